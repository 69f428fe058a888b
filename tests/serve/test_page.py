"""The web page, in a real Chromium, against a real server without Ray."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from sqlalchemy import create_engine
from starlette.types import ASGIApp

from arlon_ray.generation.video import read_video
from serve.api import build_api
from serve.blobs import Blobs
from serve.job_store import JobStore
from serve.keys import Keys
from serve.page import WEB
from serve.service import VideoService
from tests.serve.browser import Visiting
from tests.serve.stages import FakeStages, small_config


def test_a_storyboard_is_watched_while_it_is_made(visit: Visiting) -> None:
    seen, stages = visit()
    stages.held_at = 2
    seen.write("A red circle moves to the right.", "It turns blue and falls.", segments=4)
    seen.one("#seed").fill("7")
    seen.one("#make-video").click()
    chips = seen.one(".chip")
    for index, words in enumerate(("ready", "ready", "step")):
        seen.expect(chips.nth(index)).to_contain_text(words)
    seen.status("Segment 3 of 4, step")
    seen.page.wait_for_timeout(300)
    early = seen.shown()
    whole = float(seen.made()[0]["seconds"])
    assert early["width"] == 96 and 0.5 < early["end"] < whole - 0.5
    seen.expect(seen.one(".card")).to_contain_text("%")
    seen.shot("watching")
    stages.held_at = None
    seen.status("Ready")
    seen.page.wait_for_timeout(300)
    assert seen.shown()["end"] == pytest.approx(whole, abs=0.05)
    seen.expect(seen.one(".card")).to_contain_text("completed")
    picture = seen.one(".card img")
    seen.expect(picture).to_have_js_property("naturalWidth", 96)
    (video,) = seen.made()
    assert video["seed"] == 7 and "#" + video["id"] in seen.page.url
    prompts = ["A red circle moves to the right."] * 2 + ["It turns blue and falls."] * 2
    assert [segment["prompt"] for segment in video["segments"]] == prompts
    seen.page.reload()  # what is finished is the file itself
    seen.status("Ready")
    seen.expect(seen.one("#video")).to_have_js_property("videoWidth", 96)
    seen.fits()


@pytest.mark.slow
def test_a_segment_of_a_draft_is_planned_anew_and_the_draft_rendered(visit: Visiting) -> None:
    seen, stages = visit()
    seen.write("A cat.", "A dog.", segments=3)
    seen.one("#advanced summary").click()
    seen.one("#steps").fill("5")
    seen.one("#make-draft").click()
    seen.status("Ready")
    seen.expect(seen.one("#video")).to_have_js_property("videoWidth", 96)
    before = seen.made("drafts")[0]
    assert seen.made() == [] and stages.rendered == []
    stages.step_s = 0.5
    seen.one(".chip").nth(1).press("Enter")
    seen.expect(seen.one("#reroll-prompt")).to_be_focused()
    seen.expect(seen.one("#reroll-prompt")).to_have_value("A cat.")
    seen.shot("draft")
    seen.one("#reroll-seed").fill("-1")
    seen.one("#reroll-seed").press("Enter")
    seen.expect(seen.one("#reroll-seed-error")).to_contain_text("0")
    seen.one("#reroll-prompt").fill("A bird.")
    seen.one("#reroll-seed").fill("11")
    seen.one("#reroll-seed").press("Enter")
    seen.expect(seen.one("#reroll")).to_be_hidden()
    seen.expect(seen.one(".chip").nth(1)).to_contain_text("waiting")
    seen.expect(seen.one(".chip").nth(0)).to_contain_text("ready")
    seen.status("Ready")
    after = seen.made("drafts")[0]
    assert [segment["prompt"] for segment in after["segments"]] == ["A cat.", "A bird.", "A dog."]
    assert after["segments"][1]["seed"] == 11 and after["segments"][0] == before["segments"][0]
    stages.step_s = 0.05
    seen.one("#render").click()
    seen.expect(seen.one("#stage-title")).to_contain_text("A cat.")
    seen.expect(seen.one("#render")).to_be_hidden()
    seen.status("Ready")
    (video,) = seen.made()
    assert video["draft_id"] == after["id"] and len(stages.rendered) == 3
    seen.one("[data-list=drafts]").click()
    seen.expect(seen.one(".card")).to_have_count(1)
    seen.expect(seen.one(".card img")).to_have_js_property("naturalWidth", 96)
    seen.may_fail.append("status of 400")


@pytest.mark.slow
def test_deleting_asks_first_and_stops_the_work(visit: Visiting) -> None:
    seen, stages = visit()
    stages.held_at = 0
    seen.write("A cat.")
    seen.one("#make-video").click()
    seen.status("Segment 1 of 1")
    seen.one("#make-video").click()
    seen.status("Waiting: 1 before it")
    running = seen.made()[1]["id"]
    card = seen.one(".card").nth(1)
    card.get_by_role("button", name="Delete").click()
    seen.expect(seen.one("#ask-text")).to_contain_text("A cat.")
    seen.shot("asking")
    seen.one("#ask-cancel").click()
    seen.expect(seen.one(".card")).to_have_count(2)
    assert len(seen.made()) == 2 and not stages.cancelled
    card.get_by_role("button", name="Delete").click()
    seen.one("#ask-ok").click()
    seen.expect(seen.one(".card")).to_have_count(1)
    assert stages.cancelled == [running]
    seen.status("Segment 1 of 1")  # the next one's turn has come
    httpx.delete(f"{seen.url}/v1/videos/{seen.made()[0]['id']}").raise_for_status()
    seen.status("deleted")  # by somebody else
    seen.may_fail += ["status of 404", "ERR_INCOMPLETE_CHUNKED_ENCODING"]


@pytest.mark.slow
def test_a_key_is_asked_for_and_kept_in_the_tab_alone(visit: Visiting, tmp_path: Path) -> None:
    keys = Keys(create_engine(f"sqlite:///{tmp_path / 'keys.sqlite'}"))
    key = keys.add("ann")
    seen, stages = visit(keys=keys)
    seen.may_fail.append("status of 401")
    seen.expect(seen.one("#ask-title")).to_have_text("This server asks for a key")
    seen.shot("key")
    seen.one("#ask-key").fill("arlon_wrong")
    seen.page.keyboard.press("Enter")
    seen.expect(seen.one("#ask-title")).to_have_text("That key is not accepted")
    seen.one("#ask-key").fill(key)
    seen.page.keyboard.press("Enter")
    seen.expect(seen.one("#server")).to_have_text("model tiny")
    stages.held_at = 1
    seen.write("A cat.", segments=2)
    seen.one("#make-video").click()
    seen.status("Segment 2 of 2")
    seen.page.wait_for_timeout(300)
    assert seen.shown()["width"] == 96  # while it is made, although <video> could send no key
    stages.held_at = None
    seen.status("Ready")
    seen.expect(seen.one(".card img")).to_have_js_property("naturalWidth", 96)
    with seen.page.expect_download() as download:
        seen.one("#download").click()
    assert download.value.suggested_filename.endswith(".mp4")
    assert len(read_video(download.value.path())) == 51
    seen.page.reload()
    seen.status("Ready")
    seen.expect(seen.one("#video")).to_have_js_property("videoWidth", 96)
    assert seen.page.evaluate("() => [localStorage.length, document.cookie, sessionStorage['arlon.key']]") == [
        0,
        "",
        key,
    ]
    assert key not in seen.page.url
    seen.one("#key-button").click()  # forgets it
    seen.expect(seen.one("#ask-title")).to_have_text("This server asks for a key")
    other = seen.context.new_page()
    other.goto(seen.url)
    seen.expect(other.locator("#ask-title")).to_have_text("This server asks for a key")


class Cut:
    """ASGI middleware: the first `/events` end, without a word, behind the third event."""

    def __init__(self, app: ASGIApp) -> None:
        self.app, self.resumed = app, list[str | None]()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if not scope.get("path", "").endswith("/events"):
            return await self.app(scope, receive, send)
        self.resumed.append(dict(scope["headers"]).get(b"last-event-id", b"").decode() or None)
        told = 0

        async def some(message: Any) -> None:
            nonlocal told
            await send(message)
            told += message.get("body", b"").count(b"id:")
            if len(self.resumed) == 1 and told >= 3:
                await send({"type": "http.response.body", "body": b""})
                raise ConnectionResetError

        with suppress(ConnectionResetError):
            await self.app(scope, receive, some)
        return None


@pytest.mark.slow
def test_events_go_on_where_the_connection_was_lost(visit: Visiting) -> None:
    cuts: list[Cut] = []

    def around(app: ASGIApp) -> ASGIApp:
        cuts.append(Cut(app))
        return cuts[0]

    seen, stages = visit(around=around)
    stages.held_at = 1
    seen.write("A cat.", segments=3)
    seen.one("#make-video").click()
    seen.expect(seen.one(".chip").nth(0)).to_contain_text("ready")
    seen.expect(seen.one(".chip").nth(1)).to_contain_text("step 4/8")
    stages.held_at = None
    seen.status("Ready")
    assert cuts[0].resumed[:2] == [None, "3"]


def test_the_page_is_small_and_is_fetched_once(tmp_path: Path) -> None:
    config = small_config()
    app = build_api(VideoService(config, JobStore.in_folder(tmp_path), FakeStages(config), Blobs(tmp_path)), config)
    client = TestClient(app, base_url="http://127.0.0.1", client=("127.0.0.1", 1))
    size = 0
    for path in ("/", *(f"/web/{file.name}" for file in WEB.iterdir())):
        response = client.get(path)
        assert response.status_code == 200 and response.headers["content-encoding"] == "gzip", path
        assert "'unsafe" not in response.headers["content-security-policy"]
        size += int(response.headers["content-length"])
        tag = response.headers["etag"]
        assert client.get(path, headers={"if-none-match": f'"other", W/{tag}'}).status_code == 304
        assert client.get(path, headers={"if-none-match": '"other"'}).status_code == 200
        assert client.head(path).status_code == 200
        plain = client.get(path, headers={"accept-encoding": "identity"})
        assert "content-encoding" not in plain.headers and plain.text == response.text
        # what the policy would refuse
        assert not re.search(r"<script>|<style|\sstyle=|\son\w+=|https?://(?!www.w3.org)", response.text), path
    assert size < 40_000
    assert client.get("/").headers["content-type"] == "text/html; charset=utf-8"
    for path in ("/web/", "/web/..%2Fpage.py", "/web/../page.py", "/web/x.js"):
        assert client.get(path).status_code == 404
    assert "/web/{name}" not in app.openapi()["paths"]
