"""The page where keys are on, in a real Chromium: `<video>` and `<img>` fetch files themselves, part by part."""

from __future__ import annotations

from pathlib import Path

import pytest
from sqlalchemy import create_engine

from arlon_ray.generation.video import read_video
from serve.keys import Keys
from serve.passes import Passes
from tests.serve.browser import Visit, Visiting

_NEW_MS = 2100  # a pass that is younger is not replaced
#: The player shows a file, not what comes by a stream.
_SHOWN = """() => { const video = document.getElementById("video");
  return video.src.includes("/content") && video.readyState >= 2 }"""


@pytest.fixture
def over(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Passes that are good no longer, as all are where the service was started again."""
    ended: set[str] = set()
    prefix = Passes.prefix
    monkeypatch.setattr(Passes, "prefix", lambda self, given: None if given in ended else prefix(self, given))
    return ended


@pytest.fixture
def seen(visit: Visiting, tmp_path: Path) -> Visit:
    """The page of somebody who has typed a key, and made a video."""
    keys = Keys(create_engine(f"sqlite:///{tmp_path / 'keys.sqlite'}"))
    key = keys.add("ann")
    opened, _ = visit(keys=keys)
    opened.may_fail.append("status of 401")
    opened.one("#ask-key").fill(key)
    opened.page.keyboard.press("Enter")
    opened.expect(opened.one("#server")).to_have_text("model tiny")
    opened.write("A cat.")
    opened.one("#make-video").click()
    opened.status("Ready")
    opened.expect(opened.one(".card img")).to_have_js_property("naturalWidth", 96)
    return opened


def pass_of(seen: Visit, selector: str) -> str:
    """The pass in an element's address."""
    return seen.page.evaluate(
        "(selector) => new URL(document.querySelector(selector).src).searchParams.get('pass')", selector
    )


def test_files_are_fetched_by_the_browser_itself(seen: Visit) -> None:
    asked = []
    seen.page.on("request", lambda each: asked.append(each) if "/content" in each.url else None)
    seen.page.reload()
    seen.page.wait_for_function(_SHOWN)
    seen.expect(seen.one(".card img")).to_have_js_property("naturalWidth", 96)
    kinds = {each.resource_type: each for each in asked}
    assert set(kinds) == {"media", "image"}  # and none by a script
    assert kinds["media"].headers["range"] == "bytes=0-" and kinds["media"].response().status == 206
    assert pass_of(seen, "#video") == pass_of(seen, ".card img")  # one for all of the tab
    key = seen.page.evaluate("() => sessionStorage['arlon.key']")
    assert not any(key in each.url for each in asked) and seen.page.evaluate("() => document.cookie") == ""


def test_another_pass_is_made_where_one_is_over(seen: Visit, over: set[str]) -> None:
    first = pass_of(seen, ".card img")
    seen.page.wait_for_timeout(_NEW_MS)
    over.add(first)
    seen.one("#make-video").click()
    seen.expect(seen.one(".card img")).to_have_count(2)
    seen.expect(seen.one(".card img").first).to_have_js_property("naturalWidth", 96)
    second = pass_of(seen, ".card img")
    seen.page.wait_for_timeout(_NEW_MS)
    over.add(second)
    seen.one(".card .open").nth(1).click()
    seen.page.wait_for_function(_SHOWN)
    third = pass_of(seen, "#video")
    assert len({first, second, third}) == 3
    seen.page.wait_for_timeout(_NEW_MS)
    over.add(third)
    with seen.page.expect_download() as download:
        seen.one("#download").click()
    assert len(read_video(download.value.path())) == 34
