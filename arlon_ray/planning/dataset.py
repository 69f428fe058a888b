"""What becomes of the videos: clips, and the bytes of their rows (`data_pipeline.schema`)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2, prod

from arlon_ray.config import GROUP_FRAMES, GROUP_LATENTS, Config

#: Bytes of the columns beside latent and embedding: names, spans, scores, and what Parquet adds.
ROW_BYTES = 400
#: Half-precision floats, of latents and embeddings.
HALF = 2


@dataclass(frozen=True)
class Videos:
    """A collection: so many files of one kind."""

    count: float
    seconds: float
    height: int = 720
    width: int = 1280
    fps: float = 30.0
    bits_per_s: float = 4e6
    caption_tokens: int = 32

    @property
    def file_bytes(self) -> float:
        """Of one file."""
        return self.seconds * self.bits_per_s / 8


def clips_of(config: Config, seconds: float) -> list[int]:
    """Groups of 17 frames of each clip of a video without cuts: the longest bucket that fits, again and again."""
    frames, data = int(seconds * config.video.fps + 1e-6), config.data
    stride, start, clips = data.stride_groups, 0, list[int]()
    while fitting := [groups for groups in data.bucket_groups if start + groups * GROUP_FRAMES <= frames]:
        clips.append(max(fitting))
        start += (stride or max(fitting)) * GROUP_FRAMES
    return clips[: data.max_clips_per_video]


def latent_row_bytes(config: Config, groups: int, caption_tokens: int) -> float:
    """A row of the latents: latent and embedding in half precision. Stored compressed, it is a few percent less."""
    latent = config.vae.latent_channels * groups * GROUP_LATENTS * prod(config.latent_grid)
    return ROW_BYTES + HALF * (latent + min(caption_tokens, config.text.max_tokens) * config.text.dim)


def token_row_bytes(config: Config, groups: int) -> float:
    """A row of the tokens of both codecs: Parquet packs them into the bits that their codes need."""
    bits = sum(
        prod(config.token_grid(codec, groups)) * ceil(log2(codec.codebook_size))
        for codec in (config.vqvae.fine, config.vqvae.coarse)
    )
    return 60 + bits / 8
