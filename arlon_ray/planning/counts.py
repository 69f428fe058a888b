"""What a stage computes, counted from the configuration alone: no weights, no device.

Legend: N tokens of a segment = T frames × S places, D hidden size, L text tokens, E text width, r rows (branches of
guidance, or samples), C width of the AR, H width of its MLP, P positions. A multiplication and an addition count two
operations. docs/scaling.md writes the formulas out; tests/planning compare them with torch's own counter.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from functools import lru_cache
from math import prod

import torch
from torch.utils.flop_counter import FlopCounterMode

from arlon_ray.config import (
    GROUP_FRAMES,
    GROUP_LATENTS,
    ArConfig,
    CodecConfig,
    Config,
    DitConfig,
    TextConfig,
    VaeConfig,
)
from arlon_ray.generation.options import segment_options
from arlon_ray.models.codec import LatentCodec
from arlon_ray.models.injection import listening_layers
from arlon_ray.models.vae import build_vae

#: What the features of a time or a frame rate are (`ScalarEmbedder`).
FREQUENCIES = 256
#: Forward and backward are three forwards: one more for the gradients of inputs, one for those of weights.
TRAINING = 3


@dataclass(frozen=True)
class Work:
    """Operations of `products` (of matrices, convolutions) and of `attention`; `traffic`: numbers that have to be read
    or written; `calls`: layers that are gone through one after the other.
    """

    products: float = 0.0
    attention: float = 0.0
    traffic: float = 0.0
    calls: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, times: float) -> Work:
        return Work(*(times * part for part in astuple(self)))

    @property
    def flops(self) -> float:
        """All operations."""
        return self.products + self.attention


def ar_blocks(config: Config, groups: int) -> int:
    """Steps of the transformer for so many groups: blocks of fine tokens."""
    t, h, w = config.token_grid(config.vqvae.fine, groups)
    rows, columns = config.ar.block
    return t * -(-h // rows) * -(-w // columns)


def dit_grid(config: Config, groups: int) -> tuple[int, int]:
    """Frames T and places S of the DiT's tokens of so many groups."""
    sizes = (groups * GROUP_LATENTS, *config.latent_grid)
    t, h, w = (-(-size // patch) for size, patch in zip(sizes, config.dit.patch_size, strict=True))
    return t, h * w


def dit_forward(dit: DitConfig, frames: int, places: int, text: int, rows: int, inputs: int = 1) -> Work:
    """One evaluation of the DiT. `inputs`: samples whose patches and times are embedded (branches share them)."""
    tokens, width, hidden = frames * places, dit.hidden_size, int(dit.hidden_size * dit.mlp_ratio)
    over_time = tokens if dit.temporal_attention == "joint" else frames
    # qkv and output of attention, query and output of cross-attention; MLP
    products = 2 * tokens * width * (6 * width + 2 * hidden)
    pair = Work(
        products=rows * 2 * products,
        attention=rows * 4 * tokens * width * (places + over_time + 2 * text),
        traffic=rows * 2 * tokens * (14 * width + 2 * hidden),
        calls=2,
    )
    injected = len(listening_layers(dit)) if dit.injection.enabled else 0
    body = pair * dit.depth
    if injected and dit.injection.kind == "controlnet":
        body += (pair + Work(products=rows * 2 * tokens * width**2)) * injected
    elif injected:
        body += Work(traffic=rows * 4 * tokens * width) * injected
    patch = prod(dit.patch_size)
    out = dit.in_channels * (2 if dit.pred_sigma else 1) * patch
    embedded = 2 * tokens * width * dit.in_channels * patch
    # of the time, and of time 0 where frames are given
    times = 2 * (2 * (FREQUENCIES * width + width**2) + 12 * width**2)
    return body + Work(products=rows * 2 * tokens * width * out + inputs * (embedded + times), calls=4)


def dit_condition(dit: DitConfig, frames: int, places: int, text: int, rows: int, guided: bool = True) -> Work:
    """What is prepared once a segment, or once a training sample: text, frame rate, and what is injected."""
    tokens, width = frames * places, dit.hidden_size
    guided = guided and dit.injection.enabled
    injected = len(listening_layers(dit)) if dit.injection.enabled else 0
    control = dit.injection.kind == "controlnet"
    pairs = dit.depth + (injected if control else 0)
    # captions to the hidden size, keys and values of each block
    products = 2 * text * (dit.caption_channels * width + width**2) + 2 * pairs * 4 * text * width**2
    products += 2 * (FREQUENCIES * width + width**2)
    if guided:
        inner, patch = dit.injection.width, prod(dit.patch_size)
        products += 2 * tokens * (dit.in_channels * patch * inner + dit.injection.blocks * 4 * inner**2)
        if control:
            products += 2 * tokens * inner * width
        else:
            out = 3 * width if dit.injection.kind == "adaptive_norm" else width
            products += injected * 2 * tokens * (inner**2 + inner * out)
    traffic = tokens * width * 3 * injected if guided else 0
    return Work(products=rows * products, traffic=rows * traffic, calls=2 * pairs + injected)


def ar_hidden(ar: ArConfig) -> int:
    """Width of the AR's MLPs."""
    return int(ar.dim * ar.mlp_ratio) // 8 * 8


def ar_trunk(ar: ArConfig, positions: float, seen: float) -> Work:
    """So many new positions through the blocks; each attends to `seen`."""
    width, hidden = ar.dim, ar_hidden(ar)
    weights = 4 * width**2 + 3 * width * hidden
    layer = Work(
        products=2 * positions * weights,
        attention=4 * positions * seen * width,
        traffic=weights + positions * (12 * width + 3 * hidden),
        calls=1,
    )
    return layer * ar.layers


def ar_head(ar: ArConfig, codes: int, blocks: float) -> Work:
    """From the trunk's output to the tokens of so many blocks, and from tokens to the trunk's input."""
    width, hidden, size = ar.dim, ar_hidden(ar), prod(ar.block)
    inner = size > 1
    weights = width * codes + (3 * width * hidden if inner else 0)
    products = 2 * size * weights + (2 * (2 * size - 1) * width**2 if inner else 0)
    # of each token: output and choice; with an inner head its two products and that of the token before, too
    return Work(products=blocks * products, traffic=size * weights, calls=size * (5 if inner else 2))


def ar_forward(config: Config, groups: int, text: int) -> Work:
    """The whole sequence at once, as in training: text, start, and all blocks but the last."""
    ar, blocks = config.ar, ar_blocks(config, groups)
    positions = text + blocks
    inputs = 2 * text * config.text.dim * ar.dim + 3 * ar.dim**2 * blocks
    if prod(ar.block) > 1:  # the last block is no input
        inputs -= 2 * prod(ar.block) * ar.dim**2
    head = ar_head(ar, config.vqvae.fine.codebook_size, blocks)
    return ar_trunk(ar, positions, positions) + head + Work(products=inputs)


@dataclass(frozen=True)
class ArSteps:
    """What the AR does for one segment: `context` positions at once, then `steps` steps, each of `step`'s work."""

    context: Work
    step: Work
    steps: int

    @property
    def all(self) -> Work:
        """Both."""
        return self.context + self.step * self.steps


def ar_steps(ar: ArConfig, codes: int, context: int, steps: int, rows: int) -> ArSteps:
    """So many steps behind `context` positions, of a video with `rows` rows. Weights are read once for all rows."""
    seen = context + steps / 2
    cache = Work(traffic=rows * 2 * seen * ar.dim * ar.layers)
    step = ar_trunk(ar, rows, seen) + ar_head(ar, codes, rows) + cache
    return ArSteps(ar_trunk(ar, rows * context, context), step, steps)


def ar_segment(config: Config, text: int, first: bool = False) -> ArSteps:
    """A segment in the middle of a long video (all context in sight), or the first one."""
    segment = config.segment
    known = 0 if first else config.ar_window_groups - segment.groups + segment.overlap_groups
    new = segment.groups if first else segment.groups - segment.overlap_groups
    rows = 1 if config.sampling.ar_guidance_scale == 1.0 else 2
    codes = config.vqvae.fine.codebook_size
    return ar_steps(config.ar, codes, text + 1 + ar_blocks(config, known), ar_blocks(config, new), rows)


def vae_group(config: Config, encode: bool) -> Work:
    """One 17-frame group of the configured size through the VAE's encoder or decoder."""
    return _vae(config.vae.model_dump_json(), config.video.height, config.video.width, encode)


@lru_cache(maxsize=64)
def _vae(settings: str, height: int, width: int, encode: bool) -> Work:
    config = VaeConfig.model_validate_json(settings)
    with torch.device("meta"):
        vae = build_vae(config).eval()
        frames = torch.empty(1, 3, GROUP_FRAMES, height, width)
        latents = torch.empty(1, config.latent_channels, GROUP_LATENTS, height // 8, width // 8)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        vae.encode(frames) if encode else vae.decode(latents)
    convolutions = sum(isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d) for module in vae.modules())
    return Work(
        products=counter.get_total_flops(), traffic=_widths(config) * GROUP_FRAMES * height * width,
        calls=convolutions / 2,
    )  # fmt: skip


def _widths(config: VaeConfig) -> float:
    """Numbers that the widest layers write for each pixel of a frame."""
    if config.kind == "folded":
        return (4 * config.width / 16 + 4 * config.blocks * config.deep_width / 64) / 4
    return 8.0 * config.spatial.block_out_channels[0]


def codec_group(config: Config, role: str, encode: bool) -> Work:
    """The latents of one group to tokens of the codec `role` ("fine", "coarse"), or back."""
    codec = getattr(config.vqvae, role)
    return _codec(codec.model_dump_json(), config.vae.latent_channels, *config.latent_grid, encode)


@lru_cache(maxsize=64)
def _codec(settings: str, channels: int, height: int, width: int, encode: bool) -> Work:
    config = CodecConfig.model_validate_json(settings)
    with torch.device("meta"):
        codec = LatentCodec(config, channels).eval()
        latents = torch.empty(1, channels, GROUP_LATENTS, height, width)
        grid = codec.grid(GROUP_LATENTS, height, width)
        codes = torch.empty(1, grid[0], *grid[1:], config.code_dim)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        codec.encode(latents) if encode else codec.rebuild(codes, 1, (height, width))
    tokens = prod(grid)
    return Work(
        products=counter.get_total_flops(),
        traffic=tokens * (6 * config.blocks * config.width + (config.codebook_size if encode else 0)),
        calls=2 * config.blocks + 2,
    )


def branches(config: Config, first: bool = True) -> int:
    """Rows of the DiT for a segment of one text, the `first` of it or a later one: guidance by text and by tokens add
    one each.
    """
    sampling = segment_options(config.sampling, [""] * 2, 0 if first else 1)
    guided = config.dit.injection.enabled and not sampling.baseline
    return 1 + (sampling.guidance_scale != 1.0) + (guided and sampling.token_guidance_scale != 1.0)


#: Layers, width, width of the MLP, matrices of the MLP, words: all-MiniLM-L6 and the encoder of T5-v1.1-XXL.
TEXT_SIZES = {"minilm": (6, 384, 1536, 2, 30522), "t5": (24, 4096, 10240, 3, 32128)}


def text_caption(text: TextConfig, tokens: int) -> Work:
    """One caption of so many tokens."""
    layers, width, hidden, matrices, _ = TEXT_SIZES[text.kind]
    layers = min(layers, text.layers or layers)
    weights = 4 * width**2 + matrices * width * hidden
    layer = Work(2 * tokens * weights, 4 * tokens**2 * width, weights + tokens * (8 * width + 2 * hidden), 1)
    return layer * layers
