"""How much memory a worker needs to train a stage, found without any of it: shapes go through the model, not numbers.

Forward and backward run on fake tensors while torch's own tracker follows what is alive; what ZeRO splits is reckoned
from the numbers of parameters. Bytes of float32 unless said otherwise.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from arlon_ray.config import GROUP_FRAMES, GROUP_LATENTS, Config, TrainingConfig
from arlon_ray.models.ar import ArTransformer
from arlon_ray.models.codec import LatentCodec
from arlon_ray.models.dit import STDiT3
from arlon_ray.models.vae import FoldedVAE
from arlon_ray.training.engine import blocks_of, parameter_counts, recompute_blocks
from arlon_ray.training.optimizer import parameter_groups

FLOAT = 4
#: Elements of one of DeepSpeed's reductions: its own default reserves 2 GB in every worker.
BUCKET_ELEMENTS = 20_000_000
#: Layers of the two models that a deeper one is reckoned from.
SHALLOW = (4, 8)
PLANNED = ("vae", "vqvae_fine", "vqvae_coarse", "ar", "dit")


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of one worker, beside those of the process itself; `offloaded` lies in main memory.

    `activations` are what forward and backward need at their peak beyond the room of all gradients: the activations
    are most when most of the gradients are not there yet.
    """

    parameters: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    communication: int
    offloaded: int

    @property
    def total(self) -> int:
        """On the device at the peak."""
        return sum(asdict(self).values()) - self.offloaded


@dataclass(frozen=True)
class Probe:
    """The model of a stage, its training, the loss of one micro-batch, and frozen parts beside it (parameters)."""

    model: nn.Module
    training: TrainingConfig
    loss: Callable[[], Tensor]
    frozen: int = 0


def plan_memory(config: Config, stage: str, workers: int, peak: tuple[int, int] | None = None) -> MemoryPlan:
    """The plan of a worker for `stage` (one of `PLANNED`), by its training settings.

    Captions are taken to be as long as they may be. `peak` is `activations_at_peak` of a worker's batch, where that is
    known: for a large model it takes most of the time. Raises ValueError for another stage.
    """
    training = training_of(config, stage)
    shared = training.sequence_parallel
    batch = max(1, training.batch_size * shared // workers // training.accumulation)
    with FakeTensorMode():
        probe = probe_of(config, stage, batch)
        counts = parameter_counts(probe.model)
        muon = sum(
            parameter.numel()
            for group in parameter_groups(probe.model, training)
            if group["use_muon"]
            for parameter in group["params"]
        )
        largest = max((sum(p.numel() for p in block.parameters()) for block in blocks_of(probe.model)), default=0)
    peak = peak or activations_at_peak(config, stage, batch)
    return _plan(training, workers, counts, probe.frozen, muon, largest, peak)


def step_flops(config: Config, stage: str) -> int:
    """Floating-point operations of forward and backward of one batch of the largest clips, over all workers.

    Without those of frozen parts and of blocks that are computed again: what model FLOPs utilisation is reckoned from.
    """
    counter = FlopCounterMode(display=False)
    # the counter knows nothing of the CPU's fused attention
    with FakeTensorMode(), sdpa_kernel(SDPBackend.MATH):
        probe = probe_of(config, stage, 1)
        with counter:
            probe.loss().backward()
    return counter.get_total_flops() * training_of(config, stage).batch_size


def probe_of(config: Config, stage: str, batch: int) -> Probe:
    """The model of a stage with inputs of zeros, or of nothing in particular: for memory and time, not for training."""
    return _PROBES[stage](config, batch)


def training_of(config: Config, stage: str) -> TrainingConfig:
    """The settings of the stage's training. Raises ValueError for a stage that there is not."""
    if stage not in PLANNED:
        raise ValueError(f"stage {stage}: expected one of {', '.join(PLANNED)}")
    section = (
        getattr(config.vqvae, stage.removeprefix("vqvae_")) if stage.startswith("vqvae") else getattr(config, stage)
    )
    return section.training


def _plan(
    training: TrainingConfig,
    workers: int,
    counts: tuple[int, int],
    frozen: int,
    muon: int,
    largest: int,
    peak: tuple[int, int],
) -> MemoryPlan:
    """`counts`: parameters that train, and frozen ones; `largest`: those of the largest block.

    `peak`: `activations_at_peak`.
    """
    trained, zero = counts[0], training.zero_stage
    share = -(-trained // workers)
    kept = 2 * (trained - muon) + muon
    # DeepSpeed's optimizers of ZeRO step copies of the parameters
    states = (kept if not zero else -(-kept // workers) + share) * FLOAT
    split = {0: (trained, trained), 1: (trained, trained + share), 2: (trained, share), 3: (share + 2 * largest, share)}
    parameters, gradients = split[zero]
    missing = gradients * FLOAT * max(0.0, 1 - peak[1] / (sum(counts) * FLOAT))
    return MemoryPlan(
        parameters=(parameters + counts[1] + frozen) * FLOAT,
        gradients=gradients * FLOAT,
        optimizer=0 if training.offload_optimizer else states,
        average=(share if zero else trained) * FLOAT if training.ema_decay else 0,
        activations=max(0, peak[0] - round(missing)),
        communication=BUCKET_ELEMENTS * FLOAT if zero and workers > 1 else 0,
        offloaded=states if training.offload_optimizer else 0,
    )


def activations_at_peak(config: Config, stage: str, batch: int) -> tuple[int, int]:
    """What is alive at the peak of forward and backward beside parameters: activations, and gradients of all of them.

    Of a deep model it is reckoned from two shallow ones: layers are alike, and following all takes minutes.
    """
    name = {"dit": "depth", "ar": "layers"}.get(stage)
    depth = getattr(getattr(config, stage), name) if name else 0
    if name is None or depth <= SHALLOW[1]:
        return _followed(config, stage, batch)
    part = getattr(config, stage)
    less, more = (
        _followed(config.model_copy(update={stage: part.model_copy(update={name: layers})}), stage, batch)
        for layers in SHALLOW
    )
    deeper = (depth - SHALLOW[1]) / (SHALLOW[1] - SHALLOW[0])
    activations, gradients = (round(many + deeper * (many - few)) for few, many in zip(less, more, strict=True))
    return activations, gradients


def _followed(config: Config, stage: str, batch: int) -> tuple[int, int]:
    """The same of a model as it is, followed tensor by tensor."""
    training = training_of(config, stage)
    with FakeTensorMode():
        probe = probe_of(config, stage, batch)
        for parameter in probe.model.parameters():
            parameter.requires_grad_(True)  # the tracker asks for it
        if training.activation_checkpointing:
            recompute_blocks(probe.model, training.checkpointed_share)
        tracker: Any = MemTracker()
        tracker.track_external(probe.model)
        arithmetic = torch.autocast("cpu", torch.bfloat16) if training.precision == "bf16" else nullcontext()
        with tracker:
            with arithmetic:
                loss = probe.loss()
            loss.backward()
        (peak,) = tracker.get_tracker_snapshot("peak").values()
    alive = {str(kind).rpartition(".")[2]: its for kind, its in peak.items()}
    gradients = alive.pop("GRAD", 0)
    return sum(its for kind, its in alive.items() if kind not in ("PARAM", "Total")), gradients


def _vae(config: Config, batch: int) -> Probe:
    vae = FoldedVAE(config.vae).train()

    def loss() -> Tensor:
        video = torch.empty(batch, 3, GROUP_FRAMES, config.video.height, config.video.width)
        posterior = vae.posterior(video)
        return (vae.reconstruct(posterior.mean) - video).square().mean()

    return Probe(vae, config.vae.training, loss)


def _codec(role: str) -> Callable[[Config, int], Probe]:
    def probe(config: Config, batch: int) -> Probe:
        codec = LatentCodec(getattr(config.vqvae, role), config.vae.latent_channels).train()

        def loss() -> Tensor:
            latents = torch.empty(batch, config.vae.latent_channels, _frames(config), *config.latent_grid)
            features = codec.features(latents)
            rebuilt = codec.rebuild(features, batch, config.latent_grid)
            return F.mse_loss(rebuilt, latents)

        return Probe(codec, getattr(config.vqvae, role).training, loss)

    return probe


def _frames(config: Config) -> int:
    """Latent frames of the longest clips."""
    return max(config.data.bucket_groups) * GROUP_LATENTS


def _text(config: Config, batch: int) -> tuple[Tensor, Tensor]:
    length = config.text.max_tokens
    return torch.empty(batch, length, config.text.dim), torch.ones(batch, length, dtype=torch.bool)


def _ar(config: Config, batch: int) -> Probe:
    codec, text = config.vqvae.fine, config.text
    model = ArTransformer(config.ar, codebook_size=codec.codebook_size, text_dim=text.dim, max_text=text.max_tokens)
    groups = min(config.ar_window_groups, max(config.data.bucket_groups))

    def loss() -> Tensor:
        tokens = torch.zeros(batch, *config.token_grid(codec, groups), dtype=torch.int64)
        logits = model(*_text(config, batch), tokens).float().flatten(0, 3)
        return F.cross_entropy(logits, tokens.flatten())

    return Probe(model.train(), config.ar.training, loss)


def _dit(config: Config, batch: int) -> Probe:
    dit, guided = STDiT3(config.dit).train(), config.dit.injection.enabled
    if config.dit.train_only == "injection" and dit.injection is not None:
        dit.requires_grad_(False)
        dit.injection.requires_grad_(True)
    frames = config.anchor_latents + min(config.segment.latents, _frames(config))
    frames = -(-frames // config.dit.training.sequence_parallel)
    codecs = (config.vqvae.fine, config.vqvae.coarse) if guided else ()
    frozen = sum(parameter_counts(LatentCodec(codec, config.vae.latent_channels))[0] for codec in codecs)

    def loss() -> Tensor:
        x = torch.empty(batch, config.dit.in_channels, frames, *config.latent_grid)
        text, mask = _text(config, batch)
        size = (config.video.height, config.video.width)
        guide = torch.empty_like(x) if guided else None
        condition = dit.condition((frames, *config.latent_grid), text, mask, torch.empty(batch), size, guide)
        noisy = torch.ones(batch, frames, dtype=torch.bool)
        return (dit.velocity(dit(x, torch.empty(batch), condition, noisy)) - x).square().mean()

    return Probe(dit, config.dit.training, loss, frozen)


_PROBES: dict[str, Callable[[Config, int], Probe]] = {
    "vae": _vae, "vqvae_fine": _codec("fine"), "vqvae_coarse": _codec("coarse"), "ar": _ar, "dit": _dit,
}  # fmt: skip
