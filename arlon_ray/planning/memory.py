"""The memory that making videos takes: weights, and the most that a step holds beside them.

Shapes go through the models, not numbers (the meta device), while the storages that operations make are counted: no
weights are needed, and none of the memory. Bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, cast

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from arlon_ray.config import GROUP_LATENTS, Config, ServeConfig, VaeConfig
from arlon_ray.evaluation.cost import most_bytes
from arlon_ray.models.ar import KeyValueCache
from arlon_ray.models.codec import LatentCodec
from arlon_ray.models.dit import STDiT3
from arlon_ray.models.quantised import quantise, weight_bytes
from arlon_ray.models.vae import build_vae
from arlon_ray.planning.counts import TEXT_SIZES, ar_blocks, branches
from arlon_ray.planning.training import stage_model
from arlon_ray.precision import Weights

META = torch.device("meta")
#: Layers of the two DiTs that a deeper one is reckoned from: multiples of four, so that shares of them listen.
SHALLOW = (4, 8)


@dataclass(frozen=True)
class PartMemory:
    """Bytes of a part's weights, and the most that it needs beside them while it works."""

    weights: int
    working: int

    @property
    def total(self) -> int:
        """Both."""
        return self.weights + self.working


def inference_memory(config: Config, precision: Weights, text_tokens: int | None = None) -> dict[str, PartMemory]:
    """On a GPU, each part that makes a segment of one video: text encoder, AR, fine codec, DiT, VAE's decoder.

    AR and DiT are in `precision`, the text encoder in bf16 unless that is fp32; the VAE in `vae.precision`, the codec
    always in float32. Captions are as long as they may be, unless `text_tokens` says otherwise.
    """
    length = text_tokens or config.text.max_tokens
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    parts = {"text": _text(config, dtype, length), "dit": _dit(config, precision, dtype, length), "vae": _vae(config)}
    if config.dit.injection.enabled and not config.sampling.baseline:
        parts |= {"ar": _ar(config, precision, dtype, length), "codec": _codec(config)}
    return parts


def resident(parts: dict[str, PartMemory], offloaded: bool) -> int:
    """What a device needs for all parts: idle ones stay on it, or lie in main memory (`offloaded`)."""
    if offloaded:
        return max(part.total for part in parts.values())
    return sum(part.weights for part in parts.values()) + max(part.working for part in parts.values())


#: The parts that a replica of each of the service's deployments has. The fine codec is never offloaded.
REPLICAS = {"ar": ("text", "codec", "ar"), "dit": ("text", "codec", "dit"), "decoder": ("codec", "vae")}


def served(parts: dict[str, PartMemory], serve: ServeConfig, text_on_cpu: bool = False) -> dict[str, int]:
    """What a device needs for a replica of each deployment, with their text encoders on it or on the CPU.

    AR and DiT have as many segments at work as share their steps (`max_batch`). All videos are of one kind: who asks a
    guided bundle for baselines too has a second DiT.
    """
    batches = {"ar": serve.ar.max_batch, "dit": serve.dit.max_batch}
    there = {
        name: PartMemory(part.weights, part.working * batches.get(name, 1))
        for name, part in parts.items()
        if name != "text" or not text_on_cpu
    }
    own = {
        name: {part: there[part] for part in its if part in there} for name, its in REPLICAS.items() if its[-1] in there
    }
    return {name: resident(its, offloaded=False) for name, its in own.items()}


class _FusedAttention(TorchFunctionMode):
    """Attention that keeps no scores, as on GPUs: on the meta device it would be the plain one, in float32."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


def _working(call: Callable[[], object]) -> int:
    with torch.no_grad(), _FusedAttention():
        return most_bytes(call)


def _in(model: nn.Module, precision: Weights, dtype: torch.dtype) -> nn.Module:
    model = model.to(dtype).eval().requires_grad_(False)
    return quantise(model) if precision == "int8" else model


def _text(config: Config, dtype: torch.dtype, length: int) -> PartMemory:
    layers, width, hidden, matrices, words = TEXT_SIZES[config.text.kind]
    layers = min(layers, config.text.layers or layers)
    parameters = words * width + layers * (4 * width**2 + matrices * width * hidden)
    working = length * (4 * width + matrices * hidden) + 2 * config.text.max_tokens * width
    return PartMemory(parameters * dtype.itemsize, working * dtype.itemsize)


def _ar(config: Config, precision: Weights, dtype: torch.dtype, length: int) -> PartMemory:
    ar = _in(stage_model(config, "ar"), precision, dtype)
    rows = 1 if config.sampling.ar_guidance_scale == 1.0 else 2
    positions = length + 1 + ar_blocks(config, config.ar_window_groups)
    with META:
        cache = KeyValueCache(ar, rows, positions)  # type: ignore[arg-type]
    shown = rows * positions * (8 * config.ar.dim + 3 * int(config.ar.dim * config.ar.mlp_ratio)) * dtype.itemsize
    return PartMemory(weight_bytes(ar), cache.values.nbytes + shown)


def _dit(config: Config, precision: Weights, dtype: torch.dtype, length: int) -> PartMemory:
    weights = weight_bytes(_in(stage_model(config, "dit"), precision, dtype))
    depth = config.dit.depth
    if depth <= SHALLOW[1]:
        return PartMemory(weights, _dit_working(config, precision, dtype, length))
    # what is kept grows by the layer, and following all of a deep model takes long
    few, many = (_dit_working(_as_deep(config, layers), precision, dtype, length) for layers in SHALLOW)
    return PartMemory(weights, many + (depth - SHALLOW[1]) * (many - few) // (SHALLOW[1] - SHALLOW[0]))


def _as_deep(config: Config, layers: int) -> Config:
    return config.model_copy(update={"dit": config.dit.model_copy(update={"depth": layers})})


def _dit_working(config: Config, precision: Weights, dtype: torch.dtype, length: int) -> int:
    """What a step holds, with all that is prepared for the segment."""
    dit = cast(STDiT3, _in(stage_model(config, "dit"), precision, dtype))
    rows, latent = branches(config), (config.anchor_latents + config.segment.latents, *config.latent_grid)
    guided = config.dit.injection.enabled and not config.sampling.baseline

    def step() -> object:
        x = torch.empty(rows, config.dit.in_channels, *latent, device=META)
        text = torch.empty(rows, length, config.text.dim, device=META)
        size, fps = (config.video.height, config.video.width), torch.empty(rows, device=META)
        condition = dit.condition(latent, text, (length,) * rows, fps, size, x if guided else None)
        noisy = torch.ones(rows, latent[0], dtype=torch.bool, device=META)
        return dit(x, torch.empty(rows, device=META), condition, noisy)

    return _working(step)


def _vae(config: Config) -> PartMemory:
    return _vae_memory(config.vae.model_dump_json(), config.segment.groups, *config.latent_grid)


@lru_cache(maxsize=16)
def _vae_memory(settings: str, groups: int, height: int, width: int) -> PartMemory:
    config = VaeConfig.model_validate_json(settings)
    with META:
        vae = build_vae(config).eval().in_precision(torch.bfloat16 if config.precision == "bf16" else torch.float32)
    latents = torch.empty(1, config.latent_channels, groups * GROUP_LATENTS, height, width, device=META)
    return PartMemory(weight_bytes(vae), _working(lambda: vae.decode(latents)))


def _codec(config: Config) -> PartMemory:
    with META:
        codec = LatentCodec(config.vqvae.fine, config.vae.latent_channels).eval()
        t, h, w = codec.grid(config.segment.groups * GROUP_LATENTS, *config.latent_grid)
        codes = torch.empty(config.segment.groups, t // config.segment.groups, h, w, config.vqvae.fine.code_dim)
    return PartMemory(weight_bytes(codec), _working(lambda: codec.rebuild(codes, 1, config.latent_grid)))
