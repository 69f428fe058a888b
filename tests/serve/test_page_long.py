"""The page with a video of a hundred segments: nothing too wide, what is rendered in sight, and quick."""

from __future__ import annotations

import json

from tests.serve.browser import Visit, Visiting

SEGMENTS = 100
PROMPTS = [
    f"Scene {number}: a red circle moves to the {'right' if number % 2 else 'left'}." for number in range(1, 101)
]
#: Counts what is changed in the list of segments, from the page's beginning on.
_COUNT = """
  window.changes = 0;
  new MutationObserver((found) => {
    for (const each of found) if (each.target.closest?.("#chips")) window.changes++;
  }).observe(document, { subtree: true, attributes: true, childList: true });
"""


def in_sight(seen: Visit, index: int) -> bool:
    """Whether a segment's chip can be seen in its list."""
    return seen.page.evaluate(
        """(index) => {
          const list = document.getElementById("chips").getBoundingClientRect();
          const chip = document.getElementById("chips").children[index].getBoundingClientRect();
          return chip.top >= list.top - 1 && chip.bottom <= list.bottom + 1;
        }""",
        index,
    )


def test_a_video_of_a_hundred_segments(visit: Visiting) -> None:
    seen, stages = visit("serve.max_segments=100")
    stages.step_s, stages.held_at = 0.01, 60
    kept = json.dumps([{"prompt": prompt, "seconds": ""} for prompt in PROMPTS])
    seen.page.evaluate("(kept) => sessionStorage.setItem('arlon.storyboard', kept)", kept)
    seen.page.add_init_script(_COUNT)
    seen.page.reload()
    seen.expect(seen.one(".part")).to_have_count(SEGMENTS)
    # a list of its own: what follows is not fifteen windows further down
    seen.expect(seen.one("#make-video")).to_be_in_viewport()
    seen.one("#add").click()
    seen.expect(seen.one(".part textarea").nth(100)).to_be_in_viewport()
    seen.one("[data-tool=remove]").nth(100).click()
    seen.one(".part textarea").nth(99).press("Control+Enter")
    seen.expect(seen.one(".chip")).to_have_count(SEGMENTS)
    seen.expect(seen.one(".chip").nth(60)).to_contain_text("step", timeout=60_000)
    seen.page.wait_for_timeout(300)
    assert in_sight(seen, 60) and not in_sight(seen, 0) and not in_sight(seen, 99)
    seen.fits()
    seen.shot("hundred-segments")
    # opened again: all that has happened is told anew, and drawn once
    seen.page.reload()
    seen.status("Segment 61 of 100, step")
    seen.page.wait_for_timeout(500)
    assert in_sight(seen, 60)
    assert 100 < seen.page.evaluate("() => window.changes") < 100 * 50
    seen.page.set_viewport_size({"width": 390, "height": 844})
    seen.fits()
    seen.shot("hundred-segments-phone")
    stages.held_at = None
    seen.expect(seen.one("#status-text")).to_contain_text("Ready", timeout=60_000)
    assert in_sight(seen, 99)
    (video,) = seen.made()
    assert [segment["prompt"] for segment in video["segments"]] == PROMPTS
