"""The configuration that a bundle is served with."""

from __future__ import annotations

import tempfile
from pathlib import Path

import yaml

from arlon_ray.bundle import Bundle
from arlon_ray.config import Config, ConfigError, load_config, override

#: What may differ from the bundle's own configuration; all else is what its weights were trained with.
ADJUSTABLE = {"device", "sampling", "serve"}


def served_config(trained: Config, source: str | None, overrides: list[str]) -> Config:
    """The bundle's configuration with device, sampling and serve of `source` (if any) and `overrides`.

    Raises ConfigError, also for overrides of what the weights were trained with.
    """
    base = trained.model_dump(mode="json")
    if source is not None:
        base |= load_config(source).model_dump(mode="json", include=ADJUSTABLE)
    with tempfile.TemporaryDirectory() as folder:
        resolved = Path(folder) / "config.yaml"
        resolved.write_text(yaml.safe_dump(base))
        config = load_config(str(resolved), overrides)
    for name in sorted(set(type(config).model_fields) - ADJUSTABLE):
        if getattr(config, name) != getattr(trained, name):
            allowed = ", ".join(sorted(ADJUSTABLE))
            raise ConfigError(f"--set {name}: fixed by the bundle; what can be set here is {allowed}")
    return config


def config_of(bundle: Bundle, source: str | None, overrides: list[str]) -> Config:
    """`served_config` of a bundle; one that is text-only is served without an AR. Raises ConfigError."""
    config = served_config(bundle.config, source, overrides)
    return config if bundle.guided else override(config, ["sampling.baseline=true"])


def as_served(config: Config, bundle: Bundle) -> Config:
    """A bundle's configuration, to be served with device, sampling and serve of `config`."""
    return bundle.config.model_copy(update={name: getattr(config, name) for name in ADJUSTABLE})
