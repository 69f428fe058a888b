"""The page's player, in a real Chromium, while the connection of its stream is lost and comes back."""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeVar

import pytest
from starlette.types import ASGIApp

from tests.serve.browser import Visit, Visiting

#: How a stream ends: behind so many bytes, without a word or (neatly) as if that were all.
End = tuple[int, bool]
M = TypeVar("M")
LOST = ["ERR_INCOMPLETE_CHUNKED_ENCODING"]


class Cutting:
    """ASGI middleware: the streams end as `ends` says, one after another; those behind them with the video.

    Or, while `away`, those are answered as by a proxy whose server is not there.
    """

    def __init__(self, app: ASGIApp, ends: tuple[End, ...], away: bool) -> None:
        self.app, self.ends, self.away, self.streams = app, list(ends), away, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not scope.get("path", "").endswith("/stream"):
            return await self.app(scope, receive, send)
        self.streams += 1
        if self.away and not self.ends:
            await send({"type": "http.response.start", "status": 502, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body", "body": b""})
            return None
        with suppress(ConnectionResetError):
            await self.app(scope, receive, _cut(send, *self.ends.pop(0)) if self.ends else send)
        return None


def _cut(send: Any, left: int, neatly: bool) -> Callable[[Any], Any]:
    async def some(message: Any) -> None:
        nonlocal left
        body = message.get("body", b"")
        if message["type"] == "http.response.start" or len(body) < left:
            left -= len(body)
            return await send(message)
        await send({**message, "body": body[:left], "more_body": not neatly})
        raise ConnectionResetError

    return some


def visit_through(visit: Visiting, make: Callable[[ASGIApp], M]) -> tuple[Visit, Any, M]:
    """The page of a service behind the middleware that is made of it."""
    made: list[M] = []

    def around(app: ASGIApp) -> ASGIApp:
        made.append(make(app))
        return made[0]  # type: ignore[return-value]

    seen, stages = visit(around=around)
    return seen, stages, made[0]


def cut(visit: Visiting, *ends: End, away: bool = False) -> tuple[Visit, Any, Cutting]:
    """The page, whose streams are cut, with a video of four segments that waits in the middle of the third."""
    seen, stages, between = visit_through(visit, lambda app: Cutting(app, ends, away))
    seen.may_fail += [*LOST, "502"]
    stages.held_at = 2
    seen.write("A cat.", segments=4)
    seen.one("#make-video").click()
    seen.status("Segment 3 of 4, step")
    return seen, stages, between


def shown_until(seen: Visit, second: float) -> None:
    """The player has it up to there."""
    seen.page.wait_for_function(
        """(second) => { const { buffered } = document.getElementById("video");
          return buffered.length === 1 && Math.abs(buffered.end(0) - second) < 0.05 }""",
        arg=second,
    )


@pytest.mark.parametrize("neatly", [False, True])
def test_the_picture_goes_on_where_the_connection_was_lost(visit: Visiting, neatly: bool) -> None:
    # in the headers, in the first segment, and in the second
    seen, stages, between = cut(visit, (100, neatly), (3000, neatly), (9000, neatly))
    (video,) = seen.made()
    frames = [segment["frames"] for segment in video["segments"]]
    whole = float(video["seconds"])
    shown_until(seen, whole * sum(frames[:2]) / sum(frames))
    assert between.streams == 4
    address = seen.page.evaluate("() => document.getElementById('video').src")
    stages.held_at = None
    seen.status("Ready")
    shown_until(seen, whole)
    # all of it came by the stream: the file did not take its place
    assert seen.page.evaluate("() => document.getElementById('video').src") == address
    assert address.startswith("blob:") and between.streams == 4


@pytest.mark.parametrize("had", [0, 3000])
def test_what_was_finished_meanwhile_is_shown_as_the_file(visit: Visiting, had: int) -> None:
    seen, stages, between = cut(visit, (had, False), away=True)
    stages.held_at = None
    seen.status("Ready")
    between.away = False
    whole = float(seen.made()[0]["seconds"])
    # when the pause between two tries is over
    seen.expect(seen.one("#video")).to_have_attribute("src", re.compile("/content"), timeout=15_000)
    shown_until(seen, whole)


def test_no_stream_is_opened_again_for_what_is_not_shown_any_more(visit: Visiting) -> None:
    seen, stages, between = cut(visit, (3000, False), away=True)
    seen.page.wait_for_timeout(1200)
    assert between.streams >= 2
    seen.page.evaluate("() => { location.hash = '' }")
    seen.expect(seen.one("#stage-empty")).to_be_visible()
    before = between.streams
    seen.page.wait_for_timeout(3000)
    assert between.streams == before
    stages.held_at = None


class Restarted:
    """ASGI middleware: says, when segment 1 is there, that another bundle begins the video anew."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.streams, self.told = app, 0, False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.streams += scope.get("path", "").endswith("/stream")

        async def with_news(message: Any) -> None:
            body = message.get("body", b"")
            if not self.told and b'segment.completed\ndata: {"index": 1' in body:
                self.told = True
                message = {**message, "body": b"event: restarted\ndata: {}\n\n" + body}
            await send(message)

        await self.app(scope, receive, with_news if scope.get("path", "").endswith("/events") else send)


def test_what_is_begun_anew_is_shown_from_its_beginning(visit: Visiting) -> None:
    seen, _, between = visit_through(visit, Restarted)
    seen.may_fail += LOST
    seen.write("A cat.", segments=4)
    seen.one("#make-video").click()
    seen.status("Ready")
    shown_until(seen, float(seen.made()[0]["seconds"]))
    assert between.told and between.streams == 2


class Silent:
    """ASGI middleware: of the first answer at `path` only so many bytes come, and nothing says that no more will."""

    def __init__(self, app: ASGIApp, path: str, left: int) -> None:
        self.app, self.path, self.left, self.asked = app, path, left, 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not scope.get("path", "").endswith(self.path):
            return await self.app(scope, receive, send)
        self.asked += 1
        if self.asked > 1:
            return await self.app(scope, receive, send)

        async def some(message: Any) -> None:
            body = message.get("body", b"")[: self.left]
            self.left -= len(body)
            if body or message["type"] == "http.response.start":
                await send({**message, "body": body, "more_body": True} if body else message)

        await self.app(scope, receive, some)
        while (await receive())["type"] != "http.disconnect":
            pass
        return None


@pytest.mark.parametrize("path, left", [("/events", 200), ("/stream", 3000)])
def test_a_connection_that_says_nothing_any_more_is_opened_again(visit: Visiting, path: str, left: int) -> None:
    seen, stages, between = visit_through(visit, lambda app: Silent(app, path, left))
    # three quarters of a minute are four and a half seconds
    sooner = (
        "const real = setTimeout; window.setTimeout = (f, ms, ...more) => real(f, ms > 3e4 ? ms / 10 : ms, ...more)"
    )
    seen.context.add_init_script(sooner)
    seen.page.reload()
    stages.held_at = 3
    seen.write("A cat.", segments=4)
    seen.one("#make-video").click()
    seen.status("Segment 4 of 4, step")
    stages.held_at = None
    seen.status("Ready")
    shown_until(seen, float(seen.made()[0]["seconds"]))
    assert between.asked >= 2
