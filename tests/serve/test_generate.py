"""jobs/generate.py before it generates: prompts, output and device are checked; and the counter that it shares."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from arlon_ray.artifact import ArtifactError
from arlon_ray.generation import Timeline, VideoGenerator
from arlon_ray.generation.video import contact_sheet, read_video, write_video
from arlon_ray.models.text import load_text_encoder, load_token_counter
from benchmarks.long_video import WAYS
from data_pipeline.decode import fit
from jobs import command_line, generate
from jobs.command_line import InputError
from tests.bundles import make_random_bundle, small_config


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_bundle(tmp_path_factory.mktemp("generate") / "bundle", "device=auto")


def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Run the command, which must end with code 2 and one line before anything is generated; the line."""

    def never(*_: object) -> None:
        raise AssertionError("it generates")

    monkeypatch.setattr(generate, "make_video", never)
    monkeypatch.setattr(sys, "argv", ["generate.py", *arguments])
    with pytest.raises(SystemExit) as ended:
        command_line.run(generate.main)
    printed = capsys.readouterr().err
    assert ended.value.code == 2 and printed.count("\n") == 1, printed
    return printed


def test_the_counter_counts_as_the_encoder_does(monkeypatch: pytest.MonkeyPatch) -> None:
    config = small_config().text
    encoder = load_text_encoder(config)
    monkeypatch.setattr("arlon_ray.models.text.load_minilm", lambda *_: pytest.fail("the model was loaded"))
    count = load_token_counter(config)
    for text in ("", "A red circle moves to the right.", "circle " * 100):
        assert count(text) == encoder.count_tokens(text)
    with pytest.raises(ArtifactError, match="no tokenizer"):
        load_token_counter(config.model_copy(update={"path": "/no/such/folder"}))


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--segments", "0"], "--segments 0: expected 1 or more"),
        (["--segments", "100001"], "--segments 100001: expected at most 100000 segments (106251.0625 s)"),
        (["--seconds", "1e300"], "--seconds 1e+300: expected at most 100000 segments"),
        (["--seconds", "1e308", "--prompt", "b", "--seconds", "1e308"], "--seconds inf: expected at most 100000"),
    ],
)
def test_a_video_of_no_end_is_refused_at_once(
    flags: list[str],
    expected: str,
    bundle: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    arguments = ["--bundle", str(bundle), "--prompt", "a", *flags, "--output", str(tmp_path / "video.mp4")]
    assert expected in refused(monkeypatch, capsys, *arguments)


def test_a_prompt_that_would_be_cut_off_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--bundle", str(bundle), "--prompt", "a", "--prompt", "circle " * 100]
    printed = refused(monkeypatch, capsys, *arguments, "--output", str(tmp_path / "video.mp4"))
    assert f"--prompt: 102 tokens, at most {small_config().text.max_tokens}" in printed


@pytest.mark.parametrize(("output", "expected"), [(".", "is a folder"), ("file/x/video.mp4", "file is not a folder")])
def test_an_output_that_cannot_be_written_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], output: str,
    expected: str,
) -> None:  # fmt: skip
    (tmp_path / "file").write_text("")
    arguments = ["--bundle", str(bundle), "--prompt", "a", "--output", str(tmp_path / output)]
    printed = refused(monkeypatch, capsys, *arguments)
    assert "--output" in printed and expected in printed


def test_a_parent_without_write_permission_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    generate.check_output(tmp_path / "new" / "video.mp4")
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr("os.access", lambda *_: False)  # tests may run as root, who may write everywhere
    with pytest.raises(InputError, match="is not writable"):
        generate.check_output(tmp_path / "new" / "video.mp4")


def test_the_device_is_the_bundles(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    plain = generate.load_bundle
    monkeypatch.setattr(
        generate, "load_bundle", lambda path, device="cpu", _="none": asked.append(device) or plain(path)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    generate.open_bundle(bundle)
    assert asked[-1] == "cuda"
    assert generate.device_of(small_config("device=cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    generate.open_bundle(bundle)
    assert asked[-1] == "cpu"
    with pytest.raises(InputError, match="--offload idle: frees a GPU's memory, but this bundle computes on the CPU"):
        generate.open_bundle(bundle, "idle")
    with pytest.raises(InputError, match="no GPU"):
        generate.device_of(small_config("device=cuda"))


@pytest.mark.parametrize(
    "flag, content, expected",
    [
        ("--image", None, "--image"),
        ("--image", b"no picture", "Invalid data"),
        ("--video", b"", "Invalid data"),
        ("--video", "short", "has 10 frames at 16 a second: expected at least 17"),
        ("both", b"", "exclude each other"),
        ("--until", b"", "Invalid data"),
        ("--until", "short", "has 10 frames at 16 a second: expected at least 17"),
    ],
)
def test_what_a_video_cannot_start_from_is_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flag: str,
    content: bytes | str | None, expected: str,
) -> None:  # fmt: skip
    path = tmp_path / "start"
    if content == "short":
        write_video(path.with_suffix(".mp4"), np.zeros((10, 48, 64, 3), np.uint8), 16)
        path = path.with_suffix(".mp4")
    elif isinstance(content, bytes):
        path.write_bytes(content)
    start = ["--image", str(path), "--video", str(path)] if flag == "both" else [flag, str(path)]
    arguments = ["--bundle", str(bundle), "--prompt", "a", "--output", str(tmp_path / "video.mp4"), *start]
    assert expected in refused(monkeypatch, capsys, *arguments)


def test_image_to_video_and_continuation_from_the_command_line(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A picture of another size is the first frame; a clip at another rate is shown first, then goes on."""
    rows = np.linspace(0, 255, 96).astype(np.uint8)[:, None, None]
    picture = np.broadcast_to(rows, (96, 128, 3)).copy()
    contact_sheet(tmp_path / "first.png", picture[None])
    write_video(tmp_path / "clip.mp4", np.stack([picture] * 48), 24)  # 2 s
    cases = ((["--image", "first.png"], 34), (["--video", "clip.mp4"], 32 + 17))
    for start, frames in (*cases, (["--video", "clip.mp4", "--until", "clip.mp4"], 32 + 17 + 32)):
        output = tmp_path / "video.mp4"
        ends = [part if part.startswith("--") else str(tmp_path / part) for part in start]
        flags = ["--bundle", str(bundle), "--prompt", "a", "--output", str(output), *ends]
        monkeypatch.setattr(sys, "argv", ["generate.py", *flags])
        generate.main()
        video = read_video(output)
        assert video.shape == (frames, 64, 64, 3)
        if start[0] == "--video":
            shown = fit(picture[None], 64, 64)[0].astype(int)
            assert np.abs(video[:32].astype(int) - shown).mean() < 3
            assert frames == 49 or np.abs(video[-32:].astype(int) - shown).mean() < 3


@pytest.mark.parametrize(
    "flags, expected",
    [
        ([], "expected --prompt or --storyboard"),
        (["--prompt", "a", "--storyboard", "x"], "expected --prompt or --storyboard"),
        (["--prompt", " "], "--prompt: empty prompt"),
        (["--prompt", "a", "--seconds", "0"], "--seconds 0: expected a number above 0"),
        (["--prompt", "a", "--seconds", "-3"], "--seconds -3: expected a number above 0"),
        (["--prompt", "a", "--seconds", "nan"], "--seconds nan: expected a number above 0"),
        (["--prompt", "a", "--seconds", "3", "--seconds", "4"], "--seconds is there 2 times, --prompt 1 times"),
        (["--prompt", "a", "--seconds", "3", "--segments", "4"], "exclude each other"),
        (["--prompt", "a", "--prompt", "b", "--segments", "1"], "--segments: 2 prompts for 1 segments"),
        (["--prompt", "a", "--prompt", "b", "--seconds", "1"], "--seconds 1: 2 prompts for 1 segments"),
        (["--prompt", "a", "--prompt", "b", "--seconds", "1", "--seconds", "0.01"], "scene 2 lasts 0.01 seconds"),
        (["--prompt", "a", "--transition", "3"], "--transition: needs to know how long each prompt lasts"),
        (["--prompt", "a", "--transition", "-3"], "--transition -3: expected 0 or more"),
        (["--prompt", "a", "--prompt", "b", "--cut", "3"], "--cut 3: expected the number of a prompt, 1 to 2"),
        (["--storyboard", str(Path(__file__)), "--cut", "2"], "--cut: the storyboard says where its cuts are"),
        (["--storyboard", "/no/such/file"], "--storyboard /no/such/file: not found"),
    ],
)
def test_storyboards_that_make_no_sense_are_refused(
    bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str
) -> None:
    assert expected in refused(monkeypatch, capsys, "--bundle", str(bundle), *flags)


@pytest.mark.parametrize(
    "content, expected",
    [
        ("", "the file: Input should be a valid list"),
        ("[]", "empty; expected a list of prompts"),
        ("- {seconds: 3}", "0.prompt: Field required"),
        ("- {prompt: a, second: 3}", "0.second: Extra inputs are not permitted"),
        ("- {prompt: a, cut: maybe}", "0.cut: Input should be a valid boolean"),
        ("- {prompt: a, seconds: -1}", "0.seconds: Input should be greater than 0"),
        ("- {prompt: a, seconds: 1}\n- {prompt: b}", "all parts say how many seconds they last, or none does"),
        ("- {prompt: a, seconds: 1}\n- {prompt: '', seconds: 2}", "empty prompt"),
        ("{", "cannot be read"),
    ],
)
def test_storyboard_files_that_make_no_sense_are_refused(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], content: str,
    expected: str,
) -> None:  # fmt: skip
    (tmp_path / "board.yaml").write_text(content)
    printed = refused(monkeypatch, capsys, "--bundle", str(bundle), "--storyboard", str(tmp_path / "board.yaml"))
    assert "--storyboard" in printed and expected in printed


def test_a_storyboard_from_the_command_line(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same video from flags and from a file; what is made can be watched meanwhile; the trace is there."""
    (tmp_path / "board.yaml").write_text(
        "- {prompt: a red circle, seconds: 1.5}\n- {prompt: a blue square, seconds: 2}\n"
        "- {prompt: a green triangle, seconds: 1, cut: true}\n"
    )
    said = ["--prompt", "a red circle", "--seconds", "1.5", "--prompt", "a blue square", "--seconds", "2"]
    said += ["--prompt", "a green triangle", "--seconds", "1", "--cut", "3"]
    videos = []
    for number, flags in enumerate((said, ["--storyboard", str(tmp_path / "board.yaml")])):
        output = tmp_path / f"video{number}.mp4"
        more = ["--transition", "2", "--trace", str(tmp_path / "trace.json"), "--output", str(output)]
        monkeypatch.setattr(sys, "argv", ["generate.py", "--bundle", str(bundle), *flags, *more])
        generate.main()
        videos.append(read_video(output))
        printed = capsys.readouterr()
        assert f"watch it in {tmp_path}/video{number}.partial.mp4" in printed.err and "(5.312 s)" in printed.out
        assert not (tmp_path / f"video{number}.partial.mp4").exists()
    assert len(videos[0]) == 85 and np.array_equal(*videos)
    assert len(json.loads((tmp_path / "trace.json").read_text())["traceEvents"]) == 4 + 4 * 4


def test_what_is_made_when_it_is_interrupted_is_kept(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, calls = VideoGenerator.generate, []

    def interrupted(*arguments: object, **more: object) -> Iterator[np.ndarray]:
        for part in plain(*arguments, **more):  # type: ignore[arg-type]
            if len(calls) == 2:
                raise KeyboardInterrupt
            calls.append(len(part))
            yield part

    monkeypatch.setattr(VideoGenerator, "generate", interrupted)
    flags = ["--bundle", str(bundle), "--prompt", "a", "--segments", "5", "--output", str(tmp_path / "video.mp4")]
    monkeypatch.setattr(sys, "argv", ["generate.py", *flags])
    with pytest.raises(SystemExit) as ended:
        command_line.run(generate.main)
    assert ended.value.code == 130
    assert f"the first 51 frames are kept in {tmp_path}/video.partial.mp4" in capsys.readouterr().err
    assert len(read_video(tmp_path / "video.partial.mp4")) == 51 and not (tmp_path / "video.mp4").exists()


@pytest.mark.slow
def test_a_full_disk_keeps_the_segments_that_are_done(bundle: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    words = ["--bundle", str(bundle), "--prompt", "a", "--segments", "40", "--output", str(disk / "video.mp4")]
    try:
        full = subprocess.run(
            [sys.executable, "jobs/generate.py", *words], cwd=Path(__file__).parents[2], capture_output=True, text=True
        )
        lines = full.stderr.splitlines()
        assert full.returncode == 1 and lines[-1].startswith("error: the disk is full"), full.stderr
        assert "frames are kept in" in lines[-2]
        kept = int(lines[-2].split(" frames are kept")[0].rpartition(" ")[2])
        assert kept >= 34 and len(read_video(disk / "video.partial.mp4")) >= kept
    finally:
        subprocess.run(["umount", str(disk)], check=False)


def test_the_benchmark_makes_the_same_video_both_ways(bundle: Path, tmp_path: Path) -> None:
    generator = VideoGenerator.from_bundle(bundle)
    for way, make in WAYS.items():
        make(generator, 3, tmp_path / f"{way}.mp4", Timeline())
    one, other = (tmp_path / f"{way}.mp4" for way in WAYS)
    assert one.read_bytes() == other.read_bytes() and len(read_video(one)) == 68


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length(bundle: Path) -> None:
    def peak(segments: int) -> float:
        words = [sys.executable, "-m", "benchmarks.long_video", "--case", str(bundle), str(segments), "overlapped"]
        ended = subprocess.run(words, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
        return float(json.loads(ended.stdout.splitlines()[-1])["peak_mib"])

    assert peak(60) < 1.05 * peak(6)
