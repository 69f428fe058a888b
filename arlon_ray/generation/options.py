"""What a caller may choose for one video."""

from __future__ import annotations

from arlon_ray.config import SamplingConfig

GenerationOptions = SamplingConfig


def default_options(sampling: SamplingConfig, **changes: object) -> GenerationOptions:
    """A bundle's own sampling settings, with changes (None: keep). Raises pydantic.ValidationError on bad values."""
    chosen = {name: value for name, value in changes.items() if value is not None}
    return GenerationOptions.model_validate({**sampling.model_dump(), **chosen})
