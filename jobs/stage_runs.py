"""One function a stage: work out its key, skip it if its artefact is there, else train it on Ray Train.

Used by `jobs/train_*.py` and by `jobs/pipeline.py`, so that both do the same. Workers build their stage from paths.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from arlon_ray import mirror
from arlon_ray.artifact import Artifact, finished, load_artifact
from arlon_ray.config import Config, TrainingConfig, config_fingerprint, effective_settings
from arlon_ray.opensora.importing import DIT_FIELDS
from arlon_ray.training.engine import Stage
from arlon_ray.training.loop import Reporter
from arlon_ray.training.memory import step_flops
from arlon_ray.training.stages.ar import ArPaths, ArStage
from arlon_ray.training.stages.codec import CodecStage
from arlon_ray.training.stages.dit import DitPaths, DitStage, initial_dit
from arlon_ray.training.stages.vae import VaeStage
from data_pipeline.manifest import DatasetManifest, TokenManifest, read_manifest, settings_key
from data_pipeline.pixels import PixelClips
from data_pipeline.reader import BucketBatches, LatentDataset
from data_pipeline.sources import find_sources
from jobs.command_line import InputError
from jobs.ray_training import StageFactory, check_workers, train_stage
from jobs.tracking import Tracking

Role = Literal["fine", "coarse"]
#: What the evaluations of a stage measure, by the kind of its artefact.
FIGURES = {"vae": VaeStage.figures, "codec": CodecStage.figures, "ar": ArStage.figures, "dit": DitStage.figures}


@dataclass(frozen=True)
class StageOutcome:
    """A stage's artefact; `skipped`: it was there already, made from the same settings and parents."""

    artifact: Artifact
    skipped: bool


def report(outcome: StageOutcome) -> None:
    """Say on the screen what a stage ended with and where it is."""
    figures = "  ".join(f"{name} {value:.4g}" for name, value in outcome.artifact.lineage.metrics.items())
    where = mirror.named(str(outcome.artifact.path))
    print(f"{'nothing to do, it is there' if outcome.skipped else 'done'}: {where}  {figures}")


@dataclass(frozen=True)
class StagePlan:
    """What `_run` needs to know of one stage. `arguments` go to the factory in every worker."""

    name: str
    kind: str
    factory: StageFactory
    arguments: dict[str, Any]
    training: TrainingConfig
    #: With seed, parents and `more` all that determines the result.
    sections: Mapping[str, BaseModel]
    parents: dict[str, str]
    more: dict[str, Any] = field(default_factory=dict)

    def key(self, seed: int) -> str:
        """sha256 of all that determines the result."""
        settings = {"config": config_fingerprint(*self.sections.values()), "seed": seed, **self.more}
        return settings_key({"stage": self.name, "parents": self.parents, **settings})

    def settings(self, seed: int) -> dict[str, Any]:
        """The same for people."""
        return {**effective_settings(**self.sections), "seed": seed, **self.more, **self.parents}


def _run(
    plan: StagePlan,
    config: Config,
    output: Path,
    tracking: Tracking | None,
    reporters: Sequence[Reporter] | None = None,
) -> StageOutcome:
    check_workers(plan.name, plan.training, config)
    check_figure(plan)
    key = plan.key(config.seed)
    if there := finished(output, plan.kind, key):
        return StageOutcome(there, skipped=True)
    # what the workers would find wrong with the data is found here first, before anything starts
    if plan.factory is not build_vae:
        _batches(config, plan.training, plan.arguments["dataset"], plan.parents, plan.arguments.get("tokens"))
    artifact = train_stage(
        plan.name,
        plan.factory,
        {"config": config, **plan.arguments},
        config=config,
        training=plan.training,
        output=output,
        key=key,
        tracking=tracking,
        parents=plan.parents,
        settings=plan.settings(config.seed),
        reporters=reporters,
        flops=step_flops(config, "dit" if plan.kind == "dit" else plan.name),
    )
    return StageOutcome(artifact, skipped=False)


def check_figure(plan: StagePlan) -> None:
    """Raises InputError if `keep_best` names a figure that the stage does not measure."""
    if (figure := plan.training.keep_best) and figure not in FIGURES[plan.kind]:
        raise InputError(
            f"{plan.name}: training.keep_best={figure}: expected one of {', '.join(sorted(FIGURES[plan.kind]))}"
        )


def run_vae(
    config: Config, inputs: Sequence[tuple[str, float]], output: Path, tracking: Tracking | None = None
) -> StageOutcome:
    """Train the small VAE on the videos of weighted folders. Raises InputError if one of them holds no video."""
    if config.vae.kind != "folded":
        raise InputError(f"vae.kind={config.vae.kind}: only the folded VAE is trained here; import Open-Sora's")
    files = []
    for folder, weight in inputs:
        found = sorted([source.name, source.size, source.identity] for source in find_sources(folder, config.data))
        if not found:
            raise InputError(f"--input {folder}: no video files (.mp4, .mkv, .webm, …)")
        files.append([weight, found])
    sections = {"vae": config.vae, "video": config.video}
    arguments = {"inputs": list(inputs)}
    plan = StagePlan("vae", "vae", build_vae, arguments, config.vae.training, sections, {}, {"inputs": files})
    return _run(plan, config, output, tracking)


def run_codec(
    config: Config,
    role: Role,
    dataset: Path,
    vae: Path,
    output: Path,
    tracking: Tracking | None = None,
    *,
    reporters: Sequence[Reporter] | None = None,
) -> StageOutcome:
    """Train the fine or the coarse latent VQ-VAE."""
    codec = getattr(config.vqvae, role)
    parents = check_dataset(dataset, vae)
    arguments = {"role": role, "dataset": dataset, "vae": vae, "parents": parents}
    plan = StagePlan(
        f"vqvae_{role}", "codec", build_codec, arguments, codec.training, {f"vqvae.{role}": codec}, parents
    )
    return _run(plan, config, output, tracking, reporters)


def fitting_codec(path: str | Path, role: Role, vae: Path) -> Path:
    """The codec that `vqvae.<role>.init` names. Raises InputError if it is of another VAE, ArtifactError if none."""
    codec, here = load_artifact(path, "codec"), load_artifact(vae, "vae").fingerprint
    if (trained_on := codec.lineage.parents.get("vae", here)) != here:
        raise InputError(f"vqvae.{role}.init={path}: of VAE {trained_on[:12]}…, but {vae} is {here[:12]}…")
    return codec.path


def run_ar(
    config: Config,
    dataset: Path,
    tokens: Path,
    vae: Path,
    codec_fine: Path,
    output: Path,
    tracking: Tracking | None = None,
    *,
    reporters: Sequence[Reporter] | None = None,
) -> StageOutcome:
    """Train the AR on the fine tokens."""
    parents = check_dataset(dataset, vae) | _token_parents(tokens)
    _expect(codec_fine, "codec", parents["codec_fine"], f"{tokens}: made by the fine codec")
    if config.ar.init:
        parents["ar_init"] = _fitting_ar(config, parents).fingerprint
    sections = {"ar": config.ar, "segment": config.segment, "text": config.text}
    paths = ArPaths(codec_fine, vae)
    arguments = {"dataset": dataset, "tokens": tokens, "paths": paths, "parents": parents}
    plan = StagePlan("ar", "ar", build_ar, arguments, config.ar.training, sections, parents)
    return _run(plan, config, output, tracking, reporters)


def run_dit(
    config: Config,
    dataset: Path,
    vae: Path,
    output: Path,
    tokens: Path | None = None,
    codecs: tuple[Path, Path] | None = None,
    tracking: Tracking | None = None,
    ar: Path | None = None,
    *,
    reporters: Sequence[Reporter] | None = None,
) -> StageOutcome:
    """Train the DiT, guided by tokens; with `dit.injection.enabled=false` the text-only one, which needs no tokens.

    `ar` gives the tokens of `dit.ar_token_probability`.
    """
    parents, paths = check_dataset(dataset, vae), DitPaths(vae)
    guided = config.dit.injection.enabled
    if guided:
        if tokens is None or codecs is None:
            raise InputError("semantic injection needs --tokens and both codecs; or set dit.injection.enabled=false")
        parents |= _token_parents(tokens)
        for role, path in zip(("fine", "coarse"), codecs, strict=True):
            _expect(path, "codec", parents[f"codec_{role}"], f"{tokens}: made by the {role} codec")
        paths = DitPaths(vae, *codecs, ar=_token_giver(config, ar, parents))
    if config.dit.train_only == "injection" and not guided:
        raise InputError("dit.train_only=injection needs dit.injection.enabled=true: there is nothing to train")
    if config.dit.train_only == "injection" and not config.dit.init:
        raise InputError("dit.train_only=injection needs dit.init: a base with random weights would stay as it is")
    if config.dit.init:
        parents["dit_init"] = _fitting_start(config, parents).fingerprint
    sections = {"dit": config.dit, "segment": config.segment, "video": config.video}
    arguments = {"dataset": dataset, "tokens": tokens if guided else None, "paths": paths, "parents": parents}
    name = "dit" if guided else "dit_base"
    plan = StagePlan(name, "dit", build_dit, arguments, config.dit.training, sections, parents)
    return _run(plan, config, output, tracking, reporters)


def _token_giver(config: Config, ar: Path | None, parents: dict[str, str]) -> Path | None:
    """The AR whose tokens the DiT trains on, noted in `parents`. Raises InputError if it does not fit."""
    if not config.dit.ar_token_probability:
        return None
    if ar is None:
        raise InputError(f"dit.ar_token_probability={config.dit.ar_token_probability:g} needs an AR: name it with --ar")
    giver = load_artifact(ar, "ar")
    _expect_parents(f"--ar {ar}", giver, {"codec_fine": "fine codec"}, parents, must_say=True)
    parents["ar_tokens"] = giver.fingerprint
    return ar


def _expect_parents(
    name: str, artifact: Artifact, roles: dict[str, str], parents: dict[str, str], *, must_say: bool = False
) -> None:
    """Raises InputError if the artefact is of other parents than these, or (`must_say`) does not name its own."""
    for role, what in roles.items():
        if (trained_on := artifact.lineage.parents.get(role, "" if must_say else parents[role])) != parents[role]:
            raise InputError(f"{name}: of {what} {trained_on[:24]}…, but the data is of {parents[role][:24]}…")


def _fitting_ar(config: Config, parents: dict[str, str]) -> Artifact:
    """What `ar.init` names. Raises InputError if it is another model, or of another codec or text encoder."""
    start, ours = load_artifact(str(config.ar.init), "ar"), config.ar.model_dump(mode="json")
    for name in ("dim", "layers", "heads", "mlp_ratio", "block"):
        if start.config[name] != ours[name]:
            raise InputError(f"ar.init={start.path}: {name}={start.config[name]}, but ar.{name}={ours[name]} here")
    _expect_parents(f"ar.init={start.path}", start, {"codec_fine": "fine codec", "text": "text encoder"}, parents)
    return start


def _fitting_start(config: Config, parents: dict[str, str]) -> Artifact:
    """What `dit.init` names. Raises InputError if it is another model, or of another VAE or text encoder."""
    start = initial_dit(str(config.dit.init))
    ours = config.dit.model_dump(mode="json")
    for name in (*DIT_FIELDS, "temporal_attention"):
        if start.config[name] != ours[name]:
            raise InputError(f"dit.init={start.path}: {name}={start.config[name]}, but dit.{name}={ours[name]} here")
    theirs, injection = start.config["injection"], ours["injection"]
    if theirs["enabled"] and injection["enabled"] and theirs != injection:
        raise InputError(f"dit.init={start.path}: its injection is {theirs}, but here {injection}")
    _expect_parents(f"dit.init={start.path}", start, {"vae": "VAE", "text": "text encoder"}, parents)
    return start


def build_vae(config: Config, inputs: Sequence[tuple[str, float]]) -> Stage:
    """In a worker: the VAE stage over folders of videos."""
    source = PixelClips(inputs, config.video, config.data, config.vae.training.held_out)
    return VaeStage(config.vae, source, config.seed)


def build_codec(config: Config, role: Role, dataset: Path, vae: Path, parents: dict[str, str]) -> Stage:
    """In a worker: a codec stage over a latent dataset."""
    codec = getattr(config.vqvae, role)
    source = _batches(config, codec.training, dataset, parents, tokens=None)
    return CodecStage(codec, role, config.vae.latent_channels, source, vae, parents, config.seed)


def build_ar(config: Config, dataset: Path, tokens: Path, paths: ArPaths, parents: dict[str, str]) -> Stage:
    """In a worker: the AR stage; it reads no latents."""
    source = _batches(config, config.ar.training, dataset, parents, tokens, latents=False)
    return ArStage(config, source, paths, parents)


def build_dit(config: Config, dataset: Path, tokens: Path | None, paths: DitPaths, parents: dict[str, str]) -> Stage:
    """In a worker: the DiT stage."""
    return DitStage(config, _batches(config, config.dit.training, dataset, parents, tokens), paths, parents)


def _batches(
    config: Config,
    training: TrainingConfig,
    dataset: Path,
    parents: dict[str, str],
    tokens: Path | None,
    latents: bool = True,
) -> BucketBatches:
    opened = LatentDataset(dataset, expect_vae=parents["vae"], tokens=tokens)
    return BucketBatches(
        opened,
        training.batch_size,
        config.seed,
        held_out=training.held_out,
        share=training.data_share,
        latents=latents,
        cache_bytes=config.data.cache_bytes,
    )


def check_dataset(dataset: Path, vae: Path) -> dict[str, str]:
    """The dataset's parents. Raises ArtifactError or InputError if it is unfinished, or another VAE's."""
    manifest = read_manifest(dataset, DatasetManifest)
    _expect(vae, "vae", manifest.vae_fingerprint, f"{dataset}: encoded by the VAE")
    return {"dataset": manifest.fingerprint, "vae": manifest.vae_fingerprint, "text": manifest.text_identity}


def _token_parents(tokens: Path) -> dict[str, str]:
    manifest = read_manifest(tokens, TokenManifest)
    return {"codec_fine": manifest.fine_fingerprint, "codec_coarse": manifest.coarse_fingerprint}


def _expect(path: Path, kind: str, fingerprint: str, what: str) -> None:
    found = load_artifact(path, kind).fingerprint
    if found != fingerprint:
        raise InputError(f"{what} {fingerprint[:12]}…, but {path} is {found[:12]}…: use the one it was made with")
