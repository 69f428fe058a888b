"""Rendered scenes of both grades: deterministic, true to their captions, and still so after H.264."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from itertools import islice
from pathlib import Path

import av
import numpy as np
import pytest

from arlon_ray.config import Config, ConfigError, VideoConfig, load_config
from arlon_ray.evaluation.world import ACTIONS, COLOURS, RELATIONS
from arlon_ray.models.text import load_token_counter
from data_pipeline.sources import read_caption
from data_pipeline.synthetic import remove_samples_from, render, render_shot, write_sample, write_samples
from data_pipeline.wording import MAX_WORDS
from data_pipeline.worlds import (
    HELD_OUT,
    caption,
    exchanged,
    held_out_scenes,
    sample_scene,
    shot_captions,
    training_seed,
    turned,
)

WORDS = {
    "left": ("left",),
    "right": ("right",),
    "up": ("up", "upward", "upwards", "rises", "rise", "rising", "top"),
    "down": ("down", "downward", "downwards", "sinks", "sink", "sinking", "falls", "fall", "falling", "bottom"),
    "still": ("still", "not", "place", "motionless"),
}
GRADES = ("simple", "rich")


@pytest.mark.parametrize("grade", GRADES)
def test_equal_seed_equal_scene_and_picture(grade: str) -> None:
    one, same, other = (sample_scene(seed, grade=grade) for seed in (5, 5, 6))
    assert one == same and caption(one) == caption(same) and one != other
    assert np.array_equal(render(one), render(same))
    with pytest.raises(ValueError, match="grade 'plain': expected one of simple, rich"):
        sample_scene(5, grade="plain")


def test_simple_captions_name_what_is_seen_and_fit_the_text_encoder() -> None:
    count, limit = load_token_counter(load_config("tiny").text), load_config("tiny").text.max_tokens
    texts = set()
    for seed in range(400):
        (shot,) = sample_scene(seed).shots
        text = caption(sample_scene(seed))
        words = text.lower().rstrip(".").replace(",", "").replace(":", "").split()
        texts.add(text)
        assert len(words) <= MAX_WORDS and count(text) <= limit
        pair = len(shot.things) == 2 and shot.relation is None
        for thing in shot.things:
            assert thing.colour in words and (f"{thing.shape}s" if pair else thing.shape) in words
        assert any(word in words for word in WORDS[shot.things[0].direction]), text
        # "from left to right", and behind "to the left of": the last of them is the direction
        named = [word for word in words if word in ("left", "right")]
        if shot.things[0].direction in ("left", "right"):
            assert named[-1] == shot.things[0].direction, text
    assert len(texts) > 350


def test_a_relation_is_worded_from_either_side() -> None:
    for seed in range(300):
        (shot,) = sample_scene(seed).shots
        if shot.relation is None:
            continue
        text = caption(sample_scene(seed)).lower()
        first, second = (text.index(f"{thing.colour} {thing.shape}") for thing in shot.things)
        between = text[min(first, second) : max(first, second)]
        inverse = any(word in between for word in ("right of", "below", "under"))
        assert inverse == (second < first), text


@pytest.mark.parametrize("grade", GRADES)
def test_related_objects_start_where_the_relation_says_whole_in_the_picture(grade: str) -> None:
    seen = set()
    for seed in range(200):
        for shot in sample_scene(seed, grade=grade).shots:
            if shot.relation is None:
                continue
            seen.add(shot.relation)
            axis = 0 if shot.relation == "left of" else 1
            first, second = (thing.start[axis] for thing in shot.things[:2])
            edge = shot.things[0].diameter / 2
            assert edge <= first and second <= 64 - edge, shot
            assert 24.0 <= second - first <= 28.0, shot
    assert seen == {"left of", "above"}


def test_the_opposite_of_a_relation_says_the_same_words_of_the_other_object() -> None:
    for scene in filter(lambda scene: scene.shots[0].relation, map(sample_scene, range(100))):
        text, other = caption(scene).lower(), caption(exchanged(scene)).lower()
        assert text != other and sorted(re.findall("[a-z]+", text)) == sorted(re.findall("[a-z]+", other))
        assert exchanged(exchanged(scene)) == scene
    alone = next(scene for scene in map(sample_scene, range(100)) if scene.shots[0].relation is None)
    assert exchanged(alone) == alone


def test_the_rich_grade_has_all_that_it_names() -> None:
    scenes = [sample_scene(seed, (2, 4), grade="rich") for seed in range(300)]
    shots = [shot for scene in scenes for shot in scene.shots]
    assert {thing.action for shot in shots for thing in shot.things} == set(ACTIONS)
    assert {shot.relation for shot in shots} == set(RELATIONS) and {len(shot.things) for shot in shots} == {2, 3}
    assert {shot.background for shot in shots} == {"stripes", "checks", "clouds"} and len({s.pan for s in shots}) == 5
    lengths = Counter(len(scene.shots) for scene in scenes)
    assert lengths[2] > 40 and all(shot.frames % 17 == 0 for shot in shots)
    for scene in scenes:
        parts = shot_captions(scene)
        assert len(parts) == len(scene.shots) and all(
            part.rstrip(".").lower() in caption(scene).lower() for part in parts
        )
        for shot, text in zip(scene.shots, parts, strict=True):
            assert all(f"the {thing.colour} one is" in text for thing in shot.things)
            assert ("camera" in text) == (shot.pan != "still")


def test_motion_goes_round_the_torus_and_the_camera_moves_all() -> None:
    shot = next(s for seed in range(50) for s in sample_scene(seed).shots if len(s.things) == 1)
    thing = dataclasses.replace(shot.things[0], action="move", direction="right", speed="fast")
    frames = render_shot(dataclasses.replace(shot, things=(thing,), background="dark", frames=68), 64, 64).astype(int)
    # after 20 frames at 1.35 everything has moved by 27 pixels exactly, over the seam too
    for start in (0, 40):
        assert np.abs(np.roll(frames[start], 27, axis=1) - frames[start + 20]).max() <= 1
    still = dataclasses.replace(thing, action="still", direction="still")
    panned = dataclasses.replace(shot, things=(still,), background="clouds", pan="left", frames=41)
    frames = render_shot(panned, 64, 64).astype(int)
    assert np.abs(np.roll(frames[0], 36, axis=1) - frames[40]).max() <= 1


@pytest.mark.parametrize("count", [1, 2])
def test_number_of_objects_is_what_the_scene_says(count: int) -> None:
    shots = (sample_scene(seed).shots[0] for seed in range(300))
    shot = next(s for s in shots if len(s.things) == count and s.relation is None and s.things[0].shape == "circle")
    thing = shot.things[0]
    picture = render_shot(dataclasses.replace(shot, background="dark"), 64, 64)[0]
    area = (np.abs(picture - np.array(COLOURS[thing.colour])).max(-1) < 30).sum()
    expected = count * np.pi * thing.diameter**2 / 4
    assert 0.8 * expected < area < 1.1 * expected


def test_no_seed_of_a_training_set_reaches_the_scenes_that_are_held_out() -> None:
    config, most = Config(), 10**9 - 1
    held_out = {scene.seed for use in HELD_OUT for scene in islice(held_out_scenes(config, use), 50)}
    assert len(held_out) == 50 * len(HELD_OUT)
    assert training_seed(most, 1_000_000) < min(held_out)
    with pytest.raises(ValueError, match="held out"):
        training_seed(5 * most, 0)


@pytest.mark.parametrize("grade", GRADES)
def test_mp4_keeps_length_and_colours(tmp_path: Path, grade: str) -> None:
    write_sample(tmp_path, 0, seed=3, video=VideoConfig(), groups=(2,), grade=grade)
    facts = json.loads((tmp_path / "scene_000000.json").read_text())
    scene = sample_scene(facts["seed"], (2,), grade=grade)
    assert facts["shots"][0]["things"][0]["colour"] == scene.shots[0].things[0].colour
    with av.open(str(tmp_path / "scene_000000.mp4")) as container:
        assert container.streams.video[0].codec_context.name == "h264"
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    truth = render(scene)
    assert frames.shape == truth.shape
    colour = COLOURS[scene.shots[-1].things[-1].colour]
    inside = np.abs(truth.astype(int) - colour).max(-1) < 3
    assert np.abs(np.median(frames[inside], axis=0) - colour).max() < 12
    assert (tmp_path / "scene_000000.txt").read_text().strip() == caption(scene) == facts["caption"]
    assert facts["shot_captions"] == shot_captions(scene)


def test_writing_again_renders_only_what_is_missing_or_different(tmp_path: Path) -> None:
    video = VideoConfig(height=32, width=32)
    assert write_samples(tmp_path, 3, 0, video, (2,)) == 3
    assert write_samples(tmp_path, 3, 0, video, (2,)) == 0
    (tmp_path / "scene_000001.mp4").unlink()
    assert write_samples(tmp_path, 3, 0, video, (2,)) == 1
    assert write_samples(tmp_path, 3, 1, video, (2,)) == 3
    assert write_samples(tmp_path, 3, 1, video, (2,), "rich") == 3
    assert remove_samples_from(tmp_path, 2) == 1
    assert sorted(path.name for path in tmp_path.glob("*.mp4")) == ["scene_000000.mp4", "scene_000001.mp4"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("grade", GRADES)
def test_a_scene_turned_round_keeps_its_wording(grade: str) -> None:
    for seed in range(30):
        scene = sample_scene(seed, grade=grade)
        back = turned(scene)
        assert turned(back) == scene
        moves = any(t.direction in ("left", "right", "up", "down") for shot in scene.shots for t in shot.things)
        assert (back != scene) == moves
        if grade == "simple":
            assert (caption(back) != caption(scene)) == moves
            assert len(caption(back).split()) == len(caption(scene).split())


def test_what_changes_goes_on_from_where_it_is_or_is_cut() -> None:
    kinds: Counter[str] = Counter()
    for seed in range(60):
        scene = sample_scene(seed, (4, 6), grade="changing")
        before, after = scene.shots
        assert before.frames % 17 in (0, 1, 5, 9, 13) and min(before.frames, after.frames) >= 17
        assert shot_captions(scene) != [shot_captions(scene)[0]] * 2
        if before.background_phase != after.background_phase:
            kinds["cut"] += 1
            continue
        (old, *_), (new, *_) = before.things, after.things
        assert (new.shape, new.colour, new.diameter) == (old.shape, old.colour, old.diameter)
        assert new.direction != old.direction
        kinds[f"{old.direction} {new.direction}"] += 1
        # the first frame of the second shot is what the first would have shown next
        further = render_shot(dataclasses.replace(before, frames=before.frames + 1), 64, 64)
        assert np.abs(further[-1].astype(int) - render(scene)[before.frames]).max() <= 1
    assert kinds["cut"] in range(12, 48) and kinds["left right"] and kinds["up down"]
    with pytest.raises(ValueError, match="17 frames: the changing grade needs 34"):
        sample_scene(0, (1,), grade="changing")
    with pytest.raises(ConfigError, match="evaluate_changes"):
        next(held_out_scenes(load_config("tiny", ["data.sample_grade=changing"]), "measure"))


def test_a_caption_that_changes_is_written_with_its_times(tmp_path: Path) -> None:
    video = load_config("tiny").video
    write_sample(tmp_path, 0, 5, video, (4,))  # a simple one was there
    assert write_sample(tmp_path, 0, 5, video, (4,), "changing")
    assert not write_sample(tmp_path, 0, 5, video, (4,), "changing")
    scene = sample_scene(training_seed(5, 0), (4,), grade="changing")
    found = read_caption(str(tmp_path / "scene_000000.mp4"))
    assert [part.text for part in found.parts] == shot_captions(scene)
    assert [part.start_s * video.fps for part in found.parts] == [0, scene.shots[0].frames]


def test_scenes_of_several_segments_begin_alike() -> None:
    config = load_config("tiny")
    short, long = (next(held_out_scenes(config, "measure", segments)) for segments in (1, 3))
    assert short.frames == 34 and long.frames == 68
    assert short.shots[0].things == long.shots[0].things
