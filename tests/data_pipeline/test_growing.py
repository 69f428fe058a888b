"""A dataset that grows: appended to, its rejects tried again, filtered again; by the real job on Ray."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from arlon_ray.artifact import ArtifactError
from arlon_ray.config import Config, FilterConfig, load_config
from data_pipeline import schema
from data_pipeline.dataset import LatentDataset
from jobs import preprocess
from jobs.command_line import InputError
from jobs.extract_tokens import run_extract_tokens
from jobs.preprocess import run_preprocess
from jobs.refilter import run_refilter
from tests.data_pipeline.inputs import write_video
from tests.data_pipeline.test_preprocess import SETTINGS, artefacts, config, table_of

__all__ = ["artefacts", "config"]

VALUES = {"loud": 60, "calm": 6, "still": 0}


def render(folder: Path, name: str, strength: str, seed: int, shape: tuple[int, int] = (32, 32)) -> None:
    """Two clips of blocks that a noise of this strength shakes, captioned."""
    numbers = np.random.default_rng(seed)
    coarse = numbers.integers(60, 190, (1, shape[0] // 4, shape[1] // 4, 3))
    shaken = coarse + numbers.integers(-1, 2, (68, *coarse.shape[1:])) * VALUES[strength]
    frames = np.repeat(np.repeat(np.clip(shaken, 0, 255).astype(np.uint8), 4, 1), 4, 2)
    write_video(folder / f"{name}.mp4", frames)
    (folder / f"{name}.txt").write_text(f"{strength} blocks")


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """Three videos and a broken one."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number, strength in enumerate(VALUES):
        render(folder, strength, strength, number)
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "broken.txt").write_text("will be one")
    return folder


def rows_of(folder: Path) -> dict[int, tuple[str, bytes, str]]:
    """Source, latent and caption of every clip, by id."""
    table = table_of(folder)
    assert len(set(table["clip_id"].to_pylist())) == len(table)
    return {row["clip_id"]: (row["source"], row["latent"], row["caption"]) for row in table.to_pylist()}


@pytest.mark.ray
def test_what_is_new_is_appended_and_failures_are_tried_again(
    tmp_path: Path, videos: Path, config: Config, artefacts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    vae, output, codecs = artefacts / "vae", tmp_path / "set", (artefacts / "fine", artefacts / "coarse")
    with preprocess.connect(config):
        first = run_preprocess(config, videos, output, vae=vae)
        assert first.manifest.rows == 6
        parts = {path: path.stat().st_mtime_ns for path in (output / "latents").rglob("*.parquet")}
        run_extract_tokens(config, output, *codecs, output / "tokens")
        token_parts = {path: path.stat().st_mtime_ns for path in (output / "tokens").rglob("*.parquet")}

        render(videos, "new", "loud", 9)
        second = run_preprocess(config, videos, output, vae=vae)
        assert not second.skipped and second.manifest.rows == 8
        assert second.manifest.fingerprint != first.manifest.fingerprint
        after = {path: path.stat().st_mtime_ns for path in (output / "latents").rglob("*.parquet")}
        assert parts.items() <= after.items() and len(after) == len(parts) + 1
        assert run_preprocess(config, videos, output, vae=vae).skipped

        tokens = run_extract_tokens(config, output, *codecs, output / "tokens")
        assert tokens.manifest.rows == 8
        now = {path: path.stat().st_mtime_ns for path in (output / "tokens").rglob("*.parquet")}
        assert token_parts.items() <= now.items() and len(now) == len(token_parts) + 1
        LatentDataset(output, tokens=output / "tokens")

        shutil.copy(videos / "calm.mp4", videos / "broken.mp4")
        assert run_preprocess(config, videos, output, vae=vae).skipped
        assert "broken.mp4 changed since rejected: --retry-rejects" in capsys.readouterr().out
        third = run_preprocess(config, videos, output, vae=vae, retry_rejects=True)
        assert (third.manifest.rows, third.manifest.rejects) == (10, 0)

        anew = run_preprocess(config, videos, tmp_path / "anew", vae=vae)
    assert rows_of(output) == rows_of(tmp_path / "anew")
    assert anew.manifest.fingerprint == third.manifest.fingerprint
    report = json.loads((output / "report.json").read_text())
    assert report["total"] == {"in": 10, "kept": 10, "filtered": 0, "failed": 0} and report["files"] == 5
    assert (output / "report.html").stat().st_size > 10_000


@pytest.mark.ray
def test_filtering_again_gives_what_filtering_at_once_gives(
    tmp_path: Path, videos: Path, config: Config, artefacts: Path
) -> None:
    vae, data = artefacts / "vae", ["data.aspect_ratios=['1:1', '2:1']", "data.captioner_options.word=wall"]
    data += ["data.captioner=tests.data_pipeline.inputs:Brightness"]
    (videos / "calm.txt").unlink()
    render(videos, "wide", "loud", 5, shape=(32, 64))
    shutil.copy(videos / "loud.mp4", videos / "again.mp4")
    (videos / "again.txt").write_text("loud blocks")
    wide = load_config("tiny", [*SETTINGS, *data])
    filters = ["data.filters.max_frozen=0.5", "data.filters.near_duplicate_bits=4", "data.filters.min_short_side=16"]
    strict = load_config("tiny", [*SETTINGS, *data, *filters])
    with preprocess.connect(config):
        everything = run_preprocess(wide, videos, tmp_path / "all", vae=vae)
        at_once = run_preprocess(strict, videos, tmp_path / "once", vae=vae)
    assert everything.manifest.buckets == {"34x24x48": 2, "34x32x32": 8}
    later = run_refilter(strict.data.filters, tmp_path / "all", tmp_path / "later")
    assert rows_of(tmp_path / "later") == rows_of(tmp_path / "once")
    captions = {source: caption for source, _, caption in rows_of(tmp_path / "all").values()}
    assert captions["calm.mp4"] == "a bright wall" and captions["loud.mp4"] == "loud blocks"
    assert later.fingerprint == at_once.manifest.fingerprint and later.key == at_once.manifest.key
    reasons = [pq.read_table(tmp_path / name / "rejects.parquet")["reason"].to_pylist() for name in ("later", "once")]
    assert sorted(reasons[0]) == sorted(reasons[1])
    assert {schema.FROZEN, schema.NEAR_DUPLICATE, schema.UNREADABLE} == set(reasons[0])
    LatentDataset(tmp_path / "later")
    misspelt = load_config("tiny", [*SETTINGS, *data, "data.captioner_options.size=3"])
    with pytest.raises(ArtifactError, match=r"captioner_options do not fit .*it takes: word"):
        run_preprocess(misspelt, videos, tmp_path / "none", vae=vae)
    with pytest.raises(InputError, match=r"max_frozen=0\.9 is looser than the dataset's own 0\.5"):
        run_refilter(FilterConfig(max_frozen=0.9), tmp_path / "once", tmp_path / "looser")
    with pytest.raises(InputError, match="its text was not measured"):
        run_refilter(FilterConfig(max_text=0.1), tmp_path / "once", tmp_path / "looser")
    with pytest.raises(InputError, match="leave no clip"):
        run_refilter(FilterConfig(min_sharpness=1e9), tmp_path / "once", tmp_path / "looser")
    with pytest.raises(InputError, match="holds a dataset already"):
        run_refilter(FilterConfig(max_frozen=0.1), tmp_path / "once", tmp_path / "all")
