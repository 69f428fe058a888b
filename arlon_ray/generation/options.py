"""What a caller may choose for one video."""

from __future__ import annotations

from collections.abc import Sequence

from arlon_ray.config import SamplingConfig
from arlon_ray.generation.storyboard import SegmentText, goes_on

GenerationOptions = SamplingConfig


def default_options(sampling: SamplingConfig, **changes: object) -> GenerationOptions:
    """A bundle's own sampling settings, with changes (None: keep). Raises pydantic.ValidationError on bad values."""
    chosen = {name: value for name, value in changes.items() if value is not None}
    return GenerationOptions.model_validate({**sampling.model_dump(), **chosen})


def segment_options(options: GenerationOptions, texts: Sequence[SegmentText], index: int) -> GenerationOptions:
    """The options that segment `index` is rendered with: 1 + c·(s − 1) instead of s where its text goes on.

    What a segment takes over is guided already. Guided again in each of many, what stays where it is turns into
    artefacts (docs/long_video.md). s: `guidance_scale`, c: `continued_guidance`. A baseline has no plan that would hold
    it to its text: it is guided everywhere.
    """
    if options.baseline or options.continued_guidance == 1.0 or not goes_on(texts, index):
        return options
    scale = 1 + options.continued_guidance * (options.guidance_scale - 1)
    return options.model_copy(update={"guidance_scale": scale})
