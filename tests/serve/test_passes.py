"""Passes: what an address carries in place of a key, and all that it does not open."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from sqlalchemy import create_engine

import serve.keys
from serve.keys import Keys
from serve.passes import PASS_S, Passes, pass_in
from tests.serve.live import serving

PREFIX = "0123456789ab"


def test_a_pass_names_its_key_for_an_hour() -> None:
    now = [1000.0]
    passes = Passes(lambda: now[0])
    made = passes.make(PREFIX)
    assert passes.prefix(made) == PREFIX
    now[0] += PASS_S - 1
    assert passes.prefix(made) == PREFIX
    now[0] += 1
    assert passes.prefix(made) is None


def test_nobody_else_can_make_one() -> None:
    passes = Passes()
    prefix, end, signature = passes.make(PREFIX).split(".")
    assert Passes().prefix(f"{prefix}.{end}.{signature}") is None  # another process
    for wrong in (
        f"{'f' * 12}.{end}.{signature}",
        f"{prefix}.{int(end) + 1}.{signature}",
        f"{prefix}.{end}.{'0' * 64}",
        f"{prefix}.{end}.{signature}\n",
        f"{prefix}.{end}.{signature[:-1]}",
        f"{prefix}.{end}.",
        f"{prefix}.-1.{signature}",
        "",
        "..",
        "\u0661" * 12,
    ):
        assert passes.prefix(wrong) is None, wrong


def test_a_pass_is_read_where_files_are_and_nowhere_else() -> None:
    path, query = "/v1/videos/video_1/content", b"variant=thumbnail&pass=a"
    assert pass_in("GET", path, query) == pass_in("HEAD", path.replace("videos", "drafts"), query) == "a"
    for method in ("POST", "DELETE", "PUT", "OPTIONS"):
        assert pass_in(method, path, query) is None
    for other in ("/v1/videos/a/stream", "/v1/videos", "/v1/videos/a", f"{path}/", f"/x{path}", "/v1/usage/a/content"):
        assert pass_in("GET", other, query) is None, other
    for bad in (b"", b"pass=", b"pass=a&pass=b", b"PASS=a", b"\xff"):
        assert pass_in("GET", path, bad) is None, bad


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(create_engine(f"sqlite:///{tmp_path / 'keys.sqlite'}"))


@pytest.fixture
def url(tmp_path: Path, keys: Keys) -> Iterator[str]:
    with serving(tmp_path / "data", keys=keys) as (address, _):
        yield address


def client(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"})


def made_by(someone: httpx.Client) -> str:
    """The path of a finished video."""
    path = f"/v1/videos/{someone.post('/v1/videos', json={'prompt': 'A cat.'}).json()['id']}"
    until = time.monotonic() + 20
    while someone.get(path).json()["status"] != "completed":
        assert time.monotonic() < until
        time.sleep(0.05)
    return path


def test_it_reads_what_its_key_may_read_until_that_is_revoked(
    url: str, keys: Keys, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(serve.keys, "BELIEVED_S", 0.0)
    ann, bob = client(url, keys.add("ann", tenant="studio")), client(url, keys.add("bob"))
    colleague = client(url, keys.add("cid", tenant="studio"))
    path = made_by(ann)
    with caplog.at_level(logging.DEBUG):
        answer = ann.post("/v1/passes")
        value = answer.json()["value"]
        assert answer.json()["expires_in"] == PASS_S
        opened = {"pass": value}
        file = httpx.get(f"{url}{path}/content", params=opened)
        assert file.status_code == 200 and file.content == ann.get(f"{path}/content").content
        assert file.headers["cache-control"] == "private"
        part = httpx.get(f"{url}{path}/content", params=opened, headers={"range": "bytes=4-7"})
        assert part.status_code == 206 and part.content == b"ftyp"
        assert httpx.head(f"{url}{path}/content", params=opened).status_code == 200
        picture = httpx.get(f"{url}{path}/content", params={**opened, "variant": "thumbnail"})
        assert picture.headers["content-type"] == "image/png"
        for other in ("", "/stream", "/events", "/trace"):
            assert httpx.get(f"{url}{path}{other}", params=opened).json()["error"]["code"] == "missing_api_key", other
        assert httpx.delete(f"{url}{path}", params=opened).status_code == 401
        assert httpx.post(f"{url}/v1/passes", params=opened).status_code == 401  # no pass makes another one
    own = [record.getMessage() for record in caplog.records if not record.name.startswith("http")]  # not the client's
    assert own and value not in "".join(own)
    passes = [each.post("/v1/passes").json()["value"] for each in (bob, colleague)]
    found = [httpx.get(f"{url}{path}/content", params={"pass": each}).status_code for each in passes]
    assert found == [404, 200]  # another tenant's does not exist
    keys.revoke("ann")
    refused = httpx.get(f"{url}{path}/content", params=opened)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_pass")
    assert httpx.get(f"{url}{path}/content", params={"pass": passes[1]}).status_code == 200


def test_a_wrong_key_is_not_helped_by_a_pass(url: str, keys: Keys) -> None:
    ann = client(url, keys.add("ann"))
    path = made_by(ann)
    opened = {"pass": ann.post("/v1/passes").json()["value"]}
    wrong = httpx.get(f"{url}{path}/content", params=opened, headers={"authorization": "Bearer arlon_wrong"})
    assert (wrong.status_code, wrong.json()["error"]["code"]) == (401, "invalid_api_key")


def test_requests_with_a_pass_count_as_those_of_its_key(tmp_path: Path, keys: Keys) -> None:
    with serving(tmp_path / "data", keys=keys) as (url, _):
        ann = client(url, keys.add("ann", requests_per_minute=3))
        opened = {"pass": ann.post("/v1/passes").json()["value"]}
        asked = [httpx.get(f"{url}/v1/videos/none/content", params=opened).status_code for _ in range(3)]
        assert asked == [404, 404, 429]


def test_where_no_keys_are_needed_there_are_no_passes(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as (url, _):
        answer = httpx.post(f"{url}/v1/passes")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "keys_are_off")
