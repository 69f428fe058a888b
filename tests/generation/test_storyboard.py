"""Which text belongs to which frames: whole segments, changes within them, blends; and what planner and renderer make
of a text that changes."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from arlon_ray.config import GROUP_LATENTS, Config
from arlon_ray.generation import (
    ChangingText,
    Cut,
    Scene,
    SegmentText,
    VideoGenerator,
    default_options,
    new_frames,
    playing_time,
    prompt_of,
    segments_for,
    spread,
    storyboard,
)
from arlon_ray.generation.storyboard import prompts_in
from tests.bundles import small_config


def shares(texts: list[SegmentText], config: Config, prompts: list[str]) -> np.ndarray:
    """[prompt, latent frame of the video]: what is rendered anew by each segment, one behind the other."""
    parts = []
    for index, text in enumerate(texts):
        part = np.zeros((len(prompts), config.segment.latents))
        if isinstance(text, str):
            part[prompts.index(text)] = 1
        else:
            for prompt, share in zip(text.prompts, text.shares, strict=True):
                part[prompts.index(prompt)] = share
        parts.append(part[:, config.segment.overlap_latents if index else 0 :])
    return np.concatenate(parts, 1)


def frame_of(latent: int) -> int:
    """The first frame that a latent stands for."""
    group, rest = divmod(latent, GROUP_LATENTS)
    return 17 * group + (1 + 4 * (rest - 1) if rest else 0)


@pytest.mark.parametrize(
    "overrides", [(), ("segment.groups=4", "video.fps=24"), ("segment.groups=3", "segment.overlap_groups=2")]
)
def test_every_prompt_begins_and_ends_within_two_frames_of_its_time(overrides: tuple[str, ...]) -> None:
    config, random = small_config(*overrides), np.random.default_rng(0)
    for _ in range(50):
        lengths = random.uniform(0.5, 9, random.integers(1, 7)).tolist()
        prompts = [f"prompt {number}" for number in range(len(lengths))]
        scenes = [Scene(prompt, length) for prompt, length in zip(prompts, lengths, strict=True)]
        found = shares(storyboard(scenes, config), config, prompts)
        assert np.array_equal(found.sum(0), np.ones(found.shape[1])) and set(found.flatten()) <= {0.0, 1.0}
        ends = np.cumsum(lengths) * config.video.fps
        begins = [frame_of(int(row.argmax())) for row in found]
        assert begins[0] == 0 and all(abs(a - b) <= 2 for a, b in zip(begins[1:], ends, strict=False))
        # the last prompt goes on to the end of the last segment, and no segment is there for nothing
        frames = frame_of(found.shape[1])
        new = 17 * (config.segment.groups - config.segment.overlap_groups)
        assert found[-1, -1] == 1 and ends[-1] <= frames < max(17 * config.segment.groups, ends[-1] + new) + 1


def test_whole_segments_are_said_by_one_prompt() -> None:
    config = small_config()  # 34 frames, then 17 more with each segment
    scenes = [Scene("a", 34 / 16), Scene("b", 17 / 16), Scene("c", 34 / 16)]
    assert storyboard(scenes, config) == ["a", "b", "c", "c"]


def test_a_transition_comes_in_latent_by_latent() -> None:
    config = small_config()
    texts = storyboard([Scene("a", 34 / 16), Scene("b", 4)], config, transition=4)
    found = shares(texts, config, ["a", "b"])
    assert found[1, :10].max() == 0 and found[1, 10:16].tolist() == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert found.sum(0) == pytest.approx(1)
    assert isinstance(texts[1], ChangingText) and texts[2:] == ["b"] * (len(texts) - 2)
    assert prompt_of(texts[1], 5) == "b" and prompt_of("a") == "a"
    # longer than the scene: what it passes through sums to one
    passed = storyboard([Scene("a", 2), Scene("b", 0.5), Scene("c", 6)], config, transition=9)
    assert shares(passed, config, ["a", "b", "c"]).sum(0) == pytest.approx(1)


@pytest.mark.parametrize(
    ("scenes", "expected"),
    [
        ([], "no scenes"),
        ([Scene("a", 0)], "scene 1 lasts 0 seconds: expected a number above 0"),
        ([Scene("a", 1), Scene("b", -2)], "scene 2 lasts -2 seconds"),
        ([Scene("a", 1), Scene("b")], "scene 2 lasts None seconds"),
        ([Scene("a", float("nan"))], "scene 1 lasts nan seconds"),
        ([Scene("a", 1), Scene("b", 0.01), Scene("c", 1)], r"scene 2 lasts 0\.01 seconds: expected at least 0\.25"),
    ],
)
def test_durations_that_make_no_sense_are_refused(scenes: list[Scene], expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        storyboard(scenes, small_config())


def test_hundreds_of_prompts() -> None:
    scenes = [Scene(f"prompt {number}", 1.3) for number in range(600)]
    begin = time.perf_counter()
    texts = storyboard(scenes, small_config(), transition=3)
    assert time.perf_counter() - begin < 5
    said = list(dict.fromkeys(prompt for text in texts for prompt in prompts_in(text)))
    assert said == [scene.prompt for scene in scenes]


def test_tokens_follow_the_prompt_of_their_frame(generator: VideoGenerator) -> None:
    options = default_options(generator.bundle.config.sampling, ar_guidance_scale=1000.0)

    def plan(*texts: SegmentText) -> list[np.ndarray]:
        return [planned.tokens for planned in generator.planner.plan(texts, 0, options)]

    half = tuple(float(latent < 6) for latent in range(10))
    changing = ChangingText(("a red circle", "a blue square falls"), (half, tuple(1 - share for share in half)))
    (one,), (both, after) = plan("a red circle"), plan(changing, "a blue square falls")
    assert np.array_equal(one[:6], both[:6]) and not np.array_equal(one[6:], both[6:])
    assert np.array_equal(both[5:], after[:5])
    # later segments: the text changes behind the overlap
    later = plan("a red circle", changing)[1]
    assert np.array_equal(later[:6], plan("a red circle", "a red circle")[1][:6])


def test_where_the_ar_looks_at_another_prompts_tokens_it_is_guided_away_from_that(
    generator: VideoGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    planner, heard = generator.planner, list[str]()

    class Listening:
        def encode(self, captions: Sequence[str]) -> object:
            heard.extend(captions)
            return generator.bundle.text.encode(captions)

    monkeypatch.setattr(planner, "text", Listening())
    behind = len(planner.looked_at(["a"] * 101, 100))
    prompts = ["a red circle"] * 2 + ["a blue square falls"] * (behind + 2)
    options = default_options(generator.bundle.config.sampling, ar_guidance_scale=1000.0)
    plans = [planned.tokens for planned in planner.plan(prompts, 0, options)]
    assert heard == prompts[:2] + ["a red circle", "a blue square falls"] * behind + prompts[-2:]

    without = options.model_copy(update={"ar_contrast": False})
    heard.clear()
    others = [planned.tokens for planned in planner.plan(prompts, 0, without)]
    assert heard == prompts
    same = [np.array_equal(ours, theirs) for ours, theirs in zip(plans, others, strict=True)]
    assert same[:3] == [True, True, False]

    # away from the negative prompt elsewhere: as long as another prompt's tokens are in sight, away from that one
    rain, away = "rain", dict[bool, list[str]]()
    for contrast in (True, False):
        heard.clear()
        changed = options.model_copy(update={"negative_prompt": rain, "ar_contrast": contrast})
        negative = [planned.tokens for planned in planner.plan(prompts, 0, changed)]
        assert not np.array_equal(negative[0], plans[0])
        away[contrast] = heard[::2]
        assert heard[1::2] == prompts
    assert away[True] == [rain] * 2 + ["a red circle"] * behind + [rain] * 2 and away[False] == [rain] * len(prompts)


def test_a_changing_text_is_rendered_frame_by_frame(generator: VideoGenerator) -> None:
    options = default_options(generator.bundle.config.sampling, guidance_scale=4.0, steps=3, token_guidance_scale=1.5)
    tokens = np.zeros((10, 4, 4), np.int32)

    def render(text: SegmentText) -> np.ndarray:
        return generator.renderer.render(text, tokens, None, 0, 0, options).latents

    first, second = render("a red circle"), render("a blue square falls")
    same = ChangingText(("a red circle", "a red circle"), ((0.3,) * 10, (0.7,) * 10))
    assert np.allclose(render(same), first, atol=1e-4)
    half = tuple(float(latent < 5) for latent in range(10))
    changing = render(ChangingText(("a red circle", "a blue square falls"), (half, tuple(1 - s for s in half))))
    near = [
        np.abs(changing[:, part] - other[:, part]).mean()
        for part in (slice(5), slice(5, 10))
        for other in (first, second)
    ]
    assert near[0] < near[1] and near[3] < near[2]


def scenes_of(*prompts: str, cuts: bool = False) -> list[Scene]:
    return [Scene(prompt, cut=cuts) for prompt in prompts]


def test_prompts_are_spread_in_order() -> None:
    assert spread(scenes_of("a", "b"), 5) == ["a", "a", "a", "b", "b"]
    assert spread(scenes_of("a"), 3) == ["a"] * 3
    for cuts in (False, True):
        texts = spread(scenes_of("a", "b", "c", cuts=cuts), 8)
        assert all(a <= b for a, b in pairwise(map(prompt_of, texts)))
    assert spread(scenes_of("a", "b", "b", cuts=True), 6) == ["a", "a", Cut("b"), "b", Cut("b"), "b"]
    with pytest.raises(ValueError, match="3 prompts for 2 segments"):
        spread(scenes_of("a", "b", "c"), 2)


@pytest.mark.parametrize("fps", [16.0, 23.976, 30.0])
def test_the_playing_time_asks_for_the_same_length_again(fps: float) -> None:
    config = small_config(f"video.fps={fps}")
    assert [segments_for(float(playing_time(count, config)), config) for count in range(1, 30)] == [*range(1, 30)]
    assert playing_time(3, config) == format((new_frames(config, 0) + 2 * new_frames(config, 1)) / fps, ".10g")


def test_a_storyboard_is_a_video_of_its_length(generator: VideoGenerator) -> None:
    texts = storyboard([Scene("a red circle", 1.5), Scene("a blue square", 2.5)], generator.bundle.config, transition=2)
    assert sum(len(part) for part in generator.generate(texts, 0)) == 68
