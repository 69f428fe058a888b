"""Folders that no row names: what a process leaves that dies between writing files and writing the row."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from pathlib import Path

import numpy as np
import pytest

from serve.blobs import Blobs
from serve.callers import LOCAL
from serve.cleaning import MARK, Cleaner
from serve.job_store import JobStore
from serve.places import Places
from serve.schema import VideoRequest
from serve.service import VideoService
from tests.serve.play import serve_alone
from tests.serve.stages import FakeStages
from tests.serve.test_job_store import stored


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    """It knows video_kept."""
    found = JobStore.in_folder(tmp_path / "database")
    found.add(stored("video_kept"))
    return found


def test_what_no_row_names_goes_once_it_is_old(blobs: Blobs, store: JobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    cleaner = Cleaner(store, Places(blobs))
    assert cleaner.orphans() == []  # the place is this database's now
    for name in ("video_kept", "video_lost", "draft_lost"):
        blobs.write(f"videos/{name}/picture.safetensors", b"x")
    blobs.write("videos/video_lost/sub/deep", b"x")
    assert cleaner.orphans() == []  # just written: its row may be on its way
    monkeypatch.setattr("serve.cleaning.GRACE_S", -5.0)
    assert cleaner.orphans() == ["draft_lost", "video_lost"]
    assert blobs.folders("videos") == ["video_kept"] and blobs.exists("videos/video_kept/picture.safetensors")
    assert cleaner.orphans() == []


def test_the_newest_file_counts(store: JobStore, tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    Cleaner(store, Places(blobs)).clean()
    for name in ("video_kept", "video_old", "video_new"):
        blobs.write(f"videos/{name}/a", b"x")
        blobs.write(f"videos/{name}/b", b"x")
        for path in ("a", ".") if name == "video_new" else ("a", "b", "."):
            os.utime(tmp_path / "videos" / name / path, (0, time.time() - 4000))
    assert Cleaner(store, Places(blobs)).orphans() == ["video_old"]
    assert blobs.folders("videos") == ["video_kept", "video_new"]


def test_another_database_removes_nothing(
    blobs: Blobs,
    store: JobStore,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("serve.cleaning.GRACE_S", -5.0)
    empty = JobStore.in_folder(tmp_path / "mistyped")
    blobs.write("videos/video_kept/a", b"x")
    with caplog.at_level(logging.WARNING, "ray.serve"):
        # nobody has said yet whose it is, and it knows none of them
        assert Cleaner(empty, Places(blobs)).orphans() == []
    assert "another database" in caplog.text and not blobs.exists(MARK)
    assert Cleaner(store, Places(blobs)).orphans() == []
    assert blobs.read(MARK).decode() == store.identity() == JobStore.in_folder(tmp_path / "database").identity()
    empty.add(stored("video_its_own"))
    assert Cleaner(empty, Places(blobs)).orphans() == [] and blobs.folders("videos") == ["video_kept"]


def test_two_databases_in_one_place_lose_nothing(
    blobs: Blobs, store: JobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither knows all that is there: it is nobody's."""
    monkeypatch.setattr("serve.cleaning.GRACE_S", -5.0)
    other = JobStore.in_folder(tmp_path / "other")
    other.add(stored("video_theirs"))
    for name in ("video_kept", "video_theirs"):
        blobs.write(f"videos/{name}/a", b"x")
    for each in (store, other):
        assert Cleaner(each, Places(blobs)).orphans() == [] and not blobs.exists(MARK)
    assert blobs.folders("videos") == ["video_kept", "video_theirs"]


def test_a_service_that_starts_again_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process dies when the files are there and the row is not."""

    class Died(BaseException):
        pass

    def die(*_: object) -> None:
        raise Died

    async def first(service: VideoService, stages: FakeStages) -> None:
        video = await service.create(VideoRequest(prompt="a"))
        while (await service.get(video.id)).status != "completed":
            await asyncio.sleep(0.01)
        monkeypatch.setattr(service._store, "add", die)
        with pytest.raises(Died):
            await service.create(VideoRequest(prompt="c"), picture=np.zeros((16, 16, 3), np.uint8))
        assert len(Blobs(tmp_path).folders("videos")) == 2

    async def second(service: VideoService, stages: FakeStages) -> None:
        while len(Blobs(tmp_path).folders("videos")) != 1:
            await asyncio.sleep(0.01)
        assert len((await service.page("video", LOCAL, None, 10, True))[0]) == 1

    serve_alone(first, tmp_path)
    monkeypatch.setattr("serve.cleaning.GRACE_S", -5.0)
    serve_alone(second, tmp_path)
