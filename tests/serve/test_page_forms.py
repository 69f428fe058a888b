"""What is written in the page, in a real Chromium: errors, the keyboard, a phone, and text that would be more."""

from __future__ import annotations

import re

import pytest

from tests.serve.browser import Visiting


@pytest.mark.slow
def test_errors_stand_at_the_fields_that_they_name(visit: Visiting) -> None:
    seen, _ = visit()
    seen.may_fail.append("status of 400")
    seen.write("A cat.", " ")
    seen.one("#make-video").click()
    wrong = seen.one(".part textarea").nth(1)
    seen.expect(wrong).to_be_focused()
    seen.expect(wrong).to_have_attribute("aria-invalid", "true")
    seen.expect(seen.one(f"#{wrong.get_attribute('aria-describedby')}")).to_have_text("the prompt is empty")
    wrong.fill("A dog.")
    seen.one("#steps").evaluate("field => { field.value = 5000 }")  # in settings that are folded away
    seen.one("#make-video").click()
    seen.expect(seen.one("#steps")).to_be_focused()
    seen.expect(seen.one("#steps-error")).to_contain_text("1000")
    seen.expect(wrong).not_to_have_attribute("aria-invalid", "true")
    seen.one("#steps").fill("")
    seen.one("#length").fill("1")
    seen.one("#unit").select_option("num_segments")
    seen.one("#make-video").click()
    seen.expect(seen.one("#length-error")).to_contain_text("2 prompts need at least as many segments")
    seen.shot("errors")
    seen.one(".part [type=number]").nth(0).fill("2")
    seen.expect(seen.one("#length")).to_be_disabled()
    seen.one("#make-video").click()
    seen.expect(seen.one(".part [type=number]").nth(1)).to_be_focused()
    seen.expect(seen.one(".part").nth(1)).to_contain_text("all segments say how long they last")
    seen.one(".part [type=number]").nth(1).fill("1")
    seen.one("#image").set_input_files({"name": "x.png", "mimeType": "image/png", "buffer": b"no picture"})
    seen.one("#make-draft").click()
    seen.expect(seen.one("#image-error")).to_be_visible()
    seen.expect(seen.one("#image")).to_have_attribute("aria-invalid", "true")
    assert seen.made() == [] == seen.made("drafts")
    seen.one("#image").set_input_files([])
    seen.one("#make-video").click()
    seen.status("Ready")
    seen.expect(seen.one("[aria-invalid]")).to_have_count(0)
    assert float(seen.made()[0]["seconds"]) >= 3


@pytest.mark.slow
def test_all_of_it_by_keyboard(visit: Visiting) -> None:
    seen, _ = visit()
    keys = seen.page.keyboard
    keys.press("Tab")
    seen.expect(seen.one(".skip")).to_be_focused()
    keys.press("Enter")
    keys.press("Tab")
    seen.expect(seen.one(".part textarea")).to_be_focused()
    ring = "() => getComputedStyle(document.activeElement).outlineStyle"
    assert seen.page.evaluate(ring) == "solid"
    keys.type("First")
    for expected in (".part [type=number]", "#add"):  # the buttons that would do nothing are passed over
        keys.press("Tab")
        seen.expect(seen.one(expected)).to_be_focused()
    keys.press("Enter")
    keys.type("Second")
    keys.press("Alt+ArrowUp")
    keys.type("!")
    parts = seen.one(".part textarea")
    assert [parts.nth(index).input_value() for index in range(2)] == ["Second!", "First"]
    seen.expect(seen.one("#live")).to_have_text("Now part 1 of 2")
    keys.press("Control+Enter")
    seen.expect(seen.one("#stage-title")).to_be_focused()
    seen.status("Ready")
    assert [segment["prompt"] for segment in seen.made()[0]["segments"]] == ["Second!", "First"]
    seen.one("#remix").press("Enter")
    seen.expect(seen.one("#ask-prompt")).to_be_focused()
    keys.press("Escape")
    seen.expect(seen.one("#ask")).to_be_hidden()
    seen.expect(seen.one("#remix")).to_be_focused()
    keys.press("Enter")
    seen.one("#ask-prompt").fill("Third")
    keys.press("Tab")
    seen.one("#ask-ok").press("Enter")
    seen.expect(seen.one("#stage-title")).to_contain_text("Third")
    seen.status("Ready")
    remixed, first = seen.made()
    assert remixed["remixed_from_video_id"] == first["id"] and remixed["seed"] == first["seed"]
    seen.one("#extend").press("Enter")
    seen.one("#ask-seconds").fill("1")
    keys.press("Enter")
    seen.status("Ready: 4.25 s")  # a second more than it was, in whole segments
    longer = seen.made()[0]
    assert longer["extended_from_video_id"] == remixed["id"]
    assert float(longer["seconds"]) >= float(remixed["seconds"]) + 1
    seen.page.go_back()
    seen.expect(seen.one("#stage-title")).to_contain_text("Third")


@pytest.mark.slow
def test_a_phone_in_the_dark(visit: Visiting) -> None:
    phone = {"viewport": {"width": 360, "height": 740}, "color_scheme": "dark", "has_touch": True, "is_mobile": True}
    seen, stages = visit(**phone)
    seen.fits()
    stages.held_at = 9
    seen.write("A" * 300, "https://example.org/" + "x" * 200, segments=14)
    seen.fits()
    seen.one("#advanced summary").click()
    seen.fits()
    seen.one("#make-video").click()
    seen.status("Segment 10 of 14")
    seen.fits()
    seen.expect(seen.one("#video")).to_be_in_viewport()
    seen.shot("phone")
    for button in ("#remix", "#delete", "#copy-open"):
        seen.one(button).click()
        seen.fits()
        seen.shot(f"phone-{button[1:]}")
        seen.page.keyboard.press("Escape")
    small = seen.page.evaluate(
        """() => [...document.querySelectorAll("main button, main input, main select")]
          .map((e) => e.getBoundingClientRect()).filter((b) => b.width && Math.min(b.width, b.height) < 24).length"""
    )
    assert small == 0, "too small for a finger"
    ground = seen.page.evaluate("() => getComputedStyle(document.body).backgroundColor")
    assert sum(map(int, re.findall(r"\d+", ground))) < 120, "not dark"


@pytest.mark.slow
def test_what_people_write_stays_text(visit: Visiting) -> None:
    seen, _ = visit()
    evil = '<img src=x onerror="document.title=1"><script>document.title=2</script>'
    seen.write(evil, evil)
    seen.one("#make-video").click()
    seen.status("Ready")
    seen.expect(seen.one("#stage-title")).to_contain_text("<img src=x")
    seen.expect(seen.one(".card")).to_contain_text("<script>")
    seen.one("#copy-open").click()
    seen.expect(seen.one("#copy-code")).to_contain_text("onerror")
    assert seen.page.title() == "ARLON-Ray"
    assert seen.page.evaluate("() => document.querySelectorAll('main img[src=x], main script').length") == 0
