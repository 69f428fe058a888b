"""Fréchet video distance on stated features (Heusel et al. 2017; Unterthiner et al. 2019 for video).

The public FVD takes features from an I3D network trained on Kinetics, of which rendered scenes are nothing like. Here
the features are those of a fixed network with random weights (seed 0): 3-D convolutions, ReLU, and mean and deviation
of every channel over time and space. Random convolutions keep texture, colour and motion apart well enough to rank
models (random features: Naeem et al. 2020, section 5). A distance is comparable with others of the same FEATURES alone.

Legend: N videos, T frames, H × W pixels, F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from arlon_ray.evaluation.scenes import Frames
from arlon_ray.models.vae import to_video

#: Name of the features, to stand beside every distance.
FEATURES = "random 3-D convolutions v1"
WIDTHS = (3, 16, 24, 32)


@lru_cache(maxsize=1)
def _network() -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    layers: list[nn.Module] = []
    for inward, outward in pairwise(WIDTHS):
        layer = nn.Conv3d(
            inward, outward, 3, stride=(1, 2, 2) if inward == 3 else 2, padding=1, padding_mode="circular"
        )
        with torch.no_grad():
            layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator) * (2 / (27 * inward)) ** 0.5)
            layer.bias.zero_()  # type: ignore[union-attr]
        layers += [layer, nn.ReLU()]
    return nn.Sequential(*layers).eval().requires_grad_(False)


@torch.no_grad()
def video_features(frames: Frames) -> NDArray[np.float64]:
    """Features [F] of uint8 [T, H, W, 3]: mean and deviation of each channel of the last layer."""
    found = _network()(to_video(np.ascontiguousarray(frames)[None]))[0].flatten(1)
    return torch.cat([found.mean(1), found.std(1)]).double().numpy()


def frechet_distance(features: Sequence[NDArray[np.float64]], reference: Sequence[NDArray[np.float64]]) -> float:
    """|μ1 − μ2|² + tr(Σ1 + Σ2 − 2·(Σ1·Σ2)^½) of two sets of features. Raises ValueError for fewer than two each."""
    if min(len(features), len(reference)) < 2:
        raise ValueError(f"{len(features)} and {len(reference)} videos: a distance needs 2 or more of each")
    first, second = np.array(features), np.array(reference)
    gap = first.mean(0) - second.mean(0)
    one, two = (np.cov(part, rowvar=False) for part in (first, second))
    root = _root(one)
    # tr (Σ1·Σ2)^½ = tr (Σ1^½·Σ2·Σ1^½)^½, of a symmetric matrix
    shared = np.sqrt(np.clip(np.linalg.eigvalsh(root @ two @ root), 0, None)).sum()
    return float(max(0.0, gap @ gap + np.trace(one) + np.trace(two) - 2 * shared))


def _root(matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    values, vectors = np.linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0, None))) @ vectors.T
