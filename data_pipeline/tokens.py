"""Tokens of both codecs for the latent rows of one file. The token file has the same rows in the same row groups.

Legend: B clips, C latent channels, t × h × w latent grid, t' × h' × w' token grid.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray

from arlon_ray import mirror
from arlon_ray.models.codec import load_codec
from data_pipeline.parquet import WRITTEN, open_parquet
from data_pipeline.schema import TOKEN, Row


def stack_latents(table: pa.Table) -> NDArray[np.float16]:
    """[B,C,t,h,w] of latent rows that have one shape. Raises ValueError if they do not."""
    shapes = {tuple(shape) for shape in table["latent_shape"].to_pylist()}
    if len(shapes) != 1:
        raise ValueError(f"latents of one bucket have the shapes {sorted(shapes)}: expected one")
    raw = b"".join(table["latent"].to_pylist())
    return np.frombuffer(raw, np.float16).reshape(len(table), *shapes.pop())


def stray_token(table: pa.Table, name: str, codebook_size: int) -> int | None:
    """A token of codec `name` in token rows that its codebook does not have, if there is one."""
    range_ = pc.min_max(table[f"tokens_{name}"].combine_chunks().flatten())
    least, most = range_["min"].as_py() or 0, range_["max"].as_py() or 0
    return least if least < 0 else most if most >= codebook_size else None


class TokenWriter:
    """Reads a latent file, writes its token file. One instance lives in each actor."""

    def __init__(self, fine: str | Path, coarse: str | Path, *, batch_size: int = 16, device: str = "cpu") -> None:
        """`fine` and `coarse` are codec artefacts. Raises ArtifactError."""
        self.device, self.batch_size = torch.device(device), batch_size
        self.codecs = {"fine": load_codec(fine, self.device), "coarse": load_codec(coarse, self.device)}

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """`row["latents"]` and `row["tokens"]` are paths; returns them with the number of rows written."""
        target = Path(row["tokens"])
        partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
        written = 0
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            source = open_parquet(Path(row["latents"]))
            with pq.ParquetWriter(partial, TOKEN, **WRITTEN) as writer:
                for group in range(source.num_row_groups):
                    table = source.read_row_group(group, columns=["clip_id", "latent", "latent_shape"])
                    writer.write_table(self.extract(table), row_group_size=len(table))
                    written += len(table)
            os.replace(partial, target)
            mirror.push(target)
        finally:
            partial.unlink(missing_ok=True)
        return {**row, "rows": written}

    def extract(self, table: pa.Table) -> pa.Table:
        """Latent rows of one bucket → rows of `schema.TOKEN`, in the same order."""
        latents = stack_latents(table)
        rows: list[Row] = [{"clip_id": value} for value in table["clip_id"].to_pylist()]
        for first in range(0, len(rows), self.batch_size):
            batch = torch.from_numpy(latents[first : first + self.batch_size].astype(np.float32)).to(self.device)
            for name, codec in self.codecs.items():
                tokens = codec.encode(batch).to(torch.int32).cpu().numpy()
                for offset, values in enumerate(tokens):
                    rows[first + offset][f"tokens_{name}"] = values.ravel().tolist()
                    rows[first + offset][f"grid_{name}"] = list(values.shape)
        return pa.Table.from_pylist(rows, schema=TOKEN)
