"""The page in a browser (pictures of it go to $ARTEFACTS), and places for files."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from serve.blobs import Blobs
from serve.keys import Keys
from tests.s3 import s3_server
from tests.serve.browser import Visit, Visiting
from tests.serve.live import Around, DrawnStages, serving

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


# not for the session: while Playwright runs, no other test of its thread can use asyncio
@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    playwright = pytest.importorskip(
        "playwright.sync_api", reason="playwright is not installed: pip install playwright"
    )
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium: Any, tmp_path: Path) -> Iterator[Visiting]:
    """Serves, and opens the page. At the end nothing may have gone wrong in it, and nobody else have been asked."""
    shots = Path(os.environ.get("ARTEFACTS") or tmp_path / "shots")
    shots.mkdir(parents=True, exist_ok=True)
    visits: list[Visit] = []
    with ExitStack() as servers:

        def opened(
            *overrides: str, keys: Keys | None = None, around: Around = lambda app: app, **options: Any
        ) -> tuple[Visit, DrawnStages]:
            url, stages = servers.enter_context(serving(tmp_path / "data", *overrides, keys=keys, around=around))
            visits.append(Visit(chromium, url, shots, **options))
            return visits[-1], stages

        yield opened
        for each in visits:
            each.context.close()
    for each in visits:
        assert each.hosts <= {each.url, "data:"}
        assert [text for text in each.wrong if not any(known in text for known in each.may_fail)] == []


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The address of an empty place in a bucket."""
    with s3_server("videos") as options:
        yield f"s3://videos/PLACE{options}"


@pytest.fixture(params=["folder", "bucket"])
def blobs(request: pytest.FixtureRequest, tmp_path: Path) -> Blobs:
    """An empty place: a folder, and one in a bucket of an S3 server."""
    if request.param == "folder":
        return Blobs(tmp_path / "blobs")
    return Blobs(request.getfixturevalue("bucket").replace("PLACE", tmp_path.name))
