"""A model bundle: one folder with everything that makes videos, whose parts are proven to belong together.

bundle.json   configuration, the fingerprint of every part, and the identity of the text encoder
vae/ vqvae/fine/ vqvae/coarse/ ar/ dit/ dit_base/   stage artefacts
text/         the text encoder, where it does not come with a package (T5)

A guided bundle has all of vqvae/fine, vqvae/coarse, ar and dit; a text-only one (imported from Open-Sora) has none of
them, but dit_base, which is also the baseline of a guided bundle.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import nn

from arlon_ray import mirror
from arlon_ray.artifact import (
    Artifact,
    ArtifactError,
    fetched,
    load_artifact,
    one_line,
    read_object,
    whole_folder,
    write_json,
)
from arlon_ray.config import Config, config_fingerprint
from arlon_ray.models.ar import ArTransformer, load_ar
from arlon_ray.models.codec import LatentCodec, load_codec
from arlon_ray.models.dit import STDiT3, load_dit
from arlon_ray.models.quantised import in_bf16, quantise
from arlon_ray.models.text import TextEncoder, load_text_encoder, text_identity
from arlon_ray.models.vae import VideoVAE, load_vae
from arlon_ray.offload import Offload, Turns
from arlon_ray.precision import NOTE, Weights, arithmetic, falls_back

log = logging.getLogger(__name__)

M = TypeVar("M", bound=nn.Module)

MANIFEST = "bundle.json"
#: Where each part lies, and its kind.
PARTS = {
    "vae": ("vae", "vae"),
    "codec_fine": ("vqvae/fine", "codec"),
    "codec_coarse": ("vqvae/coarse", "codec"),
    "ar": ("ar", "ar"),
    "dit": ("dit", "dit"),
    "dit_base": ("dit_base", "dit"),
}
#: What guidance by tokens needs: all of it is there, or nothing.
GUIDED = ("codec_fine", "codec_coarse", "ar", "dit")
TEXT = "text"
LINK_FROM_BYTES = 64 * 2**20
#: What a part must have been trained on, by its own record. (`dit_base` sees no tokens.)
PARENTS = {
    "codec_fine": ("vae",),
    "codec_coarse": ("vae",),
    "ar": ("codec_fine", "vae", "text"),
    "dit": ("codec_fine", "codec_coarse", "vae"),
    "dit_base": ("vae",),
}


def save_bundle(path: str | Path, config: Config, parts: Mapping[str, str | Path], text: str) -> Path:
    """Put stage artefacts ("vae", and the others of `PARTS`) into a bundle, with the text encoder if it is a folder.

    `text` is the identity of the text encoder. Large files are linked where they can be (artefacts never change), all
    others copied; what is there already is not written again. Raises ArtifactError if a part is missing or was trained
    on another one than the one given, or the DiT with another anchor.
    """
    artifacts = {name: load_artifact(folder, PARTS[name][1]) for name, folder in parts.items()}
    _check(artifacts, text, "bundle")
    _check_anchor(artifacts, config)
    fingerprints = {name: artifact.fingerprint for name, artifact in artifacts.items()}
    # how it is served is not what its weights were trained with: defaults stay those of the code that serves it
    serving = config.serve.model_dump(mode="json", exclude_defaults=True)
    recorded = {**config.model_dump(mode="json"), "serve": serving}
    manifest = {"config": recorded, "parts": fingerprints, "text": text}
    if _is_there(path, manifest):
        return mirror.local(path)
    with whole_folder(path) as folder:
        for name, artifact in artifacts.items():
            shutil.copytree(artifact.path, folder / PARTS[name][0], copy_function=_link)
        if config.text.path is not None:
            shutil.copytree(fetched(config.text.path), folder / TEXT, copy_function=_link)
        write_json(folder / MANIFEST, manifest)
    return mirror.local(path)


def _check_anchor(artifacts: Mapping[str, Artifact], config: Config) -> None:
    """What segments hand on must be what the DiT was trained to be given."""
    if (dit := artifacts.get("dit")) is None:
        return
    trained, wanted = dit.config.get("anchor_groups", 0), config.dit.anchor_groups
    if trained != wanted:
        raise ArtifactError(
            f"bundle: dit was trained with anchor_groups={trained}: set dit.anchor_groups={trained} (here: {wanted})"
        )


def _is_there(path: str | Path, manifest: dict[str, Any]) -> bool:
    """Whether the bundle of this manifest is there, and whole."""
    try:
        return _read_json(Bundle(path).path / MANIFEST) == manifest
    except ArtifactError:
        return False


def _link(source: str, target: str) -> None:
    if os.path.getsize(source) >= LINK_FROM_BYTES:
        with contextlib.suppress(OSError):  # another file system, or one without links
            os.link(source, target)
            return
    shutil.copy2(source, target)


class Bundle:
    """An opened bundle. Lineage is verified when it is opened; each part is loaded when it is first asked for.

    `offload`: which parts are not on the device, or only while they work: whoever uses one does so within `at_work`.
    (The fine codec, which is small, is always there.)
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu", offload: Offload = "none") -> None:
        self.path, self.device, self.offload = fetched(path), torch.device(device), offload
        self.turns, self._said = Turns(self.device), False
        manifest = _read_json(self.path / MANIFEST)
        try:
            config = Config.model_validate(manifest["config"])
        except (ValidationError, KeyError) as error:
            raise ArtifactError(f"{self.path / MANIFEST}: unusable configuration: {one_line(error)}") from None
        if config.text.path is not None:
            text = config.text.model_copy(update={"path": str(self.path / TEXT)})
            config = config.model_copy(update={"text": text})
        self.config = config
        self.text_identity = str(manifest.get("text", ""))
        self.artifacts = {
            name: load_artifact(self.path / folder, kind)
            for name, (folder, kind) in PARTS.items()
            if (self.path / folder).exists()
        }
        _check_manifest(self.artifacts, manifest.get("parts"), str(self.path))
        _check(self.artifacts, self.text_identity, str(self.path))

    @property
    def fingerprint(self) -> str:
        """sha256 (hex) of all that a video depends on beside its request: all parts, text encoder, sizes, precision."""
        parts = {name: artifact.fingerprint for name, artifact in self.artifacts.items()}
        sizes = config_fingerprint(self.config.video, self.config.segment)
        all_of_it = [parts, self.text_identity, sizes]
        if self.config.precision != "fp32":  # what was begun before there was a choice goes on
            all_of_it.append(self.config.precision)
        if self.config.vae.precision != "fp32":
            all_of_it.append({"vae": self.config.vae.precision})
        return hashlib.sha256(json.dumps(all_of_it, sort_keys=True).encode()).hexdigest()

    @property
    def guided(self) -> bool:
        """Whether it has an AR and a DiT that its tokens guide; otherwise only a text-only DiT."""
        return "dit" in self.artifacts

    @cached_property
    def _dtype(self) -> torch.dtype:
        return self._arithmetic(self.config.precision)

    def _arithmetic(self, precision: Weights) -> torch.dtype:
        if falls_back(precision, self.device) and not self._said:
            self._said = True
            log.warning(NOTE)
        return arithmetic(precision, self.device)

    @cached_property
    def vae(self) -> VideoVAE:
        """The video VAE."""
        vae = load_vae(self.path / PARTS["vae"][0], self._home, bounds=self.config.vae)
        return self._waiting(vae.in_precision(self._arithmetic(self.config.vae.precision)))

    @cached_property
    def text(self) -> TextEncoder:
        """The text encoder. Raises ArtifactError as `check_text` does."""
        self.check_text()
        if self.offload in ("text", "all"):
            encoder = load_text_encoder(self.config.text, "cpu")
        else:
            encoder = load_text_encoder(self.config.text, self._home, self.device)
            encoder.at_work = partial(self.at_work, self._waiting(encoder.model))
        encoder.values_to = self.device
        return encoder

    def check_text(self) -> None:
        """Raises ArtifactError if the text encoder that is here is not the one that was trained with. Loads nothing."""
        here = text_identity(self.config.text)
        if here != self.text_identity:
            raise ArtifactError(f"{self.path}: made with text encoder {self.text_identity}, found {here}")

    @cached_property
    def codec(self) -> LatentCodec:
        """The fine codec: the one whose tokens the AR predicts."""
        return load_codec(self._part("codec_fine"), self.device)

    @cached_property
    def ar(self) -> ArTransformer:
        """The autoregressive transformer.

        On a CPU it computes in float32, with weights of the precision asked for: its products wait for weights to be
        read, however these are multiplied (`arlon_ray.native`). In memory they are float32 too, beside what is read.
        """
        if self.device.type != "cpu":
            return self._loaded(load_ar, "ar")
        rounded = torch.bfloat16 if self.config.precision == "bf16" else torch.float32
        ar = load_ar(self._part("ar"), self._home, rounded).float()
        if self.config.precision == "int8":
            quantise(ar)
        return self._waiting(ar)

    @cached_property
    def dit(self) -> STDiT3:
        """The guided diffusion transformer."""
        return self._dit("dit")

    @cached_property
    def baseline(self) -> STDiT3:
        """The text-only diffusion transformer; the guided one (used without tokens) if the bundle has no other."""
        return self._dit("dit_base") if "dit_base" in self.artifacts else self.dit

    def _dit(self, name: str) -> STDiT3:
        """On a CPU activations are float32, and products of the precision asked for, where it has that."""
        if self.device.type != "cpu":
            return self._loaded(load_dit, name)
        dit = load_dit(self._part(name), self._home)
        if self.config.precision == "int8":
            quantise(dit, self._dtype)
        elif self._dtype is torch.bfloat16:
            in_bf16(dit)
        return self._waiting(dit)

    def _loaded(self, load: Callable[[Path, torch.device, torch.dtype], M], name: str) -> M:
        """A part in the precision that the configuration asks for."""
        if self.config.precision != "int8":
            return self._waiting(load(self._part(name), self._home, self._dtype))
        # the device never holds it whole
        quantise(model := load(self._part(name), torch.device("cpu"), self._dtype))
        return self._waiting(model.to(self._home))

    @property
    def offloads_idle(self) -> bool:
        """Whether parts are on the device only while they work."""
        return self.offload in ("idle", "all")

    @property
    def _home(self) -> torch.device:
        """Where a part is when it is loaded."""
        return torch.device("cpu") if self.offloads_idle else self.device

    def _waiting(self, model: M) -> M:
        if self.offloads_idle:
            self.turns.waits(model)
        return model

    def at_work(self, part: nn.Module) -> AbstractContextManager[None]:
        """Within it a part of this bundle is on its device; see `Turns.at_work`."""
        return self.turns.at_work(part)

    def _part(self, name: str) -> Path:
        """Raises ArtifactError if the bundle is text-only and the part belongs to guidance."""
        if name not in self.artifacts:
            raise ArtifactError(f"{self.path}: has no {name}: this bundle is text-only; ask for the baseline")
        return self.path / PARTS[name][0]


def load_bundle(path: str | Path, device: str | torch.device = "cpu", offload: Offload = "none") -> Bundle:
    """Open a bundle. Raises ArtifactError, in one line, if a part is missing, damaged, or of another lineage."""
    return Bundle(path, device, offload)


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        raise ArtifactError(f"{path.parent}: not a bundle: {path.name} is missing")
    return read_object(path)


def _check_manifest(artifacts: Mapping[str, Artifact], recorded: Any, where: str) -> None:
    """The parts that are here must be the ones that the bundle was made of."""
    if not isinstance(recorded, dict):
        raise ArtifactError(f"{where}: damaged {MANIFEST}: it lists no parts")
    for name in PARTS:
        if name not in artifacts and name not in recorded:
            continue
        if name not in recorded:
            raise ArtifactError(f"{where}: {name} is here, but {MANIFEST} does not list it: make the bundle again")
        if name not in artifacts:
            raise ArtifactError(f"{where}: {MANIFEST} lists {name}, but it is missing: make the bundle again")
        made_of, here = str(recorded[name]), artifacts[name].fingerprint
        if here != made_of:
            raise ArtifactError(
                f"{where}: {name} here is {here[:12]}…, but {MANIFEST} records {made_of[:12]}…: "
                "the part was exchanged; make the bundle again"
            )


def _check(artifacts: Mapping[str, Artifact], text_identity: str, where: str) -> None:
    """Every part must have been trained on the other parts that are here."""
    guided = any(name in artifacts for name in GUIDED)
    for name in ("vae", *(GUIDED if guided else ("dit_base",))):
        if name not in artifacts:
            raise ArtifactError(f"{where}: {name} is missing")
    here = {name: artifact.fingerprint for name, artifact in artifacts.items()} | {"text": text_identity}
    for name, artifact in artifacts.items():
        for role, trained_on in artifact.lineage.parents.items():
            blind = role == "text" and name.startswith("codec")  # it sees latents alone
            if role in here and role != name and here[role] != trained_on and not role.startswith("dit") and not blind:
                raise ArtifactError(
                    f"{where}: {name} was trained on {role} {trained_on[:20]}…, but {role} here is "
                    f"{here[role][:20]}…: use parts of one pipeline run"
                )
    for name, artifact in artifacts.items():
        for role in PARENTS.get(name, ()):
            if role not in artifact.lineage.parents:
                raise ArtifactError(f"{where}: {name} has no recorded parent {role}: train it again")
