"""What stands before every route. No Ray: an application of a few routes, in process."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, StreamingResponse
from sqlalchemy import create_engine
from starlette.types import Message

from arlon_ray.config import ServeConfig
from serve.guard import Guard, RateLimit
from serve.keys import KeyCheck, Keys
from serve.logs import REQUEST_ID, JsonLines, RequestIdFilter, log_stage
from serve.metrics import MemoryRecorder, Metrics
from serve.schema import RequestError

Scenario = Callable[[httpx.AsyncClient], Coroutine[Any, Any, None]]


def application(recorder: MemoryRecorder | None = None, keys: KeyCheck | None = None, **settings: Any) -> FastAPI:
    """A few routes behind a Guard."""
    app = FastAPI()
    app.add_middleware(Guard, ServeConfig(**settings), keys, Metrics(recorder or MemoryRecorder()))

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse("<p>page</p>")

    @app.get("/healthz")
    async def health() -> dict:
        return {}

    @app.get("/v1/videos/{video_id}")
    async def who(video_id: str, request: Request) -> dict:
        return {"caller": request.state.caller.name, "role": request.state.caller.role, "id": REQUEST_ID.get()}

    @app.post("/v1/videos")
    async def echo(request: Request) -> dict:
        return {"bytes": len(await request.body()), "gone": await request.is_disconnected()}

    @app.get("/v1/broken")
    async def broken() -> None:
        raise OSError("/secret/path on host 10.1.2.3")

    @app.get("/v1/half")
    async def half() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"one"
            raise OSError("/secret/path")

        return StreamingResponse(pieces())

    return app


def ask(app: FastAPI, scenario: Scenario, client: tuple[str, int] = ("127.0.0.1", 1)) -> None:
    """Run a scenario; `client` is where its requests come from."""

    async def run() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False, client=client)
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost:8000") as session:
            await scenario(session)

    asyncio.run(run())


def keys_in(folder: Path) -> Keys:
    return Keys(create_engine(f"sqlite:///{folder / 'keys.sqlite'}"))


def code_of(answer: httpx.Response) -> tuple[int, str]:
    """Status and code of an error in OpenAI's form."""
    assert set(answer.json()) == {"error"} and set(answer.json()["error"]) == {"message", "type", "param", "code"}
    return answer.status_code, answer.json()["error"]["code"]


def with_key(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_key_says_who_calls_and_nothing_else_gets_in(tmp_path: Path) -> None:
    keys = keys_in(tmp_path)
    user, admin, gone = keys.add("ann"), keys.add("root", "admin"), keys.add("bob")
    keys.revoke("bob")

    async def scenario(client: httpx.AsyncClient) -> None:
        answer = await client.get("/v1/videos/a", headers=with_key(user))
        assert (answer.json()["caller"], answer.json()["role"]) == ("ann", "user")
        assert (await client.get("/v1/videos/a", headers={"authorization": f"bearer {admin}"})).json()[
            "role"
        ] == "admin"
        missing = await client.get("/v1/videos/a")
        assert code_of(missing) == (401, "missing_api_key")
        assert missing.headers["www-authenticate"].startswith("Bearer")
        changed = user[:-1] + ("a" if user[-1] != "a" else "b")
        for wrong in (gone, changed, "arlon_x", "", "x" * 5000, "arlon_' OR 1=1 --"):
            answer = await client.get("/v1/videos/a", headers=with_key(wrong))
            assert code_of(answer)[0] == 401 and (not wrong or wrong[:20] not in answer.text), wrong
        assert (await client.get("/v1/videos/a", headers={"authorization": f"Basic {user}"})).status_code == 401
        two = await client.get("/v1/videos/a", headers=[("authorization", f"Bearer {user}")] * 2)
        assert two.status_code == 401  # who reads the first and who the last would disagree
        # what does not exist is not told to those without a key
        assert code_of(await client.get("/v1/nothing"))[0] == 401
        assert (await client.get("/v1/nothing", headers=with_key(user))).status_code == 404
        for path in ("/", "/healthz", "/docs", "/openapi.json"):
            assert (await client.get(path)).status_code == 200, path
        for begin in ("/web/..", "/web/%2e%2e", "/docs/..", "/docs/%2e%2e", "/", "/healthz/.."):
            path = f"{begin}/v1/videos/a"
            assert (await client.get(path)).status_code in (401, 404), path

    ask(application(keys=KeyCheck(keys)), scenario)


def test_keys_that_cannot_be_looked_up_let_nobody_in(tmp_path: Path) -> None:
    keys = keys_in(tmp_path)
    key = keys.add("ann")

    async def scenario(client: httpx.AsyncClient) -> None:
        (tmp_path / "keys.sqlite").write_bytes(b"not a database" * 100)
        answer = await client.get("/v1/videos/a", headers=with_key(key))
        assert code_of(answer) == (503, "unavailable") and "sqlite" not in answer.text

    ask(application(keys=KeyCheck(keys)), scenario)


def test_without_keys_only_this_machine_gets_in() -> None:
    async def here(client: httpx.AsyncClient) -> None:
        assert (await client.get("/v1/videos/a")).json()["caller"] == "local"
        for host in ("127.0.0.1:8000", "[::1]:8000", "localhost", "LOCALHOST:80", "box.test"):
            assert (await client.get("/v1/videos/a", headers={"host": host})).status_code == 200, host
        # a name of somebody else that was made to point here
        for host in ("evil.test", "evil.test:8000", "localhost.evil.test", "[::1", "127.0.0.1@evil.test"):
            assert code_of(await client.get("/v1/videos/a", headers={"host": host})) == (403, "unknown_host"), host
        # a page of another site, which could send a form without asking
        for origin in ("https://evil.test", "null", "http://localhost:9"):
            answer = await client.post("/v1/videos", headers={"origin": origin})
            assert code_of(answer) == (403, "foreign_page"), origin
        assert (await client.post("/v1/videos", headers={"origin": "http://localhost:8000"})).status_code == 200

    async def elsewhere(client: httpx.AsyncClient) -> None:
        assert code_of(await client.get("/v1/videos/a")) == (403, "keys_are_off")
        assert (await client.get("/healthz")).status_code == 200

    ask(application(allowed_hosts=("box.test",)), here)
    ask(application(), here_as_ipv6, client=("::ffff:127.0.0.1", 1))
    ask(application(), elsewhere, client=("192.0.2.7", 1))
    ask(application(), elsewhere, client=("::ffff:192.0.2.7", 1))


async def here_as_ipv6(client: httpx.AsyncClient) -> None:
    assert (await client.get("/v1/videos/a")).status_code == 200


def test_addresses_with_a_zero_are_refused() -> None:
    """PostgreSQL answers them with an error."""

    async def scenario(client: httpx.AsyncClient) -> None:
        for path in ("/v1/videos/%00", "/v1/videos/a%00b", "/v1/videos/a?after=%00"):
            assert code_of(await client.get(path)) == (400, "invalid_address"), path
        assert (await client.get("/v1/videos/%2500")).status_code == 200

    ask(application(), scenario)


def test_each_key_has_its_own_rate(tmp_path: Path) -> None:
    keys = keys_in(tmp_path)
    many, few = keys.add("many"), keys.add("few", requests_per_minute=2)

    async def scenario(client: httpx.AsyncClient) -> None:
        statuses = [(await client.get("/v1/videos/a", headers=with_key(few))).status_code for _ in range(3)]
        assert statuses == [200, 200, 429]
        refused = await client.get("/v1/videos/a", headers=with_key(few))
        assert code_of(refused) == (429, "rate_limit_exceeded") and 25 <= int(refused.headers["retry-after"]) <= 30
        assert [(await client.get("/v1/videos/a", headers=with_key(many))).status_code for _ in range(5)] == [200] * 5
        assert (await client.get("/v1/videos/a", headers=with_key(many))).status_code == 429
        assert (await client.get("/healthz")).status_code == 200

    ask(application(keys=KeyCheck(keys), requests_per_minute=5), scenario)


def test_where_keys_are_off_open_requests_are_not_counted() -> None:
    """Everybody is the same there, and the page and /healthz must go on."""

    async def scenario(client: httpx.AsyncClient) -> None:
        answers = await asyncio.gather(*(client.get(path) for path in ("/healthz", "/v1/videos/a") * 5))
        assert {answer.status_code for answer in answers} == {200}

    ask(application(max_open_per_key=1), scenario)


def test_a_bucket_fills_up_again() -> None:
    now = [0.0]
    limit = RateLimit(60, lambda: now[0])
    for _ in range(60):
        limit.take("a")
    with pytest.raises(RequestError) as refused:
        limit.take("a")
    assert refused.value.retry_after_s == 1
    now[0] = 1.0
    limit.take("a")
    with pytest.raises(RequestError):
        limit.take("a")
    now[0] = 1e6
    for _ in range(60):  # and no fuller than full
        limit.take("a")
    with pytest.raises(RequestError):
        limit.take("a")


def test_bodies_have_a_longest_length() -> None:
    async def pieces(count: int) -> AsyncIterator[bytes]:
        for _ in range(count):
            yield b"x" * 512

    async def scenario(client: httpx.AsyncClient) -> None:
        assert (await client.post("/v1/videos", content=b"x" * 2048)).json() == {"bytes": 2048, "gone": False}
        assert (await client.post("/v1/videos", content=pieces(4))).json()["bytes"] == 2048
        for body in (b"x" * 2049, pieces(5), pieces(10**9)):
            answer = await client.post("/v1/videos", content=body)
            assert code_of(answer) == (413, "body_too_large") and answer.headers["connection"] == "close"
        lied = await client.post("/v1/videos", content=b"x", headers={"content-length": "9" * 30})
        assert lied.status_code == 413

    ask(application(max_upload_bytes=2048), scenario)


def test_bodies_together_have_a_bound() -> None:
    size, small = 200_000, 1000

    async def scenario(client: httpx.AsyncClient) -> None:
        much_sent, go_on = asyncio.Event(), asyncio.Event()

        async def slowly() -> AsyncIterator[bytes]:
            yield b"x" * 150_000
            much_sent.set()
            await go_on.wait()
            yield b"x" * 50_000

        async def in_pieces() -> AsyncIterator[bytes]:
            for _ in range(10):
                yield b"x" * (size // 10)

        first = asyncio.ensure_future(client.post("/v1/videos", content=slowly()))
        await much_sent.wait()
        for body in (b"x" * size, in_pieces()):  # announced, and not
            refused = await client.post("/v1/videos", content=body)
            assert code_of(refused) == (503, "uploads_full") and int(refused.headers["retry-after"]) >= 1
            assert refused.headers["connection"] == "close"
        # what is small gets in, and what has room
        for length in (small, 2**16, 100_000):
            assert (await client.post("/v1/videos", content=b"x" * length)).json()["bytes"] == length
        go_on.set()
        assert (await first).json()["bytes"] == size
        # all is given back, also of what was refused, or went away
        for body in (b"x" * size, in_pieces()):
            assert (await client.post("/v1/videos", content=body)).json()["bytes"] == size

    ask(application(max_upload_bytes=size, upload_memory_bytes=size), scenario)
    with pytest.raises(ValueError, match="upload_memory_bytes=1999 is below max_upload_bytes=2000"):
        ServeConfig(max_upload_bytes=2000, upload_memory_bytes=1999)


def test_who_breaks_off_or_is_too_slow_gives_the_room_back() -> None:
    size = 200_000

    async def broken_off() -> AsyncIterator[bytes]:
        yield b"x" * (size - 1)
        raise ConnectionError

    async def slow() -> AsyncIterator[bytes]:
        yield b"x" * (size - 1)
        await asyncio.sleep(10)

    async def scenario(client: httpx.AsyncClient) -> None:
        assert (await client.post("/v1/videos", content=broken_off())).status_code == 500
        assert code_of(await client.post("/v1/videos", content=slow())) == (408, "body_timeout")
        assert (await client.post("/v1/broken", content=b"x" * size)).status_code == 405
        assert (await client.post("/v1/videos", content=b"x" * size)).json()["bytes"] == size

    ask(application(max_upload_bytes=size, upload_memory_bytes=size, body_timeout_s=0.2), scenario)


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    async def slowly() -> AsyncIterator[bytes]:
        while True:
            yield b"x"
            await asyncio.sleep(0.05)

    async def scenario(client: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/videos", content=slowly())
        assert code_of(answer) == (408, "body_timeout")

    ask(application(body_timeout_s=0.3), scenario)


def test_a_client_that_goes_away_in_mid_body_is_not_answered() -> None:
    recorder, sent = MemoryRecorder(), []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    scope = {
        "type": "http", "method": "POST", "path": "/v1/videos", "query_string": b"", "client": ("127.0.0.1", 1),
        "headers": [(b"host", b"localhost"), (b"content-length", b"9")], "root_path": "", "http_version": "1.1",
    }  # fmt: skip
    asyncio.run(application(recorder)(scope, receive, send))
    assert sent == []
    assert recorder.counters == {("requests", "POST", "unmatched", "499"): 1.0}


def test_every_answer_has_a_request_id_and_safe_headers() -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        given = await client.get("/v1/videos/a", headers={"x-request-id": "trace-1.2"})
        assert given.headers.get_list("x-request-id") == ["trace-1.2"] and given.json()["id"] == "trace-1.2"
        for bad in ("", "a b", "x" * 65, "a\x7f", "<script>", "../../etc"):
            answer = await client.get("/v1/videos/a", headers={"x-request-id": bad})
            assert answer.headers["x-request-id"].startswith("req_") and answer.json()["id"] != bad, bad
        assert REQUEST_ID.get() == ""
        for path in ("/", "/v1/videos/a", "/v1/broken", "/v1/nothing", "/docs"):
            headers = (await client.get(path)).headers
            assert headers["x-content-type-options"] == "nosniff" and headers["referrer-policy"] == "no-referrer"
            policy = headers["content-security-policy"]
            assert "frame-ancestors 'none'" in policy and "default-src 'none'" in policy
            assert "unsafe" not in policy and "https:" not in policy

    ask(application(), scenario)


def test_what_breaks_gives_nothing_away(caplog: pytest.LogCaptureFixture) -> None:
    async def scenario(client: httpx.AsyncClient) -> None:
        answer = await client.get("/v1/broken", headers={"x-request-id": "find-me"})
        assert code_of(answer) == (500, "internal_error") and answer.json()["error"]["type"] == "server_error"
        for secret in ("secret", "10.1.2.3", "Traceback", "OSError", ".py"):
            assert secret not in answer.text

    ask(application(), scenario)
    assert "/secret/path" in caplog.text  # the operator is told


def test_half_an_answer_is_not_taken_for_a_whole_one() -> None:
    recorder = MemoryRecorder()

    async def scenario(client: httpx.AsyncClient) -> None:
        with pytest.raises(OSError):
            transport = httpx.ASGITransport(application(recorder), client=("127.0.0.1", 1))
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as strict:
                await strict.get("/v1/half")

    ask(application(), scenario)
    assert recorder.counters == {("requests", "GET", "/v1/half", "200"): 1.0}


def test_requests_are_counted_by_route_and_not_by_what_clients_make_up() -> None:
    recorder = MemoryRecorder()

    async def scenario(client: httpx.AsyncClient) -> None:
        for name in ("a", "b", "c"):
            await client.get(f"/v1/videos/{name}")
            await client.get(f"/nothing/{name}")
            await client.request(f"X{name.upper()}", "/v1/videos")

    ask(application(recorder), scenario)
    assert recorder.counters == {
        ("requests", "GET", "/v1/videos/{video_id}", "200"): 3.0,
        ("requests", "GET", "unmatched", "404"): 3.0,
        ("requests", "OTHER", "/v1/videos", "405"): 3.0,
    }
    assert len(recorder.values["request_seconds", "GET", "/v1/videos/{video_id}"]) == 3


def test_every_line_of_a_request_carries_its_id(caplog: pytest.LogCaptureFixture) -> None:
    caplog.handler.addFilter(RequestIdFilter())

    async def scenario(client: httpx.AsyncClient) -> None:
        await client.post("/v1/videos", headers={"x-request-id": "mine"})
        await client.get("/v1/broken", headers={"x-request-id": "broken"})
        await client.get("/v1/videos/a", headers={"x-request-id": "poll"})

    with caplog.at_level(logging.INFO, "serve"):
        ask(application(), scenario)
        log_stage("earlier", "video_1", "dit", 2, 1.5)
    lines = [json.loads(JsonLines().format(record)) for record in caplog.records if record.name.startswith("serve")]
    assert [line["request_id"] for line in lines] == ["mine", "broken", "broken", "earlier"]  # no line for each poll
    (post, error, failed, stage) = lines
    assert (post["method"], post["route"], post["status"], post["caller"]) == ("POST", "/v1/videos", 200, "local")
    assert post["seconds"] > 0 and "traceback" in error and failed["status"] == 500
    assert stage["message"] == "request_id earlier video_1 segment 2 stage dit 1.500 s"
    assert (stage["stage"], stage["segment"], stage["seconds"]) == ("dit", 2, 1.5)


def test_a_mounted_application_is_guarded_alike(tmp_path: Path) -> None:
    outer = FastAPI()
    outer.mount("/arlon", application(keys=KeyCheck(keys_in(tmp_path))))

    async def scenario(client: httpx.AsyncClient) -> None:
        assert (await client.get("/arlon/healthz")).status_code == 200
        assert code_of(await client.get("/arlon/v1/videos/a")) == (401, "missing_api_key")

    ask(outer, scenario)
