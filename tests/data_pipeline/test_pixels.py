"""Pixels for training a VAE: bad files are left out and named, long ones cut; and files rendered for it."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch

from arlon_ray.artifact import ArtifactError
from arlon_ray.config import DataConfig, VideoConfig, load_config
from arlon_ray.training.engine import Evaluation
from arlon_ray.training.stages.vae import VaeStage
from data_pipeline import pixels
from data_pipeline.pixels import PixelClips
from data_pipeline.synthetic import write_sample
from tests.data_pipeline.inputs import numbered, numbers_of, write_broken, write_video

VIDEO = VideoConfig(height=32, width=32)


def clips(folder: Path, held_out: int = 0) -> PixelClips:
    return PixelClips([(folder, 1.0)], VIDEO, DataConfig(cache_bytes=1 << 30), held_out)


def write_good(folder: Path, count: int, frames: int = 20) -> None:
    for number in range(count):
        write_video(folder / f"good_{number}.mp4", numbered(frames))


@pytest.mark.parametrize(("files", "held_out"), [(2, 4), (6, 0)])
def test_nothing_held_out_is_an_empty_array_and_an_empty_evaluation(tmp_path: Path, files: int, held_out: int) -> None:
    write_good(tmp_path, files)
    source = clips(tmp_path, held_out)
    assert source.held_out(4).shape == (0, 17, 32, 32, 3) and source.held_out(4).dtype == np.uint8
    config = load_config("tiny", ["video.height=32", "video.width=32", "vae.width=16", "vae.deep_width=16"]).vae
    stage = VaeStage(config, source, seed=0)
    assert stage.evaluate(stage.objective(), torch.device("cpu")) == Evaluation()


def test_what_is_held_out_is_never_trained_on(tmp_path: Path) -> None:
    for number in range(6):
        write_video(tmp_path / f"{number}.mp4", np.full((17, 32, 32, 3), 40 * number, np.uint8))
    source = clips(tmp_path, held_out=1)
    (held,) = source.held_out(4)
    seen = {round(float(group.mean()) / 40) for group in source.training(0, 64)}
    assert len(seen) == 5 and round(float(held.mean()) / 40) not in seen


def test_files_that_do_not_fit_are_left_out_with_a_line_a_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_broken(tmp_path)
    write_good(tmp_path, 2)
    for number in range(5):
        write_video(tmp_path / f"tiny_{number}.mp4", numbered(20, 16, 16))
    write_video(tmp_path / "sixteen.mkv", numbered(16))  # by duration and rate: mkv records no count
    write_video(tmp_path / "seventeen.mkv", numbered(17))
    source = clips(tmp_path)
    lines = capsys.readouterr().out.splitlines()
    assert sorted(lines) == [
        "pixels: 1 file left out: no video stream (audio.mp4)",
        "pixels: 1 file left out: too short (sixteen.mkv)",
        "pixels: 3 files left out: unreadable (empty.mp4, folder.mp4, text.mp4)",
        "pixels: 5 files left out: too small (tiny_0.mp4, tiny_1.mp4, tiny_2.mp4, …)",
    ]
    assert source.training(0, 32).shape == (32, 17, 32, 32, 3)


def test_a_file_that_breaks_while_it_is_read_is_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_broken(tmp_path)
    kept = {"short.mp4", "nocaption.mp4", "cut_pictures.mp4"}
    for path in tmp_path.glob("*.mp4"):
        if path.is_file() and path.name not in kept:
            path.unlink()
    (tmp_path / "folder.mp4").rmdir()
    source = clips(tmp_path)
    assert capsys.readouterr().out == ""
    drawn = source.training(3, 32)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and said.startswith(f"pixels: {tmp_path / 'cut_pictures.mp4'} left out: ")
    # the same again, and in a process that has not met the broken file yet
    assert np.array_equal(source.training(3, 32), drawn)
    assert capsys.readouterr().out == ""
    assert np.array_equal(clips(tmp_path).training(3, 32), drawn)


def test_a_file_that_vanishes_is_replaced_and_left_out_of_the_evaluation(tmp_path: Path) -> None:
    write_good(tmp_path, 10)
    source = clips(tmp_path, held_out=2)
    Path(source._held_out[0]).unlink()
    Path(source._folders[0][0][0]).unlink()
    assert len(source.held_out(4)) == 1
    assert len(source.training(0, 64)) == 64


def test_a_folder_without_usable_video_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no video to train on"):
        clips(tmp_path)
    (tmp_path / "text.mp4").write_text("this is no video")
    with pytest.raises(ArtifactError, match="no video to train on"):
        clips(tmp_path)
    write_good(tmp_path, 1)
    source = clips(tmp_path)
    (tmp_path / "good_0.mp4").unlink()
    with pytest.raises(ArtifactError, match="none of the 1 videos"):
        source.training(0, 2)


def test_a_long_file_is_read_in_part_and_shrunk_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert pixels.MOST_FRAMES == 600
    monkeypatch.setattr(pixels, "MOST_FRAMES", 40)
    sizes = []
    plain = pixels._shrink
    monkeypatch.setattr(pixels, "_shrink", lambda frames, video: sizes.append(len(frames)) or plain(frames, video))
    write_video(tmp_path / "long.mp4", numbered(200, 128, 256))
    frames = clips(tmp_path)._frames(tmp_path / "long.mp4")
    assert frames is not None and frames.shape == (40, 64, 128, 3)
    assert numbers_of(frames) == [*range(40)]
    assert sizes == [17, 17, 6]


def test_frames_are_shrunk_to_what_covers_twice_the_target() -> None:
    wide = VideoConfig(height=32, width=128)
    assert pixels._shrink(np.zeros((1, 512, 512, 3), np.uint8), wide).shape == (1, 256, 256, 3)
    assert pixels._shrink(np.zeros((1, 60, 250, 3), np.uint8), wide).shape == (1, 60, 250, 3)


def rate_of(path: Path) -> Fraction | None:
    with av.open(str(path)) as container:
        return container.streams.video[0].average_rate


def test_rendered_files_are_made_again_where_the_settings_differ(tmp_path: Path) -> None:
    path = tmp_path / "scene_000000.mp4"

    def render(fps: float = 16, size: int = 32, groups: tuple[int, ...] = (2,)) -> bool:
        return write_sample(tmp_path, 0, 0, VideoConfig(height=size, width=size, fps=fps), groups)

    assert (render(), render(), rate_of(path)) == (True, False, 16)
    assert (render(fps=12.5), render(fps=12.5), rate_of(path)) == (True, False, Fraction(25, 2))
    assert json.loads(path.with_suffix(".json").read_text())["fps"] == 12.5
    assert (render(size=64), render(size=64)) == (True, False)
    assert (render(size=64, groups=(3,)), render(size=64, groups=(3,))) == (True, False)
    # a file of an earlier version, whose rate nobody wrote down
    facts = json.loads(path.with_suffix(".json").read_text())
    del facts["fps"]
    path.with_suffix(".json").write_text(json.dumps(facts, sort_keys=True))
    assert render(size=64, groups=(3,))
