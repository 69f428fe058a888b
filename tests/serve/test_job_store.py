"""The job store outlives the process that wrote it, in SQLite and in PostgreSQL."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text

from arlon_ray.config import load_config
from arlon_ray.generation import ChangingText
from serve.callers import LOCAL, Caller
from serve.job_store import DayUsedError, Event, JobStore, RequestKey, Stored, state_of
from serve.schema import SegmentState, Status, Video
from serve.work import Job
from tests.postgres import postgres

OPTIONS = load_config("tiny").sampling


@pytest.fixture(scope="module")
def postgresql(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a real server of our own."""
    with postgres(tmp_path_factory.mktemp("postgresql")) as address:
        yield address


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of an empty database."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    address = request.getfixturevalue("postgresql")
    engine = create_engine(address)
    with engine.begin() as connection:
        connection.execute(text("DROP TABLE IF EXISTS jobs, events"))
    engine.dispose()
    return address


def stored(name: str, status: Status = "queued", owner: str = "me", **more: object) -> Stored:
    video = Video(
        id=name,
        model="m",
        status=status,
        created_at=1,
        seconds="1",
        size="16x16",
        prompt="a",
        seed=0,
        segments=[SegmentState(index=0, prompt="a", frames=34, seed=0)],
    )
    job = Job(name, ("a", ChangingText(("a", "b"), ((1.0, 0.0), (0.0, 1.0)))), 3, OPTIONS, (1, 2), (1,), "request")
    return Stored(video, job, owner, **more)  # type: ignore[arg-type]


def test_what_it_knows_and_who_it_is(url: str) -> None:
    store = JobStore(url)
    for name in ("a", "b", "c"):
        store.add(stored(name))
    assert store.known(["b", "x", *(f"y{n}" for n in range(1200)), "c"]) == {"b", "c"} and store.known([]) == set()
    assert len(store.identity()) == 32 and store.identity() == JobStore(url).identity()


def test_a_restart_knows_what_is_unfinished_and_how_it_is_made(url: str) -> None:
    store = JobStore(url)
    for name, status in (("done", "completed"), ("bad", "failed"), ("waiting", "queued"), ("at_work", "in_progress")):
        store.add(stored(name, status, deadline=5.5))  # type: ignore[arg-type]
    store.close()

    again = JobStore(url)
    assert [each.video.id for each in again.unfinished()] == ["waiting", "at_work"]
    waiting = again.unfinished()[0]
    assert waiting == stored("waiting", deadline=5.5)
    done = again.get("done", LOCAL)
    assert done and done.video.status == "completed"
    again.close()


def test_saving_does_not_bring_back_a_deleted_video(url: str) -> None:
    store = JobStore(url)
    new = stored("a")
    store.add(new)
    new.video.status = "in_progress"
    store.save(state_of(new.video), [Event("in_progress", {}, 1)])
    found = store.get("a", LOCAL)
    assert found and found.video.status == "in_progress"
    assert store.delete("a")
    store.save(state_of(new.video), [Event("completed", {}, 2)])
    assert store.get("a", LOCAL) is None and store.events("a") == []
    assert not store.delete("a")
    store.close()


def test_events_are_kept_in_order(url: str) -> None:
    store = JobStore(url)
    new = stored("a")
    store.add(new)
    store.save(state_of(new.video), [Event("in_progress", {}, 1), Event("segment.planned", {"index": 0}, 2)])
    store.save(state_of(new.video), [Event("completed", {}, 3)])
    assert [event.number for event in store.events("a")] == [1, 2, 3]
    assert store.events("a", 1) == [Event("segment.planned", {"index": 0}, 2), Event("completed", {}, 3)]
    store.close()


def test_pages_follow_each_other_and_show_what_one_may_see(url: str) -> None:
    store = JobStore(url)
    for name in "abcde":
        store.add(stored(name, owner="other" if name == "c" else "me"))

    def names(who: Caller = LOCAL, **arguments: object) -> tuple[str, bool]:
        videos, more = store.page("video", who, **arguments)  # type: ignore[arg-type]
        return "".join(video.id for video in videos), more

    assert names(limit=2) == ("ed", True)
    assert names(limit=2, after="d") == ("cb", True)
    assert names(limit=2, after="b") == ("a", False)
    assert names(limit=3, newest_first=False) == ("abc", True)
    assert names(limit=3, newest_first=False, after="c") == ("de", False)
    assert names(Caller("me")) == ("edba", False)
    assert names(Caller("other")) == ("c", False)
    assert names(Caller("stranger")) == ("", False)
    assert store.page("draft", LOCAL) == ([], False)
    for who, after in ((LOCAL, "unknown"), (Caller("me"), "c")):
        with pytest.raises(KeyError):
            store.page("video", who, after=after)
    store.close()


def test_a_key_is_used_once_an_owner(url: str) -> None:
    store = JobStore(url)
    assert store.add(stored("a", idempotency_key="k", request_digest="1")) is None
    assert store.add(stored("b", idempotency_key="k", request_digest="1", owner="other")) is None
    assert store.add(stored("c")) is None and store.add(stored("d")) is None  # no key is no clash
    earlier = store.add(stored("e", idempotency_key="k", request_digest="2"))
    assert earlier and (earlier.video.id, earlier.request_digest) == ("a", "1")
    assert store.get("e", LOCAL) is None
    store.close()


def test_what_is_made_again_is_there_and_finished_and_known_by_its_key(url: str) -> None:
    store = JobStore(url)
    old, reset = stored("draft_a", "completed", owner="changing", idempotency_key="made"), Event("segment.reset", {}, 1)
    store.add(old)
    again = stored("draft_a", "queued", owner="changing")
    used = store.used("changing")[0]
    with pytest.raises(DayUsedError):
        store.change(again, reset, 2, used + 1, RequestKey("changing", "k", "d"))
    assert store.find("changing", "k") is None and store.events("draft_a") == []
    assert store.change(again, reset, 2, used + 2, RequestKey("changing", "k", "d"))
    found = store.find("changing", "k")
    assert found and (found.video.id, found.video.status, found.request_digest) == ("draft_a", "queued", "d")
    assert store.find("other", "k") is None and store.find("changing", None) is None
    made = store.find("changing", "made")
    assert made and (made.video.id, made.request_digest) == ("draft_a", old.request_digest)
    assert store.events("draft_a") == [reset] and store.used("changing")[0] == used + 2
    assert not store.delete("draft_a", unfinished=False) and store.events("draft_a") == [reset]
    assert store.delete("draft_a")
    assert store.find("changing", "k") is None
    assert not store.change(again, reset, 2, None, RequestKey("changing", "k", "d"))
    assert store.find("changing", "k") is None and store.events("draft_a") == []
    assert store.used("changing")[0] == used + 2
    store.close()


def test_threads_write_at_the_same_time(url: str) -> None:
    store = JobStore(url)
    errors = []

    def write(number: int) -> None:
        try:
            for count in range(10):
                new = stored(f"{number}-{count}")
                store.add(new)
                new.video.status = "completed"
                store.save(state_of(new.video), [Event("completed", {}, 1)])
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    videos, more = store.page("video", LOCAL, limit=100)
    assert (len(videos), more, {video.status for video in videos}) == (40, False, {"completed"})
    store.close()


def change(url: str, name: str, job: str = "{}", video: str = "{}", options: str = "{}") -> None:
    """Write other values into what a row holds, as other code would have."""
    engine = create_engine(url)
    with engine.begin() as connection:
        row = connection.execute(text("SELECT job, video FROM jobs WHERE id = :id"), {"id": name}).one()
        of_job, of_video = (json.loads(each) if isinstance(each, str) else each for each in row)
        of_job["options"].update(json.loads(options))
        values = {"job": of_job | json.loads(job), "video": of_video | json.loads(video)}
        written = {key: json.dumps(value) for key, value in values.items()}
        connection.execute(text("UPDATE jobs SET job = :job, video = :video WHERE id = :id"), {**written, "id": name})
    engine.dispose()


def test_what_newer_code_has_accepted_is_gone_on_with(url: str, caplog: pytest.LogCaptureFixture) -> None:
    store = JobStore(url)
    store.add(stored("newer"))
    change(url, "newer", options='{"of_next_year": 3, "solver": "not yet"}')
    (found,) = store.unfinished()
    assert found.job == stored("newer").job  # by default
    assert "newer: options that this code does not know are left out: " in caplog.text
    assert "of_next_year" in caplog.text and "solver" in caplog.text
    found.video.status = "completed"
    store.save(state_of(found.video))
    caplog.clear()
    assert [job.id for job in store.unmeasured()] == ["newer"] and store.get("newer", LOCAL)
    assert not caplog.text  # it is said once, not whenever somebody looks
    assert store.delete("newer")
    store.close()


@pytest.mark.parametrize("part", ["video", "job"])
def test_what_cannot_be_read_fails_and_the_others_go_on(url: str, part: str, caplog: pytest.LogCaptureFixture) -> None:
    """And can be seen and deleted."""
    store = JobStore(url)
    for name in ("first", "strange", "last"):
        store.add(stored(name))
    if part == "video":
        change(url, "strange", video='{"segments": "none"}', job='{"tenant": "studio"}')
    else:
        change(url, "strange", job='{"prompts": 3}')
    assert [each.video.id for each in store.unfinished()] == ["first", "last"]
    assert "strange: its row cannot be read" in caplog.text
    failed = store.get("strange", LOCAL)
    assert failed and failed.video.status == "failed" and failed.video.error and failed.video.completed_at
    assert failed.video.error.code == "unreadable"
    assert failed.job.tenant == ("studio" if part == "video" else "")
    assert [(each.type, each.number) for each in store.events("strange")] == [("failed", 1)]
    assert [video.id for video in store.page("video", LOCAL, newest_first=False)[0]] == ["first", "strange", "last"]
    assert [each.video.id for each in store.unfinished()] == ["first", "last"]
    store.expire(0.0)
    assert [job.id for job in store.expired(time.time() + 1)] == ["strange"]
    assert store.delete("strange") and store.get("strange", LOCAL) is None
    store.close()


def test_what_never_expired_expires_once_it_is_to(url: str) -> None:
    store = JobStore(url)
    for name, status in (("old", "completed"), ("new", "failed"), ("waiting", "queued"), ("promised", "completed")):
        store.add(stored(name, status))  # type: ignore[arg-type]
    change(url, "old", video='{"completed_at": 1000}')
    change(url, "new", video='{"completed_at": 5000}')
    promised = store.get("promised", LOCAL)
    assert promised
    promised.video.expires_at = 7000
    store.save(state_of(promised.video))
    store.expire(100.0)
    assert [job.id for job in store.expired(4000)] == ["old"] and [job.id for job in store.expired(5100)] == [
        "old",
        "new",
    ]
    for name, at in (("old", 1100), ("new", 5100), ("waiting", None), ("promised", 7000)):
        found = store.get(name, LOCAL)
        assert found and found.video.expires_at == at
    store.close()
