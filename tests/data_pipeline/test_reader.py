"""What training reads: pure functions of the step, equal shares, held-out clips, refusals."""

from __future__ import annotations

import json
import logging
import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from arlon_ray.artifact import ArtifactError
from data_pipeline.reader import BucketBatches, LatentDataset
from tests.data_pipeline.inputs import MAX_TOKENS, TEXT_DIM, write_dataset

BUCKETS = {"34x16x16": 30, "51x16x16": 17}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_dataset(tmp_path / "set", BUCKETS)
    return tmp_path / "set"


def batches(folder: Path, seed: int = 0, **options: int | bool) -> BucketBatches:
    """Batches of four with five clips held out."""
    dataset = LatentDataset(folder, tokens=folder / "tokens")
    return BucketBatches(dataset, 4, seed, **{"held_out": 5, **options})  # type: ignore[arg-type]


def test_a_batch_holds_what_was_written(folder: Path) -> None:
    source = batches(folder)
    for step in range(source.steps_per_epoch):
        batch = source.batch(step)
        ids = batch["clip_id"]
        assert batch["caption"] == [f"clip {number}" for number in ids.tolist()]
        frames = 10 if int(ids[0]) < 130 else 15
        assert batch["latents"].shape == (4, 2, frames, 2, 2) and batch["latents"].dtype == torch.float32
        assert torch.equal(batch["latents"], ids.float().view(4, 1, 1, 1, 1).expand_as(batch["latents"]))
        assert batch["tokens_fine"].shape == (4, frames, 2, 2) and batch["tokens_fine"].dtype == torch.int64
        assert torch.equal(batch["tokens_fine"][:, 0, 0, 0], ids)
        assert batch["tokens_coarse"].shape == (4, frames, 1, 1)
        assert torch.equal(batch["tokens_coarse"][:, 0, 0, 0], ids + 1)
        assert batch["text"].shape == (4, MAX_TOKENS, TEXT_DIM) and batch["text_mask"].dtype == torch.bool
        assert batch["text_mask"].sum(1).tolist() == [int(i) % (MAX_TOKENS - 1) + 1 for i in ids]
        assert torch.equal(batch["text"][:, 0, 0], ids.float())
        assert (batch["text"][~batch["text_mask"]] == 0).all()
        assert batch["fps"].tolist() == [16.0] * 4
        assert batch["given_frames"].tolist() == [i % 3 * 4 for i in ids.tolist()]


def test_batches_are_a_pure_function_of_the_step(folder: Path) -> None:
    forward, fresh = batches(folder), batches(folder)
    ids = [forward.batch(step)["clip_id"].tolist() for step in range(25)]
    for step in (24, 3, 17, 0):
        assert fresh.batch(step)["clip_id"].tolist() == ids[step]
    other = batches(folder, seed=1)
    assert [other.batch(step)["clip_id"].tolist() for step in range(25)] != ids


def test_an_epoch_shows_every_clip_at_most_once_and_the_next_differs(folder: Path) -> None:
    source = batches(folder)
    epochs = []
    for epoch in range(2):
        steps = range(epoch * source.steps_per_epoch, (epoch + 1) * source.steps_per_epoch)
        epochs.append([i for step in steps for i in source.batch(step)["clip_id"].tolist()])
    for ids in epochs:
        assert len(ids) == len(set(ids))
        assert source.train_rows - len(ids) < 2 * 4
    assert epochs[0] != epochs[1]


def test_workers_share_one_batch(folder: Path) -> None:
    source = batches(folder)
    for step in range(source.steps_per_epoch):
        whole = source.batch(step)["clip_id"].tolist()
        shares = [source.batch(step, rank, 2)["clip_id"].tolist() for rank in range(2)]
        assert shares[0] + shares[1] == whole
    with pytest.raises(ValueError, match="divide the batch of 4"):
        source.batch(0, 0, 3)


def test_held_out_clips_never_appear_in_training(folder: Path) -> None:
    source = batches(folder)
    held = [i for batch in source.held_out_batches(2) for i in batch["clip_id"].tolist()]
    assert len(held) == len(set(held)) == 5
    seen = {i for step in range(4 * source.steps_per_epoch) for i in source.batch(step)["clip_id"].tolist()}
    assert not seen & set(held)
    assert held == [i for batch in batches(folder, seed=9).held_out_batches(2) for i in batch["clip_id"].tolist()]


def test_a_tiny_cache_and_small_windows_change_nothing_but_memory(folder: Path) -> None:
    full, tight = batches(folder, window_groups=2), batches(folder, window_groups=2, cache_bytes=1500)
    for step in range(full.steps_per_epoch):
        assert torch.equal(full.batch(step)["latents"], tight.batch(step)["latents"])
    assert tight._cache.nbytes < full._cache.nbytes
    assert len(tight._cache._groups) < len(full._cache._groups)


def test_text_and_tokens_alone(folder: Path) -> None:
    source = batches(folder, latents=False)
    assert "latents" not in source.batch(0) and "tokens_fine" in source.batch(0)


def test_small_buckets_are_left_out_and_said_so(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = LatentDataset(folder)
    with caplog.at_level(logging.WARNING):
        source = BucketBatches(dataset, 20, seed=0)
    assert "51x16x16: 17" in caplog.text
    assert {int(i) < 130 for step in range(3) for i in source.batch(step)["clip_id"]} == {True}
    with pytest.raises(ArtifactError, match=r"no bucket has the 64 clips.*34x16x16: 30"):
        BucketBatches(dataset, 64, seed=0)
    with pytest.raises(ArtifactError, match="none is left"):
        BucketBatches(dataset, 4, seed=0, held_out=47)


def test_mismatches_are_refused_by_name(folder: Path) -> None:
    with pytest.raises(ArtifactError, match=r"VAE aaaaaaaaaaaa…, but the VAE here is bbbbbbbbbbbb…"):
        LatentDataset(folder, expect_vae="b" * 64)
    with pytest.raises(ArtifactError, match=r"fine codec ffffffffffff….*eeeeeeeeeeee…"):
        LatentDataset(folder, tokens=folder / "tokens", expect_fine="e" * 64)
    LatentDataset(folder, expect_vae="a" * 64, tokens=folder / "tokens", expect_fine="f" * 64, expect_coarse="c" * 64)
    path = folder / "tokens" / "manifest.json"
    path.write_text(path.read_text().replace(LatentDataset(folder).manifest.fingerprint, "d" * 64))
    with pytest.raises(ArtifactError, match=r"tokens .* were made from dataset dddddddddddd…"):
        LatentDataset(folder, tokens=folder / "tokens")


def test_other_schema_missing_or_damaged_parts_are_refused(folder: Path) -> None:
    path = folder / "manifest.json"
    good = path.read_text()
    path.write_text(json.dumps({**json.loads(good), "schema_version": 99}))
    with pytest.raises(ArtifactError, match="schema version 99"):
        LatentDataset(folder)
    path.write_text("{")
    with pytest.raises(ArtifactError, match="damaged"):
        LatentDataset(folder)
    path.write_text(good)
    part = folder / "latents" / "bucket=34x16x16" / "part-00000.parquet"
    part.rename(folder / "aside")
    with pytest.raises(ArtifactError, match="17 rows in latents/, but 47"):
        LatentDataset(folder)
    part.write_bytes(b"no parquet")
    with pytest.raises(ArtifactError, match="cannot be read"):
        LatentDataset(folder)
    path.unlink()
    with pytest.raises(ArtifactError, match="not a finished dataset"):
        LatentDataset(folder)


@pytest.mark.parametrize("kind", ["latents", "tokens"])
def test_one_bit_that_has_changed_is_noticed(folder: Path, kind: str) -> None:
    """Compressed pages have no checksum of their own: most such bits would be other latents, or another token."""
    damaged = sorted((folder / kind).rglob("*.parquet"))[0]
    data, whole, numbers, noticed = damaged.read_bytes(), everything(folder), random.Random(0), 0
    for _ in range(50):
        changed = bytearray(data)
        changed[numbers.randrange(len(data))] ^= 1 << numbers.randrange(8)
        damaged.write_bytes(changed)
        try:
            assert everything(folder) == whole  # it may be in a column that training does not read
        except ArtifactError as error:
            assert str(damaged) in str(error) or "latents/" in str(error)
            noticed += 1
    assert noticed > 10


def test_a_token_that_no_codebook_has_is_named(folder: Path) -> None:
    path = folder / "tokens" / "34x16x16-part-00000.parquet"
    table = pq.read_table(path)
    rows = table.to_pylist()
    rows[5]["tokens_coarse"][1] = 512
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path, row_group_size=4)
    with pytest.raises(ArtifactError, match="a coarse token is 512, but the codebook has 512: extract the tokens"):
        everything(folder)


def everything(folder: Path) -> list[str]:
    """The content of all batches of an epoch, as text."""
    source = batches(folder, held_out=0)
    steps = [source.batch(step) for step in range(source.steps_per_epoch)]
    return [str({n: v.tolist() if isinstance(v, torch.Tensor) else v for n, v in step.items()}) for step in steps]


def test_a_share_of_the_clips_is_part_of_every_larger_share(folder: Path) -> None:
    def trained(share: float) -> set[int]:
        source = batches(folder, share=share)  # type: ignore[arg-type]
        return {int(i) for epoch in range(3) for step in range(source.steps_per_epoch)
                for i in source.batch(step + epoch * source.steps_per_epoch)["clip_id"]}  # fmt: skip

    half, most, whole = trained(0.5), trained(0.8), trained(1.0)
    assert half < most < whole and 10 < len(half) < 32
    assert not whole & {int(i) for batch in batches(folder, share=0.5).held_out_batches(4) for i in batch["clip_id"]}  # type: ignore[arg-type]
