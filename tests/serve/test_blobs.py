"""Files of the service in a folder and in a bucket, and a video that another machine finishes."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from arlon_ray.generation.video import read_video
from serve.blobs import Blobs
from serve.job_store import JobStore
from serve.schema import RequestError, VideoRequest
from serve.service import VideoService
from tests.serve.stages import FakeStages, small_config


def test_files_by_name(blobs: Blobs) -> None:
    assert blobs.names("a") == [] and not blobs.exists("a/x")
    with pytest.raises(FileNotFoundError):
        blobs.read("a/x")
    for name in ("a/x", "a/y", "b/x"):
        blobs.write(name, name.encode())
    blobs.write("a/x", b"anew")
    assert (blobs.read("a/x"), blobs.names("a")) == (b"anew", ["a/x", "a/y"])
    blobs.delete("a/y")
    blobs.delete("a/y")
    blobs.delete_folder("a")
    blobs.delete_folder("a")
    assert blobs.names("a") == [] and blobs.read("b/x") == b"b/x"


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blobs = Blobs(tmp_path)
    blobs.write("a/x", b"old")
    plain = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        plain(path, data[:2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space"):
        blobs.write("a/x", b"new and longer")
    assert (blobs.read("a/x"), blobs.names("a")) == (b"old", ["a/x"])


def test_another_machine_finishes_what_one_has_begun(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, names = bucket.replace("PLACE", "machines"), []
    config = small_config("serve.max_running=1")

    def on_a_machine(name: str, scenario: Callable[[VideoService, FakeStages], Awaitable[None]]) -> None:
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / name))  # all that a machine has of its own
        (tmp_path / name).mkdir()

        async def run() -> None:
            stages = FakeStages(config)
            service = VideoService(config, JobStore.in_folder(tmp_path / "database"), stages, Blobs(place))
            await service.start()
            async with asyncio.timeout(60):
                await scenario(service, stages)
            await service.close()

        asyncio.run(run())

    async def first(service: VideoService, stages: FakeStages) -> None:
        stages.hang_at(2)
        names.append((await service.create(VideoRequest(prompt="a", num_segments=4, seed=1))).id)
        watched = await service.stream(names[0])
        assert len(read_video(io.BytesIO(await anext(watched)))) >= 34
        while (await service.get(names[0])).segments[1].status != "completed":
            await asyncio.sleep(0.01)

    async def second(service: VideoService, stages: FakeStages) -> None:
        while (await service.get(names[0])).status != "completed":
            await asyncio.sleep(0.01)
        assert [index for _, index in stages.rendered] == [2, 3]
        with (await service.content(names[0])).file as file:
            content = file.read()
        assert len(read_video(io.BytesIO(content))) == 34 + 3 * 17
        assert b"".join([piece async for piece in await service.stream(names[0])]) == content
        assert (await service.content(names[0], variant="thumbnail")).file.read(4) == b"\x89PNG"
        assert list((tmp_path / "second" / "arlon-ray").iterdir()) == []
        await service.delete(names[0])
        assert Blobs(place).names(f"videos/{names[0]}") == []
        with pytest.raises(RequestError, match="no video"):
            await service.content(names[0])

    on_a_machine("first", first)
    on_a_machine("second", second)
