"""Reading a dataset for training: plain pyarrow, no Ray. Refuses what does not fit together.

Legend: C latent channels, t × h × w latent grid, t' × h' × w' token grid, L text tokens, D text width.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from arlon_ray import mirror
from arlon_ray.artifact import ArtifactError, one_line
from data_pipeline.manifest import DatasetManifest, TokenManifest, read_manifest
from data_pipeline.parquet import open_parquet
from data_pipeline.tokens import stack_latents, stray_token

#: What to do about a file that is damaged.
AGAIN, RESTORE = "extract the tokens again", "copy the file again, or remove the dataset and preprocess again"


@dataclass(frozen=True)
class RowGroup:
    """The decoded rows of one Parquet row group; n rows.

    `latents` float16 [n,C,t,h,w] (None where they were not asked for); `texts`: n arrays float16 [L,D];
    `tokens`: by codec ("fine", "coarse") int32 [n,t',h',w'].
    """

    clip_ids: NDArray[np.int64]
    captions: list[str]
    fps: NDArray[np.float32]
    given_frames: NDArray[np.int32]
    texts: list[NDArray[np.float16]]
    latents: NDArray[np.float16] | None
    tokens: dict[str, NDArray[np.int32]] = field(default_factory=dict)

    @property
    def nbytes(self) -> int:
        """Bytes in memory, nearly."""
        arrays: list[NDArray[Any]] = [self.clip_ids, self.fps, *self.texts, *self.tokens.values()]
        return sum(array.nbytes for array in arrays) + (self.latents.nbytes if self.latents is not None else 0)


@dataclass(frozen=True)
class BucketIndex:
    """Where a bucket's rows are: `groups` are (file, row group in it), `starts` their first rows, and the row count."""

    groups: list[tuple[Path, int]]
    starts: NDArray[np.int64]
    clip_ids: NDArray[np.int64]


class LatentDataset:
    """A finished dataset, and its tokens where a token folder is given. Knows every clip id, reads rows on demand."""

    def __init__(
        self,
        folder: str | Path,
        expect_vae: str | None = None,
        tokens: str | Path | None = None,
        *,
        expect_fine: str | None = None,
        expect_coarse: str | None = None,
    ) -> None:
        """`expect_*` are artefacts' fingerprints. Raises ArtifactError that names both sides of a mismatch."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder, DatasetManifest)
        if expect_vae is not None and self.manifest.vae_fingerprint != expect_vae:
            raise ArtifactError(
                f"dataset {folder} was encoded by VAE {self.manifest.vae_fingerprint[:12]}…, "
                f"but the VAE here is {expect_vae[:12]}…: preprocess again, or use the VAE it was made with"
            )
        self.token_folder = Path(tokens) if tokens is not None else None
        self.token_manifest: TokenManifest | None = None
        if self.token_folder is not None:
            self.token_manifest = self._check_tokens(self.token_folder, expect_fine, expect_coarse)
        self.buckets = {name: self._index(name) for name in sorted(self.manifest.buckets)}
        if self.rows != self.manifest.rows:
            raise ArtifactError(
                f"{self.folder}: {self.rows} rows in latents/, but {self.manifest.rows} in the manifest: "
                "files are missing or were added; preprocess again"
            )

    @property
    def rows(self) -> int:
        """Clips in all."""
        return sum(len(index.clip_ids) for index in self.buckets.values())

    def _check_tokens(self, folder: Path, fine: str | None, coarse: str | None) -> TokenManifest:
        manifest = read_manifest(folder, TokenManifest)
        if manifest.dataset_fingerprint != self.manifest.fingerprint:
            raise ArtifactError(
                f"tokens {folder} were made from dataset {manifest.dataset_fingerprint[:12]}…, but dataset "
                f"{self.folder} is {self.manifest.fingerprint[:12]}…: extract the tokens again"
            )
        pairs = (("fine", manifest.fine_fingerprint, fine), ("coarse", manifest.coarse_fingerprint, coarse))
        for name, found, expected in pairs:
            if expected is not None and found != expected:
                raise ArtifactError(
                    f"tokens {folder} were made by {name} codec {found[:12]}…, but the {name} codec here is "
                    f"{expected[:12]}…: extract the tokens again"
                )
        return manifest

    def _index(self, bucket: str) -> BucketIndex:
        groups: list[tuple[Path, int]] = []
        counts: list[int] = []
        ids: list[NDArray[np.int64]] = []
        for path in mirror.glob(self.folder / "latents" / f"bucket={bucket}", "*.parquet"):
            try:
                file = open_parquet(path)
                ids.append(file.read(columns=["clip_id"])["clip_id"].to_numpy())
            except (OSError, pa.ArrowInvalid, KeyError) as error:
                raise ArtifactError(f"{path}: cannot be read: {one_line(error)}: {RESTORE}") from None
            for number in range(file.num_row_groups):
                groups.append((path, number))
                counts.append(file.metadata.row_group(number).num_rows)
        starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return BucketIndex(groups, starts, np.concatenate(ids) if ids else np.array([], np.int64))

    def read_group(self, bucket: str, number: int, *, latents: bool = True) -> RowGroup:
        """Decode one row group. Raises ArtifactError where a file is damaged or tokens do not belong to the latents."""
        path, group = self.buckets[bucket].groups[number]
        columns = ["clip_id", "caption", "fps", "given_frames", "text_embedding", "text_length"]
        table = _read(path, group, columns + (["latent", "latent_shape"] if latents else []), RESTORE)
        width = self.manifest.text_dim
        texts = [np.frombuffer(raw, np.float16).reshape(-1, width) for raw in table["text_embedding"].to_pylist()]
        clip_ids = table["clip_id"].to_numpy()
        tokens: dict[str, NDArray[np.int32]] = {}
        if self.token_folder is not None:
            token_path = self.token_folder / token_file(path)
            rows = _read(token_path, group, None, AGAIN)
            if not np.array_equal(rows["clip_id"].to_numpy(), clip_ids):
                raise ArtifactError(f"{token_path}: its clips are not those of {path}: {AGAIN}")
            assert self.token_manifest is not None
            sizes = {"fine": self.token_manifest.fine_codebook_size, "coarse": self.token_manifest.coarse_codebook_size}
            for name, size in sizes.items():
                if (stray := stray_token(rows, name, size)) is not None:
                    raise ArtifactError(
                        f"{token_path}: a {name} token is {stray}, but the codebook has {size}: {AGAIN}"
                    )
            tokens = {name: _grids(rows, name) for name in sizes}
        return RowGroup(
            clip_ids=clip_ids,
            captions=table["caption"].to_pylist(),
            fps=table["fps"].to_numpy().astype(np.float32),
            given_frames=table["given_frames"].to_numpy(),
            texts=texts,
            latents=stack_latents(table) if latents else None,
            tokens=tokens,
        )


def token_file(latent_file: Path) -> str:
    """Name of the token file of `latents/bucket=B/part-N.parquet`: "B-part-N.parquet"."""
    return f"{latent_file.parent.name.removeprefix('bucket=')}-{latent_file.name}"


def _read(path: Path, group: int, columns: list[str] | None, advice: str) -> pa.Table:
    try:
        return open_parquet(path).read_row_group(group, columns=columns)
    except (OSError, pa.ArrowInvalid, IndexError) as error:
        raise ArtifactError(f"{path}: row group {group} cannot be read: {one_line(error)}: {advice}") from None


def _grids(table: pa.Table, name: str) -> NDArray[np.int32]:
    """Tokens [n,t',h',w'] of one codec; all rows of a bucket have one grid."""
    grid = table[f"grid_{name}"][0].as_py()
    flat = table[f"tokens_{name}"].combine_chunks().flatten().to_numpy()
    return flat.astype(np.int32).reshape(len(table), *grid)


class GroupCache:
    """Decoded row groups, the least recently used thrown out when there are more than `limit` bytes of them."""

    def __init__(self, dataset: LatentDataset, limit: int, latents: bool) -> None:
        self._dataset, self._limit, self._latents = dataset, limit, latents
        self._groups: OrderedDict[tuple[str, int], RowGroup] = OrderedDict()
        self.nbytes = 0

    def get(self, bucket: str, number: int) -> RowGroup:
        """The row group, from memory or from disk."""
        key = (bucket, number)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        group = self._dataset.read_group(bucket, number, latents=self._latents)
        self._groups[key] = group
        self.nbytes += group.nbytes
        # the newest stays, however large: it is in use
        while self.nbytes > self._limit and len(self._groups) > 1:
            self.nbytes -= self._groups.popitem(last=False)[1].nbytes
        return group
