"""STDiT3, the diffusion transformer of Open-Sora v1.2, with public parameter names, and semantic injection beside it.

Legend: B batch, C latent channels, t×h×w latent grid, T×S tokens (frames × places), D hidden size, L text tokens.
Time runs from 0 (data) to 1000 (noise). Without injection this is the public model, formula by formula.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from arlon_ray.artifact import building, load_artifact
from arlon_ray.config import DitConfig
from arlon_ray.models.injection import BRANCH, ControlBranch, Modulation, SemanticInjection, listening_layers
from arlon_ray.models.layers import (
    CrossAttention,
    FrameSharing,
    Mlp,
    Over,
    RotaryEmbedding,
    ScalarEmbedder,
    SelfAttention,
    position_table,
)
from arlon_ray.native.dit import library_for, modulated


@dataclass(frozen=True)
class Condition:
    """What stays the same over the denoising steps of one segment; made by `STDiT3.condition`."""

    text: list[tuple[Tensor, Tensor]]
    text_real: Tensor | tuple[int, ...] | None  # mask [B, L] of real tokens, or how many each text begins with
    fps_BD: Tensor
    positions_SD: Tensor
    rotary: tuple[Tensor, Tensor]  # cosines and sines of this rank's frames, or of their tokens for joint attention
    injection: dict[str, Modulation]


class TimeFeatures(NamedTuple):
    """What the model makes of the times of a denoising step."""

    noisy_BD: Tensor
    clean_BD: Tensor  # of time 0
    modulation_BT6D: Tensor  # T = 1: the same for all frames


@dataclass
class LateLayers:
    """What the last `count` layers added to the tokens, kept from one denoising step for later ones.

    x_out = x_in + added, `added` [B, T, S, D] (with what is injected into these layers; None: still to be computed):
    it changes less from step to step than the tokens do. Δ-DiT (Chen et al. 2024) keeps the same for its late blocks.
    """

    count: int
    added: Tensor | None = None


def some_samples(condition: Condition, rows: slice) -> Condition:
    """The condition of some of the samples alone."""
    real = condition.text_real
    return Condition(
        text=[(k[rows], v[rows]) for k, v in condition.text],
        text_real=None if real is None else real[rows],
        fps_BD=condition.fps_BD[rows],
        positions_SD=condition.positions_SD,
        rotary=condition.rotary,
        injection={name: tuple(part[rows] for part in parts) for name, parts in condition.injection.items()},
    )


def join_conditions(conditions: Sequence[Condition]) -> Condition:
    """One condition for the samples of all, one behind the other. All must be of the same size and kind of guidance."""
    first, *others = conditions
    if not others:
        return first
    reals = [condition.text_real for condition in conditions]
    real: Tensor | tuple[int, ...] | None = None
    if isinstance(first.text_real, tuple):
        real = tuple(length for lengths in reals if isinstance(lengths, tuple) for length in lengths)
    elif first.text_real is not None:
        real = torch.cat([mask for mask in reals if isinstance(mask, Tensor)])
    longest = max(condition.text[0][0].shape[2] for condition in conditions)

    def joined(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[2])) for part in parts])

    return Condition(
        text=[
            (joined([k for k, _ in layer]), joined([v for _, v in layer]))
            for layer in zip(*(condition.text for condition in conditions), strict=True)
        ],
        text_real=real,
        fps_BD=torch.cat([condition.fps_BD for condition in conditions]),
        positions_SD=first.positions_SD,
        rotary=first.rotary,
        injection={
            name: tuple(map(torch.cat, zip(*(condition.injection[name] for condition in conditions), strict=True)))
            for name in first.injection
        },
    )


def drawn(rows: int, width: int) -> Tensor:
    """Normal numbers of deviation 1/√width; left out where `nn.init` is (`artifact.building`)."""
    return nn.init.normal_(torch.empty(rows, width), std=width**-0.5)


class CaptionEmbedder(nn.Module):
    """Text features to the hidden size; holds the learned null caption."""

    y_embedding: Tensor

    def __init__(self, channels: int, dim: int, tokens: int) -> None:
        super().__init__()
        self.y_proj = Mlp(channels, dim, dim)
        self.register_buffer("y_embedding", drawn(tokens, channels))


def modulate(x_BTSD: Tensor, shift_BTD: Tensor, scale_BTD: Tensor) -> Tensor:
    """LayerNorm(x)·(1 + scale) + shift; T of shift and scale may be 1, the same for all frames."""
    if (built := library_for(x_BTSD)) is not None:
        return modulated(built, x_BTSD, shift_BTD.flatten(0, 1), scale_BTD.flatten(0, 1))
    normed = F.layer_norm(x_BTSD, x_BTSD.shape[-1:], eps=1e-6)
    return torch.addcmul(shift_BTD[:, :, None], normed, 1 + scale_BTD[:, :, None])


class STDiT3Block(nn.Module):
    """adaLN-single block: self-attention (over space, time, or both), cross-attention to the text, MLP."""

    def __init__(self, config: DitConfig, temporal: bool) -> None:
        super().__init__()
        dim = config.hidden_size
        self.temporal = temporal
        self.joint = temporal and config.temporal_attention == "joint"
        self.attn = SelfAttention(dim, config.num_heads, config.qk_norm)
        self.cross_attn = CrossAttention(dim, config.num_heads)
        self.mlp = Mlp(dim, int(dim * config.mlp_ratio), dim)
        self.scale_shift_table = nn.Parameter(drawn(6, dim))

    def forward(
        self,
        x_BTSD: Tensor,
        time_BT6D: Tensor,
        text: tuple[Tensor, Tensor],
        text_real: Tensor | tuple[int, ...] | None,
        rotary: tuple[Tensor, Tensor],
        parallel: FrameSharing | None = None,
        frames: int | None = None,
    ) -> Tensor:
        """[B, T, S, D] to [B, T, S, D]; `time` [B, T or 1, 6, D] is added to the block's own table.

        `rotary`: cosines and sines of the frames, of all tokens where attention is joint; spatial blocks ignore them.
        `parallel`: T is a share of the frames, of which there are `frames`.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table + time_BT6D).unbind(2)
        over: Over = "space" if not self.temporal else "all" if self.joint else "time"
        y = self.attn(modulate(x_BTSD, shift1, scale1), over, rotary, parallel if self.temporal else None, frames)
        x = torch.addcmul(x_BTSD, gate1[:, :, None], y)
        x = x + self.cross_attn(x.flatten(1, 2), text, text_real).view_as(x)
        return torch.addcmul(x, gate2[:, :, None], self.mlp(modulate(x, shift2, scale2)))


Pair = tuple[STDiT3Block, STDiT3Block]


class FinalLayer(nn.Module):
    """Modulated norm and the projection to patches."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.scale_shift_table = nn.Parameter(drawn(2, dim))

    def forward(self, x_BTSD: Tensor, times_BD: tuple[Tensor, Tensor], noisy_BT: Tensor | None) -> Tensor:
        """[B, T, S, D] to patches [B, T, S, p·C]; `times`: features of the time, and of 0 for frames without noise."""
        x = self._modulate(x_BTSD, times_BD[0])
        if noisy_BT is not None:
            # the public model norms conditioning frames twice; nothing reads what it predicts for them
            x = torch.where(noisy_BT[:, :, None, None], x, self._modulate(x, times_BD[1]))
        return self.linear(x)

    def _modulate(self, x_BTSD: Tensor, time_BD: Tensor) -> Tensor:
        shift, scale = (self.scale_shift_table + time_BD[:, None])[:, None].unbind(2)
        return modulate(x_BTSD, shift, scale)


class PatchEmbedder(nn.Module):
    """Patches of the latent to tokens."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.proj = nn.Conv3d(config.in_channels, config.hidden_size, config.patch_size, stride=config.patch_size)


class STDiT3(nn.Module):
    """The velocity model. `injection` is None in the text-only baseline."""

    muon_excluded = ("x_embedder", "t_embedder", "fps_embedder", "y_embedder", "final_layer", "t_block")
    block_lists = ("spatial_blocks", "temporal_blocks")

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        self.config = config
        #: Set by an engine whose ranks share the frames of a sample.
        self.parallel: FrameSharing | None = None
        dim = config.hidden_size
        self.out_channels = config.in_channels * (2 if config.pred_sigma else 1)
        self.rope = RotaryEmbedding(dim // config.num_heads)
        self.x_embedder = PatchEmbedder(config)
        self.t_embedder = ScalarEmbedder(dim)
        self.fps_embedder = ScalarEmbedder(dim)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.y_embedder = CaptionEmbedder(config.caption_channels, dim, config.model_max_length)
        self.spatial_blocks = nn.ModuleList(STDiT3Block(config, temporal=False) for _ in range(config.depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(config, temporal=True) for _ in range(config.depth))
        patch = config.patch_size
        self.final_layer = FinalLayer(dim, patch[0] * patch[1] * patch[2] * self.out_channels)
        self._initialise()
        self.injection = SemanticInjection(config, self._new_pair) if config.injection.enabled else None

    def _new_pair(self) -> nn.Module:
        return nn.ModuleList([STDiT3Block(self.config, temporal=False), STDiT3Block(self.config, temporal=True)])

    @torch.no_grad()
    def copy_into_branch(self) -> None:
        """A ControlNet-like branch starts as a copy of the layers that it stands beside; without one, nothing."""
        pairs = self._all_pairs()
        for index, copies in zip(listening_layers(self.config), pairs[self.config.depth :], strict=False):
            for copy, block in zip(copies, pairs[index], strict=True):
                copy.load_state_dict(block.state_dict())

    def _initialise(self) -> None:
        """Open-Sora v1.2's initialisation: new temporal blocks, frame-rate embedding and output start at zero."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.xavier_uniform_(self.x_embedder.proj.weight.flatten(1))
        state = dict(self.named_parameters())
        for name in ("t_embedder.mlp.0", "t_embedder.mlp.2", "fps_embedder.mlp.0", "t_block.1"):
            nn.init.normal_(state[f"{name}.weight"], std=0.02)
        for name, parameter in state.items():
            new = name.startswith("temporal_blocks") and name.endswith(("proj.weight", "fc2.weight"))
            if new or name in ("fps_embedder.mlp.2.weight", "final_layer.linear.weight"):
                nn.init.zeros_(parameter)

    def condition(
        self,
        latent_shape: tuple[int, int, int],
        text_BLE: Tensor,
        text_real: Tensor | tuple[int, ...] | None,
        fps_B: Tensor,
        size: tuple[float, float],
        coarse_BCthw: Tensor | None = None,
        keep_tokens_B: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Condition:
        """Everything that does not depend on time or noise, once per segment (or per training sample).

        latent_shape (t, h, w); text [B, L, E] with a mask [B, L] (True: a real token) or with how many real
        tokens each begins with, the longest of them L (faster: nothing is masked); fps [B]; size (height, width) in
        pixels; `coarse` is the latent that the tokens decode to, of each sample or one for all, used where
        `keep_tokens_B` (default: everywhere).
        Raises ValueError if `coarse` is given to a model that was built without injection.
        """
        dtype = self.final_layer.linear.weight.dtype
        text = self.y_embedder.y_proj(text_BLE.to(dtype))
        frames, height, width = (-(-n // p) for n, p in zip(latent_shape, self.config.patch_size, strict=True))
        scale = (size[0] * size[1]) ** 0.5 / self.config.input_sq_size
        injection: dict[str, Modulation] = {}
        if coarse_BCthw is not None:
            if self.injection is None:
                raise ValueError("this DiT was built without semantic injection: it cannot be guided by tokens")
            keep = keep_tokens_B if keep_tokens_B is not None else text.new_ones(len(text), dtype=torch.bool)
            injection = self.injection.prepare(coarse_BCthw.to(dtype), keep, generator, self._share(height * width))
        return Condition(
            text=[block.cross_attn.keys_values(text) for pair in self._all_pairs() for block in pair],
            text_real=text_real,
            fps_BD=self.fps_embedder(fps_B),
            positions_SD=position_table(height, width, self.config.hidden_size, scale, text.device).to(dtype),
            rotary=self._rotary(frames, height * width, text.device),
            injection=injection,
        )

    def _rotary(self, frames: int, places: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the frames that this rank has; joint attention needs them for each place of a frame."""
        cos, sin = self.rope.angles(torch.arange(frames, device=device))
        if self.parallel is not None:
            cos, sin = self.parallel.split(cos, 0), self.parallel.split(sin, 0)
        repeated = places if self.config.temporal_attention == "joint" else 1
        return cos.repeat_interleave(repeated, 0), sin.repeat_interleave(repeated, 0)

    def token_count(self, latent_shape: Sequence[int]) -> int:
        """Tokens that a latent (t, h, w) is cut into."""
        return math.prod(-(-size // patch) for size, patch in zip(latent_shape, self.config.patch_size, strict=True))

    def _share(self, places: int) -> Callable[[Tensor], Tensor] | None:
        """Picks this rank's tokens [B, t·S, E] of [B, T·S, E]."""
        parallel = self.parallel
        if parallel is None:
            return None
        return lambda x: parallel.split(x.unflatten(1, (-1, places)), 1).flatten(1, 2)

    def _layers(self) -> list[Pair]:
        return list(zip(self.spatial_blocks, self.temporal_blocks, strict=True))  # type: ignore[arg-type]

    @property
    def _branch(self) -> ControlBranch | None:
        return None if self.injection is None else self.injection.branch

    def _all_pairs(self) -> list[Pair]:
        """The layers, then those of the branch."""
        return self._layers() + ([(pair[0], pair[1]) for pair in self._branch.pairs] if self._branch else [])  # type: ignore[index]

    def forward(self, x_BCthw: Tensor, time_B: Tensor, condition: Condition, noisy_Bt: Tensor | None = None) -> Tensor:
        """Velocity x0 − noise (and, with `pred_sigma`, unused variances): [B, C or 2C, t, h, w] in float32.

        `time_B` in [0, 1000]. `noisy_Bt` marks the frames that carry noise (`x_mask` of Open-Sora); the others are
        conditioning frames and are modulated as at time 0.
        """
        shape: Sequence[int] = x_BCthw.shape[2:]
        return self.denoise(
            self.embed(x_BCthw), shape, self.times(time_B, condition.fps_BD, noisy_Bt), condition, noisy_Bt
        )

    def embed(self, x_BCthw: Tensor) -> Tensor:
        """The patches of a latent as tokens [B, T, rows, columns, D], without their positions."""
        patch = self.config.patch_size
        _, _, t, h, w = x_BCthw.shape
        x = F.pad(
            x_BCthw.to(self.final_layer.linear.weight.dtype), (0, -w % patch[2], 0, -h % patch[1], 0, -t % patch[0])
        )
        # contiguous: what follows would keep the convolution's order of axes, in which norms and products are slow
        return rearrange(self.x_embedder.proj(x), "b d t h w -> b t h w d").contiguous()

    def denoise(
        self,
        tokens_BTHWD: Tensor,
        latent_shape: Sequence[int],
        times: TimeFeatures,
        condition: Condition,
        noisy_Bt: Tensor | None,
        late: LateLayers | None = None,
    ) -> Tensor:
        """What `forward` does behind `embed` and `times`: apart, so that requests of different times can share it.

        What it makes of a sample does not depend on the samples beside it; `embed` and `times` do, in the last bits.
        The layers that are `late` are not computed, but for what they added before, or else leave there what they add.
        """
        patch = self.config.patch_size
        t, h, w = latent_shape
        frames, rows, columns = tokens_BTHWD.shape[1:4]
        x = tokens_BTHWD.flatten(2, 3) + condition.positions_SD
        noisy_BT = None if noisy_Bt is None else noisy_Bt[:, :: patch[0]]
        times_BD, time_BT6D = (times.noisy_BD, times.clean_BD), times.modulation_BT6D
        parallel = self.parallel
        if parallel is not None:
            x = parallel.split(x, 1)
            if noisy_BT is not None:
                noisy_BT, time_BT6D = parallel.split(noisy_BT, 1), parallel.split(time_BT6D, 1)
        text = list(zip(condition.text[::2], condition.text[1::2], strict=True))
        pairs = self._all_pairs()

        def through(number: int, x: Tensor) -> Tensor:
            for block, words in zip(pairs[number], text[number], strict=True):
                x = block(x, time_BT6D, words, condition.text_real, condition.rotary, parallel, parallel and frames)
            return x

        copies = listening_layers(self.config) if BRANCH in condition.injection else range(0)
        branch = x + condition.injection[BRANCH][0].view_as(x) if copies else x
        first_late = self.config.depth - late.count if late else None
        entering = x
        for i in range(self.config.depth):
            if i == first_late and late is not None:
                entering = x
                if late.added is not None:
                    x = x + late.added
                    break
            if str(i) in condition.injection:
                injected = self.injection.layers[str(i)](x.flatten(1, 2), condition.injection[str(i)])  # type: ignore[union-attr]
                x = injected.view_as(x)
            x = through(i, x)
            if i in copies and self._branch is not None:
                number = copies.index(i)
                branch = through(self.config.depth + number, branch)
                x = x + self._branch.leave(number, branch, condition.injection[BRANCH][1])
        if late is not None and late.added is None:
            late.added = x - entering
        patches = self.final_layer(x, times_BD, noisy_BT)
        out = rearrange(
            patches if parallel is None else parallel.gather(patches, 1, frames),
            "b t (h w) (u p q c) -> b c (t u) (h p) (w q)",
            h=rows, w=columns, u=patch[0], p=patch[1], q=patch[2],
        )  # fmt: skip
        return out[:, :, :t, :h, :w].float()

    def times(
        self,
        time_B: Tensor,
        fps_BD: Tensor,
        noisy_Bt: Tensor | None = None,
        clean: tuple[Tensor, Tensor] | None = None,
    ) -> TimeFeatures:
        """Features of the time and of time 0, and the blocks' modulation: that of time 0 for frames without noise.

        `clean`: what `clean_time` makes, where that is known.
        """
        noisy = self.t_embedder(time_B) + fps_BD
        clean_BD, of_clean = clean or self.clean_time(fps_BD)
        modulation = rearrange(self.t_block(noisy), "b (six d) -> b 1 six d", six=6)
        if noisy_Bt is not None:
            modulation = torch.where(noisy_Bt[:, :: self.config.patch_size[0], None, None], modulation, of_clean)
        return TimeFeatures(noisy, clean_BD, modulation)

    def clean_time(self, fps_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Features [B, D] of time 0 and the blocks' modulation [B, 1, 6, D]: the same at every step."""
        clean = self.t_embedder(fps_BD.new_zeros(len(fps_BD), dtype=torch.float32)) + fps_BD
        return clean, rearrange(self.t_block(clean), "b (six d) -> b 1 six d", six=6)

    def velocity(self, output: Tensor) -> Tensor:
        """The velocity half [B, C, t, h, w] of an output."""
        return output[:, : self.config.in_channels]


def load_dit(path: str | Path, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32) -> STDiT3:
    """The DiT at `path`, frozen, in evaluation mode, with weights in `dtype`. Raises ArtifactError."""
    artifact = load_artifact(path, "dit")
    # rounded frequencies would shift the positions of late frames
    tensors = artifact.tensors(device, dtype, whole=("rope.freqs",))
    with building(artifact):
        with torch.device("meta"):
            dit = STDiT3(DitConfig.model_validate(artifact.config))
        dit.load_state_dict(tensors, assign=True)
    return dit.eval().requires_grad_(False)
