"""Clips and bytes beside what the data pipeline makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arlon_ray.config import load_config
from arlon_ray.planning.dataset import clips_of, latent_row_bytes, token_row_bytes
from data_pipeline.clips import split_spans
from data_pipeline.parquet import WRITTEN
from data_pipeline.schema import LATENT, TOKEN

ROWS, TEXT = 64, 9


@pytest.mark.parametrize("seconds", [1.0, 2.2, 4.3, 8.0, 61.7])
@pytest.mark.parametrize("stride", ["null", "1", "3"])
def test_clips_are_those_of_the_pipeline(seconds: float, stride: str) -> None:
    config = load_config("tiny", [f"data.stride_groups={stride}"])
    lengths = [17 * groups for groups in config.data.bucket_groups]
    spans = split_spans(int(seconds * config.video.fps), lengths, None if stride == "null" else 17 * int(stride))
    assert [17 * groups for groups in clips_of(config, seconds)] == [count for _, count in spans][:64]


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_latent_rows_are_as_long_as_in_a_file(preset: str, tmp_path: Path) -> None:
    config, generator = load_config(preset), np.random.default_rng(0)
    shape = [config.vae.latent_channels, 15, *config.latent_grid]
    rows = [
        {
            "clip_id": int(generator.integers(2**62)), "source": f"folder/clip-{i}.mp4", "uri": f"/videos/clip-{i}.mp4",
            "start_s": 0.0, "end_s": 3.2, "fps": 16.0, "height": config.video.height, "width": config.video.width,
            "num_frames": 51, "caption": "a red circle moves to the right", "source_height": 64, "source_width": 64,
            "source_duration_s": 3.3, "given_frames": 0, "black": 0.0, "frozen": 0.0, "text": None,
            "motion": float(generator.random()), "sharpness": float(generator.random()), "phash": generator.bytes(24),
            "latent": generator.normal(size=shape).astype(np.float16).tobytes(), "latent_shape": shape,
            "text_embedding": generator.normal(size=(TEXT, config.text.dim)).astype(np.float16).tobytes(),
            "text_length": TEXT,
        }
        for i in range(ROWS)
    ]  # fmt: skip
    file = tmp_path / "latents.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=LATENT), file, **WRITTEN)
    assert latent_row_bytes(config, 3, TEXT) == pytest.approx(file.stat().st_size / ROWS, rel=0.15)


@pytest.mark.parametrize("preset", ["tiny", "small"])
def test_token_rows_are_as_long_as_in_a_file(preset: str, tmp_path: Path) -> None:
    config, generator = load_config(preset), np.random.default_rng(0)
    rows = []
    for i in range(ROWS):
        row: dict[str, object] = {"clip_id": i}
        for role in ("fine", "coarse"):
            codec = getattr(config.vqvae, role)
            grid = config.token_grid(codec, 3)
            row[f"tokens_{role}"] = generator.integers(codec.codebook_size, size=int(np.prod(grid))).tolist()
            row[f"grid_{role}"] = list(grid)
        rows.append(row)
    file = tmp_path / "tokens.parquet"
    pq.write_table(pa.Table.from_pylist(rows, schema=TOKEN), file, **WRITTEN)
    assert token_row_bytes(config, 3) == pytest.approx(file.stat().st_size / ROWS, rel=0.25)
