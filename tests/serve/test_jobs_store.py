"""The job store outlives the process that wrote it."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest

from serve.jobs_store import JobStore
from serve.schema import SegmentState, Status, Video, VideoRequest

REQUEST = VideoRequest(prompt="a")


def video(name: str, status: Status = "queued") -> Video:
    return Video(
        id=name,
        model="m",
        status=status,
        created_at=1,
        seconds="1",
        size="16x16",
        prompt="a",
        seed=0,
        segments=[SegmentState(index=0, prompt="a", frames=34)],
    )


def test_a_restart_keeps_finished_videos_and_fails_the_others(tmp_path: Path) -> None:
    store = JobStore.in_folder(tmp_path)
    for name, status in (("done", "completed"), ("bad", "failed"), ("waiting", "queued"), ("at_work", "in_progress")):
        store.add(video(name, status), REQUEST)  # type: ignore[arg-type]
    store.close()

    again = JobStore.in_folder(tmp_path)
    assert sorted(again.fail_unfinished()) == ["at_work", "waiting"]
    assert again.get("done") == video("done", "completed")
    assert again.get("bad") == video("bad", "failed")
    interrupted = again.get("at_work")
    assert interrupted and interrupted.status == "failed"
    assert interrupted.error and interrupted.error.code == "server_restarted"
    assert again.fail_unfinished() == []


def test_saving_does_not_bring_back_a_deleted_video(tmp_path: Path) -> None:
    store = JobStore.in_folder(tmp_path)
    store.add(video("a"), REQUEST)
    store.save(video("a", "in_progress"))
    found = store.get("a")
    assert found and found.status == "in_progress"
    assert store.delete("a")
    store.save(video("a", "completed"))
    assert store.get("a") is None
    assert not store.delete("a")


def test_pages_follow_each_other(tmp_path: Path) -> None:
    store = JobStore.in_folder(tmp_path)
    for name in "abcde":
        store.add(video(name), REQUEST)

    def names(**arguments: object) -> tuple[str, bool]:
        videos, more = store.page(**arguments)  # type: ignore[arg-type]
        return "".join(video.id for video in videos), more

    assert names(limit=2) == ("ed", True)
    assert names(limit=2, after="d") == ("cb", True)
    assert names(limit=2, after="b") == ("a", False)
    assert names(limit=3, newest_first=False) == ("abc", True)
    assert names(limit=3, newest_first=False, after="c") == ("de", False)
    with pytest.raises(KeyError):
        store.page(after="unknown")


def test_threads_write_at_the_same_time(tmp_path: Path) -> None:
    store = JobStore.in_folder(tmp_path)
    errors = []

    def write(number: int) -> None:
        try:
            for count in range(10):
                store.add(video(f"{number}-{count}"), REQUEST)
                store.save(video(f"{number}-{count}", "completed"))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    videos, more = store.page(limit=100)
    assert (len(videos), more, {video.status for video in videos}) == (40, False, {"completed"})
