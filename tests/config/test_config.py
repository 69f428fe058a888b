"""Bad settings end in one line that names the key."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from arlon_ray.config import (
    Config,
    ConfigError,
    config_fingerprint,
    effective_settings,
    load_config,
    override,
    preset_names,
)


def test_every_preset_loads_and_is_frozen() -> None:
    assert {"tiny", "demo", "small", "opensora-v1.2"} == set(preset_names())
    assert all(load_config(name).name == name for name in preset_names())
    for name in preset_names():
        config = load_config(name)
        with pytest.raises(ValidationError):
            config.seed = 3  # type: ignore[misc]


def test_overrides_are_typed_yaml() -> None:
    config = load_config("tiny", ["dit.training.learning_rate=1e-4", "vqvae.fine.patch=[1, 4, 4]", "vae.train=true"])
    assert config.dit.training.learning_rate == 1e-4
    assert config.vqvae.fine.patch == (1, 4, 4)
    assert config.vae.train is True


@pytest.mark.parametrize(
    "override, message",
    [
        ("dit.trainin.steps=3", "unknown key dit.trainin; did you mean dit.training?"),
        ("seeed=3", "unknown key seeed; did you mean seed?"),
        ("dit.training.steps=many", "dit.training.steps='many'"),
        ("dit.training.steps=0", "greater than or equal to 1"),
        ("segment.overlap_groups=2", "must be smaller than groups=2"),
        ("dit.anchor_groups=2", "dit.anchor_groups=2: a segment adds only 1"),
        ("vae.latent_channels=4", "dit.in_channels=8 must equal vae.latent_channels=4"),
        ("video.height=60", "multiple of 8"),
        ("name.x=1", "name is a value, not a section"),
        ("no_value", "expected dotted.key=value"),
        ("data.bucket_groups=[2, 0]", "data.bucket_groups.1=0: Input should be greater than or equal to 1"),
        ("data.bucket_groups=[]", "at least 1 item"),
        ("seed=-1", "seed=-1: Input should be greater than or equal to 0"),
        ("dit={hidden_size: 18, num_heads: 1}", "hidden_size=18 must be a multiple of 4"),
        ("ar={dim: 18, heads: 1}", "dim=18 must be a multiple of 4"),
        ("vqvae.fine.patch=[1, 0, 2]", "patch=[1, 0, 2] must be 1 or more"),
        ("dit.training.steps=true", "dit.training.steps=True: Input should be a number"),
        ("video.fps=true", "video.fps=True: Input should be a number"),
        ("dit.training.zero_stage=true", "dit.training.zero_stage=True: Input should be a number"),
        ("vqvae.fine.patch=[true, 2, 2]", "Input should be a number"),
        ("dit={training: {steps: '5'}}", "dit.training.steps='5': Input should be a whole number"),
        ("seed=2001-99-99", "not valid YAML"),
    ],
)
def test_bad_overrides_name_the_key_in_one_line(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config("tiny", [override])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_whole_numbers_pass_for_floats_and_lists_for_tuples() -> None:
    config = load_config("tiny", ["video.fps=8", "dit.training.betas=[0, 0.5]", "dit.training={learning_rate: 1e-4}"])
    assert config.video.fps == 8.0 and config.dit.training.learning_rate == 1e-4
    assert load_config("tiny", ["data.bucket_groups=[2]"]).data.bucket_groups == (2,)


def test_override_changes_a_configuration_that_is_there() -> None:
    config = override(load_config("tiny"), ["seed=3", "vae.train=true"])
    assert config == load_config("tiny", ["seed=3", "vae.train=true"])
    with pytest.raises(ConfigError, match="did you mean seed"):
        override(config, ["seeed=3"])


def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(bytes(range(128, 256)))
    for source in (str(path), "x" * 5000):
        with pytest.raises(ConfigError, match="cannot be read") as raised:
            load_config(source)
        assert "\n" not in str(raised.value)


def test_files_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("seed: 5\n")
    assert load_config(str(path)).seed == 5
    path.write_text("- 1\n")
    with pytest.raises(ConfigError, match="expected a mapping"):
        load_config(str(path))
    path.write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(str(path))
    with pytest.raises(ConfigError, match="neither a file nor one of the presets"):
        load_config("tinny")


def test_the_fingerprint_follows_the_settings() -> None:
    without = ["dit.training.log_every=3", "dit.init=elsewhere", "vae.precision=bf16"]
    base, same = load_config("tiny"), load_config("tiny", without)
    other = load_config("tiny", ["dit.training.steps=3"])
    assert config_fingerprint(base) == config_fingerprint(same) != config_fingerprint(other)
    trained = load_config("tiny", ["vae.training.precision=fp32"])
    assert config_fingerprint(base.vae) != config_fingerprint(trained.vae)
    assert Config.model_validate(base.model_dump(mode="json")) == base


def test_a_setting_that_came_later_changes_no_fingerprint_while_it_is_off() -> None:
    base, recycled = (load_config("tiny", text).dit for text in ([], ["dit.recycled_probability=0.5"]))
    assert not {"dit.recycled_probability", "dit.anchor_groups"} & set(effective_settings(dit=base))
    assert effective_settings(dit=recycled) == effective_settings(dit=base) | {"dit.recycled_probability": 0.5}
    assert config_fingerprint(recycled) != config_fingerprint(base)
    anchored = load_config("tiny", ["dit.anchor_groups=1"]).dit
    assert effective_settings(dit=anchored) == effective_settings(dit=base) | {
        "dit.anchor_groups": 1, "dit.anchor_share": 0.5
    }  # fmt: skip


def test_a_file_can_change_a_preset(tmp_path: Path) -> None:
    demo, tiny = load_config("demo"), load_config("tiny")
    assert demo.ar.init and demo.ar.training.steps < tiny.ar.training.steps
    assert demo.dit.hidden_size == tiny.dit.hidden_size and demo.ar.training.batch_size == tiny.ar.training.batch_size
    (tmp_path / "own.yaml").write_text("extends: tiny\nar: {training: {steps: 7}}\n")
    own = load_config(str(tmp_path / "own.yaml"))
    assert own.ar.training.steps == 7 and own.ar.block == tiny.ar.block
    (tmp_path / "wrong.yaml").write_text("extends: huge\n")
    with pytest.raises(ConfigError, match="extends: huge: expected one of the presets"):
        load_config(str(tmp_path / "wrong.yaml"))
