"""Scores tell what they are about, whatever the size of the picture and after H.264, and thresholds judge by them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import pytest
from numpy.typing import NDArray

from arlon_ray.config import FilterConfig
from data_pipeline import schema
from data_pipeline.scores import (
    CLIP_THRESHOLDS,
    FILE_THRESHOLDS,
    black,
    frozen,
    judge,
    measure,
    motion,
    perceptual_hash,
    sharpness,
    written,
)
from data_pipeline.synthetic import render
from data_pipeline.worlds import sample_scene
from tests.data_pipeline.inputs import write_video

Frames = NDArray[np.uint8]
SIZES = [(64, 64), (144, 256), (240, 426), (720, 1280)]
LINES = ("all our friends", "were walking home", "in light rain and", "sang about foxes", "who never slept")


def textured(seed: int, height: int, width: int) -> Frames:
    """[H,W,3]: soft blobs of many sizes, as photographs have, of luma about 50 to 200."""
    random = np.random.default_rng(seed)
    picture = np.zeros((height, width, 3), np.float32)
    for cells in (3, 6, 12, 24):
        blobs = random.normal(0, 1 / cells, (cells, cells * width // height, 3)).astype(np.float32)
        picture += cv2.resize(blobs, (width, height), interpolation=cv2.INTER_CUBIC)
    return (125 + 75 * np.tanh(2 * picture)).astype(np.uint8)


def grey(frames: Frames) -> Frames:
    return np.stack([cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames])


def coded(folder: Path, frames: Frames, crf: int) -> Frames:
    """The frames after H.264."""
    write_video(folder / "coded.mp4", frames, crf=str(crf), preset="veryfast")
    with av.open(str(folder / "coded.mp4")) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def moving(height: int, width: int, step: float, count: int = 9) -> Frames:
    """[T,H,W,3]: a texture that moves by `step` pixels a frame to the left."""
    margin = int(step * count) + 1
    picture = textured(1, height, width + margin)
    shifts = [np.array([[1, 0, -step * frame], [0, 1, 0]], np.float32) for frame in range(count)]
    return np.stack([cv2.warpAffine(picture, shift, (width, height)) for shift in shifts])


def lettered(
    picture: Frames, lines: tuple[str, ...], size: float, colour: int, font: int, edge: bool = False
) -> Frames:
    """`picture` with lines of letters that are `size` of its height, the last of them near its foot."""
    picture, height = picture.copy(), picture.shape[0]
    letter = max(6, round(size * height))
    thickness = max(1, letter // 9)
    scale = letter / cv2.getTextSize("A", font, 1, thickness)[0][1]
    top = (height + len(lines) * 2 * letter) // 2 if len(lines) > 1 else height
    for number, line in enumerate(reversed(lines)):
        at = picture.shape[1] // 12, top - (2 * number + 1) * letter
        outline = max(1, letter // 10)
        for dx, dy in ((-1, -1), (-1, 1), (1, -1), (1, 1)) if edge else ():
            shifted = at[0] + dx * outline, at[1] + dy * outline
            cv2.putText(picture, line, shifted, font, scale, (255 - colour,) * 3, thickness, cv2.LINE_AA)
        cv2.putText(picture, line, at, font, scale, (colour,) * 3, thickness, cv2.LINE_AA)
    return picture


def plain(height: int, width: int, luma: int) -> Frames:
    return np.full((height, width, 3), luma, np.uint8)


def patterns(height: int, width: int) -> dict[str, Frames]:
    """Pictures without text: noise, stripes, checks, windows, blobs."""
    x, y = np.arange(width)[None, :], np.arange(height)[:, None]
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    found = {"noise": noise, "grey noise": np.repeat(noise[..., :1], 3, axis=2)}
    for period in (4, 8, 16):
        stripes = {"upright": x + 0 * y, "level": y + 0 * x, "slanting": x + y}
        stripes["checks"] = np.where((y // (period // 2)) % 2, x, x + period // 2)
        stripes["windows"] = np.where((y // (period // 2)) % 2, x, 0)
        for name, ramp in stripes.items():
            luma = (20 + 200 * ((ramp // (period // 2)) % 2)).astype(np.uint8)
            found[f"{name} {period}"] = np.repeat(luma[..., None], 3, axis=2)
    return {**found, **{f"blobs {seed}": textured(seed, height, width) for seed in range(5)}}


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_what_has_no_text_is_hardly_written(height: int, width: int) -> None:
    shares = {name: written(picture) for name, picture in patterns(height, width).items()}
    assert {name: share for name, share in shares.items() if share > 0.01} == {}


@pytest.mark.parametrize("grade", ["simple", "rich"])
def test_rendered_scenes_are_not_written(grade: str) -> None:
    scenes = [render(sample_scene(seed, (1,), grade=grade)) for seed in range(12)]
    assert max(written(frames[8]) for frames in scenes) == 0


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_a_title_card_is_far_more_written_than_a_subtitle(height: int, width: int) -> None:
    for font in (cv2.FONT_HERSHEY_SIMPLEX, cv2.FONT_HERSHEY_COMPLEX):
        lines = tuple(line[:10] for line in LINES) if height == 64 else LINES
        cards = [
            written(lettered(plain(height, width, 255 - colour), lines, 0.08, colour, font)) for colour in (15, 240)
        ]
        under = written(lettered(textured(2, height, width), lines[1:2], 0.06, 240, font, edge=True))
        assert min(cards) > 0.07
        assert 0.01 < under < 0.6 * min(cards)


@pytest.mark.parametrize(("height", "width"), SIZES[1:])
def test_a_page_of_dense_text_is_written(height: int, width: int) -> None:
    page = lettered(plain(height, width, 235), tuple(" ".join([line] * 3) for line in LINES * 2), 0.045, 20, 0)
    assert written(page) > 0.15


@pytest.mark.parametrize("crf", [23, 35])
def test_a_still_is_frozen_after_h264_and_slow_footage_is_not(tmp_path: Path, crf: int) -> None:
    still = np.repeat(textured(3, 96, 128)[None], 24, axis=0)
    assert frozen(grey(coded(tmp_path, still, crf))) > 0.9
    assert frozen(grey(coded(tmp_path, moving(96, 128, 0.5, 24), crf))) < 0.2


def test_a_small_slow_object_is_not_frozen() -> None:
    frames = np.repeat(plain(64, 64, 60)[None], 17, axis=0)
    for number, frame in enumerate(frames):
        cv2.circle(frame, (20 + number // 2, 30), 5, (200, 40, 40), -1)
    assert frozen(grey(frames)) == 0.5  # it moves on every other frame
    assert frozen(grey(frames[:1])) == 0


def test_black_frames_are_counted_and_white_letters_on_black_are_not() -> None:
    frames = np.repeat(plain(64, 96, 12)[None], 10, axis=0)
    frames[:3] = textured(0, 64, 96)
    assert black(grey(frames)) == 0.7
    card = lettered(plain(240, 426, 0), LINES, 0.08, 240, cv2.FONT_HERSHEY_SIMPLEX)
    assert card.mean() < 25 and black(grey(card[None])) == 0


@pytest.mark.parametrize(("height", "width"), [(64, 64), (144, 256), (426, 240)])
@pytest.mark.parametrize("speed", [0.06, 0.25, 1.0])
def test_motion_is_in_shorter_sides_a_second(height: int, width: int, speed: float) -> None:
    frames = grey(moving(height, width, speed * min(height, width) / 16))
    assert motion(frames, 16) == pytest.approx(speed, rel=0.1, abs=0.005)
    assert motion(frames, 8) == pytest.approx(motion(frames, 16) / 2)
    assert motion(np.repeat(frames[:1], 5, axis=0), 16) < 0.001
    assert motion(frames[:1], 16) == 0


def test_blurred_is_less_sharp_and_size_matters_little() -> None:
    picture = grey(lettered(textured(4, 512, 512), LINES, 0.05, 240, 0)[None])[0]
    soft = [sharpness(cv2.GaussianBlur(picture, (0, 0), sigma).astype(np.uint8)) for sigma in (1, 2, 4)]
    assert sharpness(picture) > 2 * soft[0] > 4 * soft[1] > 8 * soft[2]
    larger = cv2.resize(picture, (1024, 1024), interpolation=cv2.INTER_CUBIC).astype(np.uint8)
    assert sharpness(larger) == pytest.approx(sharpness(picture), rel=0.4)


def bits(one: bytes, other: bytes) -> int:
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_count()


def test_the_hash_stays_after_coding_resizing_and_brightening_and_tells_scenes_apart(tmp_path: Path) -> None:
    clips = [moving(96, 128, 1.0), np.repeat(textured(5, 96, 128)[None], 9, axis=0)]
    clips += [render(sample_scene(seed, (1,), 96, 128)) for seed in (0, 1, 8)]
    hashes = [measure(frames, 16)["phash"] for frames in clips]
    assert {len(found) for found in hashes} == {24}
    for frames, own in zip(clips, hashes, strict=True):
        smaller = np.stack([cv2.resize(frame, (64, 48), interpolation=cv2.INTER_AREA) for frame in frames])
        brighter = np.minimum(frames.astype(int) + 8, 255).astype(np.uint8)
        changed = [coded(tmp_path, frames, 28), smaller, brighter]
        assert max(bits(own, measure(other, 16)["phash"]) for other in changed) <= 8
    others = [bits(one, other) for place, one in enumerate(hashes) for other in hashes[:place]]
    assert min(others) > 40
    # a picture turned upside down is another one
    assert bits(perceptual_hash(grey(clips[0])[0]), perceptual_hash(grey(clips[0])[0][::-1].copy())) > 16


def test_measure_has_every_score_and_text_only_if_asked() -> None:
    frames = moving(64, 64, 1.0)
    plainly, fully = measure(frames, 16), measure(frames, 16, text=True)
    assert list(plainly) == schema.SCORES.names
    assert plainly["text"] is None and fully["text"] == 0
    assert {**fully, "text": None} == plainly
    one = measure(frames[:1], 16)
    assert one["motion"] == one["frozen"] == 0 and len(one["phash"]) == 24


@pytest.mark.parametrize(
    ("name", "bound", "row", "reason"),
    [
        ("max_black", 0.5, {"black": 0.6}, schema.BLACK),
        ("max_frozen", 0.5, {"frozen": 0.6}, schema.FROZEN),
        ("min_motion", 0.1, {"motion": 0.05}, schema.LITTLE_MOTION),
        ("max_motion", 1.0, {"motion": 1.5}, schema.MUCH_MOTION),
        ("min_sharpness", 20, {"sharpness": 10.0}, schema.BLURRED),
        ("max_text", 0.1, {"text": 0.2}, schema.TEXT_HEAVY),
        ("min_duration_s", 5, {"source_duration_s": 3.0}, schema.SHORT_FILE),
        ("min_short_side", 200, {"source_height": 240, "source_width": 100}, schema.LOW_RESOLUTION),
    ],
)
def test_a_threshold_names_its_reason(name: str, bound: float, row: dict[str, Any], reason: str) -> None:
    good = {"black": 0, "frozen": 0, "motion": 0.5, "sharpness": 100, "text": None}
    whole = {**good, "source_duration_s": 9, "source_height": 480, "source_width": 640}
    thresholds = (*FILE_THRESHOLDS, *CLIP_THRESHOLDS)
    filters = FilterConfig.model_validate({name: bound})
    assert judge(whole, filters, thresholds) == ("", "")
    assert judge({**whole, **row}, FilterConfig(), thresholds) == ("", "")
    found, error = judge({**whole, **row}, filters, thresholds)
    assert found == reason and f"filters.{name}={bound:g}" in error
    kept = {**whole, **dict.fromkeys(row, bound)}
    assert judge(kept, filters, thresholds) == ("", "")  # the bound itself is kept
