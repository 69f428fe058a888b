"""What `/content` and `/stream` answer: whole files and ranges, from a folder and a bucket, and what vanishes."""

from __future__ import annotations

import asyncio
import email
import io
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from arlon_ray.generation.video import read_video
from serve.blobs import Blobs, Opened
from serve.job_store import JobStore
from serve.sending import file_answer
from tests.serve.play import play, post, until
from tests.serve.stages import FakeStages

DATA = bytes(range(256)) * 2000  # several pieces of an answer


def answered(blobs: Blobs, **asked: str) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to a request with these headers."""
    blobs.write("a/x", DATA)
    opened = blobs.open("a/x")
    answer = file_answer(opened, {name.replace("_", "-"): value for name, value in asked.items()}, "video/mp4", "x.mp4")

    async def body() -> bytes:
        return b"".join([bytes(piece) async for piece in answer.body_iterator])  # type: ignore[arg-type]

    data = asyncio.run(body())
    assert opened.file.closed and answer.headers["content-length"] == str(len(data))
    return answer.status_code, dict(answer.headers), data


def test_a_file_is_sent_in_pieces(blobs: Blobs) -> None:
    status, headers, data = answered(blobs)
    assert (status, data, headers["accept-ranges"], headers["content-type"]) == (200, DATA, "bytes", "video/mp4")
    assert headers["content-disposition"] == 'attachment; filename="x.mp4"'


@pytest.mark.parametrize(
    ("asked", "start", "end"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=70000-", 70000, len(DATA)),
        ("bytes=-5", len(DATA) - 5, len(DATA)),
        ("Bytes = 3-200000", 3, 200001),
        ("bytes=5-99999999999", 5, len(DATA)),
        ("bytes=-99999999999", 0, len(DATA)),
        ("bytes=10-20, 15-30,x,-", 10, 31),
    ],
)
def test_a_range(blobs: Blobs, asked: str, start: int, end: int) -> None:
    status, headers, data = answered(blobs, range=asked)
    assert (status, data) == (206, DATA[start:end])
    assert headers["content-range"] == f"bytes {start}-{end - 1}/{len(DATA)}"


def test_several_ranges(blobs: Blobs) -> None:
    status, headers, data = answered(blobs, range="bytes=300-309,0-4,-1")
    message = email.message_from_bytes(f"Content-Type: {headers['content-type']}\n\n".encode() + data)
    parts = message.get_payload()
    assert status == 206 and isinstance(parts, list)
    assert [(part["content-type"], part["content-range"]) for part in parts] == [  # type: ignore[index]
        ("video/mp4", f"bytes {span}/{len(DATA)}") for span in ("0-4", "300-309", f"{len(DATA) - 1}-{len(DATA) - 1}")
    ]
    assert [part.get_payload(decode=True) for part in parts] == [DATA[:5], DATA[300:310], DATA[-1:]]  # type: ignore[union-attr]
    assert answered(blobs, range="bytes=" + ",".join(["0-1"] * 101))[0] == 200


def test_what_is_no_range_of_bytes_is_none(blobs: Blobs) -> None:
    status, headers, data = answered(blobs, range="pages=0-1")
    assert (status, data) == (200, DATA) and "content-range" not in headers
    status, headers, data = answered(blobs, range="bytes=0-1,99999999-")
    assert (status, data, headers["content-range"]) == (206, DATA[:2], f"bytes 0-1/{len(DATA)}")


def test_the_headers_alone_read_nothing(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    blobs.write("x/v.mp4", DATA)
    opened = blobs.open("x/v.mp4")
    answer = file_answer(opened, {"range": "bytes=5-3"}, "video/mp4", "x.mp4", headers_only=True)
    assert (answer.status_code, answer.body, answer.headers["content-length"]) == (200, b"", str(len(DATA)))
    assert opened.file.closed


def test_a_range_of_the_file_that_the_client_has_a_part_of(tmp_path: Path) -> None:
    blobs = Blobs(tmp_path)
    (tmp_path / "a").mkdir()
    blobs.write("a/x", DATA)
    opened = blobs.open("a/x")
    opened.file.close()
    marks = file_answer(opened, {}, "video/mp4", "x.mp4").headers

    def again(mark: str) -> int:
        opened = blobs.open("a/x")
        with opened.file:
            return file_answer(opened, {"range": "bytes=0-1", "if-range": mark}, "video/mp4", "x.mp4").status_code

    tried = (marks["etag"], marks["last-modified"], '"another"', f"W/{marks['etag']}")
    assert [again(mark) for mark in tried] == [206, 206, 200, 200]


@pytest.mark.parametrize(
    ("asked", "status", "code"),
    [
        ("bytes=abc", 400, "invalid_range"),
        ("bytes", 400, "invalid_range"),
        ("bytes=5-3", 400, "invalid_range"),
        ("bytes=99999999-", 416, "range_not_satisfiable"),
        ("bytes=-0", 416, "range_not_satisfiable"),
    ],
)
def test_ranges_that_are_refused_have_the_usual_form(tmp_path: Path, asked: str, status: int, code: str) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        video = await until(client, (await post(client, prompt="a"))["id"], "completed")
        where = f"/v1/videos/{video['id']}/content"
        size = len((await client.get(where)).content)
        refused = await client.get(where, headers={"range": asked})
        error = refused.json()["error"]
        assert (refused.status_code, error["code"], error["param"]) == (status, code, "Range")
        assert error["type"] == "invalid_request_error"
        assert refused.headers.get("content-range") == (f"bytes */{size}" if status == 416 else None)
        part = await client.get(where, headers={"range": "bytes=4-7"})
        assert (part.status_code, part.content) == (206, b"ftyp")

    play(scenario, tmp_path)


def vanishing(monkeypatch: pytest.MonkeyPatch, before: bool, remove: Callable[[], None]) -> None:
    """The file is removed just before, or just after it is opened: behind all that was looked at."""
    plain = Blobs.open

    def open(blobs: Blobs, name: str) -> Opened:
        if before:
            remove()
        opened = plain(blobs, name)
        remove()
        return opened

    monkeypatch.setattr(Blobs, "open", open)


@pytest.mark.parametrize("what", ["content", "stream"])
def test_a_video_that_is_deleted_between_the_look_and_the_answer(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        made = [await until(client, (await post(client, prompt="a"))["id"], "completed") for _ in range(2)]
        for video, before in zip(made, (True, False), strict=True):
            store = JobStore.in_folder(tmp_path)
            file = tmp_path / "videos" / video["id"] / "video.mp4"

            def remove(store: JobStore = store, video: dict = video, file: Path = file) -> None:
                store.delete(video["id"])
                file.unlink(missing_ok=True)

            vanishing(monkeypatch, before, remove)
            answer = await client.get(f"/v1/videos/{video['id']}/{what}")
            monkeypatch.undo()
            store.close()
            if before:
                assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
            else:  # what is open is sent to its end
                assert answer.status_code == 200 and len(read_video(io.BytesIO(answer.content))) == 34
                assert not file.exists()

    play(scenario, tmp_path)


@pytest.mark.parametrize("what", ["content", "stream"])
def test_a_draft_that_is_planned_anew_between_the_look_and_the_answer(
    tmp_path: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario(client: httpx.AsyncClient, stages: FakeStages) -> None:
        asked = (await client.post("/v1/drafts", json={"prompt": "a", "num_segments": 2})).json()["id"]
        await until(client, asked, "completed")
        loop = asyncio.get_running_loop()
        file = tmp_path / "videos" / asked / "video.mp4"
        stages.gate.clear()

        def reroll() -> None:
            async def ask() -> None:
                await post(client, prompt="it has its turn before")  # so that the draft waits
                assert (await client.post(f"/v1/drafts/{asked}/segments/0/reroll", json={})).status_code == 200

            asyncio.run_coroutine_threadsafe(ask(), loop).result(10)
            file.unlink()

        vanishing(monkeypatch, True, reroll)
        answer = await client.get(f"/v1/drafts/{asked}/{what}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "draft_queued")
        stages.gate.set()

    play(scenario, tmp_path)


def test_what_is_open_knows_its_length(blobs: Blobs) -> None:
    with pytest.raises(FileNotFoundError):
        blobs.open("a/x")
    blobs.write("a/x", DATA)
    opened = blobs.open("a/x")
    with opened.file as file:
        assert (opened.size, opened.modified > 1e9) == (len(DATA), True)
        file.seek(-3, io.SEEK_END)
        assert file.read() == DATA[-3:]
