"""Editing what is finished: one segment between its neighbours, more at the end; projects on disk."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from arlon_ray.generation import (
    ChangingText,
    Project,
    ProjectError,
    ProjectSegment,
    SegmentText,
    VideoEditor,
    VideoGenerator,
    default_options,
    given_picture,
)
from arlon_ray.generation.video import read_video, write_video
from jobs import command_line, edit, generate
from tests.bundles import make_random_bundle


@pytest.fixture(
    scope="module",
    params=[
        (),
        ("segment.groups=3", "ar.sink_groups=1"),
        ("segment.groups=3", "segment.overlap_groups=2"),
        ("ar.sink_groups=1", "dit.anchor_groups=1"),
        ("segment.groups=4", "segment.overlap_groups=2", "dit.anchor_groups=2"),
    ],
)
def generator(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> VideoGenerator:
    return VideoGenerator.from_bundle(make_random_bundle(tmp_path_factory.mktemp("bundle") / "b", *request.param))


def made(
    generator: VideoGenerator, folder: Path, texts: list[SegmentText], seed: int = 3
) -> tuple[Project, list[np.ndarray]]:
    options = default_options(generator.bundle.config.sampling, steps=2)
    project = Project.create(folder, generator.bundle.fingerprint, options)
    return project, list(generator.generate(texts, seed, options, project=project))


def shown(generator: VideoGenerator, project: Project) -> list[np.ndarray]:
    """The frames of a project's segments."""
    return list(generator.generate(project.texts(), 0, project.options, project.start, project=project))


def test_a_segment_is_made_again_between_its_neighbours(generator: VideoGenerator, tmp_path: Path) -> None:
    project, before = made(generator, tmp_path / "p", ["a", "b", "c", "d"])
    editor = VideoEditor(generator, project)
    assert all(np.array_equal(a, b) for a, b in zip(before, shown(generator, project), strict=True))
    old = list(project)
    editor.reroll(1, seed=9, text="a blue square")
    for index, (was, now) in enumerate(zip(old, project, strict=True)):
        assert np.array_equal(was.latents, now.latents) == (index != 1)
    assert (project.read(1).text, project.read(1).seed) == ("a blue square", 9)
    again = project.read(1)
    editor.reroll(1, seed=9)  # the text that it has
    assert np.array_equal(project.read(1).latents, again.latents) and project.read(1).text == "a blue square"
    # what comes after is seen
    following = project.read(2)
    project.write(2, ProjectSegment(following.text, following.seed, following.latents + 1, following.tokens))
    editor.reroll(1, seed=9)
    assert not np.array_equal(project.read(1).latents, again.latents)
    for index in (-1, 4):
        with pytest.raises(ValueError, match=f"segment {index}: the video has segments 0 to 3"):
            editor.reroll(index, seed=0)


def test_the_last_segment_with_its_own_seed_is_what_it_was(generator: VideoGenerator, tmp_path: Path) -> None:
    half = tuple(
        float(i < generator.bundle.config.segment.latents - 3) for i in range(generator.bundle.config.segment.latents)
    )
    last = ChangingText(("c", "d"), (half, tuple(1 - share for share in half)))
    project, _ = made(generator, tmp_path / "p", ["a", "b", last])
    was = project.read(2)
    assert was.text == last
    VideoEditor(generator, project).reroll(2, seed=3)
    assert np.array_equal(project.read(2).latents, was.latents) and np.array_equal(project.read(2).tokens, was.tokens)


def test_extending_is_making_a_longer_video(generator: VideoGenerator, tmp_path: Path) -> None:
    texts: list[SegmentText] = ["a", "b", "c", "d", "e"]
    short, _ = made(generator, tmp_path / "short", texts[:2])
    _, whole = made(generator, tmp_path / "long", texts)
    was = list(short)
    opened = Project.open(tmp_path / "short", generator.bundle.fingerprint)
    longer = list(generator.generate(texts, 3, opened.options, project=opened))
    assert all(np.array_equal(a, b) for a, b in zip(whole, longer, strict=True)) and len(opened) == 5
    assert all(np.array_equal(a, b) for a, b in zip(whole, shown(generator, opened), strict=True))
    assert all(np.array_equal(a.latents, b.latents) for a, b in zip(was, opened, strict=False))


def test_text_that_goes_on_is_guided_as_it_was(tmp_path: Path) -> None:
    bundle = make_random_bundle(tmp_path / "b", "sampling.guidance_scale=3", "sampling.continued_guidance=0")
    generator = VideoGenerator.from_bundle(bundle)
    project, whole = made(generator, tmp_path / "p", ["a", "a", "b"])
    for index in (0, 1, 2):
        VideoEditor(generator, made(generator, tmp_path / str(index), ["a", "a", "b"][: index + 1])[0]).reroll(index, 3)
        again = Project.open(tmp_path / str(index), generator.bundle.fingerprint)
        assert np.array_equal(again.read(index).latents, project.read(index).latents)
    short, _ = made(generator, tmp_path / "short", ["a"])
    longer = list(generator.generate(["a", "a", "b"], 3, short.options, project=short))
    assert all(np.array_equal(a, b) for a, b in zip(whole, longer, strict=True))


def test_a_start_is_part_of_the_project(generator: VideoGenerator, tmp_path: Path) -> None:
    options = default_options(generator.bundle.config.sampling, steps=2)
    start = given_picture(generator.bundle, np.full((64, 64, 3), 200, np.uint8))
    Project.create(tmp_path / "p", generator.bundle.fingerprint, options, start)
    project = Project.open(tmp_path / "p", generator.bundle.fingerprint)
    made_frames = list(generator.generate(["a", "b"], 1, options, start, project=project))
    editor = VideoEditor(generator, project)
    assert all(np.array_equal(a, b) for a, b in zip(made_frames, shown(generator, project), strict=True))
    assert len(made_frames[0]) == 17 * generator.bundle.config.segment.groups
    was = project.read(0).latents
    editor.reroll(0, seed=5)
    assert project.read(0).latents.shape == was.shape and not np.array_equal(project.read(0).latents, was)


def test_projects_that_cannot_be_used_are_refused(tmp_path: Path) -> None:
    generator = VideoGenerator.from_bundle(make_random_bundle(tmp_path / "b"))
    with pytest.raises(ProjectError, match="no project that can be read"):
        Project.open(tmp_path, "b")
    made(generator, tmp_path / "p", ["a", "b"])
    with pytest.raises(ProjectError, match="there is a project already"):
        made(generator, tmp_path / "p", ["a"])
    with pytest.raises(ProjectError, match="made with the bundle"):
        Project.open(tmp_path / "p", "0" * 64)
    segment = tmp_path / "p" / "segment-00001.safetensors"
    segment.write_bytes(segment.read_bytes()[:100])
    with pytest.raises(ProjectError, match=r"segment-00001\.safetensors: cannot be read"):
        Project.open(tmp_path / "p", generator.bundle.fingerprint).read(1)


def run_job(monkeypatch: pytest.MonkeyPatch, job: object, *words: str) -> int:
    """The exit code of `jobs/generate.py` or `jobs/edit.py` with these arguments."""
    monkeypatch.setattr(sys, "argv", ["job.py", *words])
    try:
        command_line.run(job.main, job.AGAIN)  # type: ignore[attr-defined]
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def test_editing_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle, project = ["--bundle", str(make_random_bundle(tmp_path / "b"))], ["--project", str(tmp_path / "p")]
    video = ["--output", str(tmp_path / "v.mp4")]
    common = [*bundle, *project, *video]
    assert run_job(monkeypatch, generate, *common, "--prompt", "a", "--prompt", "b", "--prompt", "c") == 0
    first = read_video(tmp_path / "v.mp4")
    assert run_job(monkeypatch, edit, *common, "--segment", "1", "--seed", "4", "--prompt", "d") == 0
    second = read_video(tmp_path / "v.mp4")
    assert np.array_equal(first[:34], second[:34]) and not np.array_equal(first[34:51], second[34:51])
    assert run_job(monkeypatch, edit, *common, "--prompt", "e", "--seconds", "3", "--cut", "1") == 0
    assert len(read_video(tmp_path / "v.mp4")) == len(first) + 3 * 17
    refusals = {
        ("--segment", "9"): "--segment: segment 9: the video has segments 0 to 5",
        ("--segment", "1", "--seconds", "3"): "--segment makes one segment again",
        ("--segment", "1", "--prompt", "a", "--prompt", "b"): "expected one --prompt, not 2",
        (): "expected --prompt or --storyboard",
    }
    for flags, expected in refusals.items():
        capsys.readouterr()
        assert run_job(monkeypatch, edit, *common, *flags) == 2
        assert expected in capsys.readouterr().err
    for flags in (("--prompt", "a"), ("--prompt", "a", "--prompt", "b", "--seed", "1")):
        assert run_job(monkeypatch, generate, *common, *flags) == 2
        assert "there is a project already, of another video" in capsys.readouterr().err
    (tmp_path / "p" / "segment-00001.safetensors").unlink()
    for flags in (("--prompt", "a"), ("--segment", "0")):
        assert run_job(monkeypatch, edit, *common, *flags) == 2
        printed = capsys.readouterr().err
        assert (
            printed.startswith("error: --project") and printed.count("segment-00001") <= 2 and "\n" not in printed[:-1]
        )


@pytest.mark.parametrize("until", [False, True])
def test_a_video_that_was_interrupted_goes_on(
    until: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--bundle", str(make_random_bundle(tmp_path / "b")), "--prompt", "a", "--prompt", "b", "--segments", "4"]
    if until:
        write_video(tmp_path / "clip.mp4", np.full((34, 64, 64, 3), 90, np.uint8), 16)
        flags += ["--until", str(tmp_path / "clip.mp4")]
    assert run_job(monkeypatch, generate, *flags, "--output", str(tmp_path / "whole.mp4")) == 0
    flags += ["--project", str(tmp_path / "p"), "--output", str(tmp_path / "v.mp4")]
    write, written = Project.write, []

    def interrupted(project: Project, index: int, segment: ProjectSegment) -> None:
        if index == 2 and len(written) == 2:
            raise KeyboardInterrupt
        written.append(index)
        write(project, index, segment)

    monkeypatch.setattr(Project, "write", interrupted)
    capsys.readouterr()
    assert run_job(monkeypatch, generate, *flags) == 130
    printed = capsys.readouterr().err
    assert f"2 of 4 segments are kept in {tmp_path / 'p'}" in printed and "the same command goes on" in printed
    written.append(-1)
    assert run_job(monkeypatch, generate, *flags) == 0
    assert "2 of 4 segments are there already" in capsys.readouterr().err
    assert written == [0, 1, -1, 2, 3]
    assert (tmp_path / "v.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    # a machine that lost its power
    (tmp_path / "p" / "segment-00001.safetensors").write_bytes(b"")
    assert run_job(monkeypatch, generate, *flags) == 0
    assert "segment 1 cannot be read: 3 segments are made again" in capsys.readouterr().err
    assert (tmp_path / "v.mp4").read_bytes() == (tmp_path / "whole.mp4").read_bytes()
    # other videos, whose segments these are not
    others = [[*flags, "--seed", "1"], [*flags, "--segments", "3"], [*flags, "--segments", "5"]]
    without = flags.index("--until") if until else None
    others += [flags[:without] + flags[without + 2 :]] if without else [[*flags, "--until", str(tmp_path / "v.mp4")]]
    for other in others:
        assert run_job(monkeypatch, generate, *other) == 2
        assert "there is a project already, of another video" in capsys.readouterr().err
    edited = ["--bundle", flags[1], "--project", str(tmp_path / "p"), "--output", str(tmp_path / "v.mp4")]
    assert run_job(monkeypatch, edit, *edited, "--segment", "1") == 0
    assert run_job(monkeypatch, generate, *flags) == 2
    assert "or it was edited" in capsys.readouterr().err
