"""Blending at the borders of groups: what it changes, what it leaves alone, and that it helps on real footage."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from arlon_ray.config import SamplingConfig
from arlon_ray.evaluation.joins import join_figures
from arlon_ray.generation import VideoGenerator, default_options
from arlon_ray.generation.seams import Frames, blend_seams
from arlon_ray.models.vae import load_vae, to_frames, to_video
from data_pipeline.decode import Clip
from tests.bundles import make_random_bundle

FRAMES = SamplingConfig().seam_frames
VIDEOS = Path(__file__).parents[3] / "shared" / "videos"


def moving(count: int, first: int = 0) -> Frames:
    """A textured disc that moves two pixels a frame over a textured ground."""
    random = np.random.default_rng(0)
    ground = np.kron(random.integers(60, 120, (16, 16, 3)), np.ones((4, 4, 1))).astype(np.uint8)
    y, x = np.mgrid[:64, :64]
    frames = np.stack([ground] * count)
    for t in range(count):
        disc = (y - 32) ** 2 + (x - 10 - 2 * (t + first) % 44) ** 2 < 81
        frames[t][disc] = (200, 60, 40)
    return frames


def test_a_shift_of_brightness_is_spread_and_ends_stay() -> None:
    frames = moving(34)
    frames[17:] = frames[17:] + 9
    blended = blend_seams(frames, None, FRAMES)
    behind = 17 + FRAMES
    assert np.array_equal(blended[:17], frames[:17]) and np.array_equal(blended[behind:], frames[behind:])
    jump = lambda video: float(abs(video[17].astype(float).mean() - video[16].astype(float).mean()))  # noqa: E731
    assert jump(blended) < 0.3 * jump(frames)
    steps = np.diff(blended[16 : behind + 2].astype(float).mean((1, 2, 3)))
    assert steps.max() < 2.5  # no other place gets the jump instead


def test_a_jump_of_motion_is_drawn_back_and_motion_is_not() -> None:
    """A camera that moves one pixel a frame, and jumps three more at a border."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 140, 3)).astype(np.float32)
    ground = cv2.normalize(cv2.GaussianBlur(noise, (0, 0), 3), None, 0, 255, cv2.NORM_MINMAX).astype(np.uint8)

    def pan(jump: int) -> Frames:
        return np.stack([ground[:, t + jump * (t >= 17) :][:, :64] for t in range(34)])

    def steps(frames: Frames) -> np.ndarray:
        """How far the camera goes: from where on the ground each frame fits best."""
        fine = cv2.resize(ground, None, fx=10, fy=1, interpolation=cv2.INTER_LINEAR).astype(np.float32)
        places = [fine[:, at : at + 640 : 10][:, 8:56] for at in range(0, 600)]
        best = [np.argmin([np.abs(place - frame[:, 8:56]).mean() for place in places]) / 10 for frame in frames]
        return np.diff(best)

    jumping = steps(blend_seams(pan(3), None, FRAMES))
    assert steps(pan(3))[16] > 3.5 and jumping[16] < 2 and jumping.max() < 2
    assert np.abs(steps(blend_seams(pan(0), None, FRAMES)) - 1).max() < 0.2


def test_the_frame_before_the_first_is_a_border_too() -> None:
    frames = moving(17, first=17) + 9
    whole = blend_seams(np.concatenate([moving(17), frames]), None, FRAMES)
    assert np.array_equal(blend_seams(frames, moving(17)[-1], FRAMES), whole[17:])
    assert np.array_equal(blend_seams(frames, None, FRAMES), frames)


@pytest.mark.parametrize("count", [0, 8, FRAMES, 16])
def test_a_cut_stays_a_cut(count: int) -> None:
    frames = np.concatenate([moving(17), 255 - moving(17)])
    blended = blend_seams(frames, None, count)
    assert np.abs(blended.astype(int) - frames).mean() < 1.5
    assert np.array_equal(blended[33], frames[33])


def test_segments_are_blended_as_one_video(tmp_path: Path) -> None:
    generator = VideoGenerator.from_bundle(make_random_bundle(tmp_path / "b"))
    sampling = generator.bundle.config.sampling
    plain, blended = (
        np.concatenate(list(generator.generate(["a", "b", "c"], 1, default_options(sampling, seam_frames=count))))
        for count in (0, FRAMES)
    )
    assert np.array_equal(blended, blend_seams(plain, None, FRAMES)) and not np.array_equal(plain, blended)


@pytest.mark.skipif(not VIDEOS.is_dir(), reason="the real clips are not part of the repository")
def test_nothing_shows_on_real_footage() -> None:
    vae = load_vae("weights/tiny/vae")
    clip = Clip(str(VIDEOS / "bikes.mp4"), 128, 160, 16.0)
    true = clip.read(0, min(clip.frames // 17 * 17, 68))
    decoded = to_frames(vae.decode(vae.encode(to_video(true[None]))))[0]
    blended, borders = blend_seams(decoded, None, FRAMES), range(17, len(true), 17)
    before, after = (join_figures(video, list(borders))["join_difference"] for video in (decoded, blended))
    assert before > 1.2 and after < 1.1
    shorter = blend_seams(decoded, None, 8)
    error = [float(np.square(video.astype(float) - true).mean()) for video in (decoded, shorter, blended)]
    # the price, more with the frames: what is drawn back is not where it was
    assert error[1] < 1.25 * error[0] and error[2] < 1.4 * error[0]
