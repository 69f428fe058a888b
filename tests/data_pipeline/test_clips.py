"""Sources, captions and spans: every file ends as clips or as a reject with its reason."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from arlon_ray.config import ConfigError, DataConfig, FilterConfig, VideoConfig, load_config, override
from data_pipeline import schema
from data_pipeline.buckets import nearest, shapes
from data_pipeline.clips import clip_id, find_clips, split_spans
from data_pipeline.decode import decode_row
from data_pipeline.sources import Caption, TimedCaption, find_sources, read_caption
from tests.data_pipeline.inputs import numbered, write_broken, write_video

VIDEO = VideoConfig(height=32, width=32, fps=16)
NOBODY = 65534
UNNAMEABLE = b"not-utf8-\xff\xfe.mp4"


def test_spans_take_the_longest_that_fits_and_do_not_overlap() -> None:
    assert list(split_spans(68 + 51 + 5, (34, 51, 68))) == [(0, 68), (68, 51)]
    assert list(split_spans(33, (34,))) == []
    assert list(split_spans(34 * 3, (34,))) == [(0, 34), (34, 34), (68, 34)]


def test_strides_make_clips_overlap_or_leave_frames_out() -> None:
    assert list(split_spans(68, (34,), stride=17)) == [(0, 34), (17, 34), (34, 34)]
    assert list(split_spans(120, (34,), stride=51)) == [(0, 34), (51, 34)]


def test_no_clip_reaches_across_a_cut(tmp_path: Path) -> None:
    texture = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 3), dtype=np.uint8)
    first, second = (np.repeat(picture[None], count, 0) for picture, count in zip(texture, (50, 80), strict=True))
    write_video(tmp_path / "a.mp4", np.concatenate([first, second]))
    (tmp_path / "a.txt").write_text("two scenes")
    clips, _ = find_clips(find_sources(tmp_path)[0], VIDEO, DataConfig(bucket_groups=(2,), shots="content"))
    assert [row["start_s"] * 16 for row in clips] == [0, 50, 84]
    for row in clips:
        frames = np.frombuffer(decode_row(row)["frames"], np.uint8).reshape(34, -1).astype(int)
        assert np.abs(np.diff(frames, axis=0)).mean(1).max() < 10
    clips, rejects = find_clips(find_sources(tmp_path)[0], VIDEO, DataConfig(bucket_groups=(6,), shots="content"))
    assert not clips and "80 frames at 16 per second in the longest of 2 shots" in rejects[0]["error"]


def test_a_clip_goes_to_the_bucket_of_the_nearest_aspect_ratio(tmp_path: Path) -> None:
    video = VideoConfig(height=256, width=256, fps=16)
    data = DataConfig(bucket_groups=(2,), aspect_ratios=("16:9", "1:1", "9:16"))
    assert shapes(video, data) == [(192, 344), (256, 256), (344, 192)]
    assert shapes(video, DataConfig()) == [(256, 256)]
    assert [nearest(size, shapes(video, data)) for size in ((360, 640), (480, 640), (500, 500), (640, 400))] == [
        (192, 344),
        (256, 256) if 4 / 3 < (344 / 192) ** 0.5 else (192, 344),
        (256, 256),
        (344, 192),
    ]
    write_video(tmp_path / "a.mp4", numbered(34, 64, 128))
    (tmp_path / "a.txt").write_text("wide")
    (row,), _ = find_clips(find_sources(tmp_path)[0], video, data)
    assert (row["bucket"], row["source_height"], row["source_width"]) == ("34x192x344", 64, 128)
    with pytest.raises(ConfigError, match="16:9 and 17:9 both come to"):
        shapes(VideoConfig(height=64, width=64), DataConfig(aspect_ratios=("16:9", "17:9")))


def test_files_are_filtered_before_they_are_decoded(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered(40))
    (tmp_path / "a.txt").write_text("a ramp")
    for name, value, reason in (
        ("min_duration_s", 3.0, schema.SHORT_FILE),
        ("min_short_side", 64, schema.LOW_RESOLUTION),
    ):
        data = DataConfig(filters=FilterConfig(**{name: value}))
        clips, rejects = find_clips(find_sources(tmp_path)[0], VIDEO, data)
        assert not clips and rejects[0]["reason"] == reason and f"filters.{name}={value:g}" in rejects[0]["error"]


def test_every_broken_file_is_a_reject_with_its_reason(tmp_path: Path) -> None:
    expected = write_broken(tmp_path)
    found = {}
    for source in find_sources(tmp_path):
        clips, rejects = find_clips(source, VIDEO, DataConfig(bucket_groups=(2,)))
        rows = [decode_row(row) for row in clips]
        assert len({row["reason"] for row in [*rejects, *rows]}) == 1, source.name
        found[source.name] = [*rejects, *rows][0]["reason"]
    assert found == expected


def test_names_of_any_bytes_and_length_are_clips_of_their_own(tmp_path: Path) -> None:
    limit = os.pathconf(tmp_path, "PC_NAME_MAX")
    names = [
        b"a" * (limit - 4) + b".mp4",
        UNNAMEABLE,
        "größe \N{CAMERA}\n.mp4".encode(),
        b"a/same.mp4",
        b"b/same.mp4",
    ]
    for name in names:
        path = tmp_path / os.fsdecode(name)
        path.parent.mkdir(exist_ok=True)
        write_video(tmp_path / "one.mp4", numbered(34))
        (tmp_path / "one.mp4").rename(path)
        path.with_suffix(".txt").write_text("a ramp")
    found = [find_clips(source, VIDEO, DataConfig(bucket_groups=(2,))) for source in find_sources(tmp_path)]
    clips, (rejected,) = ([row for each in its for row in each] for its in zip(*found, strict=True))
    assert (rejected["reason"], "not UTF-8: rename" in rejected["error"]) == (schema.UNREADABLE, True)
    assert len({row["clip_id"] for row in clips}) == len({row["source"] for row in clips}) == len(names) - 1
    assert not any(decode_row(row)["reason"] for row in clips)
    # the columns are text: every name, the rejected one too, can be written
    pa.Table.from_pylist(clips, schema.CLIP), pa.Table.from_pylist([rejected], schema.REJECT)


@contextmanager
def _as_a_stranger() -> Iterator[None]:
    """Run as a user to whom file permissions apply, which root's files do not admit."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


def test_what_may_not_be_read_is_a_reject() -> None:
    with tempfile.TemporaryDirectory() as created:  # pytest's folders are closed to others
        folder = Path(created)
        folder.chmod(0o755)
        for name in ("closed.mp4", "caption.mp4", "open.mp4"):
            write_video(folder / name, numbered(34))
            (folder / name).with_suffix(".txt").write_text("a ramp")
        (folder / "closed.mp4").chmod(0)
        (folder / "caption.txt").chmod(0)
        (folder / "closed").mkdir(0)
        with _as_a_stranger():
            found = {source.name: find_clips(source, VIDEO, DataConfig()) for source in find_sources(folder)}
        (folder / "closed").chmod(0o755)
    assert found["open.mp4"][0] and not found["open.mp4"][1]
    reasons = {name: [(row["reason"], row["error"]) for row in rejects] for name, (_, rejects) in found.items()}
    ((reason, error),) = reasons["closed.mp4"]
    assert reason == schema.UNREADABLE and "ermission denied" in error
    ((reason, error),) = reasons["caption.mp4"]
    assert reason == schema.BAD_CAPTION and "ermission denied" in error


def test_captions_from_text_or_json(tmp_path: Path) -> None:
    video = tmp_path / "a.mp4"
    assert read_caption(str(video)) == Caption() and not Caption().said
    video.with_suffix(".json").write_text(json.dumps({"caption": "from\n json"}))
    assert read_caption(str(video)) == Caption("from json")
    video.with_suffix(".txt").write_text(" from   text\n")
    assert read_caption(str(video)) == Caption("from text")
    video.with_suffix(".txt").write_bytes(b"\xff\xfe\x00bad")
    caption = read_caption(str(video))
    assert caption.said == "" and "decode" in caption.error


def timed(*parts: tuple[float, str]) -> str:
    return json.dumps({"captions": [{"start_s": start, "caption": text} for start, text in parts]})


def test_a_caption_may_change_on_the_way(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered(119))
    (tmp_path / "a.json").write_text(timed((0, "to the\n left"), (2.5, "to the right"), (6, "up")))
    (source,) = find_sources(tmp_path)
    assert source.caption.parts == (
        TimedCaption(0, "to the left"), TimedCaption(2.5, "to the right"), TimedCaption(6, "up"))  # fmt: skip
    assert source.caption.said == "0s: to the left 2.5s: to the right 6s: up"
    config = load_config("tiny", ["data.bucket_groups=[2]"])
    clips, rejected = find_clips(source, config.video, config.data)
    # frames 0–33, 34–67 (the second caption from frame 40 on), 68–101 (the third one from frame 96 on)
    assert [(row["caption"], row["given_frames"]) for row in clips] == [
        ("to the left", 0), ("to the right", 6), ("up", 28)]  # fmt: skip
    assert not rejected
    whole = find_clips(source, config.video, override(config, ["data.bucket_groups=[7]"]).data)[0]
    assert [(row["caption"], row["given_frames"]) for row in whole] == [("up", 96)]
    (tmp_path / "a.json").write_text(timed((0, "to the left"), (2.4, "to the right"), (6, "up")))
    (moved,) = find_sources(tmp_path)
    assert moved.caption != source.caption and moved.caption.said != source.caption.said
    (tmp_path / "a.txt").write_text("all of it")
    assert find_sources(tmp_path)[0].caption == Caption("all of it")


def test_captions_that_are_several_texts_of_the_whole_are_no_timed_ones(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"caption": "a dog", "captions": ["a dog", "a brown dog"]}')
    assert read_caption(str(tmp_path / "a.mp4")) == Caption("a dog")


def test_a_caption_that_begins_within_the_last_latent_frame_is_not_the_clip_s(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered(34))
    config = load_config("tiny", ["data.bucket_groups=[2]"])
    for frame, expected in ((30, ("right", 30)), (31, ("left", 0))):  # the last latent frame is frames 30 to 33
        (tmp_path / "a.json").write_text(timed((0, "left"), (frame / 16, "right")))
        (clip,), _ = find_clips(find_sources(tmp_path)[0], config.video, config.data)
        assert (clip["caption"], clip["given_frames"]) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"captions": []}', "captions: expected a list"),
        ('{"captions": "left"}', "captions: expected a list"),
        (timed((1, "left")), "number 1: start_s 1, expected 0, where the video begins"),
        (timed((0, "left"), (2, "right"), (2, "up")), "number 3: start_s 2, expected more than 2"),
        (timed((0, "left"), (float("nan"), "right")), "number 2: start_s nan"),
        (timed((0, "left"), (2, " ")), "number 2: expected"),
        ('{"captions": [{"start_s": "0", "caption": "left"}]}', "number 1: expected"),
    ],
)
def test_timed_captions_that_say_no_time_reject_the_video(tmp_path: Path, content: str, message: str) -> None:
    write_video(tmp_path / "a.mp4", numbered(34))
    (tmp_path / "a.json").write_text(content)
    config = load_config("tiny")
    clips, (reject,) = find_clips(find_sources(tmp_path)[0], config.video, config.data)
    assert not clips and reject["reason"] == schema.BAD_CAPTION and "a.json: captions" in reject["error"]
    assert message in reject["error"]


def test_bad_caption_files_reject_the_video(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered(34))
    for content in ("{not json", '{"caption": 3}'):
        (tmp_path / "a.json").write_text(content)
        _, rejects = find_clips(find_sources(tmp_path)[0], VIDEO, DataConfig())
        assert [row["reason"] for row in rejects] == [schema.BAD_CAPTION]


def test_sources_are_recursive_sorted_and_leave_hidden_files_out(tmp_path: Path) -> None:
    for name in ("b/x.mp4", "a/x.MP4", ".hidden/x.mp4", "a/.y.mp4", "a/note.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    sources = find_sources(tmp_path)
    assert [source.name for source in sources] == ["a/x.MP4", "b/x.mp4"]
    assert len({source.identity for source in sources}) == 2


def test_clip_ids_depend_on_content_and_span_but_not_on_the_place(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    write_video(first / "a.mp4", numbered(68))
    (first / "a.txt").write_text("a ramp")
    shutil.copytree(first, second)  # encoded anew it need not be the same bytes
    rows = [find_clips(find_sources(f)[0], VIDEO, DataConfig(bucket_groups=(2,)))[0] for f in (first, second)]
    ids = [[row["clip_id"] for row in found] for found in rows]
    assert ids[0] == ids[1] and len(set(ids[0])) == 2
    assert 0 <= clip_id("a", "b", 0, 34, 16.0) < 2**63
    assert clip_id("a", "b", 0, 34, 16.0) != clip_id("a", "c", 0, 34, 16.0)


def test_the_frame_rate_decides_how_many_clips_there_are(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered(80), fps=32)
    (tmp_path / "a.txt").write_text("a ramp")
    clips, _ = find_clips(find_sources(tmp_path)[0], VIDEO, DataConfig(bucket_groups=(2,)))
    assert [(row["num_frames"], row["start_s"], row["end_s"]) for row in clips] == [(34, 0.0, 34 / 16)]
    assert clips[0]["bucket"] == "34x32x32"


def test_clips_beyond_the_limit_are_filtered_with_their_span(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered(34 * 3))
    (tmp_path / "a.txt").write_text("a ramp")
    data = DataConfig(bucket_groups=(2,), max_clips_per_video=2)
    clips, rejects = find_clips(find_sources(tmp_path)[0], VIDEO, data)
    assert len(clips) == 2
    assert [(row["reason"], row["start_s"]) for row in rejects] == [(schema.TOO_MANY_CLIPS, 68 / 16)]
    assert np.isclose(rejects[0]["end_s"], 102 / 16)
