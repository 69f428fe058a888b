"""Reading a configuration: a preset's name or a YAML file, then dotted overrides."""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import json
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from arlon_ray.config.base import Section
from arlon_ray.config.run import Config


class ConfigError(ValueError):
    """A configuration that cannot be used. The text is one line and names the key."""


#: Key of a YAML file that names the preset which it changes.
EXTENDS = "extends"


def preset_names() -> list[str]:
    """Names of the presets that come with the package."""
    folder = resources.files("arlon_ray.config") / "presets"
    return sorted(entry.name.removesuffix(".yaml") for entry in folder.iterdir() if entry.name.endswith(".yaml"))


def load_config(source: str, overrides: Sequence[str] = ()) -> Config:
    """Read `source` (a preset's name or a YAML file) and apply `overrides` ("dotted.key=value", YAML values).

    Raises ConfigError, with one line that names the key, what was found and what was expected.
    """
    return _validated(_read(source), overrides)


def override(config: Config, overrides: Sequence[str]) -> Config:
    """`config` with `overrides` ("dotted.key=value", YAML values) applied. Raises ConfigError as `load_config` does."""
    return _validated(config.model_dump(mode="json"), overrides)


def _validated(raw: dict[str, Any], overrides: Sequence[str]) -> Config:
    for text in overrides:
        _apply(raw, text)
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


#: Settings that change no result: bookkeeping, how the work and its memory are split, and where a start artefact lies
#: (its fingerprint is a parent).
WITHOUT_EFFECT = (
    "log_every", "checkpoint_every", "evaluate_every", "init", "group_batch", "frame_batch",
    "accumulation", "activation_checkpointing", "checkpointed_share", "compile", "sequence_parallel", "zero_stage",
    "offload_optimizer", "deepspeed",
)  # fmt: skip


def config_fingerprint(*sections: BaseModel) -> str:
    """sha256 (hex) of the resolved sections: equal settings, equal fingerprint, whatever the bookkeeping."""
    text = json.dumps([_effective(section) for section in sections], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def effective_settings(**sections: BaseModel) -> dict[str, Any]:
    """What `config_fingerprint` looks at, flat: {"dit.depth": 3, …}."""
    return {
        f"{section}.{name}": value for section, model in sections.items() for name, value in flat(_effective(model))
    }


def flat(values: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """(dotted name, value) of nested settings."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{inner}", its) for inner, its in flat(value))
        else:
            yield name, value


def _effective(section: BaseModel) -> dict[str, Any]:
    values = section.model_dump(mode="json")
    without = {*WITHOUT_EFFECT, "keep_best"}
    if values.get("keep_best"):  # then the weights that are exported depend on when they are evaluated
        without -= {"evaluate_every", "keep_best"}
    if isinstance(section, Section):
        without |= section.without_effect()
    return {
        name: _effective(inner) if isinstance(inner := getattr(section, name), BaseModel) else value
        for name, value in values.items()
        if name not in without
    }


def _read(source: str) -> dict[str, Any]:
    try:
        if source in preset_names():
            text = (resources.files("arlon_ray.config") / "presets" / f"{source}.yaml").read_text()
        elif Path(source).is_file():
            text = Path(source).read_text()
        else:
            raise ConfigError(f"--config {source}: neither a file nor one of the presets {', '.join(preset_names())}")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {source}: cannot be read: {' '.join(str(error).split())}") from None
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: an impossible date
        raise ConfigError(f"--config {source}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise ConfigError(f"--config {source}: expected a mapping of sections, found {type(raw).__name__}")
    base = raw.pop(EXTENDS, None)
    if base is None:
        return raw
    if base not in preset_names() or base == source:
        raise ConfigError(
            f"--config {source}: {EXTENDS}: {base}: expected one of the presets {', '.join(preset_names())}"
        )
    return merged(_read(base), raw)


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with the sections of `changes` laid over it, key by key."""
    result = dict(base)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(base.get(name), dict)
        result[name] = merged(base[name], value) if both else value
    return result


def _apply(raw: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {override}: expected dotted.key=value")
    *path, last = key.split(".")
    node = raw
    for part in path:
        node = node.setdefault(part, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {part} is a value, not a section")
    try:
        node[last] = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise ConfigError(f"--set {override}: the value is not valid YAML") from None
    # YAML 1.1 reads 1e-3 as text; a number was meant
    if isinstance(node[last], str):
        with contextlib.suppress(ValueError):
            node[last] = float(node[last])


def _one_line(error: ValidationError) -> str:
    first = error.errors()[0]
    key = ".".join(str(part) for part in first["loc"]) or "config"
    if first["type"] == "extra_forbidden":
        return f"config: unknown key {key}{_suggestion(key)}"
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "value_error":
        return f"config: {message}" if key == "config" else f"config: {key}: {message}"
    return f"config: {key}={first['input']!r}: {message}"


def _suggestion(key: str) -> str:
    *path, last = key.split(".")
    section: Any = Config
    for part in path:
        field = section.model_fields.get(part)
        section = field.annotation if field else None
        if not (isinstance(section, type) and issubclass(section, BaseModel)):
            return ""
    close = difflib.get_close_matches(last, section.model_fields, n=1)
    return f"; did you mean {'.'.join([*path, close[0]])}?" if close else ""
