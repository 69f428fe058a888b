"""Random generators of a video: each depends on the request's seed, the segment and the part, and on nothing else."""

from __future__ import annotations

import hashlib

import torch


def segment_generator(seed: int, index: int, part: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator for segment `index` of a video: the same on any replica, whatever else is being made."""
    digest = hashlib.sha256(f"{seed}/{index}/{part}".encode()).digest()
    return torch.Generator(device=device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
