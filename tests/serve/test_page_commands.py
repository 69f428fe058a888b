"""The commands that the page copies, and the examples of docs/serving.md, run as they are."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from arlon_ray.generation.video import read_video
from tests.serve.browser import Visit, Visiting
from tests.serve.live import serving

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("tab", ["curl", "python", "arlon"])
def test_what_was_done_is_done_again_by_the_command_that_is_copied(visit: Visiting, tmp_path: Path, tab: str) -> None:
    seen, _ = visit()
    seen.context.grant_permissions(["clipboard-read", "clipboard-write"])
    seen.write('It\'s a "cat" of $5 \\ `pwd`.', "Zwölf {true} Hunde", segments=3)
    seen.expect(seen.one(".part [type=checkbox]").nth(0)).to_be_hidden()  # there is nothing to cut from
    seen.one(".part [type=checkbox]").nth(1).check()
    seen.one("#advanced summary").click()
    seen.one("#negative").fill("rain")
    picture = tmp_path / "first picture.png"
    Image.new("RGB", (32, 32), (200, 30, 30)).save(picture)
    seen.one("#image").set_input_files(picture)
    for button, title in (("#make-video", "It's"), ("#make-draft", "Draft: It's"), ("#render", "It's")):
        seen.one(button).click()
        seen.expect(seen.one("#stage-title")).to_have_text(re.compile(f"^{title}"))
        seen.status("Ready")
        again(seen, tab, tmp_path)


def again(seen: Visit, tab: str, folder: Path) -> None:
    """Run what the page copies; what comes of it must be what the page has made."""
    kind = "drafts" if "#draft" in seen.page.url else "videos"
    seen.one("#copy-open").click()
    seen.one(f"[data-as={tab}]").click()
    seen.one("#copy-do").click()
    seen.expect(seen.one("#copy-do")).to_have_text("Copied")
    text = seen.page.evaluate("() => navigator.clipboard.readText()")
    if kind == "videos" and tab == "curl":
        seen.shot("copy")
    seen.page.keyboard.press("Escape")
    before = seen.made(kind)
    command = [sys.executable, "-c", text] if tab == "python" else ["bash", "-ec", text]
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    ended = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=60, env={**os.environ, "PATH": path}
    )
    assert ended.returncode == 0, f"{text}\n{ended.stderr}"
    made = seen.made(kind)
    assert len(made) == len(before) + 1, text
    for name in ("prompt", "seed", "seconds", "draft_id"):
        assert made[0][name] == before[0][name], text
    texts = [[(segment["prompt"], segment["cut"]) for segment in video["segments"]] for video in (made[0], before[0])]
    assert texts[0] == texts[1] and [cut for _, cut in texts[0]] == [False, False, True]


def test_the_examples_of_the_documentation_run(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "serving.md").read_text().split("## From Python and curl")[1]
    examples = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(examples) == 2
    with serving(tmp_path / "data") as (url, stages):
        for example, frames in zip(examples, (68, 85), strict=True):
            here = example.replace("http://127.0.0.1:8000", url)
            command = [sys.executable, "-c", here]
            path = {**os.environ, "PYTHONPATH": str(ROOT)}
            ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, env=path)
            assert ended.returncode == 0, ended.stderr
            assert len(read_video(tmp_path / "video.mp4")) == frames
            (tmp_path / "video.mp4").unlink()
        assert "segment.completed {'index': 3, 'frames': 17" in ended.stdout and len(stages.rendered) == 3 + 4
