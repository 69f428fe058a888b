"""The job: refusals before Ray starts, and one real run over good and broken files, interrupted and resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.dataset
import pyarrow.parquet as pq
import pytest

from arlon_ray.artifact import ArtifactError, save_artifact
from arlon_ray.config import Config, load_config
from arlon_ray.models.codec import LatentCodec
from data_pipeline.reader import BucketBatches, LatentDataset
from data_pipeline.schema import LATENT
from data_pipeline.staging import Staging
from data_pipeline.synthetic import write_samples
from jobs import preprocess
from jobs.command_line import InputError, run
from jobs.extract_tokens import run_extract_tokens
from jobs.preprocess import run_preprocess
from tests.bundles import save_random_vae
from tests.data_pipeline.inputs import write_broken

SETTINGS = [
    "video.height=32",
    "video.width=32",
    "data.bucket_groups=[2]",
    "data.row_group=4",
    "data.encode_batch=4",
    "vae.width=16",
    "vae.deep_width=16",
    "vae.blocks=1",
    "vae.latent_channels=4",
    "dit.in_channels=4",
    "vqvae.fine.width=16",
    "vqvae.coarse.width=16",
    "text.max_tokens=32",
]
SAMPLES = 10


@pytest.fixture(scope="module")
def config() -> Config:
    """The tiny preset, smaller still."""
    return load_config("tiny", SETTINGS)


@pytest.fixture(scope="module")
def artefacts(tmp_path_factory: pytest.TempPathFactory, config: Config) -> Path:
    """A VAE and two codecs with random weights."""
    folder = tmp_path_factory.mktemp("artefacts")
    vae = save_random_vae(folder / "vae", config.vae)
    for name, settings in (("fine", config.vqvae.fine), ("coarse", config.vqvae.coarse)):
        codec = LatentCodec(settings, 4)
        codec.codebook.normal_()
        for role, parent in ((name, vae.fingerprint), (f"{name}_of_another_vae", "0" * 64)):
            save_artifact(
                folder / role,
                kind="codec",
                config={**settings.model_dump(mode="json"), "latent_channels": 4},
                tensors=codec.state_dict(),
                parents={"vae": parent},
            )
    return folder


@pytest.fixture(autouse=True)
def _no_ray_before_validation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only tests marked `ray` may start Ray."""
    if "ray" not in request.keywords:

        def started(config: Config) -> None:
            raise AssertionError("Ray was started")

        monkeypatch.setattr(preprocess, "connect", started)


def test_bad_input_ends_before_ray_starts(tmp_path: Path, config: Config, artefacts: Path) -> None:
    with pytest.raises(InputError, match="no video files"):
        run_preprocess(config, tmp_path, tmp_path / "out", vae=artefacts / "vae")
    write_samples(tmp_path, 1, 0, config.video, (2,))
    with pytest.raises(InputError, match=r"--vae .*nothing: not found"):
        run_preprocess(config, tmp_path, tmp_path / "out", vae=tmp_path / "nothing")
    with pytest.raises(ArtifactError, match="expected a vae artefact, found codec"):
        run_preprocess(config, tmp_path, tmp_path / "out", vae=artefacts / "fine")


def test_a_run_with_other_settings_is_refused_by_name(tmp_path: Path, config: Config, artefacts: Path) -> None:
    write_samples(tmp_path / "in", 1, 0, config.video, (2,))
    output = tmp_path / "out"
    output.mkdir()
    with pytest.raises(AssertionError, match="Ray was started"):
        run_preprocess(config, tmp_path / "in", output, vae=artefacts / "vae")
    other = load_config("tiny", [*SETTINGS, "video.fps=8"])
    with pytest.raises(InputError, match=r"made with other settings: video \(.*--overwrite"):
        run_preprocess(other, tmp_path / "in", output, vae=artefacts / "vae")
    with pytest.raises(AssertionError, match="Ray was started"):
        run_preprocess(other, tmp_path / "in", output, vae=artefacts / "vae", overwrite=True)


@pytest.mark.parametrize(
    ("job", "flags", "message"),
    [
        ("preprocess", ["--input", "/nowhere"], "--input /nowhere: not found"),
        ("preprocess", ["--input", ".", "--set", "data.bucket_group=[2]"], "did you mean data.bucket_groups?"),
        (
            "extract_tokens",
            ["--dataset", "/nowhere", "--codec-fine", "a", "--codec-coarse", "b"],
            "--dataset /nowhere: not found",
        ),
        ("render_samples", ["--count", "0"], "--count 0: expected at least 1"),
    ],
)
def test_bad_flags_end_with_code_2_and_one_line(tmp_path: Path, job: str, flags: list[str], message: str) -> None:
    command = [sys.executable, f"jobs/{job}.py", *flags, "--output", str(tmp_path / "out")]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr and len(result.stderr.splitlines()) == 1


def table_of(folder: Path) -> pyarrow.Table:
    """All latent rows, read without Ray."""
    return pyarrow.dataset.dataset(folder / "latents", partitioning="hive").to_table()


@pytest.mark.ray
def test_real_run_over_good_and_broken_files(
    tmp_path: Path, config: Config, artefacts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    videos, whole, resumed = tmp_path / "in", tmp_path / "whole", tmp_path / "resumed"
    write_samples(videos, SAMPLES, 0, config.video, (2,))
    expected = write_broken(videos)
    monkeypatch.setattr(preprocess, "PART_CLIPS", 3)
    with preprocess.connect(config):
        summary = run_preprocess(config, videos, whole, vae=artefacts / "vae")
        _check_dataset(whole, expected, summary.manifest.rows)
        assert "18 files: 19 in = 10 kept + 2 filtered + 7 failed" in capsys.readouterr().out
        assert run_preprocess(config, videos, whole, vae=artefacts / "vae").skipped

        _stop_half_way(monkeypatch, config, videos, resumed, artefacts / "vae")
        before = {path: path.stat().st_mtime_ns for path in Staging(resumed).encoded.rglob("*.parquet")}
        assert 0 < Staging(resumed).encoded_rows() < SAMPLES + 2
        after = _resume_keeping_work(monkeypatch, config, videos, resumed, artefacts / "vae")
        # what was done is not done again: the same files are still there, and no clip was written twice
        assert before.items() <= after.items()
        assert table_of(resumed).equals(table_of(whole))

        tokens = run_extract_tokens(config, whole, artefacts / "fine", artefacts / "coarse", whole / "tokens")
        assert (tokens.manifest.rows, tokens.skipped) == (SAMPLES, False)
        assert run_extract_tokens(config, whole, artefacts / "fine", artefacts / "coarse", whole / "tokens").skipped
        damaged = sorted((whole / "tokens").glob("*.parquet"))[0]
        data = damaged.read_bytes()
        damaged.write_bytes(data[: len(data) // 2])
        assert not run_extract_tokens(config, whole, artefacts / "fine", artefacts / "coarse", whole / "tokens").skipped
        assert damaged.read_bytes() == data
    with pytest.raises(ArtifactError, match=r"fine codec .* was trained on latents of VAE 000000000000…"):
        run_extract_tokens(config, whole, artefacts / "fine_of_another_vae", artefacts / "coarse", tmp_path / "t")
    swapped = artefacts / "coarse", artefacts / "fine"
    with pytest.raises(InputError, match="holds tokens made otherwise: coarse"):
        run_extract_tokens(config, whole, *swapped, whole / "tokens")
    batch = BucketBatches(LatentDataset(whole, tokens=whole / "tokens"), 4, seed=0).batch(0)
    assert batch["latents"].shape == (4, 4, 10, 4, 4) and batch["tokens_coarse"].shape == (4, 10, 1, 1)


def _check_dataset(folder: Path, expected: dict[str, str], rows: int) -> None:
    """Counts, schema and reasons; nothing of the work folder is left."""
    assert rows == SAMPLES
    table = table_of(folder)
    assert len(set(table["clip_id"].to_pylist())) == SAMPLES
    for path in (folder / "latents").rglob("*.parquet"):
        assert pq.ParquetFile(path).schema_arrow.equals(LATENT)
    rejects = {row["source"]: row["reason"] for row in pq.read_table(folder / "rejects.parquet").to_pylist()}
    assert rejects == expected
    report = json.loads((folder / "report.json").read_text())
    assert report["total"] == {"in": 19, "kept": SAMPLES, "filtered": 2, "failed": 7}
    assert not Staging(folder).root.exists()


def _stop_half_way(monkeypatch: pytest.MonkeyPatch, config: Config, videos: Path, output: Path, vae: Path) -> None:
    """A run that is handed only the first half of its work and then stops, as Ctrl-C would leave it."""
    pending = Staging.pending

    def half(staging: Staging, rows_per_part: int) -> list[pyarrow.Table]:
        if staging.encoded_rows():
            raise KeyboardInterrupt
        return pending(staging, rows_per_part)[:2]

    monkeypatch.setattr(Staging, "pending", half)
    with pytest.raises(KeyboardInterrupt):
        run_preprocess(config, videos, output, vae=vae)
    monkeypatch.setattr(Staging, "pending", pending)


def _resume_keeping_work(
    monkeypatch: pytest.MonkeyPatch, config: Config, videos: Path, output: Path, vae: Path
) -> dict[Path, int]:
    """Run again; returns the encoders' files, with their times, as they were when the run ended."""
    files: dict[Path, int] = {}
    remove = Staging.remove

    def look_first(staging: Staging) -> None:
        files.update({path: path.stat().st_mtime_ns for path in staging.encoded.rglob("*.parquet")})
        # ten samples, and the two clips of the file whose pictures are damaged
        assert staging.encoded_rows() == SAMPLES + 2
        remove(staging)

    monkeypatch.setattr(Staging, "remove", look_first)
    assert not run_preprocess(config, videos, output, vae=vae).skipped
    monkeypatch.setattr(Staging, "remove", remove)
    return files


@pytest.mark.parametrize("kind", [OSError, RuntimeError])
def test_a_full_disk_ends_a_job_with_one_line(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    def full() -> None:
        raise kind("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device")

    # only an error of the operating system, wherever it was met, is one of the disk
    with pytest.raises(SystemExit if kind is OSError else RuntimeError) as error:
        run(full)
    if kind is OSError:
        assert isinstance(error.value, SystemExit) and error.value.code == 1
        assert "the disk is full" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.ray
def test_a_full_disk_loses_nothing(tmp_path: Path, config: Config, artefacts: Path) -> None:
    videos, disk = tmp_path / "in", tmp_path / "disk"
    write_samples(videos, SAMPLES, 0, config.video, (2,))
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    flags = ["--input", str(videos), "--output", str(disk / "set"), "--vae", str(artefacts / "vae")]
    flags += [part for setting in SETTINGS for part in ("--set", setting)]
    command = [sys.executable, "jobs/preprocess.py", *flags]
    try:
        full = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        assert full.returncode == 1, full.stdout + full.stderr
        assert full.stderr.splitlines()[-1].startswith("error: the disk is full")
        subprocess.run(["mount", "-o", "remount,size=20m", str(disk)], check=True)
        again = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
        assert again.returncode == 0, again.stderr
        assert len(table_of(disk / "set")) == SAMPLES
    finally:
        subprocess.run(["umount", str(disk)], check=False)
