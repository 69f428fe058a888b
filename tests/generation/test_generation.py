"""Segments: lengths, exact hand-over of the overlap, determinism, and options."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from arlon_ray.bundle import load_bundle
from arlon_ray.generation import (
    ArPlanner,
    ChangingText,
    DiTRenderer,
    HandOver,
    VideoGenerator,
    default_options,
    given_clip,
    given_picture,
)
from arlon_ray.generation.overlapped import Threads, in_background
from arlon_ray.generation.planning import Beginning
from arlon_ray.models.vae import to_frames, to_video
from tests.bundles import make_random_bundle


def test_a_long_video_has_its_frames_and_is_reproducible(generator: VideoGenerator) -> None:
    prompts = ["a red circle moves right", "a blue square moves up", "a blue square rests"]
    first, second = (list(generator.generate(prompts, seed=3)) for _ in range(2))
    assert [len(part) for part in first] == [34, 17, 17]
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    other = list(generator.generate(prompts, seed=4))
    assert not np.array_equal(first[0], other[0])


def test_a_video_is_the_beginning_of_a_longer_one(generator: VideoGenerator) -> None:
    """What is done does not depend on what follows: segments can leave as soon as they are there."""
    short, long = list(generator.generate(["a"] * 2, 1)), list(generator.generate(["a", "a", "b"], 1))
    assert all(np.array_equal(a, b) for a, b in zip(short, long[:2], strict=True))


def test_plans_carry_the_overlap_and_follow_the_prompt(generator: VideoGenerator) -> None:
    planner: ArPlanner = generator.planner
    # random weights hardly tell texts apart: strong guidance makes small differences count
    options = default_options(generator.bundle.config.sampling, ar_guidance_scale=1000.0)
    plans = list(planner.plan(["a red circle"] * 5, 0, options))
    assert all(plan.tokens.shape == (10, 4, 4) and plan.tokens.dtype == np.int32 for plan in plans)
    for before, after in pairwise(plans):
        assert np.array_equal(before.tokens[5:], after.tokens[:5])
    changed = list(planner.plan(["a red circle", "a red circle", "a blue square falls", "x", "x"], 0, options))
    assert np.array_equal(plans[1].tokens, changed[1].tokens)
    assert not np.array_equal(plans[2].tokens, changed[2].tokens)


def test_what_a_prompt_began_with_is_not_forgotten(tmp_path: Path) -> None:
    """With a sink a plan depends on it, behind its window too; up to there, and for the prompt before, it does not."""
    plans, prompts = {}, ["a"] * 8 + ["b"] * 8
    for sink in (0, 1):
        planner = ArPlanner(load_bundle(make_random_bundle(tmp_path / str(sink), f"ar.sink_groups={sink}")))
        options = default_options(planner.config.sampling, ar_guidance_scale=1.0, top_k=1)
        plans[sink] = [plan.tokens for plan in planner.plan(prompts, 0, options)]
        tokens = torch.from_numpy(np.concatenate([plans[sink][0], *(plan[5:] for plan in plans[sink][1:])])).long()
        # segments of two groups, each of which adds one; the window holds three
        for start, in_sight in ((0, 2), (8, 11)):
            first = planner.beginning(torch.from_numpy(plans[sink][start]).long(), start)
            assert torch.equal(first.tokens, tokens[5 * first.group :][: 5 * sink])
            other = Beginning((first.tokens + 1) % 8, first.group)
            for index in (in_sight, in_sight + 1, start + 7):
                one, changed = (
                    planner.go_on(tokens[: 5 * (index + 1)], prompts[index : index + 1], 0, index, options, begin=begin)
                    for begin in (first, other)
                )
                assert np.array_equal(one[-10:].numpy(), plans[sink][index])
                assert torch.equal(one, changed) == (not sink or index == in_sight)
    same = [np.array_equal(ours, theirs) for ours, theirs in zip(*plans.values(), strict=True)]
    assert all(same[:3]) and not any(same[4:8])


def test_the_overlap_is_seen_by_the_next_segment(generator: VideoGenerator) -> None:
    renderer: DiTRenderer = generator.renderer
    options = default_options(generator.bundle.config.sampling)
    tokens = np.zeros((10, 4, 4), np.int32)
    overlap = np.random.default_rng(0).normal(size=(8, 5, 8, 8)).astype(np.float32)
    one = renderer.render("a", tokens, overlap, 0, 1, options).latents
    two = renderer.render("a", tokens, overlap + 1, 0, 1, options).latents
    assert one.shape == (8, 5, 8, 8)
    assert np.abs(one - two).max() > 1e-4


def test_what_a_prompt_began_with_is_handed_on_as_long_as_it_lasts(tmp_path: Path) -> None:
    generator = VideoGenerator.from_bundle(make_random_bundle(tmp_path / "b", "dit.anchor_groups=1"))
    renderer, seen = generator.renderer, dict[int, np.ndarray | None]()
    plain = renderer.render

    def render(prompt: Any, tokens: Any, overlap: Any, seed: int, index: int, *more: Any, **named: Any) -> Any:
        made[index], seen[index] = plain(prompt, tokens, overlap, seed, index, *more, **named), overlap
        return made[index]

    renderer.render, made = render, dict[int, Any]()  # type: ignore[method-assign]
    prompts, options = ["a", "a", "a", "b", "b", "b"], default_options(generator.bundle.config.sampling, steps=2)
    frames = list(generator.generate(prompts, 1, options))
    assert [len(part) for part in frames] == [34, *[17] * 5] and seen[0] is None
    for index in range(1, 6):
        overlap, end = seen[index], made[index - 1].latents[:, -5:]
        assert overlap is not None and np.array_equal(overlap[:, -5:], end)
        if index == 3:  # another prompt
            assert overlap.shape[1] == 5
        else:
            assert np.array_equal(overlap[:, :5], made[0 if index < 3 else 3].latents[:, :5])
    # it is seen, and is no part of what comes out; a DiT that was not trained on it, the baseline's too, does without
    tokens, overlap = np.zeros((10, 4, 4), np.int32), seen[2]
    assert overlap is not None
    one, other = (
        plain("a", tokens, each, 0, 2, options).latents
        for each in (overlap, overlap + (np.arange(10) < 5)[:, None, None])
    )
    assert one.shape == other.shape == (8, 5, 8, 8) and np.abs(one - other).max() > 1e-4
    renderer.dit.config = renderer.dit.config.model_copy(update={"anchor_groups": 0})
    one, other = (plain("a", tokens, each, 0, 2, options).latents for each in (overlap, overlap[:, 5:]))
    assert np.array_equal(one, other)


def test_what_a_video_starts_from_is_its_anchor() -> None:
    hand_over, start, made = HandOver(5, 5, "aab"), np.zeros((1, 1, 1, 1)), np.ones((1, 9, 1, 1))
    handed = hand_over.after(start, made, 0)
    assert handed[0, :, 0, 0].tolist() == [0, 1, 1, 1, 1] + [1] * 5
    later = hand_over.after(hand_over.taken(handed, 1), 2 * made[:, :5], 1)
    assert later[0, :, 0, 0].tolist() == [0, 1, 1, 1, 1] + [2] * 5
    changed = hand_over.after(hand_over.taken(later, 2), 3 * made[:, :5], 2)
    assert changed[0, :, 0, 0].tolist() == [3] * 10


def test_sampling_can_start_from_the_latent_of_the_tokens(generator: VideoGenerator) -> None:
    renderer, tokens = generator.renderer, np.full((10, 4, 4), 3, np.int32)
    sampling = generator.bundle.config.sampling
    coarse = generator.bundle.codec.decode(torch.from_numpy(tokens)[None].long(), (8, 8))[0].numpy()
    far, near = (
        renderer.render("a", tokens, None, 0, 0, default_options(sampling, start=start, steps=1)).latents
        for start in (1.0, 1e-4)
    )
    assert np.abs(near - coarse).mean() < 0.1 * np.abs(far - coarse).mean()
    with pytest.raises(ValueError, match="no tokens to start from"):
        renderer.render("a", None, None, 0, 0, default_options(sampling, start=0.5, baseline=True))


def test_every_guidance_scale_of_one_is_free_and_others_change_the_video(generator: VideoGenerator) -> None:
    sampling = generator.bundle.config.sampling
    tokens = np.arange(160, dtype=np.int32).reshape(10, 4, 4) % 32

    def render(**changes: object) -> np.ndarray:
        return generator.renderer.render("a", tokens, None, 0, 0, default_options(sampling, **changes)).latents

    plain = render(guidance_scale=1.0, token_guidance_scale=1.0)
    assert np.abs(plain - render(guidance_scale=3.0, token_guidance_scale=1.0)).max() > 1e-4
    assert np.abs(plain - render(guidance_scale=1.0, token_guidance_scale=3.0)).max() > 1e-4
    assert np.abs(plain - render(guidance_scale=1.0, token_guidance_scale=1.0, baseline=True)).max() > 1e-4


def test_text_that_goes_on_is_guided_less(generator: VideoGenerator, monkeypatch: pytest.MonkeyPatch) -> None:
    scales: list[float] = []
    render = generator.renderer.render

    def told(prompt: Any, tokens: Any, overlap: Any, seed: int, index: int, options: Any, **named: Any) -> Any:
        scales.append(options.guidance_scale)
        return render(prompt, tokens, overlap, seed, index, options, **named)

    monkeypatch.setattr(generator.renderer, "render", told)
    half = tuple(float(i < 5) for i in range(10))
    between = ChangingText(("a", "b"), (half, tuple(1 - share for share in half)))

    def video(share: float) -> list[np.ndarray]:
        options = default_options(generator.bundle.config.sampling, guidance_scale=3.0, continued_guidance=share)
        return list(generator.generate(["a", "a", between, "b", "b"], 1, options))

    whole, none, _ = video(1.0), video(0.0), video(0.25)
    assert scales == [3.0] * 5 + [3.0, 1.0, 3.0, 3.0, 1.0] + [3.0, 1.5, 3.0, 3.0, 1.5]
    assert np.array_equal(whole[0], none[0]) and not np.array_equal(whole[1], none[1])
    options = default_options(
        generator.bundle.config.sampling, continued_guidance=0.0, guidance_scale=3.0, baseline=True
    )
    scales.clear()
    list(generator.generate(["a", "a"], 1, options))
    assert scales == [3.0, 3.0]


def test_rendering_stops_between_steps(generator: VideoGenerator) -> None:
    steps = []

    def stop(step: int) -> None:
        steps.append(step)
        if step == 1:
            raise InterruptedError

    options = default_options(generator.bundle.config.sampling, steps=5)
    with pytest.raises(InterruptedError):
        generator.renderer.render("a", np.zeros((10, 4, 4), np.int32), None, 0, 0, options, stop)
    assert steps == [0, 1]


def test_a_picture_becomes_the_first_frame_and_steers_the_plan(generator: VideoGenerator) -> None:
    bundle, options = generator.bundle, default_options(generator.bundle.config.sampling)
    frame = np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)
    given = given_picture(bundle, frame)
    assert given.latents.shape == (8, 1, 8, 8) and given.shown
    parts = list(generator.generate(["a", "b"], 1, options, given))
    assert [len(part) for part in parts] == [34, 17]
    # latents of the first frame are the picture's, exactly; so its frame is what the VAE makes of the picture alone
    alone = bundle.vae.decode(bundle.vae.encode(to_video(frame[None, None])))
    assert np.abs(parts[0][0].astype(int) - to_frames(alone)[0, 0].astype(int)).max() <= 1
    plan = next(generator.planner.plan(["a"], 1, options, given=given.latents)).tokens
    free = next(generator.planner.plan(["a"], 1, options)).tokens
    assert plan.shape == free.shape and not np.array_equal(plan, free)
    repeated = torch.from_numpy(np.repeat(given.latents, 5, axis=1))[None]
    assert np.array_equal(plan[0], bundle.codec.encode(repeated)[0, 0].numpy())


def test_a_video_goes_on_from_a_clip(generator: VideoGenerator) -> None:
    """A clip's last group stands where the segment before would: the same latents and tokens, the same continuation."""
    bundle, options = generator.bundle, default_options(generator.bundle.config.sampling)
    frames = np.random.default_rng(1).integers(0, 255, (40, 64, 64, 3), np.uint8)
    given = given_clip(bundle, frames)
    assert given.latents.shape == (8, 5, 8, 8) and not given.shown
    assert np.allclose(given.latents, bundle.vae.encode(to_video(frames[None, -17:]))[0].numpy(), atol=1e-5)
    parts = list(generator.generate(["a", "b"], 1, options, given))
    assert [len(part) for part in parts] == [17, 17]
    plan = next(generator.planner.plan(["a"], 1, options, given=given.latents)).tokens
    assert np.array_equal(plan[:5], bundle.codec.encode(torch.from_numpy(given.latents)[None])[0].numpy())
    with pytest.raises(ValueError, match="has 16 frames at 16 a second: expected at least 17"):
        given_clip(bundle, frames[:16])
    with pytest.raises(ValueError, match=r"frames of uint8 \[17, 32, 64, 3\]"):
        given_clip(bundle, frames[:, :32])


def test_what_does_not_fit_is_refused(generator: VideoGenerator) -> None:
    options = default_options(generator.bundle.config.sampling)
    render = generator.renderer.render
    with pytest.raises(ValueError, match="tokens of shape"):
        render("a", np.zeros((5, 4, 4), np.int32), None, 0, 0, options)
    with pytest.raises(ValueError, match="overlap of shape"):
        render("a", np.zeros((10, 4, 4), np.int32), np.zeros((8, 6, 8, 8), np.float32), 0, 1, options)
    with pytest.raises(ValueError, match="needs the AR's plan"):
        render("a", None, None, 0, 0, options)


def test_frames_whose_latents_no_patch_divides(tmp_path: Path) -> None:
    """72×88 pixels are 9×11 latents: tokens of codec and DiT reach beyond the edge, and what is beyond is cut off."""
    generator = VideoGenerator.from_bundle(
        make_random_bundle(tmp_path / "b", "video.height=72", "video.width=88", "vqvae.fine.patch=[5,4,4]")
    )
    plan = next(generator.planner.plan(["a"], 0, default_options(generator.bundle.config.sampling)))
    assert plan.tokens.shape == (2, 3, 3)
    parts = list(generator.generate(["a red circle", "b"], seed=1))
    assert [part.shape for part in parts] == [(34, 72, 88, 3), (17, 72, 88, 3)]


def test_the_last_segment_leads_up_to_a_clip(generator: VideoGenerator) -> None:
    bundle = generator.bundle
    options = default_options(bundle.config.sampling, steps=2)
    clip = np.linspace(0, 255, 17).astype(np.uint8)[:, None, None, None] * np.ones((1, 64, 64, 3), np.uint8)
    until = given_clip(bundle, clip)
    free, led = (np.concatenate(list(generator.generate(["a", "b"], 1, options, until=end))) for end in (None, until))
    assert free.shape == led.shape and np.array_equal(free[:34], led[:34]) and not np.array_equal(free[34:], led[34:])
    other = given_clip(bundle, 255 - clip)
    assert not np.array_equal(
        led[34:], np.concatenate(list(generator.generate(["a", "b"], 1, options, until=other)))[34:]
    )
    with pytest.raises(ValueError, match="whole groups of 5"):
        tokens = np.zeros((10, 4, 4), np.int32)
        generator.renderer.render("a", tokens, None, 0, 0, options, after=until.latents[:, :3])


@pytest.mark.parametrize(
    "overrides", [(), ("ar.sink_groups=1",), ("segment.groups=3", "segment.overlap_groups=2", "ar.sink_groups=2")]
)
def test_a_plan_goes_on_behind_what_is_planned(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    """To the last bit, wherever it stopped: with prompts that change, a start, and a first group kept in sight."""
    generator = VideoGenerator.from_bundle(make_random_bundle(tmp_path / "b", *overrides))
    planner, options = generator.planner, default_options(generator.bundle.config.sampling, ar_guidance_scale=20.0)
    frames = generator.bundle.config.segment.latents
    half = tuple(float(frame < frames - 3) for frame in range(frames))
    changing = ChangingText(("a", "b"), (half, tuple(1 - share for share in half)))
    given = np.random.default_rng(2).normal(size=(8, 2, 8, 8)).astype(np.float32)
    for prompts, start in ((["a"] * 4 + [changing, "b", "b", "b", "c"], None), (["a"] * 6, given)):
        whole = [plan.tokens for plan in planner.plan(prompts, 3, options, given=start)]
        for stopped in (1, 4, 6, len(prompts)):
            rest = list(planner.plan(prompts, 3, options, given=start, planned=whole[:stopped]))
            assert [plan.index for plan in rest] == list(range(stopped, len(prompts)))
            assert all(np.array_equal(plan.tokens, whole[plan.index]) for plan in rest)
        other = [*whole[:3], (whole[3] + 1) % 8]
        assert not np.array_equal(next(planner.plan(prompts, 3, options, planned=other)).tokens, whole[4])
    with pytest.raises(ValueError, match="tokens of 9 segments for a video of 2"):
        next(planner.plan(["a"] * 2, 0, options, planned=[whole[0]] * 9))
    with pytest.raises(ValueError, match="of segment 1: expected"):
        next(planner.plan(["a"] * 3, 0, options, planned=[whole[0], whole[1][1:]]))


def test_stages_at_work_together_share_the_threads_and_give_them_back(tmp_path: Path) -> None:
    """With all threads for each of them they wait for one another: on two cores a third longer."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(8)
        assert Threads.shared(torch.device("cpu")) == (2, 4, 2) and Threads.shared(torch.device("cuda")) == (None,) * 3
        torch.set_num_threads(2)
        assert Threads.shared(torch.device("cpu")) == (1, 1, 1)
        seen: list[int] = []

        def made() -> Iterator[int]:
            seen.append(torch.get_num_threads())
            yield 1

        assert list(in_background(made(), 1, threads=1)) == [1] and seen == [1]
        generator = VideoGenerator.from_bundle(make_random_bundle(tmp_path / "bundle"))
        frames = generator.generate(["a red circle moves"] * 2, 0)
        next(frames)
        assert torch.get_num_threads() == 2
        frames.close()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
