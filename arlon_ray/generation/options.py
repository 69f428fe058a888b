"""What a caller may choose for one video."""

from __future__ import annotations

from collections.abc import Callable

from arlon_ray.config import Config, SamplingConfig
from arlon_ray.models.captions import with_scores
from arlon_ray.models.text import load_token_counter


class GenerationOptions(SamplingConfig):
    """`SamplingConfig`, and what it makes of a prompt."""

    def text(self, prompt: str) -> str:
        """What the text encoder is given for `prompt`."""
        return with_scores(prompt, self.aesthetic_score, self.motion_score, self.camera_motion)


def default_options(sampling: SamplingConfig, **changes: object) -> GenerationOptions:
    """A bundle's own sampling settings, with changes (None: keep). Raises pydantic.ValidationError on bad values."""
    chosen = {name: value for name, value in changes.items() if value is not None}
    return GenerationOptions.model_validate({**sampling.model_dump(), **chosen})


def prompt_token_counter(config: Config) -> Callable[[str], int]:
    """Counts the tokens that a prompt takes of the text encoder, scores included. Raises ArtifactError."""
    count_tokens, options = load_token_counter(config.text), default_options(config.sampling)
    return lambda prompt: count_tokens(options.text(prompt))
