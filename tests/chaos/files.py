"""Damaged files, without Ray: what disks, copies and other programs do to shards, tokens, checkpoints, segments.

Nothing may come out of a damaged file as if it were whole. What can be made again is; the rest is refused by name.
"""

from __future__ import annotations

import asyncio
import random
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from arlon_ray.artifact import ArtifactError, load_artifact, save_artifact
from arlon_ray.config import TrainingConfig
from arlon_ray.training.checkpoints import FolderCheckpoints
from arlon_ray.training.engine import TorchEngine
from arlon_ray.training.loop import run_stage
from data_pipeline.reader import BucketBatches, LatentDataset
from tests.chaos.record import Fault, Order
from tests.chaos.world import World
from tests.data_pipeline.inputs import write_dataset
from tests.serve.play import play, post, until
from tests.serve.stages import FakeStages
from tests.training.recording import Recorder
from tests.training.regression_stage import RegressionStage

TARGET = "files"
BUCKETS = {"34x16x16": 17, "51x16x16": 30}
SECTOR = 512
TRAINING = TrainingConfig(
    steps=20, batch_size=12, learning_rate=0.01, warmup_steps=3, ema_decay=0.9, log_every=4, checkpoint_every=5
)
SEGMENTS = 4

#: What is seen, and what was lost of it (empty: nothing).
Outcome = tuple[str, str]


def damage(path: Path, numbers: random.Random) -> str:
    """Change one bit, overwrite a sector with zeros, or cut the file; says which."""
    data, how = bytearray(path.read_bytes()), numbers.choice(["one bit", "a sector of zeros", "cut off"])
    place = numbers.randrange(len(data))
    if how == "one bit":
        data[place] ^= 1 << numbers.randrange(8)
    elif how == "cut off":
        data = data[:place]
    else:
        end = min(place + SECTOR, len(data))
        data[place:end] = bytes(end - place)
    path.write_bytes(data)
    return f"{how} at byte {place}"


def latent_shard(folder: Path, numbers: random.Random) -> tuple[str, Callable[[], Outcome]]:
    """A file of a finished dataset, before it is trained on."""
    return _dataset_file(folder, "latents", numbers)


def token_row(folder: Path, numbers: random.Random) -> tuple[str, Callable[[], Outcome]]:
    """A file of tokens; or one token in it, which no codebook has."""
    if numbers.random() < 0.5:
        return _dataset_file(folder, "tokens", numbers)
    path = _dataset(folder, "tokens", numbers)
    whole = _batches(folder / "set")
    table, groups = pq.read_table(path), pq.read_metadata(path).row_group(0).num_rows
    rows = table.to_pylist()
    row, name = numbers.randrange(len(rows)), numbers.choice(["fine", "coarse"])
    rows[row][f"tokens_{name}"][0] = numbers.choice([-1, 10_000])
    pq.write_table(pa.Table.from_pylist(rows, table.schema), path, row_group_size=groups)
    return f"row {row} has a token that no {name} codebook has", lambda: _refused(folder / "set", whole)


def checkpoint(folder: Path, numbers: random.Random) -> tuple[str, Callable[[], Outcome]]:
    """The newest checkpoint of a training that was interrupted."""
    expected = _trained(folder / "whole")[1]
    step = numbers.choice([10, 15])
    _trained(folder / "cut", interrupt_at=step)
    newest = folder / f"cut/checkpoints/step-{step:08d}"
    how = damage(numbers.choice(sorted(newest.iterdir())), numbers)

    def go_on() -> Outcome:
        recorder, found = _trained(folder / "cut")
        assert expected is not None and found is not None
        same = all(torch.equal(found[name], value) for name, value in expected.items())
        return " / ".join(_relative(line, folder) for line in recorder.lines[1:3]), "" if same else "other weights"

    return f"after step {step}: {how}", go_on


def served_segment(folder: Path, numbers: random.Random) -> tuple[str, Callable[[], Outcome]]:
    """A finished segment of a video that is being made, while the service is down."""
    request = {"prompt": "a", "num_segments": SEGMENTS, "seed": numbers.randrange(100)}
    names: list[str] = []
    found: list[bytes] = []

    async def whole(client: httpx.AsyncClient, _: FakeStages) -> None:
        video = await until(client, (await post(client, **request))["id"], "completed", "failed")
        found.append((await client.get(f"/v1/videos/{video['id']}/content")).content)

    async def before(client: httpx.AsyncClient, stages: FakeStages) -> None:
        stages.hang_at(SEGMENTS - 1)
        names.append((await post(client, **request))["id"])
        path = f"/v1/videos/{names[0]}"
        while (await client.get(path)).json()["segments"][SEGMENTS - 2]["status"] != "completed":
            await asyncio.sleep(0.01)

    async def after(client: httpx.AsyncClient, stages: FakeStages) -> None:
        video = await until(client, names[0], "completed", "failed")
        found.append((await client.get(f"/v1/videos/{video['id']}/content")).content)
        names.append(f"{video['status']}, segments {sorted({index for _, index in stages.rendered})} made")

    play(whole, folder / "other")
    play(before, folder)
    segment = numbers.randrange(SEGMENTS - 1)
    how = damage(folder / "videos" / names[0] / f"segment-{segment:05d}.safetensors", numbers)

    def go_on() -> Outcome:
        play(after, folder)
        return names[1], "" if found[0] == found[1] else "another video"

    return f"segment {segment} of {SEGMENTS}: {how}", go_on


def stage_artefact(folder: Path, numbers: random.Random) -> tuple[str, Callable[[], Outcome]]:
    """The weights of a stage, before they are used."""
    generator = torch.Generator().manual_seed(numbers.randrange(2**31))
    save_artifact(
        folder / "codec", kind="codec", config={}, tensors={"weight": torch.randn(64, 64, generator=generator)}
    )
    how = damage(folder / "codec" / "model.safetensors", numbers)

    def load() -> Outcome:
        try:
            load_artifact(folder / "codec", "codec")
        except ArtifactError as error:
            return _relative(str(error), folder), ""
        return "nothing", "damaged weights were taken for whole"

    return how, load


KINDS = {
    "latent shard": latent_shard,
    "token row": token_row,
    "checkpoint": checkpoint,
    "served segment": served_segment,
    "stage artefact": stage_artefact,
}


def inject(order: Order, folder: Path) -> Fault:
    """Damage something of this kind in an empty `folder`, and go on."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    moment, go_on = KINDS[order.kind](folder, order.numbers)
    begin = time.perf_counter()
    seen, lost = go_on()
    return Fault(TARGET, order.kind, order.number, moment, seen, time.perf_counter() - begin, lost=lost)


def inject_all(orders: Sequence[Order], world: World) -> Iterator[Fault]:
    """One after the other."""
    for order in orders:
        yield inject(order, world.folder / "files")


def _dataset(folder: Path, kind: str, numbers: random.Random) -> Path:
    write_dataset(folder / "set", BUCKETS)
    return numbers.choice(sorted((folder / "set" / kind).rglob("*.parquet")))


def _dataset_file(folder: Path, kind: str, numbers: random.Random) -> tuple[str, Callable[[], Outcome]]:
    path = _dataset(folder, kind, numbers)
    whole = _batches(folder / "set")
    how = damage(path, numbers)
    return f"{path.name}: {how}", lambda: _refused(folder / "set", whole)


def _refused(dataset: Path, whole: list[dict[str, Any]]) -> Outcome:
    """Train on it: either it is refused, or what was damaged is not read."""
    try:
        found = _batches(dataset)
    except ArtifactError as error:
        return _relative(str(error), dataset.parent), ""
    same = str(found) == str(whole)
    return "nothing: training does not read that byte", "" if same else "damaged rows were trained on"


def _batches(dataset: Path) -> list[dict[str, Any]]:
    """All batches of an epoch, as plain numbers."""
    source = BucketBatches(LatentDataset(dataset, tokens=dataset / "tokens"), 4, 0)
    batches = [source.batch(step) for step in range(source.steps_per_epoch)]
    return [{n: v.tolist() if isinstance(v, torch.Tensor) else v for n, v in batch.items()} for batch in batches]


def _trained(folder: Path, interrupt_at: int | None = None) -> tuple[Recorder, dict[str, torch.Tensor] | None]:
    recorder, stage = Recorder(interrupt_at), RegressionStage(TRAINING)
    try:
        result = run_stage(
            stage, TorchEngine(stage), recorder,
            output=folder / "artefact", checkpoints=FolderCheckpoints(folder / "checkpoints", "k"), key="k",
        )  # fmt: skip
    except KeyboardInterrupt:
        return recorder, None
    return recorder, result.artifact.tensors() if result.artifact else None


def _relative(text: str, folder: Path) -> str:
    return text.replace(f"{folder}/", "")
