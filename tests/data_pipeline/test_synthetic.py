"""Rendered scenes: deterministic, true to their captions, and still so after H.264."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import av
import numpy as np
import pytest

from arlon_ray.config import VideoConfig
from data_pipeline.synthetic import (
    COLOURS,
    caption,
    remove_samples_from,
    render,
    sample_scene,
    write_sample,
    write_samples,
)
from data_pipeline.wording import MAX_WORDS

WORDS = {
    "left": ("left",),
    "right": ("right",),
    "up": ("up", "upward", "upwards", "rises", "rise", "rising", "top"),
    "down": ("down", "downward", "downwards", "sinks", "sink", "sinking", "falls", "bottom"),
    "still": ("still", "not", "place", "motionless"),
}


def test_equal_seed_equal_scene_and_picture() -> None:
    assert sample_scene(5) == sample_scene(5)
    assert caption(sample_scene(5)) == caption(sample_scene(5))
    assert np.array_equal(render(sample_scene(5)), render(sample_scene(5)))
    assert sample_scene(5) != sample_scene(6)


def test_captions_name_what_is_seen_and_stay_short() -> None:
    texts = set()
    for seed in range(400):
        scene = sample_scene(seed)
        text = caption(scene)
        words = text.lower().rstrip(".").replace(",", "").split()
        texts.add(text)
        assert len(words) <= MAX_WORDS
        assert scene.colour in words
        assert (scene.shape if scene.count == 1 else scene.shape + "s") in words
        # "from left to right": the last of the two is the direction
        named = [word for word in words if word in ("left", "right")]
        assert any(word in words for word in WORDS[scene.direction]), text
        if scene.direction in ("left", "right"):
            assert named[-1] == scene.direction, text
    assert len(texts) > 350


def test_motion_goes_round_the_torus() -> None:
    scene = dataclasses.replace(sample_scene(1), background="dark", velocity=(1.35, 0.0), frames=68)
    frames = render(scene).astype(int)
    # after 20 frames at 1.35 everything has moved by 27 pixels exactly, over the seam too
    for start in (0, 40):
        assert np.abs(np.roll(frames[start], 27, axis=1) - frames[start + 20]).max() <= 1


@pytest.mark.parametrize("count", [1, 2])
def test_number_of_objects_is_what_the_scene_says(count: int) -> None:
    scene = next(s for s in map(sample_scene, range(200)) if s.count == count and s.shape == "circle")
    scene = dataclasses.replace(scene, background="dark")
    colour = np.array(COLOURS[scene.colour])
    area = (np.abs(render(scene)[0] - colour).max(-1) < 30).sum()
    expected = count * np.pi * scene.diameter**2 / 4
    assert 0.8 * expected < area < 1.1 * expected


def test_mp4_keeps_length_and_colours(tmp_path: Path) -> None:
    write_sample(tmp_path, 0, seed=3, video=VideoConfig(), groups=(2,))
    facts = json.loads((tmp_path / "scene_000000.json").read_text())
    scene = sample_scene(facts["seed"], (2,))
    with av.open(str(tmp_path / "scene_000000.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    truth = render(scene)
    assert frames.shape == truth.shape
    inside = np.abs(truth.astype(int) - COLOURS[scene.colour]).max(-1) < 3
    assert np.abs(frames[inside].mean(0) - COLOURS[scene.colour]).max() < 12
    assert (tmp_path / "scene_000000.txt").read_text().strip() == caption(scene) == facts["caption"]


def test_writing_again_renders_only_what_is_missing_or_different(tmp_path: Path) -> None:
    video = VideoConfig(height=32, width=32)
    assert write_samples(tmp_path, 3, 0, video, (2,)) == 3
    assert write_samples(tmp_path, 3, 0, video, (2,)) == 0
    (tmp_path / "scene_000001.mp4").unlink()
    assert write_samples(tmp_path, 3, 0, video, (2,)) == 1
    assert write_samples(tmp_path, 3, 1, video, (2,)) == 3
    assert remove_samples_from(tmp_path, 2) == 1
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["scene_000000.mp4", "scene_000001.mp4"]
    assert not list(tmp_path.glob(".*"))
