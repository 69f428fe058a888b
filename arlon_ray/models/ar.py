"""The autoregressive transformer: plans a video as tokens of the fine codec, from text.

One decoder-only transformer: first the text (causal like all else), then a start token, then blocks of visual tokens in
(t, h, w) raster order. A block (`ar.block`, rows × columns of one latent frame; 1 × 1: plain next-token prediction) is
one position of the transformer; a small head gives its tokens one after the other, each from the transformer's output
and the block's tokens before it. So the chain rule holds exactly, and the transformer runs once a block: k times
fewer steps. (RQ-Transformer, Lee et al. 2022, splits depth in the same way; the inner head sums what comes before, as
NADE does, Larochelle and Murray 2011.)

3-D rotary positions turn the visual positions; text stays unturned. A query is turned by the place that it predicts, a
key by the place that it holds, so that "the same place one frame ago" is one and the same rotation everywhere (in
raster order alone it is not: rows wrap around). Pre-norm blocks with RMS norm and SwiGLU, no biases (Llama; LlamaGen
for visual tokens). Training runs the whole sequence; sampling runs one block a time through a KV cache.

Legend: B batch, L text tokens, N blocks of k tokens, P = L + 1 + N positions, C channels, A heads, D channels a head,
K codes, t×h×w token grid.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from arlon_ray.artifact import building, load_artifact
from arlon_ray.config import ArConfig
from arlon_ray.models.layers import RMSNorm, attend, rotate, sinusoidal

Grid = tuple[int, int, int]


class Rotary(NamedTuple):
    """(cos, sin), each [P, D], for queries and for keys."""

    query: tuple[Tensor, Tensor]
    key: tuple[Tensor, Tensor]

    def part(self, start: int, end: int) -> Rotary:
        """Those of positions `start` to `end`."""
        return Rotary(*((cos[start:end], sin[start:end]) for cos, sin in self))


class KeyValueCache:
    """Preallocated keys and values of R sequences, each filled as far as it is: `by_row` [R, layers, 2, A, P, D]."""

    def __init__(self, model: ArTransformer, rows: int, positions: int) -> None:
        config = model.config
        weight = model.head.weight
        shape = (config.layers, 2, rows, config.heads, positions, config.dim // config.heads)
        self.values = torch.zeros(shape, device=weight.device, dtype=weight.dtype)
        self.by_row = self.values.movedim(2, 0)

    def begin(self, layer: int, rows: slice, k_BAND: Tensor, v_BAND: Tensor) -> tuple[Tensor, Tensor]:
        """Store the first positions of some rows; returns them."""
        for new, stored in zip((k_BAND, v_BAND), self.values[layer, :, rows], strict=True):
            stored[:, :, : new.shape[2]] = new
            # what is not seen counts nothing, unless it is not a number
            stored[:, :, new.shape[2] :] = 0
        return k_BAND, v_BAND

    def extend(
        self, layer: int, rows_B: Tensor, filled_B: Tensor, k_BA1D: Tensor, v_BA1D: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Store one more position of the first B rows, each at its own; returns all positions, filled or not."""
        keys, values = self.values[layer]
        keys[rows_B, :, filled_B], values[rows_B, :, filled_B] = k_BA1D[:, :, 0], v_BA1D[:, :, 0]
        return keys[: len(rows_B)], values[: len(rows_B)]


class ArBlock(nn.Module):
    """Causal self-attention and SwiGLU."""

    def __init__(self, config: ArConfig) -> None:
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio) // 8 * 8
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm = RMSNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim, bias=False)
        self.q_norm = RMSNorm(config.dim // config.heads)
        self.k_norm = RMSNorm(config.dim // config.heads)
        self.proj = nn.Linear(config.dim, config.dim, bias=False)
        self.mlp_norm = RMSNorm(config.dim)
        self.gate_up = nn.Linear(config.dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, config.dim, bias=False)

    def forward(
        self,
        x_BNC: Tensor,
        rotary: Rotary,
        mask: Tensor,
        remember: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """[B, N, C] to [B, N, C]. `remember` is told the new keys and values, and says which to attend to."""
        q, k, v = rearrange(
            self.qkv(self.attention_norm(x_BNC)), "b n (three a d) -> three b a n d", three=3, a=self.heads
        )
        q, k = rotate(self.q_norm(q), *rotary.query), rotate(self.k_norm(k), *rotary.key)
        if remember is not None:
            k, v = remember(k, v)
        y = self.proj(rearrange(attend(q, k, v, mask), "b a n d -> b n (a d)"))
        x = x_BNC + F.dropout(y, self.dropout, self.training)
        gate, up = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
        return x + F.dropout(self.down(F.silu(gate) * up), self.dropout, self.training)


class InnerHead(nn.Module):
    """From the trunk's output of a block to the features of each of its k tokens, aware of those before it."""

    def __init__(self, config: ArConfig, size: int) -> None:
        super().__init__()
        hidden = int(config.dim * config.mlp_ratio) // 8 * 8
        self.dropout = config.dropout
        self.place = nn.Parameter(torch.zeros(size, config.dim))
        self.before = nn.ModuleList(nn.Linear(config.dim, config.dim, bias=False) for _ in range(size - 1))
        self.norm = RMSNorm(config.dim)
        self.gate_up = nn.Linear(config.dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, config.dim, bias=False)

    def forward(self, x_BNC: Tensor, earlier_BNiC: Tensor) -> Tensor:
        """Features [B, N, k, C] from the embeddings of the blocks' first k − 1 tokens."""
        parts = [layer(earlier_BNiC[:, :, i]) for i, layer in enumerate(self.before)]
        state = torch.stack([x_BNC, *parts], dim=2).cumsum(2)
        return self.feature(state + self.place)

    def feature(self, state: Tensor) -> Tensor:
        """SwiGLU with its residual."""
        gate, up = self.gate_up(self.norm(state)).chunk(2, dim=-1)
        return state + F.dropout(self.down(F.silu(gate) * up), self.dropout, self.training)


class ArTransformer(nn.Module):
    """Next-token model over a codec's codes. `null_text` stands for no text (classifier-free guidance)."""

    muon_excluded = ("text_in", "null_text", "codes", "start", "head", "place", "inside.place")
    block_lists = ("blocks",)

    def __init__(self, config: ArConfig, *, codebook_size: int, text_dim: int, max_text: int) -> None:
        super().__init__()
        self.config, self.codebook_size, self.text_dim, self.max_text = config, codebook_size, text_dim, max_text
        self.text_in = nn.Linear(text_dim, config.dim)
        self.null_text = nn.Parameter(torch.zeros(text_dim))
        self.codes = nn.Embedding(codebook_size, config.dim)
        self.start = nn.Parameter(torch.zeros(config.dim))
        self.place = nn.Linear(3 * config.dim // 2, config.dim)
        self.blocks = nn.ModuleList(ArBlock(config) for _ in range(config.layers))
        self.norm = RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, codebook_size, bias=False)
        size = config.block[0] * config.block[1]
        self.join = nn.Linear(size * config.dim, config.dim, bias=False) if size > 1 else None
        self.inside = InnerHead(config, size) if size > 1 else None
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.head.weight)

    @torch.no_grad()
    def start_from_codebook(self, codebook_KD: Tensor, generator: torch.Generator) -> None:
        """Codes that are alike start with embeddings that are alike: a random projection of the codebook."""
        codes = (codebook_KD - codebook_KD.mean(0)) / codebook_KD.std(0).clamp(min=1e-6)
        projection = torch.randn(codes.shape[1], self.config.dim, generator=generator) / codes.shape[1] ** 0.5
        self.codes.weight.add_(0.1 * codes @ projection)

    def settings(self) -> dict[str, object]:
        """What `load_ar` needs to build the model again."""
        sizes = {"codebook_size": self.codebook_size, "text_dim": self.text_dim, "max_text": self.max_text}
        return {**self.config.model_copy(update={"init": None}).model_dump(mode="json"), **sizes}

    def without_text(self, text_BLE: Tensor, mask_BL: Tensor, drop_B: Tensor) -> tuple[Tensor, Tensor]:
        """Replace the text of samples marked in `drop_B` by the null text: one token."""
        only_first = torch.zeros_like(mask_BL)
        only_first[:, 0] = True
        text = torch.where(drop_B[:, None, None], self.null_text.to(text_BLE.dtype), text_BLE)
        return text, torch.where(drop_B[:, None], only_first, mask_BL)

    def forward(self, text_BLE: Tensor, mask_BL: Tensor, tokens_Bthw: Tensor, times_t: Tensor | None = None) -> Tensor:
        """Logits [B, t, h, w, K]: each place's from the text and the tokens before it, block by block. For training.

        `times_t` says when each frame is, in frames of the grid (None: one after the other; see `frame_times`).
        """
        grid: Grid = tuple(tokens_Bthw.shape[1:])  # type: ignore[assignment]
        blocks = self.to_blocks(tokens_Bthw)
        x, mask = self.embed(text_BLE, mask_BL, blocks[:, :-1], self.block_grid(grid), times_t)
        positions = self.rotary(text_BLE.shape[1], self.block_grid(grid), x.shape[1], x.device, times_t)
        for block in self.blocks:
            x = block(x, positions, mask)
        logits = self.logits(x[:, text_BLE.shape[1] :], blocks)
        return self.from_blocks(logits, grid)

    def logits(self, x_BNC: Tensor, blocks_BNk: Tensor) -> Tensor:
        """Logits [B, N, k, K] of the tokens of blocks, each from the trunk and the tokens before it in its block."""
        if self.inside is None:
            return self.head(self.norm(x_BNC))[:, :, None]
        return self.head(self.norm(self.inside(x_BNC, self.codes(blocks_BNk[..., :-1].clamp(max=self.last)))))

    @property
    def last(self) -> int:
        """The largest code; one more stands for what is beyond the grid."""
        return self.codebook_size - 1

    def block_grid(self, grid: Grid) -> Grid:
        """Grid of the blocks; those at the right and lower edge may reach beyond the tokens."""
        rows, columns = self.config.block
        return grid[0], -(-grid[1] // rows), -(-grid[2] // columns)

    def to_blocks(self, tokens_Bthw: Tensor) -> Tensor:
        """Tokens [B, t, h, w] as blocks [B, N, k] in (t, h, w) raster order; `codebook_size` fills up the edges."""
        rows, columns = self.config.block
        edges = (0, -tokens_Bthw.shape[3] % columns, 0, -tokens_Bthw.shape[2] % rows)
        return rearrange(
            F.pad(tokens_Bthw, edges, value=self.codebook_size),
            "b t (h r) (w c) -> b (t h w) (r c)",
            r=rows, c=columns,
        )  # fmt: skip

    def from_blocks(self, values_BNk: Tensor, grid: Grid) -> Tensor:
        """What `to_blocks` did, undone: [B, N, k, …] to [B, t, h, w, …]."""
        rows, columns = self.config.block
        t, h, w = self.block_grid(grid)
        whole = rearrange(
            values_BNk, "b (t h w) (r c) ... -> b t (h r) (w c) ...", t=t, h=h, w=w, r=rows, c=columns
        )  # fmt: skip
        return whole[:, :, : grid[1], : grid[2]]

    def embed_blocks(self, blocks_BNk: Tensor) -> Tensor:
        """Inputs [B, N, C] of whole blocks."""
        if self.join is None:
            return self.codes(blocks_BNk[..., 0])
        inner = (blocks_BNk <= self.last)[..., None]
        return self.join((self.codes(blocks_BNk.clamp(max=self.last)) * inner).flatten(2))

    def embed(
        self, text_BLE: Tensor, mask_BL: Tensor, blocks_BNk: Tensor, grid: Grid, times_t: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Inputs [B, L + 1 + N, C] of text, start token and blocks, and their causal mask [B, 1, P, P].

        `grid` is that of the blocks.
        """
        batch, length = mask_BL.shape
        count = blocks_BNk.shape[1]
        visual = torch.cat([self.start.expand(batch, 1, -1), self.embed_blocks(blocks_BNk)], dim=1)
        text = self.text_in(text_BLE.to(self.text_in.weight.dtype))
        x = torch.cat([text, visual + self.places(grid, times_t)[: count + 1]], dim=1)
        total = length + 1 + count
        causal = torch.ones(total, total, dtype=torch.bool, device=x.device).tril()
        visible = F.pad(mask_BL, (0, 1 + count), value=True)
        # padded text attends to itself, so that no row of the softmax is empty
        itself = torch.eye(total, dtype=torch.bool, device=x.device)
        return x, ((causal & visible[:, None, :]) | itself)[:, None]

    def places(self, grid: Grid, times_t: Tensor | None = None) -> Tensor:
        """Embedding [t·h·w, C] of the place (t, h, w) in a grid of blocks that each visual position predicts."""
        half = self.config.dim // 2
        coordinates = grid_coordinates(grid, self.head.weight.device, times_t)
        features = torch.cat([sinusoidal(coordinates[:, axis], half, 100.0) for axis in range(3)], dim=-1)
        return self.place(features.to(self.place.weight.dtype))

    def rotary(
        self, text_length: int, grid: Grid, count: int, device: torch.device, times_t: Tensor | None = None
    ) -> Rotary:
        """Rotations of the first `count` positions: none for text, (t, h, w) for blocks.

        Position text_length + n holds block n − 1 (n = 0: the start token) and predicts block n of `grid`.
        """
        head_dim = self.config.dim // self.config.heads
        pairs = head_dim // 2
        share = [pairs - 2 * (pairs // 3), pairs // 3, pairs // 3]
        coordinates = grid_coordinates(grid, device, times_t)
        angles = []
        for axis, number in enumerate(share):
            freqs = 100.0 ** (-torch.arange(number, device=device).float() / max(number, 1))
            angles.append(coordinates[:, axis, None].float() * freqs)
        visual = torch.cat(angles, dim=-1).repeat_interleave(2, dim=-1)
        query = torch.cat([visual.new_zeros(text_length, head_dim), visual])[:count]
        key = torch.cat([visual.new_zeros(text_length + 1, head_dim), visual])[:count]
        return Rotary((query.cos(), query.sin()), (key.cos(), key.sin()))


def grid_coordinates(grid: Grid, device: torch.device | str = "cpu", times_t: Tensor | None = None) -> Tensor:
    """Integer coordinates (t, h, w) [t·h·w, 3] of a grid in raster order; `times_t` are those along t."""
    axes = [torch.arange(size, device=device) for size in grid]
    if times_t is not None:
        axes[0] = times_t.to(device)
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, 3)


def frame_times(frames: int, sink: int, gap: int) -> Tensor:
    """When each of `frames` frames is [t], of which the first `sink` lie `gap` frames before the others.

    The gap says that something is left out, not how much: it must be the same however long the video is.
    """
    times = torch.arange(frames)
    return torch.where(times < sink, times, times + gap)


def load_ar(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> ArTransformer:
    """The AR at `path`, frozen, in evaluation mode, with weights in `dtype`. Raises ArtifactError."""
    artifact = load_artifact(path, "ar")
    settings, tensors = dict(artifact.config), artifact.tensors(device, dtype)
    with building(artifact):
        sizes = {name: settings.pop(name) for name in ("codebook_size", "text_dim", "max_text")}
        with torch.device("meta"):
            ar = ArTransformer(ArConfig.model_validate(settings), **sizes)
        ar.load_state_dict(tensors, assign=True)
    return ar.eval().requires_grad_(False)
