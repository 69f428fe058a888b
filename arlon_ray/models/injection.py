"""Semantic injection: the latent that the AR's tokens decode to steers the first layers of the DiT.

ARLON (abstract; notes in docs/method.md): a latent adapter turns the coarse latent ẑ into features F on the DiT's token
grid; layer i then adds g_i(F)·((1 + s_i(F))·Norm(x) + b_i(F)). g is zero-initialised, so an untrained injection leaves
the base DiT exactly as it was, and its strength is learned per layer, position and channel. `injection.kind` exchanges
that for an MLP adapter or a ControlNet-like branch (Zhang et al. 2023; of DiT blocks: PixArt-δ), for comparison.

Legend: B batch, N tokens of the DiT, C channels of the DiT, E channels of F.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from arlon_ray.config import DitConfig
from arlon_ray.models.layers import Mlp
from arlon_ray.native.dit import library_for, modulated

Modulation = tuple[Tensor, ...]
#: Name of the branch's features among the modulations.
BRANCH = "branch"


class UncertaintySampling(nn.Module):
    """Perturb the channel statistics of features as errors of the AR would (ARLON; formulas after DSU, Li et al. 2022).

    Per sample: mean' ~ N(mean, spread of the means in the batch), deviation' likewise, with probability p.
    """

    def __init__(self, probability: float) -> None:
        super().__init__()
        self.probability = probability

    def forward(self, features_BNE: Tensor, generator: torch.Generator | None) -> Tensor:
        """[B, N, E] to [B, N, E]; unchanged outside training and for a batch of one."""
        if not self.training or self.probability == 0.0 or len(features_BNE) < 2:
            return features_BNE
        mean = features_BNE.mean(1, keepdim=True)
        deviation = features_BNE.var(1, keepdim=True, unbiased=False).add(1e-6).sqrt()

        def drawn(statistic: Tensor) -> Tensor:
            noise = torch.randn(statistic.shape, generator=generator, device=statistic.device)
            return statistic + noise * statistic.std(0, keepdim=True)

        perturbed = (features_BNE - mean) / deviation * drawn(deviation) + drawn(mean)
        chosen = torch.rand(len(features_BNE), 1, 1, generator=generator, device=features_BNE.device)
        return torch.where(chosen < self.probability, perturbed, features_BNE)


class LatentAdapter(nn.Module):
    """Coarse latent [B, C, t, h, w] to features [B, N, E] on the DiT's token grid."""

    def __init__(self, config: DitConfig) -> None:
        super().__init__()
        width = config.injection.width
        self.patch = config.patch_size
        self.embed = nn.Conv3d(config.in_channels, width, self.patch, stride=self.patch)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(config.injection.blocks))
        self.blocks = nn.ModuleList(Mlp(width, 2 * width, width) for _ in range(config.injection.blocks))

    def forward(self, coarse_BCthw: Tensor) -> Tensor:
        """See LatentAdapter; edges are filled up with zeros to whole patches."""
        padding = [
            pad for size, p in zip(coarse_BCthw.shape[:1:-1], self.patch[::-1], strict=True) for pad in (0, -size % p)
        ]
        features = rearrange(self.embed(F.pad(coarse_BCthw, padding)), "b e t h w -> b (t h w) e").contiguous()
        for norm, block in zip(self.norms, self.blocks, strict=True):
            features = features + block(norm(features))
        return features


class GatedAdaptiveNorm(nn.Module):
    """One layer's x + g(F)·((1 + s(F))·Norm(x) + b(F))."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, 3 * dim)
        # gate, scale and bias start at zero; the gradient of the gate needs (1 + s)·Norm(x) alone
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def modulation(self, features_BNE: Tensor) -> Modulation:
        """gate, scale, bias, each [B, N, C]: the same at every denoising step."""
        gate, scale, bias = self.out(F.silu(self.hidden(features_BNE))).chunk(3, dim=-1)
        return gate, scale, bias

    def forward(self, x_BNC: Tensor, modulation: Modulation) -> Tensor:
        """[B, N, C] to the same, with the layer's gate, scale and bias."""
        gate, scale, bias = modulation
        if (built := library_for(x_BNC)) is not None:
            return modulated(built, x_BNC, bias.flatten(0, 1), scale.flatten(0, 1), gate.flatten(0, 1))
        return torch.addcmul(x_BNC, gate, torch.addcmul(bias, self.norm(x_BNC), 1.0 + scale))


class MlpAdapter(nn.Module):
    """One layer's x + MLP(F): features are added, whatever x is. Zero-initialised."""

    def __init__(self, width: int, dim: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(width, width)
        self.out = nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def modulation(self, features_BNE: Tensor) -> Modulation:
        """What is added [B, N, C]: the same at every denoising step."""
        return (self.out(F.silu(self.hidden(features_BNE))),)

    def forward(self, x_BNC: Tensor, modulation: Modulation) -> Tensor:
        """[B, N, C] to the same, with what the layer adds."""
        return x_BNC + modulation[0]


class ControlBranch(nn.Module):
    """Copies of the listening layers that see x and the tokens' features; a zero-initialised linear adds their output.

    `blocks` are pairs of a spatial and a temporal block, made by the DiT; unlike the others, they run at every step.
    """

    def __init__(self, width: int, dim: int, pairs: Sequence[nn.Module]) -> None:
        super().__init__()
        self.entry = nn.Linear(width, dim)
        self.pairs = nn.ModuleList(pairs)
        self.exits = nn.ModuleList(nn.Linear(dim, dim) for _ in pairs)
        for layer in (self.entry, *self.exits):
            nn.init.zeros_(layer.weight)  # type: ignore[arg-type]
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]

    def leave(self, number: int, branch: Tensor, keep: Tensor) -> Tensor:
        """What layer `number` of the branch adds to its neighbour; nothing for samples that are not kept."""
        added: Tensor = self.exits[number](branch.flatten(1, 2)) * keep
        return added.view_as(branch)


class SemanticInjection(nn.Module):
    """Adapter, uncertainty sampling, and one module for each layer that listens (or one branch for all)."""

    muon_excluded = ("adapter.embed", "layers", "branch.entry", "branch.exits")

    def __init__(self, config: DitConfig, new_pair: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.adapter = LatentAdapter(config)
        self.uncertainty = UncertaintySampling(config.uncertainty_probability)
        width, layers, kind = config.injection.width, listening_layers(config), config.injection.kind
        self.branch: ControlBranch | None = None
        self.layers = nn.ModuleDict()
        if kind == "controlnet":
            self.branch = ControlBranch(width, config.hidden_size, [new_pair() for _ in layers])
        else:
            made = GatedAdaptiveNorm if kind == "adaptive_norm" else MlpAdapter
            self.layers.update({str(i): made(width, config.hidden_size) for i in layers})

    def prepare(
        self,
        coarse_BCthw: Tensor,
        keep_B: Tensor,
        generator: torch.Generator | None = None,
        share: Callable[[Tensor], Tensor] | None = None,
    ) -> dict[str, Modulation]:
        """Modulation of every listening layer. Samples with `keep_B` False stay exactly the base DiT's.

        One coarse latent for several samples is looked at once, and is that of all of them. `share` [B, N, E] to
        [B, n, E] picks the tokens that are modulated here.
        """
        features = self.uncertainty(self.adapter(coarse_BCthw), generator)
        features = features if share is None else share(features)
        keep = keep_B[:, None, None]

        def of_all(one: Tensor) -> Tensor:
            # no view of one: rows are taken and put together, and kernels walk through them
            return one if len(one) == len(keep) else one.expand(len(keep), -1, -1).contiguous()

        if self.branch is not None:
            return {BRANCH: (of_all(self.branch.entry(features)), keep)}
        prepared = {}
        for name, layer in self.layers.items():
            first, *others = layer.modulation(features)  # type: ignore[operator]
            prepared[name] = (first * keep, *map(of_all, others))
        return prepared


def listening_layers(config: DitConfig) -> range:
    """Indices of the layers (pairs of a spatial and a temporal block) that are injected into."""
    depth = config.depth
    return {
        "first_quarter": range(max(1, depth // 4)),
        "first_half": range(max(1, (depth + 1) // 2)),
        "all": range(depth),
        "last_half": range(depth // 2, depth),
    }[config.injection.layers]
