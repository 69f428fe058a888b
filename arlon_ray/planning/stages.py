"""Hours, bytes and money of preprocessing, token extraction and each training, and what holds each of them up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from arlon_ray.config import Config, DitConfig, TrainingConfig
from arlon_ray.planning import training
from arlon_ray.planning.counts import TRAINING, codec_group, text_caption, vae_group
from arlon_ray.planning.dataset import Videos, clips_of, latent_row_bytes, token_row_bytes
from arlon_ray.planning.hardware import CPU, Hardware
from arlon_ray.planning.media import clip_work
from arlon_ray.training.memory import training_of

HOUR = 3600.0
CPUS, DEVICES, NETWORK, DISKS, FEW = "CPU cores", "GPUs", "network between nodes", "reading the data", "the batch"


@dataclass(frozen=True)
class Prices:
    """Dollars: of a GPU and of a CPU core for an hour, of a terabyte stored for a month, of one sent."""

    gpu_hour: float
    cpu_core_hour: float = 0.04
    stored_tb_month: float = 23.0
    sent_tb: float = 0.0


@dataclass(frozen=True)
class Cluster:
    """`gpus` of one kind, nodes of `gpus_per_node` that reach each other and the storage at `bandwidth` bytes a second
    each, and `cpu_cores` in all. Without GPUs everything runs on the cores (then `gpu` is `hardware.CPU`).
    """

    gpus: int
    gpu: Hardware
    cpu_cores: int
    prices: Prices
    bandwidth: float = 25e9
    gpus_per_node: int = 8
    core: Hardware = CPU

    @property
    def nodes(self) -> int:
        """Machines."""
        return max(1, -(-self.gpus // self.gpus_per_node))

    @property
    def devices(self) -> int:
        """What models can run on: GPUs, or cores where there are none."""
        return self.gpus or self.cpu_cores


class Rows(NamedTuple):
    """The data set: clips, their mean length in 17-frame groups, and bytes of a clip's latent and token rows."""

    clips: float
    groups: float
    latent_bytes: float
    token_bytes: float


@dataclass(frozen=True)
class StagePlan:
    """One stage. `parts`: hours that each resource would take alone; `bottleneck` is the one that takes longest."""

    name: str
    hours: float
    gpu_hours: float
    core_hours: float
    network_bytes: float
    stored_bytes: float
    money: float
    bottleneck: str
    parts: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def rows_of(config: Config, videos: Videos) -> Rows:
    """What preprocessing leaves of the videos, if no clip is filtered out. Raises ValueError if they are too short."""
    clips = clips_of(config, videos.seconds)
    if not clips:
        shortest = min(config.data.bucket_groups) * 17 / config.video.fps
        raise ValueError(f"videos of {videos.seconds:g} s give no clip: the shortest is {shortest:.2f} s")
    latent, tokens = (
        sum(of_row) / len(clips)
        for of_row in (
            [latent_row_bytes(config, groups, videos.caption_tokens) for groups in clips],
            [token_row_bytes(config, groups) for groups in clips],
        )
    )
    return Rows(videos.count * len(clips), sum(clips) / len(clips), latent, tokens)


def plan_preprocess(config: Config, videos: Videos, cluster: Cluster) -> StagePlan:
    """Decode, score, VAE and text encoder: the stages stream, so the slowest resource sets the pace."""
    rows = rows_of(config, videos)
    frames = rows.groups * 17 * rows.clips / videos.count
    work = clip_work(videos.seconds * videos.fps, videos.height * videos.width, frames, _pixels(config))
    decoding = videos.count * cluster.core.seconds("clip", work)
    length = min(videos.caption_tokens, config.text.max_tokens)
    encoding = rows.clips * (
        cluster.gpu.seconds("vae_encode", vae_group(config, encode=True) * rows.groups)
        + cluster.gpu.seconds("text", text_caption(config.text, length))
    )
    stored = rows.clips * rows.latent_bytes
    return _streamed(
        "preprocess", cluster, decoding, encoding, videos.count * videos.file_bytes + stored, stored, ("vae_encode",)
    )


def plan_tokens(config: Config, videos: Videos, cluster: Cluster) -> StagePlan:
    """Latents to the tokens of both codecs."""
    rows = rows_of(config, videos)
    group = codec_group(config, "fine", encode=True) + codec_group(config, "coarse", encode=True)
    seconds = rows.clips * cluster.gpu.seconds("codec", group * rows.groups)
    stored = rows.clips * rows.token_bytes
    return _streamed(
        "extract tokens", cluster, 0.0, seconds, rows.clips * rows.latent_bytes + stored, stored, ("codec",)
    )


def _streamed(
    name: str, cluster: Cluster, core_s: float, device_s: float, moved: float, stored: float, models: tuple[str, ...]
) -> StagePlan:
    """A stage of Ray Data whose resources work at the same time."""
    if not cluster.gpus:
        parts = {CPUS: (core_s + device_s) / cluster.cpu_cores / HOUR}
    else:
        parts = {CPUS: core_s / cluster.cpu_cores / HOUR, DEVICES: device_s / cluster.gpus / HOUR}
    parts[DISKS] = moved / (cluster.nodes * cluster.bandwidth) / HOUR
    hours = max(parts.values())
    return _priced(
        name, cluster, hours, cluster.gpus * hours, cluster.cpu_cores * hours, moved, stored, parts,
        _estimates(cluster, models),
    )  # fmt: skip


def plan_training(config: Config, stage: str, rows: Rows, cluster: Cluster, epochs: float | None = None) -> StagePlan:
    """A training by its own settings; with `epochs` as many steps as these take, instead of `steps`.

    The engine does not communicate while it computes (`overlap_comm` is off), but samples are read meanwhile.
    """
    settings = training_of(config, stage)
    workers = usable_workers(settings, cluster.devices)
    micro = max(1, settings.batch_size * settings.sequence_parallel // workers)
    steps = settings.steps if epochs is None else max(1, round(epochs * rows.clips / settings.batch_size))
    base = config.dit.base_steps if stage == "dit" and epochs is None else 0
    compute = steps * _step_s(config, stage, micro, workers, cluster)
    if base:
        without = config.model_copy(update={"dit": _text_only(config)})
        compute += base * _step_s(without, stage, micro, workers, cluster)
    steps += base
    trained, _ = training.parameters(config, stage)
    sent = training.sent_bytes(trained, workers, settings.zero_stage, settings.accumulation)
    within = not cluster.gpus or workers <= cluster.gpus_per_node
    # a ring enters and leaves each node once: its GPUs share the node's connection, and use it for one worker's bytes
    link = cluster.gpu.link if within else cluster.bandwidth
    nodes = -(-workers // cluster.gpus_per_node)
    row = rows.latent_bytes + (0 if stage.startswith("vqvae") else rows.token_bytes)
    read = settings.batch_size * row
    parts = {
        DEVICES if cluster.gpus else CPUS: compute / HOUR,
        "exchange within a node" if within else NETWORK: steps * sent / link / HOUR,
        DISKS: steps * read / (cluster.nodes * cluster.bandwidth) / HOUR,
    }
    names = list(parts)
    hours = max(parts[names[0]], parts[DISKS]) + parts[names[1]]
    notes = list(_estimates(cluster, (f"train_{_measured(stage)}",)))
    if workers < cluster.devices:
        notes.append(f"a batch of {settings.batch_size} keeps {workers} of {cluster.devices} devices busy")
    cores = workers * (config.cluster.cpus_per_worker if cluster.gpus else 1)
    stored = training.KEPT * training.checkpoint_bytes(config, stage) + 4.0 * trained
    return _priced(
        f"train {stage}", cluster, hours, (workers if cluster.gpus else 0) * hours, cores * hours,
        steps * (read + (0 if within else sent * nodes)), stored, parts, tuple(notes),
    )  # fmt: skip


def usable_workers(settings: TrainingConfig, devices: int) -> int:
    """The most workers that a batch can be split over evenly."""
    shared = settings.sequence_parallel
    parts = settings.batch_size // settings.accumulation
    most = max(shared, min(devices, parts * shared)) // shared
    return next(count for count in range(most, 0, -1) if parts % count == 0) * shared


def _step_s(config: Config, stage: str, micro: int, workers: int, cluster: Cluster) -> float:
    """Seconds of computing in one step of a worker."""
    settings = training_of(config, stage)
    work = training.batch_work(config, stage, micro)
    if settings.activation_checkpointing:
        work += work * (settings.checkpointed_share / TRAINING)
    if stage == "dit":
        work += training.guide_work(config) * micro
    work = work * (1 / settings.sequence_parallel)
    split = workers if settings.zero_stage and settings.optimizer == "adamw" else 1
    kind = f"train_{_measured(stage)}{'_compiled' if settings.compile and cluster.gpus else ''}"
    return cluster.gpu.seconds(kind, work + training.optimizer_work(config, stage) * (1 / split))


def _measured(stage: str) -> str:
    return "codec" if stage.startswith("vqvae") else stage


def _text_only(config: Config) -> DitConfig:
    return config.dit.model_copy(update={"injection": config.dit.injection.model_copy(update={"enabled": False})})


def _pixels(config: Config) -> int:
    return config.video.height * config.video.width


def _estimates(cluster: Cluster, stages: tuple[str, ...]) -> tuple[str, ...]:
    if cluster.gpu.scaled_from:
        return (f"an estimate: scaled from the {cluster.gpu.scaled_from} by data sheets",)
    if any(cluster.gpu.estimated(stage) for stage in stages):
        return ("an estimate: not measured on this device, taken to be like the DiT",)
    return ()


def _priced(
    name: str,
    cluster: Cluster,
    hours: float,
    gpu_hours: float,
    core_hours: float,
    moved: float,
    stored: float,
    parts: Mapping[str, float],
    notes: tuple[str, ...],
) -> StagePlan:
    prices = cluster.prices
    money = gpu_hours * prices.gpu_hour + core_hours * prices.cpu_core_hour + moved / 1e12 * prices.sent_tb
    bottleneck = max(parts, key=lambda part: parts[part])
    return StagePlan(name, hours, gpu_hours, core_hours, moved, stored, money, bottleneck, dict(parts), notes)


def trained_stages(config: Config) -> list[str]:
    """What the pipeline trains, in order."""
    fixed = {f"vqvae_{role}" for role in ("fine", "coarse") if getattr(config.vqvae, role).init}
    vae = ["vae"] if config.vae.train else []
    return [*vae, *(s for s in ("vqvae_fine", "vqvae_coarse", "ar", "dit") if s not in fixed)]
