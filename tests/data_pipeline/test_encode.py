"""Encoding and tokens with the real classes: every row in comes out once, bad ones with their reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from arlon_ray.artifact import save_artifact
from arlon_ray.config import CodecConfig, TextConfig, VaeConfig
from arlon_ray.models.codec import LatentCodec, load_codec
from arlon_ray.models.vae import load_vae
from data_pipeline import schema
from data_pipeline.encode import ClipEncoder
from data_pipeline.parquet import write_table
from data_pipeline.schema import DECODED, ENCODED, LATENT, Row
from data_pipeline.tokens import TokenWriter, stack_latents
from tests.bundles import save_random_vae
from tests.data_pipeline.inputs import write_dataset

TEXT = TextConfig(kind="minilm", dim=384, max_tokens=16)


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE artefact with random weights."""
    config = VaeConfig(latent_channels=4, width=16, deep_width=16, blocks=1)
    return save_random_vae(tmp_path_factory.mktemp("artefacts") / "vae", config).path


@pytest.fixture(scope="module")
def encoder(vae: Path) -> ClipEncoder:
    """The encoder of the module's tests, two clips a batch."""
    return ClipEncoder(vae, TEXT, batch_size=2)


def decoded(clip_id: int, frames: int, caption: str = "a red circle") -> Row:
    """A row of `DECODED` with random pixels."""
    pixels = np.random.default_rng(clip_id).integers(0, 255, (frames, 16, 16, 3), dtype=np.uint8)
    return {
        "clip_id": clip_id,
        "source": "a.mp4",
        "uri": "/a.mp4",
        "start_s": 0.0,
        "end_s": 1.0,
        "fps": 16.0,
        "height": 16,
        "width": 16,
        "num_frames": frames,
        "given_frames": 0,
        "caption": caption,
        "bucket": f"{frames}x16x16",
        "frames": pixels.tobytes(),
        "reason": "",
        "error": "",
    }


def test_mixed_buckets_keep_their_order_and_give_the_vae_s_own_latents(encoder: ClipEncoder, vae: Path) -> None:
    rows = [decoded(1, 34), decoded(2, 17), decoded(3, 34, "a much longer caption, of two circles"), decoded(4, 34)]
    result = encoder(pa.Table.from_pylist(rows, schema=DECODED))
    assert result.schema == ENCODED
    assert result["clip_id"].to_pylist() == [1, 2, 3, 4]
    assert result["bucket"].to_pylist() == ["34x16x16", "17x16x16", "34x16x16", "34x16x16"]
    model = load_vae(vae)
    for row, encoded in zip(rows, result.to_pylist(), strict=True):
        pixels = np.frombuffer(row["frames"], np.uint8).reshape(row["num_frames"], 16, 16, 3)
        video = torch.from_numpy(pixels.copy()).permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        expected = model.encode(video)[0]
        latent = torch.frombuffer(bytearray(encoded["latent"]), dtype=torch.float16).view(encoded["latent_shape"])
        assert latent.shape == expected.shape
        assert torch.allclose(latent.float(), expected, atol=2e-3, rtol=2e-3)
        text = encoder.text.encode([row["caption"]])
        assert encoded["text_length"] == int(text.mask.sum())
        stored = np.frombuffer(encoded["text_embedding"], np.float16).reshape(-1, 384)
        assert np.allclose(stored, text.values[0, : encoded["text_length"]].numpy(), atol=2e-3)


def test_one_bad_row_costs_only_itself(encoder: ClipEncoder) -> None:
    bad = {**decoded(2, 34), "frames": b"too few bytes"}
    failed = {**decoded(3, 34), "frames": b"", "stage": "decode", "reason": schema.DECODE_FAILED, "error": "why"}
    result = encoder(pa.Table.from_pylist([decoded(1, 34), bad, failed, decoded(4, 34)], schema=DECODED)).to_pylist()
    assert [(row["stage"], row["reason"]) for row in result] == [
        ("", ""),
        ("encode", schema.ENCODE_FAILED),
        ("decode", schema.DECODE_FAILED),
        ("", ""),
    ]
    assert [row["bucket"] for row in result] == ["34x16x16", "rejected", "rejected", "34x16x16"]
    assert "ValueError" in result[1]["error"] and result[2]["error"] == "why"


def test_latents_that_are_not_finite_are_rejected(encoder: ClipEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    nan = np.full((1, 4, 10, 2, 2), np.nan, np.float16)
    monkeypatch.setattr(encoder, "encode_video", lambda frames: nan.repeat(len(frames), 0))
    (row,) = encoder(pa.Table.from_pylist([decoded(1, 34)], schema=DECODED)).to_pylist()
    assert row["reason"] == schema.ENCODE_FAILED and "not finite" in row["error"]


@pytest.fixture
def codecs(tmp_path: Path) -> tuple[Path, Path]:
    """Two codec artefacts with random weights, for two latent channels."""
    torch.manual_seed(0)
    paths = []
    for name, patch in (("fine", (1, 1, 1)), ("coarse", (5, 2, 2))):
        config = CodecConfig(patch=patch, codebook_size=32, code_dim=4, width=16, blocks=1)
        model = LatentCodec(config, 2)
        model.codebook.normal_()
        settings = {**config.model_dump(mode="json"), "latent_channels": 2}
        save_artifact(tmp_path / name, kind="codec", config=settings, tensors=model.state_dict())
        paths.append(tmp_path / name)
    return paths[0], paths[1]


def test_token_files_mirror_latent_files(tmp_path: Path, codecs: tuple[Path, Path]) -> None:
    write_dataset(tmp_path / "set", {"34x16x16": 7}, row_group=4)
    source = tmp_path / "set" / "latents" / "bucket=34x16x16" / "part-00000.parquet"
    table = pq.ParquetFile(source).read()
    noise = np.random.default_rng(0).normal(size=(7, 2, 10, 2, 2)).astype(np.float16)
    column = pa.array([latent.tobytes() for latent in noise], pa.binary())
    table = table.set_column(table.schema.get_field_index("latent"), LATENT.field("latent"), column)
    write_table(table, source, 4)
    target = tmp_path / "out.parquet"
    result = TokenWriter(*codecs, batch_size=3)({"latents": str(source), "tokens": str(target)})
    assert result["rows"] == 7
    file = pq.ParquetFile(target)
    assert [file.metadata.row_group(number).num_rows for number in range(file.num_row_groups)] == [4, 3]
    rows = file.read()
    assert rows["clip_id"].equals(table["clip_id"])
    for name, path, grid in (("fine", codecs[0], [10, 2, 2]), ("coarse", codecs[1], [2, 1, 1])):
        expected = load_codec(path).encode(torch.from_numpy(noise.astype(np.float32)))
        assert rows[f"grid_{name}"].to_pylist() == [grid] * 7
        assert rows[f"tokens_{name}"].to_pylist() == expected.flatten(1).tolist()
    assert not list(tmp_path.glob(".out*"))


def test_latents_of_two_shapes_in_one_bucket_are_refused() -> None:
    table = pa.table({"latent": [b"\0" * 16, b"\0" * 8], "latent_shape": [[1, 2, 2, 2], [1, 1, 2, 2]]})
    with pytest.raises(ValueError, match="expected one"):
        stack_latents(table)


def test_a_clip_s_latents_do_not_depend_on_what_it_is_encoded_with(encoder: ClipEncoder) -> None:
    rows = [decoded(number, 34) for number in range(7)]
    together = encoder(pa.Table.from_pylist(rows, schema=DECODED))["latent"].to_pylist()
    alone = [encoder(pa.Table.from_pylist([row], schema=DECODED))["latent"][0].as_py() for row in rows]
    assert together == alone
