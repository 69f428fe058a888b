"""Requests that nobody means well: never a 500, errors in one form, nothing given away, and the server stays up."""

from __future__ import annotations

import base64
import io
import json
import select
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from PIL import Image
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.postgres import postgres
from tests.serve.served import Served, served

#: What no answer may hold.
SECRETS = ("Traceback", "site-packages", '.py"', "sqlite", "psycopg", "sqlalchemy", "SELECT ", "/tmp/", "0x7f")
JSON = {"content-type": "application/json"}
#: Answers are what the API's description says of them.
DESCRIBED = [status_code_conformance, content_type_conformance, response_schema_conformance]
TRICKS = [
    "' OR '1'='1", "video_0'; DROP TABLE jobs; --", "../../../../etc/passwd", "..%2f..%2f..%2fetc%2fpasswd", "%00",
    "a%00b", "....//....//etc/passwd", "%2e%2e%2f%2e%2e%2f", "C:%5CWindows", "%ff%fe", "%ed%a0%80", "%25%30%30",
    "%0d%0aSet-Cookie:%20a=b", "{{7*7}}", "$(id)", "*", "%F0%9F%92%A9", "-1", "null", "%20", "~root", "video_%",
    "video_" + "a" * 3000,
]  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("fuzz")
    small = ("serve.max_upload_bytes=65536", "serve.body_timeout_s=1", "serve.max_segments=4", "serve.max_queued=10000")
    with served(folder, *small, "serve.max_queued_per_key=10000") as running:
        yield running


def check(response: Any, about: object = "") -> None:
    """No failure of the server, no secret, and the form of OpenAI's errors. `response` is httpx's or requests'."""
    status, text = response.status_code, response.content[:20_000].decode(errors="replace")
    assert status < 500 and status != 422, (about, status, text)
    assert "nosniff" in response.headers["x-content-type-options"], about
    assert response.headers["x-request-id"], about
    if status >= 400:
        assert not [secret for secret in SECRETS if secret in text], (about, text)
        if response.request.method != "HEAD":
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}, (about, text)
            assert error["message"] and error["type"] == "invalid_request_error", (about, text)


def still_works(here: Served) -> None:
    """A video can be made from beginning to end."""
    with here.client() as client:
        made = client.post("/v1/videos", json={"prompt": "a"})
        assert made.status_code == 200, made.text
        address = f"/v1/videos/{made.json()['id']}"
        until = time.monotonic() + 60
        while client.get(address).json()["status"] != "completed":
            assert time.monotonic() < until
            time.sleep(0.02)
        assert client.get(f"{address}/content").content[4:8] == b"ftyp"
        assert client.delete(address).status_code == 200


def fuzz(here: Served, cases: int, start: int) -> Counter[int]:
    """About `cases` requests made up from the API's description, some of them against it; their statuses."""
    schema = schemathesis.openapi.from_dict(here.openapi)
    operations = [found.ok() for found in schema.get_all_operations()]
    with here.client() as client:
        known = {"draft": client.post("/v1/drafts", json={"prompt": "a", "num_segments": 2}).json()["id"]}
        known["video"] = client.post("/v1/videos", json={"prompt": "a", "num_segments": 2}).json()["id"]
    statuses: Counter[int] = Counter()
    session = requests.Session()
    session.headers.update(here.user)
    # what takes nothing but a text in its address has no wrong input: any text is one
    wrong = [each for each in operations if each.body or each.query]
    both = [(each, GenerationMode.POSITIVE) for each in operations] + [
        (each, GenerationMode.NEGATIVE) for each in wrong
    ]
    for operation, mode in both:

        @seed(start)
        @settings(
            max_examples=-(-cases // len(both)), deadline=None, database=None, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck),
        )  # fmt: skip
        @given(case=operation.as_strategy(generation_mode=mode), existing=st.booleans())
        def send(case: Any, existing: bool) -> None:
            if existing and case.method != "DELETE" and "video_id" in (case.path_parameters or {}):
                case.path_parameters["video_id"] = known["draft" if "/drafts" in case.path else "video"]
            try:
                response = case.call(base_url=here.url, session=session, headers=here.user, timeout=20)
            except (requests.exceptions.InvalidHeader, requests.exceptions.InvalidURL, UnicodeError):
                return  # no client could send that
            statuses[response.status_code] += 1
            check(response, case)
            case.validate_response(response, checks=DESCRIBED)

        send()
    still_works(here)
    return statuses


def test_made_up_requests(here: Served) -> None:
    statuses = fuzz(here, 100, 1)
    assert sum(statuses.values()) >= 100 and {200, 404, 400} <= set(statuses), statuses


@pytest.mark.slow
@pytest.mark.parametrize("start", [1, 2])
def test_many_made_up_requests(here: Served, start: int) -> None:
    statuses = fuzz(here, 1500, start)
    print(dict(statuses))
    assert sum(statuses.values()) >= 1000, statuses


@pytest.mark.slow
def test_made_up_requests_with_postgresql(tmp_path: Path) -> None:
    """It takes less than SQLite does: no zero character in a text, for one."""
    with postgres(tmp_path / "pg") as uri, served(tmp_path, "serve.max_segments=4", database=uri) as running:
        assert 200 in fuzz(running, 300, 3)
        tricks(running)


def tricks(here: Served) -> None:
    """Ids that try to be something else, wherever there is an id."""
    with here.client() as client:
        for trick in TRICKS:
            for path in (
                f"/v1/videos/{trick}", f"/v1/videos/{trick}/content", f"/v1/videos/{trick}/events",
                f"/v1/drafts/{trick}/tokens", f"/v1/models/{trick}", f"/web/{trick}", f"/{trick}",
                f"/v1/videos?after={trick}", f"/v1/videos?limit={trick}", f"/v1/videos/x/content?variant={trick}",
            ):  # fmt: skip
                answer = client.get(path)
                check(answer, path)
                assert answer.status_code in (200, 400, 404), path
            check(client.delete(f"/v1/videos/{trick}"), trick)
            for header in ("idempotency-key", "last-event-id", "x-request-id", "content-type", "range"):
                headers = [(header.encode(), trick.encode()[:200])]
                check(client.post("/v1/drafts", content=b'{"prompt": "", "seed": -1}', headers=headers), header)
        for field in ("prompt", "user", "negative_prompt", "model", "draft"):
            for text in ("\0", "a\0b", "\ud800", "\uffff", "\u202e", "a" * 60_000):
                body = json.dumps({"prompt": "a", field: text})
                answer = client.post("/v1/videos", content=body, headers=JSON)
                check(answer, (field, text[:9]))
                assert answer.status_code == 400 or "\0" not in text, field
        key = {**JSON, "idempotency-key": "k"}
        check(client.post("/v1/videos", json={"prompt": "a"}, headers=key))
        assert client.post("/v1/videos", json={"prompt": "b"}, headers=key).status_code == 409


def test_tricks_in_ids_and_headers(here: Served) -> None:
    tricks(here)
    still_works(here)


FORM = "multipart/form-data; boundary=x"
PART = b'--x\r\nContent-Disposition: form-data; name="prompt"\r\n\r\na\r\n'


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("multipart/form-data", PART),
        ("multipart/form-data; boundary=", PART),
        ("multipart/form-data; boundary=" + "y" * 500, PART),
        ("multipart/form-data; boundary=é", PART),
        (FORM, b""),
        (FORM, b"--x--\r\n"),
        (FORM, PART),
        (FORM, PART[:30]),
        (FORM, b"--x\r\n\r\n\r\n--x--\r\n"),
        (FORM, b"--x\r\nContent-Disposition: form-data\r\n\r\na\r\n--x--\r\n"),
        (FORM, PART * 500 + b"--x--\r\n"),
        (FORM, PART.replace(b"a\r\n", b"\xff\xfe\r\n") + b"--x--\r\n"),
        (FORM, PART.replace(b"prompt", b"\xff") + b"--x--\r\n"),
        (FORM, PART.replace(b'"prompt"', b'"prompt"; filename="../../x"') + b"--x--\r\n"),
        (FORM, PART.replace(b"prompt", b"x" * 20_000) + b"--x--\r\n"),
        (FORM, b"--x\r\n" + b"a: b\r\n" * 5000 + b"\r\n--x--\r\n"),
        (FORM, b"a" * 60_000),
        ("application/x-www-form-urlencoded", b"prompt=a&prompt=b"),
        ("application/x-www-form-urlencoded", b"%ff=%ff&prompt=%00" + b"&a=b" * 5000),
        ("text/plain", b'{"prompt": "a"}'),
        ("application/xml", b"<prompt/>"),
        ("application/octet-stream", bytes(range(256))),
        ("", b'{"prompt": "a"}'),
        (";;;", b"{}"),
        ("application/json; charset=utf-16", '{"prompt": "a"}'.encode("utf-16")),
        ("application/json", b"\xff\xfe{}"),
        ("application/json", b""),
        ("application/json", b"{" * 50_000),
        ("application/json", b"[" * 60_000),
        ("application/json", b'{"a":' * 10_000),
        ("application/json", b'{"seed": ' + b"9" * 10_000 + b"}"),
        ("application/json", b'{"prompt": "a", "guidance_scale": 1e999}'),
        ("application/json", b'{"prompt": "a", "seconds": NaN}'),
        ("application/json", b'{"prompt": "a", "prompt": ["a"]}'),
        ("application/json", b'{"__proto__": {}, "constructor": 1}'),
        ("application/json", b'{"prompt": {"$ne": null}}'),
    ],
)
@pytest.mark.parametrize("path", ["/v1/videos", "/v1/drafts", "/v1/videos/extensions"])
def test_bodies_that_are_not_what_they_say(here: Served, path: str, kind: str, body: bytes) -> None:
    with here.client() as client:
        response = client.post(path, content=body, headers=[(b"content-type", kind.encode())])
        check(response, (kind, body[:60]))
        assert response.status_code >= 400 or b"prompt" in body.replace(b"\0", b""), response.text


def test_huge_bodies_are_refused_before_they_are_there(here: Served) -> None:
    with here.client() as client:
        for body in (b"x" * 70_000, iter([b"x" * 1000] * 100)):
            try:
                response = client.post("/v1/videos", content=body, headers={"content-type": "application/json"})
            except httpx.WriteError:
                continue  # the server had hung up already
            check(response)
            assert response.status_code == 413
    head = f"POST /v1/videos HTTP/1.1\r\nHost: x\r\nAuthorization: {here.user['authorization']}\r\n"
    answer = raw(here, f"{head}Content-Length: 999999999999\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 413") and b"body_too_large" in answer
    still_works(here)


def test_bad_pictures(here: Served) -> None:
    file = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(file, "PNG")
    good = file.getvalue()
    bomb = good[:16] + struct.pack(">II", 60_000, 60_000) + good[24:]
    with here.client() as client:
        for data in (b"", b"GIF89a", good[:50], bomb, b"<svg/>", good[:-40], bytes(1000)):
            answers = [
                client.post("/v1/videos", data={"prompt": "a"}, files={"input_reference": ("a.png", data, "image/png")})
            ]
            url = "data:image/png;base64," + base64.b64encode(data).decode()
            for path in ("/v1/videos", "/v1/drafts"):
                answers.append(client.post(path, json={"prompt": "a", "input_reference": {"image_url": url}}))
            for answer in answers:
                check(answer, data[:20])
                assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_reference"), answer.text
        for url in ("http://127.0.0.1:1/a.png", "file:///etc/passwd", "data:,a", "data:image/png;base64,%"):
            answer = client.post("/v1/videos", json={"prompt": "a", "input_reference": {"image_url": url}})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input_reference"), answer.text
        files = {"input_reference": ("../../a.png", good, "text/html")}
        assert client.post("/v1/videos", data={"prompt": "a"}, files=files).status_code == 200


def raw(here: Served, *pieces: bytes, pause_s: float = 0.0, half_close: bool = False) -> bytes:
    """What the server says to bytes that are sent as they are, until it hangs up or says no more for 5 s."""
    with socket.create_connection(("127.0.0.1", here.port), timeout=5) as connection:
        answer = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
                if select.select([connection], [], [], pause_s)[0]:
                    break  # what is sent to one that hangs up would cost its answer
            if half_close:
                connection.shutdown(socket.SHUT_WR)
            while more := connection.recv(65536):
                answer += more
        except (TimeoutError, ConnectionError):
            pass
        return answer


def test_slow_and_half_closed_connections(here: Served) -> None:
    key = here.user["authorization"]
    head = f"POST /v1/videos HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nContent-Type: application/json\r\n"
    body = head.encode() + b"Content-Length: 1000\r\n\r\n"
    idle = [socket.create_connection(("127.0.0.1", here.port)) for _ in range(50)]
    for number, connection in enumerate(idle):
        connection.sendall((b"GET / HT", head.encode(), body)[number % 3])
    began = time.monotonic()
    slow = raw(here, body, *[b" "] * 30, pause_s=0.05)
    assert slow.startswith(b"HTTP/1.1 408") and b"body_timeout" in slow and time.monotonic() - began < 4
    chunked = head.encode() + b"Transfer-Encoding: chunked\r\n\r\n"
    assert raw(here, chunked, *[b"1\r\na\r\n"] * 30, pause_s=0.05).startswith(b"HTTP/1.1 408")
    assert raw(here, body, b"{", half_close=True)[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 408")
    # who closes only its own half still gets its answer
    get = f"GET /v1/models HTTP/1.1\r\nHost: x\r\nAuthorization: {key}\r\nConnection: close\r\n\r\n".encode()
    assert raw(here, get, half_close=True)[:12] in (b"", b"HTTP/1.1 200")
    still_works(here)
    for connection in idle:
        connection.close()


@pytest.mark.parametrize(
    "bytes_sent",
    [
        b"\x00" * 100,
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET\r\n\r\n",
        b"GET / HTTP/9.9\r\n\r\n",
        b"GET /v1/videos HTTP/1.1\r\n\r\n",
        b"GET http://evil.test/v1/videos HTTP/1.1\r\nHost: evil.test\r\n\r\n",
        b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n" + b"A: b\r\n" * 20_000 + b"\r\n",
        b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
        b"0\r\n\r\nGET / HTTP/1.1\r\n\r\n",
        b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\naa",
        b"POST /v1/videos HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
        b"GET /v1/videos HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n",
    ],
)
def test_what_is_not_http(here: Served, bytes_sent: bytes) -> None:
    answer = raw(here, bytes_sent, half_close=True)
    assert not answer or answer[:10] in (b"HTTP/1.1 4", b"HTTP/1.0 4") or b"200 OK" in answer[:20], answer[:200]
    assert b"HTTP/1.1 5" not in answer and b"Traceback" not in answer
    with here.client() as client:
        assert client.get("/healthz").status_code == 200


def test_others_jobs_cannot_be_told_from_none(here: Served) -> None:
    with here.client() as client:
        theirs = httpx.post(f"{here.url}/v1/videos", json={"prompt": "a"}, headers=here.admin).json()["id"]
        for path in ("", "/content", "/stream", "/events"):
            found, none = (client.get(f"/v1/videos/{name}{path}") for name in (theirs, "video_" + "0" * 32))
            assert found.status_code == none.status_code == 404, path
            assert found.text.replace(theirs, "") == none.text.replace("video_" + "0" * 32, "")
        assert client.delete(f"/v1/videos/{theirs}").status_code == 404
        assert theirs not in client.get("/v1/videos?limit=100").text
        assert client.get(f"/v1/videos?after={theirs}").status_code >= 400
    assert httpx.delete(f"{here.url}/v1/videos/{theirs}", headers=here.admin).status_code == 200
