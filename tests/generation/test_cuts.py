"""Cuts: where a shot ends, what of it the next one knows (nothing), and what editing makes of that."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from arlon_ray.generation import (
    ChangingText,
    Cut,
    HandOver,
    Project,
    ProjectSegment,
    Scene,
    SegmentText,
    VideoEditor,
    VideoGenerator,
    begins_shot,
    default_options,
    given_picture,
    new_frames,
    segment_options,
    storyboard,
    with_words,
)
from arlon_ray.generation.storyboard import first_of_prompt, first_of_shot, goes_on, prompts_in, words_of
from tests.bundles import make_random_bundle, small_config

OLD: list[SegmentText] = ["a red circle", "a red circle", Cut("a blue square"), "a blue square", "a green triangle"]
OTHER: list[SegmentText] = ["rain", "snow", *OLD[2:]]


@pytest.fixture(
    scope="module",
    params=[
        (),
        ("segment.groups=3", "ar.sink_groups=1", "sampling.continued_guidance=0"),
        ("segment.groups=3", "segment.overlap_groups=2"),
        ("segment.groups=4", "segment.overlap_groups=3", "dit.anchor_groups=1"),
        ("segment.groups=4", "segment.overlap_groups=2", "dit.anchor_groups=2", "ar.sink_groups=1"),
    ],
)
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VideoGenerator:
    return VideoGenerator.from_bundle(make_random_bundle(tmp_path_factory.mktemp("bundle") / "b", *request.param))


def make(
    generator: VideoGenerator, texts: list[SegmentText], folder: Path | None = None, seed: int = 3, **changes: object
) -> list[np.ndarray]:
    options = default_options(generator.bundle.config.sampling, steps=2, **changes)
    project = None if folder is None else Project.create(folder, generator.bundle.fingerprint, options)
    return list(generator.generate(texts, seed, options, project=project))


@pytest.mark.parametrize("baseline", [False, True])
def test_a_shot_knows_nothing_of_what_was_before_it(generator: VideoGenerator, baseline: bool) -> None:
    one, other = (make(generator, texts, baseline=baseline) for texts in (OLD, OTHER))
    same = [np.array_equal(a, b) for a, b in zip(one, other, strict=True)]
    assert same == [False, False, True, True, True]
    assert [len(part) for part in one] == [new_frames(generator.bundle.config, index) for index in range(5)]
    # without the cut it goes on from what there was
    flat = make(generator, [words_of(text) for text in OLD], baseline=baseline)
    assert [np.array_equal(a, b) for a, b in zip(one, flat, strict=True)] == [True, True, False, False, False]


def test_a_text_that_changes_right_behind_a_cut(generator: VideoGenerator) -> None:
    latents = generator.bundle.config.segment.latents
    half = tuple(float(i < latents - 3) for i in range(latents))
    changing = ChangingText(("a blue square", "a green triangle"), (half, tuple(1 - share for share in half)))
    one, other = (make(generator, [*texts[:2], Cut(changing), "a green triangle"]) for texts in (OLD, OTHER))
    assert [np.array_equal(a, b) for a, b in zip(one, other, strict=True)] == [False, False, True, True]


def test_a_plan_goes_on_behind_what_is_planned(generator: VideoGenerator) -> None:
    options = default_options(generator.bundle.config.sampling)
    planner = generator.planner
    assert planner is not None
    plans = [planned.tokens for planned in planner.plan(OLD, 1, options)]
    shared = planner.overlap_frames(1)
    for before, after in pairwise(plans):
        assert before.shape == after.shape and np.array_equal(before[-shared:], after[:shared])
    for known in range(1, len(plans)):
        rest = [planned.tokens for planned in planner.plan(OLD, 1, options, planned=plans[:known])]
        assert all(np.array_equal(a, b) for a, b in zip(plans[known:], rest, strict=True))


def test_a_video_from_a_picture_cuts_away_from_it(generator: VideoGenerator) -> None:
    options = default_options(generator.bundle.config.sampling, steps=2)
    starts = [given_picture(generator.bundle, np.full((64, 64, 3), grey, np.uint8)) for grey in (10, 240)]
    one, other = (list(generator.generate(OLD, 3, options, start)) for start in starts)
    assert [np.array_equal(a, b) for a, b in zip(one, other, strict=True)] == [False, False, True, True, True]


def test_each_segment_made_again_is_what_it_was(generator: VideoGenerator, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    frames = make(generator, OLD, whole)
    was = list(Project.open(whole, generator.bundle.fingerprint))
    assert [segment.text for segment in was] == OLD
    for count in range(1, len(OLD) + 1):
        folder = tmp_path / str(count)
        make(generator, OLD[:count], folder)
        project = Project.open(folder, generator.bundle.fingerprint)
        editor = VideoEditor(generator, project)
        editor.reroll(count - 1, seed=3)
        again = project.read(count - 1)
        assert again.text == OLD[count - 1] and np.array_equal(again.latents, was[count - 1].latents)
        longer = generator.generate(OLD, 3, project.options, project=project)
        assert all(np.array_equal(a, b) for a, b in zip(frames, longer, strict=True)) and len(project) == len(OLD)


def test_a_segment_made_again_before_a_cut_does_not_lead_up_to_the_next_shot(
    generator: VideoGenerator, tmp_path: Path
) -> None:
    make(generator, OLD, tmp_path / "p")
    project = Project.open(tmp_path / "p", generator.bundle.fingerprint)
    editor = VideoEditor(generator, project)
    last = project.read(1).latents
    following = project.read(2)
    project.write(2, ProjectSegment(following.text, following.seed, following.latents + 1, following.tokens))
    editor.reroll(1, seed=3)
    assert np.array_equal(project.read(1).latents, last)
    editor.reroll(2, seed=9, text="a yellow circle")
    assert project.read(2).text == Cut("a yellow circle")


@pytest.mark.parametrize("new, overlap", [(5, 15), (10, 5), (5, 10), (5, 5)])
def test_a_prompt_looks_back_on_its_own_beginning(new: int, overlap: int) -> None:
    texts: list[SegmentText] = ["a", Cut("b"), *"cccccc", Cut("c"), *"ccccc", "a", "a", "a", "a"]
    hand_over, handed = HandOver(overlap, 5, texts), None
    for index in range(len(texts)):
        taken, shot, prompt = (
            hand_over.taken(handed, index), first_of_shot(texts, index), first_of_prompt(texts, index)
        )  # fmt: skip
        end = [number for number in range(shot, index) for _ in range(overlap + new if not number else new)][-overlap:]
        whole = index > prompt and len(end) == overlap
        expected = [prompt] * 5 + end if whole else end
        assert (None if taken is None else taken[0, :, 0, 0].tolist()) == (expected or None), index
        made = np.full((1, new if index else overlap + new, 1, 1), index)
        handed = hand_over.after(taken, made, index)


def test_a_shot_is_guided_from_its_first_segment_on(generator: VideoGenerator) -> None:
    options = default_options(generator.bundle.config.sampling, guidance_scale=3.0, continued_guidance=0.5)
    same: list[SegmentText] = ["a", "a", Cut("a"), "a", Cut("a")]
    assert [segment_options(options, same, index).guidance_scale for index in range(5)] == [3, 2, 3, 2, 3]
    assert [goes_on(same, index) for index in range(5)] == [False, True, False, True, False]
    assert [begins_shot(same, index) for index in range(5)] == [True, False, True, False, True]
    assert [first_of_shot(same, index) for index in range(5)] == [0, 0, 2, 2, 4]
    assert with_words(same[2], "b") == Cut("b") and with_words("a", "b") == "b"


@pytest.mark.parametrize("overrides", [(), ("segment.groups=4", "video.fps=24"), ("segment.groups=3",)])
def test_shots_last_as_long_as_their_scenes(overrides: tuple[str, ...]) -> None:
    config, random = small_config(*overrides), np.random.default_rng(1)
    for behind in (0, 0, 0, 3):
        for _ in range(15):
            lengths = random.uniform(0.5, 7, 6)
            cuts = [bool(cut) for cut in random.integers(0, 2, 6)]
            scenes = [Scene(str(i), float(lengths[i]), cuts[i]) for i in range(6)]
            texts = storyboard(scenes, config, transition=3, behind=behind)
            at = [index for index in range(len(texts)) if isinstance(texts[index], Cut)]
            numbers = [number for number in range(6) if cuts[number] and (number or behind)]
            assert [prompts_in(texts[index])[0] for index in at] == [str(number) for number in numbers]
            shots = [0, *(index for index in at if index)]
            firsts = [0, *(number for number in numbers if number)]
            for begin, end, first, last in zip(shots, [*shots[1:], None], firsts, [*firsts[1:], None], strict=True):
                frames = sum(new_frames(config, behind + index) for index in range(len(texts))[begin:end])
                seconds = lengths[first:last].sum()
                said = {prompt for text in texts[begin:end] for prompt in prompts_in(text)}
                assert said == {str(number) for number in range(6)[first:last]}
                surplus = frames - seconds * config.video.fps
                assert -1e-3 <= surplus < new_frames(config, behind + begin) + 1


def test_texts_change_within_a_shot_where_they_would_in_a_video_of_its_own() -> None:
    config = small_config()  # 34 frames, then 17 more with each segment; 5 latents of the overlap
    shot = [Scene("a", 1.5, cut=True), Scene("b", 2.5)]
    later = storyboard([Scene("x", 17 / 16), *shot], config, transition=2)
    assert later[:1] == ["x"] and isinstance(later[1], Cut)
    apart = storyboard(shot, config, transition=2, behind=1)
    assert later[1:] == apart and apart == storyboard([Scene("y", 2, cut=True), *shot], config, transition=2)[1:]
    # 24 frames of a: a group of 17, and 7 of the next
    assert [prompts_in(words_of(text)) for text in apart] == [("a",), ("a", "b"), ("b",), ("b",)]
