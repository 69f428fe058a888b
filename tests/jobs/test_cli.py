"""`arlon`: the commands that a server carries out, against a real one without Ray; and the jobs behind it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest
from PIL import Image
from sqlalchemy import create_engine

from arlon_ray.generation.video import read_video
from jobs import cli
from jobs.watching import Display
from serve.client import Client, ClientError, Event
from serve.keys import Keys
from tests.serve.live import DrawnStages, serving

ROOT = Path(__file__).resolve().parents[2]


class Ended(NamedTuple):
    """How a command ended."""

    code: int
    out: str
    err: str


def arlon(*words: str) -> Ended:
    """Run it in this process."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main(words)
        except SystemExit as ended:
            code = ended.code if isinstance(ended.code, int) else 1
    return Ended(code, out.getvalue(), err.getvalue())


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[DrawnStages]:
    with serving(tmp_path / "data") as (url, stages):
        monkeypatch.setenv("ARLON_URL", url)
        monkeypatch.delenv("ARLON_API_KEY", raising=False)
        yield stages


def made(kind: str = "videos") -> list[dict]:
    with Client(os.environ["ARLON_URL"]) as client:
        return client.list("drafts" if kind == "drafts" else "videos")


def test_from_prompts_to_a_file(served: DrawnStages, tmp_path: Path) -> None:
    path = tmp_path / "video.mp4"
    words = ["--prompt", "A cat.", "--prompt", "A dog.", "--segments", "3", "--seed", "7", "--steps", "4"]
    ended = arlon("submit", *words, "--negative-prompt", "rain", "--output", str(path))
    assert ended.code == 0, ended.err
    (video,) = made()
    assert ended.out == f"{path}: 68 frames (4.25 s)\n" and len(read_video(path)) == 68
    assert video["seed"] == 7 and [part["prompt"] for part in video["segments"]] == ["A cat.", "A cat.", "A dog."]
    lines = ended.err.splitlines()
    assert lines[0] == video["id"] and lines[-1] == "segment 3/3 ready"
    assert [line for line in lines if line.endswith("rendered")] == [f"segment {n}/3 rendered" for n in (1, 2, 3)]
    assert "step" not in ended.err  # a line for each would bury the others
    assert [entry.name for entry in tmp_path.iterdir()].count("video.mp4") == 1 and len(list(tmp_path.iterdir())) == 2


def test_what_is_submitted_is_watched_listed_fetched_and_deleted(served: DrawnStages, tmp_path: Path) -> None:
    served.held_at = 0
    picture = tmp_path / "first.jpg"
    Image.new("RGB", (40, 30), (200, 10, 10)).save(picture)
    ended = arlon(
        "submit",
        "--prompt",
        "A cat.",
        "--seconds",
        "2",
        "--prompt",
        "A dog.",
        "--seconds",
        "1",
        "--image",
        str(picture),
    )
    video_id = ended.out.strip()
    assert (ended.code, ended.err) == (0, f"watch it with: arlon watch {video_id}\n")
    assert re.fullmatch(rf"{video_id}  (queued|in_progress) .*  A cat. / A dog.\n", arlon("list").out)
    early = arlon("get", video_id, "--output", str(tmp_path / "x.mp4"))
    assert early.code == 1 and "no content yet" in early.err and len(early.err.splitlines()) == 1
    assert not (tmp_path / "x.mp4").exists()
    served.held_at = None
    assert arlon("watch", video_id).out.startswith(f"{video_id}: ")
    assert len(served.givens) == 1 and served.givens[0] is not None  # the picture
    assert json.loads(arlon("get", video_id).out)["status"] == "completed"
    assert arlon("get", video_id, "--output", str(tmp_path / "x.png"), "--variant", "thumbnail").code == 0
    assert Image.open(tmp_path / "x.png").size == (96, 96)
    assert arlon("delete", video_id).out == f"{video_id}: deleted\n"
    assert arlon("list").out == ""
    gone = arlon("watch", video_id)
    assert gone.code == 2 and gone.err == f"error: video_id: no video '{video_id}'\n"


def test_a_draft_is_changed_and_rendered(served: DrawnStages, tmp_path: Path) -> None:
    path = tmp_path / "draft.mp4"
    ended = arlon("submit", "--prompt", "A cat.", "--segments", "3", "--draft", "--output", str(path))
    assert ended.code == 0 and len(read_video(path)) == 68 and made() == []
    draft = made("drafts")[0]
    again = arlon("draft", "reroll", draft["id"], "1", "--seed", "5", "--prompt", "A bird.", "--wait")
    assert again.code == 0 and again.out.startswith(f"{draft['id']}: "), again.err
    assert "segment 2/3: planned anew" in again.err
    after = made("drafts")[0]
    assert [part["prompt"] for part in after["segments"]] == ["A cat.", "A bird.", "A cat."]
    assert after["segments"][1]["seed"] == 5 and after["status"] == "completed"
    assert arlon("draft", "reroll", draft["id"], "9").code == 2
    assert draft["id"] in arlon("list", "--drafts").out and arlon("list").out == ""
    rendered = arlon("render", draft["id"], "--steps", "3", "--output", str(tmp_path / "video.mp4"))
    assert rendered.code == 0 and made()[0]["draft_id"] == draft["id"], rendered.err
    first = made()[0]["id"]
    assert arlon("remix", first, "--prompt", "A fox.", "--wait").code == 0
    assert arlon("extend", first, "--prompt", "It leaves.", "--seconds", "1", "--cut", "--wait").code == 0
    extended, remixed = made()[:2]
    assert extended["extended_from_video_id"] == first == remixed["remixed_from_video_id"]
    assert remixed["prompt"] == "A fox." and float(extended["seconds"]) >= 5.25
    assert [segment["cut"] for segment in extended["segments"]].index(True) == len(made()[2]["segments"])
    assert arlon("submit", "--prompt", "A cat.", "--prompt", "A dog.", "--cut", "2", "--wait").code == 0
    assert [segment["cut"] for segment in made()[0]["segments"]] == [False, True]


def test_what_fails_is_one_line_and_exit_code_1(served: DrawnStages, tmp_path: Path) -> None:
    served.fail_at = 1
    ended = arlon("submit", "--prompt", "A cat.", "--segments", "3", "--output", str(tmp_path / "x.mp4"))
    assert ended.code == 1 and not (tmp_path / "x.mp4").exists()
    assert re.search(r"\nerror: video_\w+ failed: segment 1: \w+ failed \(MemoryError\)\n$", ended.err)


@pytest.mark.parametrize(
    "words, message",
    [
        (["submit"], "expected --prompt or --storyboard"),
        (["submit", "--prompt", " "], "--prompt: empty"),
        (["submit", "--prompt", "a", "--image", "/no/such.png"], "--image /no/such.png: not found"),
        (["submit", "--prompt", "a", "--draft", "--steps", "3"], "--steps: a draft is not rendered"),
        (["submit", "--prompt", "a", "--output", "/no/such/x.mp4"], "/no/such is not a folder"),
        (["submit", "--prompt", "a", "--seed", "-1"], "seed: Input should be greater than or equal to 0"),
        (["submit", "--prompt", "a", "--segments", "999"], "num_segments: at most 256 segments"),
        (["get", "video_nothing"], "no video 'video_nothing'"),
        (["delete", "../models"], "is no id"),
        (["list", "--limit", "0"], "limit: Input should be greater"),
        (["list", "--url", "nonsense"], "--url nonsense: expected http://HOST:PORT"),
        (["wtach"], "arlon wtach: no such command; did you mean watch?"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(served: DrawnStages, words: list[str], message: str) -> None:
    ended = arlon(*words)
    assert ended.code == 2 and message in ended.err and len(ended.err.splitlines()) == 1, ended.err
    assert made() == [] == made("drafts")


def test_a_server_that_is_not_there_and_one_that_is_none(tmp_path: Path) -> None:
    ended = arlon("list", "--url", "http://127.0.0.1:9")
    assert ended.code == 1 and "cannot be reached" in ended.err and len(ended.err.splitlines()) == 1


def test_a_key_is_needed_and_never_printed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = Keys(create_engine(f"sqlite:///{tmp_path / 'keys.sqlite'}"))
    key = keys.add("ann")
    monkeypatch.delenv("ARLON_API_KEY", raising=False)
    with serving(tmp_path / "data", keys=keys) as (url, _):
        refused = arlon("list", "--url", url)
        assert refused.code == 2 and "a key is needed" in refused.err
        ended = arlon("submit", "--prompt", "a", "--url", url, "--key", key)
        assert ended.code == 0 and key not in ended.out + ended.err and f"--url {url}" in ended.err
        monkeypatch.setenv("ARLON_API_KEY", key)
        assert arlon("watch", ended.out.strip(), "--url", url).code == 0
        assert arlon("list", "--url", url, "--key", "arlon_ü").code == 2


def test_ctrl_c_leaves_the_work_alone(served: DrawnStages) -> None:
    """As a command of its own; on a terminal there is a bar."""
    served.held_at = 1
    terminal, its_side = pty.openpty()
    termios.tcsetwinsize(its_side, (24, 100))
    command = [sys.executable, "-m", "jobs.cli", "submit", "--prompt", "A cat.", "--segments", "2", "--wait"]
    started = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=its_side)
    os.close(its_side)
    shown = ""
    while "segment 2/2, step 4/8" not in shown:
        shown += os.read(terminal, 4096).decode()
    assert re.search(r"segment 2/2, step 4/8 +\d\d %\|", shown) and "\r" in shown
    started.send_signal(signal.SIGINT)
    with contextlib.suppress(OSError):  # at its end
        while more := os.read(terminal, 4096).decode():
            shown += more
    assert started.wait(20) == 130
    (video,) = made()
    assert f"detached: {video['id']} goes on without you; watch it with: arlon watch {video['id']}\r\n" in shown
    assert "Traceback" not in shown and video["status"] == "in_progress"
    served.held_at = None
    assert arlon("watch", video["id"]).code == 0


def test_watching_survives_a_server_that_is_started_again(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as (url, stages):
        stages.held_at = 1
        client = Client(url)
        video = client.create({"prompt": "A cat.", "num_segments": 3})
        told: list[str] = []
        watching = threading.Thread(target=lambda: told.extend(event.type for event in client.watch(video["id"])))
        watching.start()
        while client.get(video["id"])["segments"][0]["status"] != "completed":
            time.sleep(0.05)
        port = int(url.rsplit(":", 1)[1])
    with serving(tmp_path / "data", port=port):
        watching.join(30)
        assert not watching.is_alive() and client.get(video["id"])["status"] == "completed"
    assert told.count("completed") == 1 and told.count("segment.completed") == 3


def test_watching_ends_whatever_comes_last() -> None:
    """A step that is told late, behind the end; and a stream that has nothing more to say of what has ended."""
    streams = [
        'id: 1\nevent: completed\ndata: {}\n\nevent: segment.step\ndata: {"index": 0, "step": 1, "steps": 2}\n\n',
        ": nothing\n\n",
    ]

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path.endswith("/events"):
            return httpx.Response(200, text=streams.pop(0))
        return httpx.Response(200, json={"status": "failed"})

    with Client("http://test", transport=httpx.MockTransport(answer)) as client:
        assert [event.type for event in client.watch("video_1")] == ["completed", "segment.step"]
        assert list(client.watch("video_1", last="1")) == []


def test_whatever_is_asked_for_is_asked_once_more_where_the_answer_is_lost() -> None:
    seen: list[tuple[str, str]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, request.headers["idempotency-key"]))
        if len(seen) % 2:
            raise httpx.RemoteProtocolError("no answer")
        return httpx.Response(200, json={"id": "made"})

    with Client("http://test", transport=httpx.MockTransport(answer)) as client:
        client.create({"prompt": "a"})
        client.remix("video_1", "b")
        client.extend("video_1", "b")
        client.reroll("draft_1", 0)
    assert seen[::2] == seen[1::2] and len({key for _, key in seen}) == 4

    def refuse(request: httpx.Request) -> httpx.Response:
        seen.append((request.url.path, ""))
        raise httpx.ConnectError("nobody there")

    with Client("http://test", transport=httpx.MockTransport(refuse)) as client, pytest.raises(ClientError):
        client.remix("video_1", "b")
    assert len(seen) == 9


def test_what_a_terminal_shows() -> None:
    video = {"id": "video_1", "segments": [{}, {}]}
    err = io.StringIO()
    with contextlib.redirect_stderr(err), Display(video, bar=True) as display:
        for kind, data in (
            ("queue", {"position": 2}),
            ("segment.planned", {"index": 0}),
            ("segment.step", {"index": 0, "step": 2, "steps": 4}),
            ("segment.completed", {"index": 0}),
            ("segment.planned", {"index": 0}),  # told again after a connection was lost
        ):
            display.show(Event(kind, data))
    assert "queued: 2 before it" in err.getvalue()
    assert re.search(r"segment 1/2, step 2/4 +25 %", err.getvalue())
    assert " 50 %" in err.getvalue().rsplit("\r", 1)[-1]


def test_the_jobs_bring_their_own_flags(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["arlon"])
    for name, flag in (("generate", "--until"), ("serve", "--port"), ("keys", "revoke"), ("edit", "--project")):
        ended = arlon(name, "--help")
        assert ended.code == 0 and flag in ended.out and ended.out.startswith(f"usage: arlon {name}")
    assert arlon("generate", "--bundle", "/no/bundle", "--prompt", "x")[::2] == (
        2,
        "error: --bundle /no/bundle: not found\n",
    )


def test_what_asks_a_server_is_quick_to_start() -> None:
    """The models' libraries take seconds to load."""
    code = "import sys, jobs.cli; print([name for name in ('torch', 'ray', 'numpy') if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"
    assert all(name in arlon("--help").out for name in (*cli.JOBS, *cli.COMMANDS))


def test_errors_name_the_field_once() -> None:
    assert not ClientError("gone", 409).bad_input and ClientError("two\nlines", 404).bad_input
    assert str(ClientError("two\nlines")) == "two lines"
