"""A thin client of the HTTP API: what `arlon` uses, and what a program that waits for events can."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import httpx

#: A video or draft as the API describes it.
Made = dict[str, Any]

_TIMEOUT = httpx.Timeout(60.0, connect=10.0)
#: The server says something every 15 s, even if it is nothing.
_EVENTS_TIMEOUT = httpx.Timeout(10.0, read=45.0)
_LAST = frozenset({"completed", "failed", "deleted"})
_BAD_INPUT = frozenset({400, 401, 403, 404, 413, 415})
_PATIENCE_S = 300.0  # for a server that is being started again
_PIECE = 2**16


class ClientError(RuntimeError):
    """The server refused, or cannot be reached. One line; `status` is the HTTP status, 0 where there was no answer."""

    def __init__(self, message: str, status: int = 0, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(" ".join(message.split()))
        self.status, self.param, self.code = status, param, code

    @property
    def bad_input(self) -> bool:
        """Whether the same request would be refused again."""
        return self.status in _BAD_INPUT


@dataclass(frozen=True)
class Event:
    """One thing that happened to a video; `type` and `data` are those of docs/serving.md."""

    type: str
    data: dict[str, Any]


class Client:
    """Of the server at `url` (as `http://127.0.0.1:8000`). A context manager: it closes its connections."""

    def __init__(self, url: str, key: str | None = None, *, transport: httpx.BaseTransport | None = None) -> None:
        """Raises ClientError for what is no address."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self.url = url.rstrip("/")
        try:
            if httpx.URL(self.url).scheme not in ("http", "https"):
                raise httpx.InvalidURL("expected http://HOST:PORT")
            self._http = httpx.Client(
                base_url=f"{self.url}/v1/", headers=headers, timeout=_TIMEOUT, transport=transport
            )
        except (httpx.InvalidURL, UnicodeEncodeError, ValueError) as error:
            raise ClientError(f"--url {url}: {error}", 400) from None

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def create(self, body: Mapping[str, Any], *, image: Path | None = None, draft: bool = False) -> Made:
        """Ask for a video or a draft; `image` is its first frame.

        Raises ClientError, OSError for an image that cannot be read.
        """
        picture = {}
        if image is not None:
            url = (
                f"data:image/{image.suffix[1:].lower() or 'png'};base64,{base64.b64encode(image.read_bytes()).decode()}"
            )
            picture = {"input_reference": {"image_url": url}}
        return self._post("drafts" if draft else "videos", {**body, **picture})

    def remix(self, video_id: str, prompt: str) -> Made:
        """The same seed, length and settings, another text. Raises ClientError."""
        return self._post(f"{_path(video_id)}/remix", {"prompt": prompt})

    def extend(self, video_id: str, prompt: str, seconds: float | None = None, *, cut: bool = False) -> Made:
        """A video that shows this one and goes on for `seconds`, or a segment; in a new shot. Raises ClientError."""
        body: dict[str, Any] = {"prompt": prompt, "video": {"id": video_id}}
        if seconds is not None:
            body["seconds"] = seconds
        return self._post("videos/extensions", {**body, "cut": True} if cut else body)

    def render(self, draft_id: str, settings: Mapping[str, Any]) -> Made:
        """The video of a draft's plan. Raises ClientError."""
        return self.create({"draft": draft_id, **settings})

    def reroll(
        self,
        draft_id: str,
        index: int,
        *,
        seed: int | None = None,
        prompt: str | None = None,
        replan: bool = False,
    ) -> Made:
        """Plan segment `index` (the first is 0) of a draft anew, and with `replan` those behind it too.

        Raises ClientError.
        """
        given = {"seed": seed, "prompt": prompt, "following": "replan" if replan else "keep"}
        body = {name: value for name, value in given.items() if value is not None}
        return self._post(f"{_path(draft_id)}/segments/{index}/reroll", body)

    def get(self, made_id: str) -> Made:
        """Raises ClientError."""
        return self._json("GET", _path(made_id))

    def list(self, kind: Literal["videos", "drafts"] = "videos", *, limit: int = 20) -> list[Made]:
        """The newest. Raises ClientError."""
        return list(self._json("GET", kind, params={"limit": limit})["data"])

    def delete(self, made_id: str) -> None:
        """One that is being made is stopped. Raises ClientError."""
        self._json("DELETE", _path(made_id))

    def download(self, made_id: str, path: Path, variant: str = "video") -> None:
        """Write the mp4 (or the PNG of `variant` thumbnail or spritesheet), which appears whole or not at all.

        Raises ClientError, OSError where it cannot be written.
        """
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")
        query = {} if variant == "video" else {"variant": variant}
        try:
            with self._stream(f"{_path(made_id)}/content", params=query) as response, partial.open("wb") as file:
                for piece in response.iter_bytes(_PIECE):
                    file.write(piece)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def watch(self, made_id: str, last: str | None = None) -> Iterator[Event]:
        """What happens until it is completed, failed or deleted: all of it, or what came after the event `last`.

        A lost connection is taken up again where it ended. Raises ClientError: unknown, or out of reach for minutes.
        """
        pause, alive, ended = 0.5, time.monotonic(), False
        while not ended:
            told = False
            try:
                for number, event in self._events(made_id, last):
                    pause, alive, told = 0.5, time.monotonic(), True
                    if number:
                        # a draft of which a segment was planned anew goes on behind its end
                        last, ended = number, event.type in _LAST
                    yield event
                if ended or (not told and self.get(made_id)["status"] in _LAST):
                    return
            except ClientError as error:
                if error.bad_input or time.monotonic() - alive > _PATIENCE_S:
                    raise
            time.sleep(pause)
            pause = min(2 * pause, 10.0)

    def _events(self, made_id: str, last: str | None) -> Iterator[tuple[str, Event]]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last} if last else {})
        with self._stream(f"{_path(made_id)}/events", headers=headers, timeout=_EVENTS_TIMEOUT) as response:
            fields: dict[str, str] = {}
            for line in response.iter_lines():
                if line:
                    name, _, value = line.partition(":")
                    fields[name] = value.removeprefix(" ")
                    continue
                if "data" in fields:
                    yield fields.get("id", ""), Event(fields.get("event", "message"), json.loads(fields["data"]))
                fields = {}

    def _post(self, path: str, body: Mapping[str, Any]) -> Made:
        """Ask for something; where the answer is lost once more: it is made once. Raises ClientError."""
        asked = {"json": dict(body), "headers": {"Idempotency-Key": uuid.uuid4().hex}}
        made: Made
        try:
            made = self._json("POST", path, **asked)
        except ClientError as error:
            if not isinstance(error.__cause__, httpx.ReadError | httpx.RemoteProtocolError):
                raise
            made = self._json("POST", path, **asked)
        return made

    def _json(self, method: str, path: str, **options: Any) -> Any:
        response = _checked(lambda: self._http.request(method, path, **options), self.url)
        try:
            return response.json()
        except ValueError:
            raise ClientError(
                f"{self.url} answered with something that is no JSON: is it an ARLON-Ray server?"
            ) from None

    @contextmanager
    def _stream(self, path: str, **options: Any) -> Iterator[httpx.Response]:
        request = self._http.build_request("GET", path, **options)
        response = _checked(lambda: self._http.send(request, stream=True), self.url)
        try:
            yield response
        except httpx.RequestError as error:
            raise _unreachable(self.url, error) from error
        finally:
            response.close()


def _path(made_id: str) -> str:
    kind = "drafts" if made_id.startswith("draft_") else "videos"
    if not made_id.replace("_", "").isalnum():
        raise ClientError(f"{made_id!r} is no id: expected video_… or draft_…", 400)
    return f"{kind}/{made_id}"


def _checked(send: Callable[[], httpx.Response], url: str) -> httpx.Response:
    try:
        response = send()
        if response.is_success:
            return response
        try:
            response.read()
        finally:
            response.close()
    except httpx.RequestError as error:
        raise _unreachable(url, error) from error
    try:
        found = response.json()["error"]
        message, param, code = found["message"], found.get("param"), found.get("code")
    except (ValueError, KeyError, TypeError):
        message, param, code = f"the server answered {response.status_code} {response.reason_phrase}", None, None
    # some of the server's messages name the field, others leave it to `param`
    named = f"{param}: {message}" if param and str(param) not in message else message
    raise ClientError(named, response.status_code, param=param, code=code)


def _unreachable(url: str, error: httpx.RequestError) -> ClientError:
    return ClientError(
        f"{url} cannot be reached ({error or type(error).__name__}); is it served? See --url and ARLON_URL"
    )
