"""A visitor of the web page: a tab of a real Chromium, and all that goes wrong in it."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx

from tests.serve.live import DrawnStages


class Visit:
    """One visitor's page, and all that went wrong in it. `may_fail` are texts of console errors that are expected."""

    def __init__(self, browser: Any, url: str, shots: Path, **options: Any) -> None:
        from playwright.sync_api import expect

        self.url, self.shots, self.may_fail = url, shots, list[str]()
        self.context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
        self.context.set_default_timeout(10_000)
        self.expect = expect
        self.wrong, self.hosts = list[str](), set[str]()
        self.context.on(
            "console", lambda said: self.wrong.append(said.text) if said.type in ("error", "warning") else None
        )
        self.context.on("weberror", lambda error: self.wrong.append(str(error.error)))
        self.context.on(
            "request", lambda request: self.hosts.add(re.sub(r"^(blob:)?(\w+://[^/]*|data:).*", r"\2", request.url))
        )
        self.page = self.context.new_page()
        self.page.goto(url)
        self.expect(self.page.locator("#server:not(:empty), #ask[open]").first).to_be_visible()

    def follow(self, link: str) -> None:
        """Go on in the tab that a link opens."""
        with self.context.expect_page() as opened:
            self.page.get_by_role("link", name=link).click()
        self.page = opened.value

    def one(self, selector: str) -> Any:
        return self.page.locator(selector)

    def write(self, *prompts: str, segments: int | None = None) -> None:
        """The storyboard, of that many segments."""
        for index, prompt in enumerate(prompts):
            if index:
                self.one("#add").click()
            self.one(".part textarea").nth(index).fill(prompt)
        if segments:
            self.one("#length").fill(str(segments))
            self.one("#unit").select_option("num_segments")

    def status(self, text: str) -> None:
        self.expect(self.one("#status-text")).to_contain_text(text, timeout=15_000)

    def shown(self) -> dict[str, float]:
        """What the player has: pictures of this width, up to this second."""
        return self.page.evaluate(
            """() => { const v = document.getElementById("video"); return {
              width: v.videoWidth, end: v.buffered.length ? v.buffered.end(v.buffered.length - 1) : 0 } }"""
        )

    def fits(self) -> None:
        """Nothing is wider than the window."""
        wide = self.page.evaluate("() => document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{wide} pixels too wide"

    def shot(self, name: str) -> None:
        self.page.screenshot(path=self.shots / f"{name}.png", full_page=True)

    def made(self, kind: str = "videos") -> list[dict[str, Any]]:
        return httpx.get(f"{self.url}/v1/{kind}").json()["data"]


#: Serves, with those overrides and that in between, and opens the page.
Visiting = Callable[..., tuple[Visit, DrawnStages]]
