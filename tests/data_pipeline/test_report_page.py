"""The page of a dataset is whole HTML whose links lead somewhere, whatever names and scores there are."""

from __future__ import annotations

import base64
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from arlon_ray.config import FilterConfig
from data_pipeline import schema
from data_pipeline.report import build_report
from data_pipeline.report_page import FILES_SHOWN, KEPT_SHOWN, REJECTED_SHOWN, chosen_clips, write_report_page
from data_pipeline.schema import CLIP, REJECT, SCORES, Row, reject_row

#: Elements without an end.
VOID = {"meta", "img", "br", "path", "use"}
SCORED = {"black": 0.0, "frozen": 0.25, "motion": 0.5, "sharpness": 120.0, "text": None, "phash": bytes(24)}
EVIL = '<script>alert("&")</script>.mp4'


class Page(HTMLParser):
    """What stands on a page. Elements that are not closed in order are an error."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.images: list[bytes] = []
        self.outside: list[str] = []
        self.tags: set[str] = set()
        self.text = ""
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self._open.append(tag)
        self._note(tag, dict(attrs))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, dict(attrs))

    def _note(self, tag: str, attributes: dict[str, str | None]) -> None:
        self.ids += [attributes["id"] or ""] if "id" in attributes else []
        target = attributes.get("href") or attributes.get("xlink:href") or attributes.get("src") or ""
        if target.startswith("#"):
            self.links.append(target[1:])
        elif tag == "img":
            head, _, data = target.partition(",")
            assert head == "data:image/jpeg;base64"
            self.images.append(base64.b64decode(data))
        elif target:
            self.outside.append(target)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data + " "


def clip(number: int, **more: Any) -> Row:
    row = {
        "clip_id": number,
        "source": f"file_{number}.mp4",
        "uri": "",
        "start_s": 0.0,
        "end_s": 2.125,
        "fps": 16.0,
        "height": 64,
        "width": 64,
        "num_frames": 34,
        "given_frames": 0,
        "caption": f"caption {number}",
        "source_height": 64,
        "source_width": 64,
        "source_duration_s": 2.125,
        "bucket": "34x64x64",
    }
    return {**row, **SCORED, **more}


def rejected(number: int, reason: str, **more: Any) -> Row:
    row = reject_row(f"file_{number}.mp4", "filter", reason, "too much", clip_id=number, start_s=0.0, end_s=2.0)
    return {**row, **SCORED, **more}


def write(tmp_path: Path, kept: list[Row], lost: list[Row], pictures: dict[int, bytes], **filters: float) -> Page:
    """The page of such a dataset, parsed; what holds of every page is checked."""
    names = dict.fromkeys(row["source"] for row in [*kept, *lost])
    found = [row["source"] for row in [*kept, *lost] if row.get("stage") != schema.STAGE_CLIPS]
    report = build_report(names, found, [row["source"] for row in kept], lost)
    clips = pa.Table.from_pylist(kept, pa.schema([*CLIP, *SCORES]))
    rejects = pa.Table.from_pylist(lost, REJECT)
    settings = {"vae": "v<1>", "filters": FilterConfig.model_validate(filters).model_dump()}
    write_report_page(tmp_path / "report.html", report, clips, rejects, pictures, settings)
    page = Page((tmp_path / "report.html").read_text())
    assert len(page.ids) == len(set(page.ids))
    assert set(page.links) <= set(page.ids)
    assert page.outside == [] and "script" not in page.tags
    return page


def test_every_reason_has_a_link_a_section_and_its_number(tmp_path: Path) -> None:
    lost = [rejected(number, schema.FROZEN) for number in range(100, 130)]
    lost += [rejected(200, schema.NEAR_DUPLICATE)]
    lost += [reject_row(f"bad_{n}.mp4", schema.STAGE_CLIPS, schema.UNREADABLE, f"error {n}") for n in range(25)]
    page = write(tmp_path, [clip(number) for number in range(40)], lost, {})
    for number, told in enumerate(("frozen (30)", "unreadable (25)", "near-duplicate (1)"), start=1):
        assert f"reason-{number}" in page.links and told in page.text
    assert page.text.count("too much") == REJECTED_SHOWN + 1
    assert page.text.count("caption ") == KEPT_SHOWN
    assert sum(f"error {n} " in page.text for n in range(25)) == FILES_SHOWN
    assert "5 more (rejects.parquet)" in page.text
    # files, in, kept, filtered, failed
    assert "96 96 40 31 25" in page.text


def test_names_captions_errors_and_settings_are_text(tmp_path: Path) -> None:
    kept = [clip(1, source=EVIL, caption="<img src=x onerror=alert(1)>", bucket="<b>")]
    lost = [rejected(2, "<i>why</i>", source=EVIL + "2", error="<u>")]
    lost += [reject_row(EVIL + "3", schema.STAGE_CLIPS, schema.UNREADABLE, "</ul>")]
    page = write(tmp_path, kept, lost, {})
    assert {"i", "u", "img"}.isdisjoint(page.tags)
    for text in (EVIL, EVIL + "2", EVIL + "3", "<img src=x onerror=alert(1)>", "<i>why</i>", "</ul>", '"v<1>"'):
        assert text in page.text


def test_pictures_are_inside_and_a_missing_one_is_said(tmp_path: Path) -> None:
    kept, lost = [clip(1), clip(2)], [rejected(3, schema.BLACK)]
    page = write(tmp_path, kept, lost, {1: b"first", 3: b"third"})
    assert page.images == [b"first", b"third"]
    assert page.text.count("no picture") == 1


def test_scores_that_were_not_measured_are_left_out(tmp_path: Path) -> None:
    kept = [clip(1), clip(2, **dict.fromkeys(SCORES.names))]
    page = write(tmp_path, kept, [], {})
    assert page.text.count("motion 0.5 · sharpness 120") == 1
    assert "text: measured of no clip" in page.text and "motion: measured" not in page.text


def test_thresholds_that_are_set_are_drawn(tmp_path: Path) -> None:
    def dashed(**filters: float) -> int:
        write(tmp_path, [clip(1), clip(2, motion=0.7)], [], {}, **filters)
        return (tmp_path / "report.html").read_text().count("stroke-dasharray")

    assert dashed() == 0
    assert dashed(min_motion=0.1, max_motion=2.0, max_frozen=0.9) == 3


@pytest.mark.parametrize(("kept", "lost"), [(0, 0), (1, 0), (0, 1)])
def test_next_to_nothing_is_a_page_too(tmp_path: Path, kept: int, lost: int) -> None:
    page = write(tmp_path, [clip(1)] * kept, [rejected(2, schema.BLACK)] * lost, {})
    assert ("Nothing was left out." in page.text) == (lost == 0)


def test_chosen_clips_are_spread_over_all() -> None:
    kept = pa.Table.from_pylist([clip(number) for number in range(1000)], pa.schema([*CLIP, *SCORES]))
    lost = [rejected(number, schema.BLACK if number % 2 else schema.FROZEN) for number in range(1000, 2000)]
    lost += [reject_row("a.mp4", schema.STAGE_CLIPS, schema.UNREADABLE)]
    chosen = chosen_clips(kept, pa.Table.from_pylist(lost, REJECT))
    assert len(chosen) == len(set(chosen)) == KEPT_SHOWN + 2 * REJECTED_SHOWN
    assert chosen[0] == 0 and chosen[KEPT_SHOWN - 1] == 999
    assert np.ptp(np.diff(chosen[:KEPT_SHOWN])) <= 1
    empty = pa.Table.from_pylist([], REJECT)
    assert chosen_clips(kept.slice(0, 0), empty) == []
    assert chosen_clips(kept.slice(5, 1), empty) == [5]


def test_a_hundred_thousand_clips(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    clips = pa.Table.from_pylist([clip(0)], pa.schema([*CLIP, *SCORES])).take(np.zeros(90_000, np.int64))
    clips = clips.set_column(0, CLIP.field("clip_id"), pa.array(np.arange(90_000)))
    motion = pa.array(random.exponential(0.3, 90_000), pa.float32())
    clips = clips.set_column(clips.schema.get_field_index("motion"), SCORES.field("motion"), motion)
    rejects = pa.Table.from_pylist([rejected(0, schema.BLACK)], REJECT).take(np.zeros(10_000, np.int64))
    report = {
        "files": 50_000,
        "total": {"in": 100_000, "kept": 90_000, "filtered": 10_000, "failed": 0},
        "reasons": {schema.BLACK: 10_000},
        "sources": {f"{n}.mp4": {"in": 2, "kept": 2, "filtered": 0, "failed": 0} for n in range(50_000)},
    }
    pictures = dict.fromkeys(chosen_clips(clips, rejects), bytes(6000))
    begin = time.process_time()
    path = tmp_path / "report.html"
    write_report_page(path, report, clips, rejects, pictures, {"filters": FilterConfig().model_dump()})
    assert time.process_time() - begin < 5
    assert path.stat().st_size < 2 * 2**20
    assert "90,000" in Page(path.read_text()).text
