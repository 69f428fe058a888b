"""What a request may say, and how it is turned into prompts and settings."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from arlon_ray.generation import ChangingText
from serve.requests import options_of, read_prompts
from serve.schema import RequestError, VideoRequest
from tests.serve.stages import small_config

CONFIG = small_config("serve.max_segments=6", "serve.max_prompt_characters=20")


def read(**fields: object) -> list[str]:
    return read_prompts(VideoRequest.model_validate(fields), CONFIG)


def test_one_prompt_is_one_segment() -> None:
    assert read(prompt="  a cat ") == ["a cat"]


def test_progressive_prompts_over_more_segments() -> None:
    assert read(segments=[{"prompt": "a"}, {"prompt": "b"}], num_segments=4) == ["a", "a", "b", "b"]
    assert read(segments=[{"prompt": "a"}, {"prompt": "b"}]) == ["a", "b"]
    assert read(segments=[{"prompt": "a"}, {"prompt": "b"}], num_segments=3) == ["a", "a", "b"]


@pytest.mark.parametrize(
    ("seconds", "segments"), [(0.1, 1), (2.125, 1), (2.126, 2), ("2.126", 2), (3.1875, 2), (3.19, 3), (7, 6)]
)
def test_seconds_become_whole_segments(seconds: float | str, segments: int) -> None:
    # 16 frames a second: 34 frames, then 17 with each further segment
    assert len(read(prompt="a", seconds=seconds)) == segments


def test_segments_with_seconds_of_their_own() -> None:
    assert read(segments=[{"prompt": "a", "seconds": 2.125}, {"prompt": "b", "seconds": "1.0625"}]) == ["a", "b"]
    parts = [{"prompt": "a", "seconds": 1.5}, {"prompt": "b", "seconds": 2}]
    (first, second, third) = read(segments=parts, transition_latents=2)
    assert isinstance(first, ChangingText) and first.prompts == ("a", "b") and (second, third) == ("b", "b")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": " \n"}, "prompt"),
        ({"prompt": "x" * 21}, "prompt"),
        ({"prompt": "a", "segments": [{"prompt": "b"}]}, "segments"),
        ({"segments": [{"prompt": "a"}, {"prompt": ""}]}, "segments.1.prompt"),
        ({"segments": [{"prompt": "a"}] * 7}, "segments"),
        ({"segments": [{"prompt": "a"}] * 3, "num_segments": 2}, "num_segments"),
        ({"prompt": "a", "num_segments": 7}, "num_segments"),
        ({"prompt": "a", "seconds": 600}, "seconds"),
        ({"prompt": "a", "seconds": 1e6}, "seconds"),
        ({"segments": [{"prompt": "a", "seconds": 1}, {"prompt": "b"}]}, "segments.1.seconds"),
        ({"segments": [{"prompt": "a", "seconds": 1}], "seconds": 2}, "seconds"),
        ({"segments": [{"prompt": "a", "seconds": 1}], "num_segments": 2}, "num_segments"),
        ({"segments": [{"prompt": "a", "seconds": 600}]}, "segments"),
        ({"segments": [{"prompt": "a", "seconds": 0.01}]}, "segments"),
        ({"segments": [{"prompt": "a"}, {"prompt": "b"}], "transition_latents": 2}, "transition_latents"),
        ({"prompt": "a", "seconds": 2, "num_segments": 2}, "seconds"),
        ({"prompt": "a", "size": "32x32"}, "size"),
        ({"prompt": "a", "model": "sora-2"}, "model"),
    ],
)
def test_what_this_model_cannot_make_is_refused_by_field(fields: dict, param: str) -> None:
    with pytest.raises(RequestError) as refused:
        read(**fields)
    assert (refused.value.param, refused.value.status) == (param, 400)


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": 3},
        {"prompt": "a", "promt": "b"},
        {"segments": [{"prompt": "a", "weight": 1}]},
        {"segments": []},
        {"prompt": "a", "num_segments": 0},
        {"prompt": "a", "num_segments": True},
        {"prompt": "a", "seconds": "long"},
        {"prompt": "a", "seconds": "nan"},
        {"prompt": "a", "seconds": -1},
        {"prompt": "a", "seconds": 1e300},
        {"prompt": "a", "seed": -1},
        {"prompt": "a", "num_inference_steps": 0},
        {"prompt": "a", "guidance_scale": float("inf")},
        {"prompt": "a", "solver": "rk4"},
        {"prompt": "a", "baseline": "yes"},
        {"prompt": "half a character: \ud800"},
    ],
)
def test_wrong_types_ranges_and_names_are_refused(fields: dict) -> None:
    with pytest.raises(ValidationError):
        VideoRequest.model_validate(fields)


def test_what_is_accepted_is_used() -> None:
    request = VideoRequest.model_validate(
        {"prompt": "a", "size": "16x16", "model": CONFIG.name, "num_inference_steps": 3, "guidance_scale": 1}
    )
    assert read_prompts(request, CONFIG) == ["a"]
    options = options_of(request, CONFIG)
    assert (options.steps, options.guidance_scale, options.baseline) == (3, 1.0, False)
    assert options.token_guidance_scale == CONFIG.sampling.token_guidance_scale
    assert options.solver == CONFIG.sampling.solver
    asked = VideoRequest.model_validate({"prompt": "a", "num_inference_steps": 3, "solver": "heun"})
    assert options_of(asked, CONFIG).evaluations == 5
