"""Scenes that are rendered while a training reads them."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import psutil
import pytest
import torch

from arlon_ray.config import GROUP_FRAMES
from benchmarks.rendered_latents import HELD_OUT, Mix, Parts, RenderedLatents, render_in_background, scenes_of
from data_pipeline.worlds import shot_captions
from tests.bundles import make_random_bundle, small_config


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards, written while somebody may read them."""
    folder = tmp_path_factory.mktemp("shards")
    bundle = make_random_bundle(folder / "bundle")
    parts = Parts(*(bundle / name for name in ("vae", "vqvae/fine", "vqvae/coarse")))
    mixes = [Mix("simple", (2, 3), 0.5), Mix("returning", (7,), 0.25), Mix("changing", (4,), 0.25)]
    process = render_in_background(
        small_config(), mixes, parts, folder / "shards",
        shards=2, size=64, seed=3, device="cpu", processes=1,
    )  # fmt: skip
    source = RenderedLatents(small_config(), folder / "shards", 2, 8, "cpu", every=1)
    source.batch(1, 0, 1)  # waits for both
    process.join()
    assert process.exitcode == 0
    return folder / "shards"


def test_what_works_in_the_background_ends_with_who_began_it() -> None:
    """Also where that one is killed, and can end nobody."""
    code = (
        "import time\n"
        "from benchmarks.rendered_latents import in_background\n"
        "if __name__ == '__main__':\n"
        "    print(in_background(time.sleep, 60).pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(code)
        file.flush()
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        began = subprocess.Popen([sys.executable, file.name], stdout=subprocess.PIPE, env=environment)
        assert began.stdout is not None
        with began.stdout as told:
            child = psutil.Process(int(told.readline()))
            time.sleep(3)  # it imports what it needs, and begins
            assert child.is_running()
            began.kill()
            began.wait(10)
            assert not psutil.wait_procs([child], 20)[1]


def source_of(folder: Path) -> RenderedLatents:
    """A new reader of both shards, one more a step."""
    return RenderedLatents(small_config(), folder, 2, 8, "cpu", every=1)


def test_a_batch_depends_on_its_step_alone(shards: Path) -> None:
    ahead, behind = source_of(shards), source_of(shards)
    ahead.batch(0, 0, 1)
    ahead.batch(1, 0, 1)
    first, again = ahead.batch(5, 0, 1), behind.batch(5, 0, 1)
    assert all(torch.equal(first[name], again[name]) for name in ("latents", "tokens_fine", "text", "clip_id"))
    assert not torch.equal(first["clip_id"], ahead.batch(6, 0, 1)["clip_id"])


def test_batches_are_of_one_length_and_of_every_length(shards: Path) -> None:
    source = source_of(shards)
    lengths = set()
    for step in range(40):
        batch = source.batch(step, 0, 1)
        latents, fine, coarse = (batch[name] for name in ("latents", "tokens_fine", "tokens_coarse"))
        assert latents.shape[2] == fine.shape[1] == coarse.shape[1] and latents.dtype is torch.float32
        assert len(latents) == 8 and batch["text"].shape[:2] == batch["text_mask"].shape
        lengths.add(latents.shape[2])
    assert lengths == {10, 15, 20, 35}


def test_what_comes_before_a_change_is_given_and_the_caption_is_that_of_what_comes_behind(shards: Path) -> None:
    config = small_config()
    scenes = islice(scenes_of(config, Mix("changing", (4,), 0.25), 3 + 2), 32)  # the third mix, two shards of 16
    given = {shot_captions(scene)[-1]: scene.frames - scene.shots[-1].frames for scene in scenes}
    batches = [source_of(shards).batch(step, 0, 1) for step in range(20)]
    changing = [batch for batch in batches if batch["latents"].shape[2] == 20]
    assert changing and all(int(batch["given_frames"].min()) >= GROUP_FRAMES for batch in changing)
    assert all(not batch["given_frames"].any() for batch in batches if batch["latents"].shape[2] != 20)
    held_out = [batch for batch in source_of(shards).held_out_batches(8) if batch["latents"].shape[2] == 20]
    for batch in held_out:
        assert [given[text] for text in batch["caption"]] == batch["given_frames"].tolist()
    assert held_out


def test_what_is_held_out_is_never_trained_on(shards: Path) -> None:
    source = source_of(shards)
    held_out = [row for batch in source.held_out_batches(8) for row in batch["latents"].flatten(1)]
    captions = [text for batch in source.held_out_batches(8) for text in batch["caption"]]
    assert len(held_out) == len(captions) >= 64 // HELD_OUT and all(captions)
    for step in range(60):
        for row in source.batch(step, 0, 1)["latents"].flatten(1):
            assert not any(len(row) == len(other) and torch.equal(row, other) for other in held_out)


def test_a_share_of_the_data_is_its_first_shards(shards: Path) -> None:
    half, whole = source_of(shards).share(0.5), source_of(shards)
    rows = {int(row) for step in range(50) for row in half.batch(step, 0, 1)["clip_id"]}
    assert half.shards == 1
    assert max(rows) < max(int(row) for step in range(50) for row in whole.batch(step, 0, 1)["clip_id"])


def test_scenes_in_which_nothing_moves_can_be_asked_for() -> None:
    scenes = list(islice(scenes_of(small_config(), Mix("simple", (2,), 1.0, still=True), 5), 20))
    assert {thing.action for scene in scenes for thing in scene.shots[0].things} == {"still"}
    assert {len(scene.shots[0].things) for scene in scenes} == {1, 2}
    moving = islice(scenes_of(small_config(), Mix("simple", (2,), 1.0), 5), 20)
    assert {scene.shots[0].things[0].action for scene in moving} == {"still", "move"}


def test_a_mix_that_cannot_be_read_is_named() -> None:
    for text in ("simple:2,3=0.8", "simple/still:7=0.25"):
        assert str(Mix.parse(text)) == text
    assert Mix.parse("simple:2,3=0.8") == Mix("simple", (2, 3), 0.8)
    with pytest.raises(ValueError, match="--mix simple: expected GRADE"):
        Mix.parse("simple")


def test_who_waits_for_shards_that_nobody_renders_is_told(shards: Path, tmp_path: Path) -> None:
    more = RenderedLatents(small_config(), shards, 3, 8, "cpu", every=1)
    with pytest.raises(RuntimeError, match=r"shard_00002.safetensors is missing in .*nobody renders it"):
        more.batch(2, 0, 1)
    mixes, parts = [Mix("simple", (2,), 1.0)], Parts(tmp_path / "no_vae")
    named = {"shards": 1, "size": 4, "seed": 3, "device": "cpu", "processes": 1}
    process = render_in_background(small_config(), mixes, parts, tmp_path / "shards", **named)
    with pytest.raises(RuntimeError, match="nobody renders it"):
        RenderedLatents(small_config(), tmp_path / "shards", 1, 8, "cpu").batch(0, 0, 1)
    process.join()
    assert process.exitcode == 1
