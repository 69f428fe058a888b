"""jobs/generate.py before it generates: prompts, output and device are checked; and the counter that it shares."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from arlon_ray.artifact import ArtifactError
from arlon_ray.generation.video import contact_sheet, read_video, write_video
from arlon_ray.models.text import load_text_encoder, load_token_counter
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
    monkeypatch.setattr("transformers.AutoModel.from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    count = load_token_counter(config)
    for text in ("", "A red circle moves to the right.", "circle " * 100):
        assert count(text) == encoder.count_tokens(text)
    with pytest.raises(ArtifactError, match="no tokenizer"):
        load_token_counter(config.model_copy(update={"path": "/no/such/folder"}))


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
    monkeypatch.setattr(generate, "load_bundle", lambda path, device="cpu": asked.append(device) or plain(path))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    generate.open_bundle(bundle)
    assert asked[-1] == "cuda"
    assert generate.device_of(small_config("device=cpu")) == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    generate.open_bundle(bundle)
    assert asked[-1] == "cpu"
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
    for start, frames in ((["--image", "first.png"], 34), (["--video", "clip.mp4"], 32 + 17)):
        output = tmp_path / "video.mp4"
        flags = ["--bundle", str(bundle), "--prompt", "a", "--output", str(output), start[0], str(tmp_path / start[1])]
        monkeypatch.setattr(sys, "argv", ["generate.py", *flags])
        generate.main()
        video = read_video(output)
        assert video.shape == (frames, 64, 64, 3)
        if start[0] == "--video":
            shown = fit(picture[None], 64, 64)[0].astype(int)
            assert np.abs(video[:32].astype(int) - shown).mean() < 3
