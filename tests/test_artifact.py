"""Artefacts are whole, of a kind, and made by a key; bundles refuse parts of another lineage."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from arlon_ray.artifact import ArtifactError, finished, load_artifact, save_artifact, whole_folder
from arlon_ray.bundle import load_bundle, save_bundle
from tests.bundles import make_random_bundle, make_random_parts, small_config


def make(path: Path, value: float = 1.0, **changes: object):
    tensors = {"w": torch.full((3,), value)}
    return save_artifact(path, kind="ar", config={"a": 1}, tensors=tensors, key="k1", **changes)  # type: ignore[arg-type]


def test_round_trip_keeps_everything(tmp_path: Path) -> None:
    saved = make(tmp_path / "x", metrics={"loss": 0.5}, parents={"vae": "abc"}, dtype=torch.float16)
    loaded = load_artifact(tmp_path / "x", "ar")
    assert loaded.lineage == saved.lineage
    assert loaded.lineage.parents == {"vae": "abc"} and loaded.lineage.metrics == {"loss": 0.5}
    assert loaded.tensors()["w"].dtype == torch.float32


def test_a_finished_artefact_is_known_by_its_key_and_its_weights(tmp_path: Path) -> None:
    make(tmp_path / "x")
    assert finished(tmp_path / "x", "ar", "k1") is not None
    assert finished(tmp_path / "x", "ar", "k2") is None
    assert finished(tmp_path / "x", "dit", "k1") is None
    shutil.copy(make(tmp_path / "y", 2.0).path / "model.safetensors", tmp_path / "x" / "model.safetensors")
    assert finished(tmp_path / "x", "ar", "k1") is None


def test_an_interrupted_write_leaves_the_old_one(tmp_path: Path) -> None:
    make(tmp_path / "x")
    with pytest.raises(KeyboardInterrupt), whole_folder(tmp_path / "x") as folder:
        (folder / "half").write_text("…")
        raise KeyboardInterrupt
    assert finished(tmp_path / "x", "ar", "k1") is not None
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("part", ["config.json", "lineage.json", "model.safetensors"])
def test_missing_parts_are_named(tmp_path: Path, part: str) -> None:
    make(tmp_path / "x")
    (tmp_path / "x" / part).unlink()
    with pytest.raises(ArtifactError, match=part):
        load_artifact(tmp_path / "x", "ar")


def test_a_bundle_loads_and_names_what_is_missing(tmp_path: Path) -> None:
    path = make_random_bundle(tmp_path / "bundle")
    bundle = load_bundle(path)
    assert bundle.codec.config.codebook_size == 32 and bundle.baseline is bundle.dit
    shutil.rmtree(path / "ar")
    with pytest.raises(ArtifactError, match=r"config\.json is missing"):
        load_bundle(path)
    (path / "bundle.json").unlink()
    with pytest.raises(ArtifactError, match="not a bundle"):
        load_bundle(path)


def test_parts_trained_on_another_codebook_are_refused(tmp_path: Path) -> None:
    config = small_config()
    parts = make_random_parts(tmp_path / "parts", config)
    identity = load_artifact(parts["ar"], "ar").lineage.parents["text"]
    codec = load_artifact(parts["codec_fine"], "codec")
    changed = codec.tensors()
    changed["codebook"][0] += 1.0
    other = save_artifact(tmp_path / "other", kind="codec", config=codec.config, tensors=changed)
    with pytest.raises(ArtifactError, match="trained on codec_fine"):
        save_bundle(tmp_path / "bundle", config, {**parts, "codec_fine": other.path}, identity)
    with pytest.raises(ArtifactError, match="trained on text"):
        save_bundle(tmp_path / "bundle", config, parts, "minilm:other")
    assert not (tmp_path / "bundle").exists()


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    path = make_random_bundle(tmp_path / "bundle")
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["config"]["dit"]["depht"] = 3
    (path / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="unusable configuration"):
        load_bundle(path)
