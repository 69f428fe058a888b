"""Artefacts are whole, of a kind, and made by a key; bundles refuse parts of another lineage."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from arlon_ray import artifact
from arlon_ray.artifact import ArtifactError, finished, load_artifact, save_artifact, whole_folder
from arlon_ray.bundle import load_bundle, save_bundle
from arlon_ray.generation import VideoGenerator
from arlon_ray.models.ar import load_ar
from arlon_ray.models.codec import load_codec
from arlon_ray.models.dit import load_dit
from arlon_ray.models.vae import load_vae
from tests.bundles import make_random_bundle, make_random_parts, small_config

ROOT = Path(__file__).resolve().parents[1]


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
    with pytest.raises(ArtifactError, match=r"bundle\.json lists ar, but it is missing"):
        load_bundle(path)
    (path / "bundle.json").unlink()
    with pytest.raises(ArtifactError, match="not a bundle"):
        load_bundle(path)


def test_a_text_only_bundle_needs_nothing_of_guidance_and_half_of_it_is_refused(tmp_path: Path) -> None:
    config = small_config()
    parts = make_random_parts(tmp_path / "parts", config)
    identity = load_artifact(parts["ar"], "ar").lineage.parents["text"]
    base = save_artifact(
        tmp_path / "base", kind="dit", config=load_artifact(parts["dit"], "dit").config,
        tensors=load_artifact(parts["dit"], "dit").tensors(),
        parents={"vae": load_artifact(parts["vae"], "vae").fingerprint},
    )  # fmt: skip
    text_only = {"vae": parts["vae"], "dit_base": base.path}
    bundle = load_bundle(save_bundle(tmp_path / "bundle", config, text_only, identity))
    assert not bundle.guided and bundle.baseline.config.depth == 2
    with pytest.raises(ArtifactError, match="has no ar: this bundle is text-only"):
        _ = bundle.ar
    frames = list(VideoGenerator(bundle).generate(["a red circle", "a blue square"], seed=1))
    assert [len(part) for part in frames] == [34, 17]
    with pytest.raises(ArtifactError, match="codec_coarse is missing"):
        save_bundle(tmp_path / "half", config, {**text_only, "codec_fine": parts["codec_fine"]}, identity)
    with pytest.raises(ArtifactError, match="dit_base is missing"):
        save_bundle(tmp_path / "none", config, {"vae": parts["vae"]}, identity)


def test_others_may_read_what_they_may_read_here(tmp_path: Path) -> None:
    """As any new file: safetensors' own are their writer's alone, and the next stage may run as another user."""
    before = os.umask(0o027)
    try:
        save_artifact(tmp_path / "codec", kind="codec", config={}, tensors={"w": torch.ones(2)})
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "codec").iterdir()}
    assert modes == dict.fromkeys(("config.json", "lineage.json", "model.safetensors"), 0o640)


def test_models_load_in_half_precision(tmp_path: Path) -> None:
    """As on a GPU: weights in bfloat16, positions exact, and a video comes out of it, also where it is emulated."""
    bundle = load_bundle(make_random_bundle(tmp_path / "bundle"))
    bundle.ar = load_ar(tmp_path / "bundle" / "ar", dtype=torch.bfloat16)
    bundle.dit = load_dit(tmp_path / "bundle" / "dit", dtype=torch.bfloat16)
    assert bundle.dit.x_embedder.proj.weight.dtype == bundle.ar.head.weight.dtype == torch.bfloat16
    exact = load_dit(tmp_path / "bundle" / "dit")
    assert torch.equal(bundle.dit.rope.freqs, exact.rope.freqs)
    frames = next(VideoGenerator(bundle).generate(["a red circle"], seed=1))
    assert frames.shape == (34, 64, 64, 3) and frames.std() > 0


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
    with pytest.raises(ArtifactError, match="anchor_groups=0: set"):
        save_bundle(tmp_path / "bundle", small_config("dit.anchor_groups=1"), parts, identity)
    assert not (tmp_path / "bundle").exists()


def test_a_changed_manifest_is_refused(tmp_path: Path) -> None:
    path = make_random_bundle(tmp_path / "bundle")
    manifest = json.loads((path / "bundle.json").read_text())
    manifest["config"]["dit"]["depht"] = 3
    (path / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="unusable configuration"):
        load_bundle(path)


def change_json(path: Path, **changes: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("content", ["[]", "3", '"text"', '{"kind": "ar"}', '{"kind": "ar", "fingerprint": 3}'])
def test_a_lineage_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    make(tmp_path / "x")
    (tmp_path / "x" / "lineage.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"damaged lineage\.json"):
        load_artifact(tmp_path / "x", "ar")


LOADERS = {"vae": load_vae, "codec_fine": load_codec, "ar": load_ar, "dit": load_dit}


@pytest.fixture(scope="module")
def bundle_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_bundle(tmp_path_factory.mktemp("made") / "bundle")


@pytest.mark.parametrize(
    "name, changes, message",
    [
        ("vae", {"width": 24}, "size mismatch"),
        ("vae", {"width": -1}, "width: Input should be greater"),
        ("codec_fine", {"code_dim": 3}, "size mismatch"),
        ("codec_fine", None, "'latent_channels' is missing"),
        ("ar", {"layers": 3}, "Missing key"),
        ("ar", None, "'codebook_size' is missing"),
        ("dit", {"hiden_size": 3}, "hiden_size: Extra inputs"),
        ("dit", {"depth": 1}, "Unexpected key"),
    ],
)
def test_settings_that_do_not_fit_end_in_one_line(
    tmp_path: Path, bundle_path: Path, name: str, changes: dict | None, message: str
) -> None:
    folder = Path(shutil.copytree(bundle_path.parent / "bundle-parts" / name, tmp_path / name))
    if changes is None:
        (folder / "config.json").write_text("{}")
    else:
        change_json(folder / "config.json", **changes)
    with pytest.raises(ArtifactError) as raised:
        LOADERS[name](folder)
    assert str(folder) in str(raised.value) and message in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("content", [b"[]", b"[[1, 2]]", b"null", b"\xff\xfe"])
def test_a_damaged_manifest_is_refused(tmp_path: Path, bundle_path: Path, content: bytes) -> None:
    path = Path(shutil.copytree(bundle_path, tmp_path / "bundle"))
    (path / "bundle.json").write_bytes(content)
    with pytest.raises(ArtifactError, match=r"damaged bundle\.json"):
        load_bundle(path)


def forget(name: str) -> Callable[[dict], None]:
    return lambda parts: parts.pop(name) and None


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda parts: parts.update(dit="0123456789abcdef"),
            r"dit here is \w{12}…, but bundle.json records 0123456789ab…",
        ),
        (forget("ar"), r"ar is here, but bundle\.json does not list it"),
        (lambda parts: parts.update(dit_base="0" * 64), "lists dit_base, but it is missing"),
    ],
)
def test_an_exchanged_part_is_refused(
    tmp_path: Path, bundle_path: Path, change: Callable[[dict], None], message: str
) -> None:
    path = Path(shutil.copytree(bundle_path, tmp_path / "bundle"))
    parts = json.loads((path / "bundle.json").read_text())["parts"]
    change(parts)
    change_json(path / "bundle.json", parts=parts)
    with pytest.raises(ArtifactError, match=message):
        load_bundle(path)


@pytest.mark.parametrize(
    "name, folder, role",
    [("ar", "ar", "text"), ("ar", "ar", "codec_fine"), ("dit", "dit", "codec_coarse"),
     ("codec_coarse", "vqvae/coarse", "vae")],
)  # fmt: skip
def test_a_part_without_its_parents_is_refused(
    tmp_path: Path, bundle_path: Path, name: str, folder: str, role: str
) -> None:
    path = Path(shutil.copytree(bundle_path, tmp_path / "bundle"))
    parents = json.loads((path / folder / "lineage.json").read_text())["parents"]
    del parents[role]
    change_json(path / folder / "lineage.json", parents=parents)
    with pytest.raises(ArtifactError, match=f"{name} has no recorded parent {role}"):
        load_bundle(path)


def test_a_file_is_hashed_again_whenever_it_may_have_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, read = tmp_path / "f", []
    original = artifact._read_sha256
    monkeypatch.setattr(artifact, "_read_sha256", lambda path: read.append(path) or original(path))
    file.write_bytes(b"a")
    first = artifact.sha256_of(file)
    file.write_bytes(b"b")
    assert artifact.sha256_of(file) != first and len(read) == 2
    monkeypatch.setattr(artifact, "_SETTLED_S", -1.0)  # as if that had been a while ago
    second = artifact.sha256_of(file)
    assert artifact.sha256_of(file) == second and len(read) == 3
    file.write_bytes(b"longer")
    assert artifact.sha256_of(file) == original(file) != second and len(read) == 4


def test_models_are_loaded_without_torchs_compiler() -> None:
    """Which takes longer to import than a small bundle to load."""
    code = (
        "import sys, torch; from arlon_ray.bundle import load_bundle; b = load_bundle('weights/tiny');"
        "b.vae, b.codec, b.ar, b.dit; slow = ('torch._dynamo', 'sympy', 'transformers');"
        "print([name for name in slow if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-500:]
