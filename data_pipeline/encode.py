"""Batch function: decoded clips → VAE latents and text embeddings. One instance lives in each encoder actor.

Legend: B clips of one bucket, C latent channels, T frames, t latent frames, H × W pixels, h × w latent grid.
"""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from arlon_ray.config import TextConfig, VaeConfig
from arlon_ray.models.text import load_text_encoder
from arlon_ray.models.vae import load_vae, to_video
from data_pipeline import schema
from data_pipeline.batches import in_batches
from data_pipeline.schema import ENCODED, REJECTED_BUCKET, STAGE_ENCODE, Row, one_line

#: Clips that a CPU encodes at once: as fast as more.
CPU_BATCH = 4
#: Columns that go through as they are.
KEPT = (*schema.CLIP.names, *schema.SCORES.names)


class ClipEncoder:
    """Encodes tables of `schema.DECODED` into tables of `schema.ENCODED`; batches are formed within each bucket."""

    def __init__(
        self,
        vae: str | Path,
        text: TextConfig,
        *,
        bounds: VaeConfig | None = None,
        batch_size: int = 16,
        device: str = "cpu",
        threads: int = 0,
    ) -> None:
        """`vae` is the artefact's folder, `bounds` say how much it codes at a time (`load_vae`).

        `threads` > 0 sets torch's CPU threads. Raises ArtifactError.
        """
        if threads:
            torch.set_num_threads(threads)
        self.device, self.batch_size = torch.device(device), batch_size
        self.vae = load_vae(vae, self.device, bounds=bounds)
        self.text = load_text_encoder(text, self.device)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Every row in comes out once, in the same order: encoded, or in the bucket of the rejected ones."""
        rows: list[Row] = table.to_pylist()
        results: list[Row] = [_rejected(row, row["stage"], row["reason"], row["error"]) for row in rows]
        buckets: dict[str, list[int]] = defaultdict(list)
        for position, row in enumerate(rows):
            if not row["reason"]:
                buckets[row["bucket"]].append(position)
        for positions in buckets.values():
            encoded = in_batches([rows[p] for p in positions], self.batch_size, self._encode_batch, _failed)
            for position, result in zip(positions, encoded, strict=True):
                results[position] = result
        return pa.Table.from_pylist(results, schema=ENCODED)

    def _encode_batch(self, rows: list[Row]) -> list[Row]:
        shape = (rows[0]["num_frames"], rows[0]["height"], rows[0]["width"], 3)
        frames = np.stack([np.frombuffer(row["frames"], np.uint8).reshape(shape) for row in rows])
        latents = self.encode_video(frames)
        if not np.isfinite(latents).all():
            raise ValueError("the latents are not finite")
        embedding = self.text.encode([row["caption"] for row in rows])
        lengths = embedding.mask.sum(1).tolist()
        values = embedding.values.to(torch.float16).cpu().numpy()
        return [
            {
                **{name: row[name] for name in KEPT},
                "latent": latent.tobytes(),
                "latent_shape": list(latent.shape),
                "text_embedding": value[:length].tobytes(),
                "text_length": length,
                "stage": "",
                "reason": "",
                "error": "",
            }
            for row, latent, value, length in zip(rows, latents, values, lengths, strict=True)
        ]

    def encode_video(self, frames: NDArray[np.uint8]) -> NDArray[np.float16]:
        """Latents float16 [B,C,t,h,w] of frames uint8 [B,T,H,W,3]."""
        if self.device.type != "cpu":
            return self._latents(frames)
        # kernels round differently for other batch sizes: with one size a clip's latents are the same to the last bit
        # whatever it is encoded with, so that an interrupted run makes the dataset of an unbroken one
        size = min(CPU_BATCH, self.batch_size)
        padded = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % size, axis=0)])
        parts = [self._latents(padded[first : first + size]) for first in range(0, len(padded), size)]
        return np.concatenate(parts)[: len(frames)]

    def _latents(self, frames: NDArray[np.uint8]) -> NDArray[np.float16]:
        return self.vae.encode(to_video(frames, self.device)).to(torch.float16).cpu().numpy()


def _failed(row: Row, error: str) -> Row:
    return _rejected(row, STAGE_ENCODE, schema.ENCODE_FAILED, error)


def _rejected(row: Row, stage: str, reason: str, error: str) -> Row:
    """The row of `schema.ENCODED` that carries a rejected clip to the writer."""
    return {
        **{name: row[name] for name in KEPT},
        "bucket": REJECTED_BUCKET,
        "latent": b"",
        "latent_shape": [],
        "text_embedding": b"",
        "text_length": 0,
        "stage": stage,
        "reason": reason,
        "error": one_line(error),
    }
