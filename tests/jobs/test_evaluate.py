"""jobs/evaluate.py on a random bundle: the table, absent rows, failures by name, VBench's layout, bad input."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from arlon_ray.bundle import load_bundle
from arlon_ray.evaluation.metrics import summary
from arlon_ray.generation import DiTRenderer
from arlon_ray.generation.rendering import SegmentLatents
from arlon_ray.generation.video import read_video
from arlon_ray.models.ar import ArTransformer
from jobs.command_line import InputError
from jobs.evaluation import Evaluator, held_out_prompts, parse_row
from jobs.results_page import NOTES, VIDEOS, gain_interval, read_results, write_page
from tests.bundles import make_random_bundle
from tests.opensora.public import make_public_bundle
from tests.scripts import run_script


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_random_bundle(tmp_path_factory.mktemp("evaluated") / "bundle")


def test_every_row_is_measured_tracked_and_exported(bundle: Path, tmp_path: Path) -> None:
    from mlflow import MlflowClient

    rows = ["truth", "vae", "text-only@2", "guided@2", "guided@2:start=0.5", "true-tokens@1:wrong=0.3"]
    flags = ["--bundle", str(bundle), "--rows", *rows, "--count", "3", "--output", str(tmp_path / "out")]
    flags += ["--tune", "guidance_scale=1,2", "--tune", "ar_guidance_scale=1", "--tune-count", "2", "--costs"]
    flags += ["--docs", str(tmp_path / "docs" / "results.md")]
    (tmp_path / "docs").mkdir()
    result = run_script("evaluate", *flags, "--export-vbench", str(tmp_path / "vbench"))
    assert result.returncode == 0, result.stderr
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    found = written["rows"]
    assert list(found) == sorted(rows) and all(row["videos"] == 3 for row in found.values())
    assert found["truth"]["metrics"]["colour"]["mean"] == found["truth"]["metrics"]["action"]["mean"] == 1.0
    assert found["truth"]["frechet_video_distance"] == pytest.approx(0.0, abs=1e-6)
    assert found["guided@2"]["metrics"]["colour"]["mean"] < 1.0  # random weights show nothing
    assert found["guided@2"]["frechet_video_distance"] > found["vae"]["frechet_video_distance"] * 0.5
    assert found["guided@2"]["options"]["ar_guidance_scale"] == 1.0
    scores = written["tuned"]["scores"]
    assert written["tuned"]["captions"] == 2 and set(scores["guided@2"]["ar_guidance_scale"]) == {"1"}
    for row in ("guided@2", "text-only@2"):
        its = scores[row]["guidance_scale"]
        assert set(its) == {"1", "2"} and its[f"{found[row]['options']['guidance_scale']:g}"] == max(its.values())
    assert (
        "guided@2: best guidance_scale=" in result.stdout and "of its values: one beyond may be better" in result.stdout
    )
    made_of = written["made_of"]
    assert made_of["parts"]["ar"] == load_bundle(bundle).artifacts["ar"].fingerprint and made_of["seed"] == 0
    each = json.loads((tmp_path / "out" / VIDEOS).read_text())
    assert set(each) == set(rows) and written["frechet_chance"] > 0
    for name, its in each["guided@2"].items():
        assert np.mean(list(its.values())) == pytest.approx(found["guided@2"]["metrics"][name]["mean"], abs=1e-4)
    assert "ar_guidance_scale" not in found["text-only@2"]["options"]
    assert found["guided@2"]["seconds_of"]["ar"] > 0 == found["text-only@2"]["seconds_of"]["ar"]
    assert {"ar_nats_left_right", "ar_nats_up_down"} & set(written["tokens"])
    assert written["tokens"]["ar_perplexity"] > 1 and 0 < written["tokens"]["fine_codebook_used"] <= 1
    dit = {"dit text-only, a step", "dit guided, a step"}
    assert set(written["parts"]) == {"vae, decoding", "codec, its guide of a segment", *dit, "ar, a segment"}
    assert written["parts"]["dit guided, a step"]["flops"] > 1e6
    assert written["parts"]["ar, a segment"]["peak_bytes"] > 1e3
    assert (tmp_path / "out" / "guided-2.png").stat().st_size > 1000
    assert (tmp_path / "out" / "guided-2-failures.png").exists()
    assert len((tmp_path / "out" / "guided-2-failures.txt").read_text().splitlines()) == 3
    page = (tmp_path / "docs" / "results.md").read_text()
    assert "## What each part costs" in page and "| fine_latent_error |" in page and "## Pictures" in page
    assert all((tmp_path / "docs" / name).is_file() for name in re.findall(r"\]\((results/[^)]+)\)", page))
    videos = sorted((tmp_path / "vbench" / "guided-2").iterdir())
    assert len(videos) == 3 and read_video(videos[0]).shape == (34, 64, 64, 3)
    client = MlflowClient(f"sqlite:///{tmp_path / 'out' / 'mlflow.db'}")
    runs = client.search_runs([client.get_experiment_by_name("arlon-ray").experiment_id])
    assert {run.info.run_name for run in runs} == {f"evaluate {row}" for row in rows}
    for run in runs:
        assert run.data.metrics["motion_smoothness/low"] <= run.data.metrics["motion_smoothness"]
        assert {"parent.ar", "parent.dit", "parent.vae", "bundle"} <= run.data.tags.keys()
        assert run.data.params["options.guidance_scale"] and run.data.tags["captions"] == "3"
        names = {Path(item.path).name for item in client.list_artifacts(run.info.run_id, "pictures")}
        assert f"{parse_row(run.data.tags['row']).file_name}.png" in names
    check_a_page_of_two(tmp_path / "out", tmp_path / "docs" / "both.md")


def test_a_difference_has_its_interval_caption_by_caption() -> None:
    """Captions are harder or easier for both: their spread is no doubt about the difference."""
    hard = {str(n): (n % 8) / 8 for n in range(64)}
    better = {n: value + (0.05 if int(n) % 2 else 0.03) for n, value in hard.items()}
    low, high = gain_interval(better, hard)  # type: ignore[misc]
    assert 0.03 < low < 0.04 < high < 0.05
    assert gain_interval(hard, better) == pytest.approx((-high, -low))
    assert gain_interval({"0": 1.0}, {"1": 1.0}) is None and gain_interval(hard, hard) == (0.0, 0.0)
    # more is no gain where the truth has less
    low, high = gain_interval(better, hard, dict.fromkeys(hard, 0.0))  # type: ignore[misc]
    assert -0.05 < low < high < -0.03


def test_the_page_says_what_is_better_and_what_is_worse(tmp_path: Path) -> None:
    """With gains that are known: colour surely, motion nearer to the truth, imaging quality surely worse."""
    captions = [str(n) for n in range(40)]
    values = {
        "truth": {"dynamic_degree": {n: float(int(n) < 20) for n in captions}},
        "text-only@30": {
            "colour": {n: float(int(n) % 2) for n in captions},
            "dynamic_degree": dict.fromkeys(captions, 1.0),
            "imaging_quality": {n: 0.6 + int(n) / 1000 for n in captions},
        },
        "guided@5": {
            "colour": dict.fromkeys(captions, 1.0),
            "dynamic_degree": {n: float(int(n) < 22) for n in captions},
            "imaging_quality": {n: 0.5 + int(n) / 1000 for n in captions},
        },
    }
    rows = {
        row: {
            "videos": 40, "seconds": 2.0 if row == "text-only@30" else 0.5, "seconds_of": {}, "guidance": "1",
            "frechet_video_distance": None, "metrics": summary([{k: v[n] for k, v in its.items()} for n in captions]),
        }
        for row, its in values.items()
    }  # fmt: skip
    found = {"variant": "bundle", "what": "made up", "rows": rows, "prompts": 40, "values": values}
    write_page(tmp_path / "page.md", [(tmp_path, found)], "Made up.")
    page = (tmp_path / "page.md").read_text()
    assert re.search(r"\| colour \| 0.500 \| 1.000 \| \+0.500 \(\+100.0%\) \| \+0.3\d+ to \+0.6\d+ \|", page)
    assert re.search(r"\| dynamic_degree \(truth: 0.500\) \| 1.000 \| 0.550 \| \+0.450 ", page)
    assert "guided@5: better on 2 of 3, equal on 0, at worst -16.1%" in page
    assert "above zero for colour, dynamic_degree, below it for imaging_quality; 4.00 times as fast" in page


def test_what_cannot_be_read_of_the_tokens_does_not_lose_the_rows(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = ArTransformer.logits
    monkeypatch.setattr(ArTransformer, "logits", lambda self, *arguments: real(self, *arguments) * torch.nan)
    flags = ["--bundle", str(bundle), "--rows", "truth", "--count", "2", "--output", str(tmp_path / "out")]
    result = run_script("evaluate", *flags, "--docs", str(tmp_path / "page.md"))
    assert result.returncode == 1 and "of_tokens: what the AR predicts is not finite numbers" in result.stderr
    assert "Traceback" not in result.stderr and "| bundle | truth | 2 |" in (tmp_path / "page.md").read_text()
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    assert written["rows"]["truth"]["videos"] == 2 and "of_tokens" in written["failures"]


def test_videos_of_several_segments_are_read_across_their_joins(bundle: Path, tmp_path: Path) -> None:
    rows = ["truth", "vae", "text-only@1", "guided@1", "true-tokens@1", "guided@1:again=1"]
    flags = ["--bundle", str(bundle), "--rows", *rows, "--count", "2", "--segments", "3"]
    result = run_script("evaluate", *flags, "--output", str(tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert "videos of 68 frames" in result.stdout
    written = json.loads((tmp_path / "out" / "results.json").read_text())
    found = written["rows"]
    assert written["variant"] == "bundle, 3 segments"
    assert found["truth"]["metrics"]["persistence"]["mean"] == 1.0
    assert all(row["videos"] == 2 and "persistence" in row["metrics"] for row in found.values())
    assert all("join_flow" in row["metrics"] for row in found.values())
    assert found["guided@1:again=1"]["metrics"] != found["guided@1"]["metrics"]


def check_a_page_of_two(results: Path, page: Path) -> None:
    """As ablate.py --also makes it."""
    folder, found = read_results(results)
    rows = dict(found["rows"]) | {"text-only@30": found["rows"]["text-only@2"], "guided@5": found["rows"]["guided@2"]}
    absent = {"absent": "the bundle has no AR"}
    other = {**found, "variant": "text-only", "what": "the baseline", "rows": {"guided@2": absent}}
    write_page(page, [(folder, {**found, "rows": rows}), (folder, other)], "Two.")
    lines = page.read_text().splitlines()
    assert len({line.count("|") for line in lines if line.startswith(("| bundle |", "| text-only |"))}) == 1
    assert any(line.startswith("| text-only | guided@2 | absent: the bundle has no AR |") for line in lines)
    assert any(re.match(r"\| dynamic_degree \(truth: \d\.\d+\) \|", line) for line in lines)
    assert any(re.match(r"guided@5: better on \d+ of 11, equal on \d+, at worst [+-]", line) for line in lines)
    old = {**found["guide_errors"]["profile"]}
    del old["wrong_at"]
    of_before = {**found, "guide_errors": {**found["guide_errors"], "profile": old}, "values": {"truth": {}}}
    write_page(page, [(folder, of_before)], "Of an earlier version, and no truth.")
    assert "before or after." in page.read_text() and "By place" not in page.read_text()
    begin, end = NOTES
    page.write_text(page.read_text().replace(f"{begin}\n{end}", f"{begin}\nwhat we saw\n{end}"))
    write_page(page, [(folder, found)], "One.")
    assert f"{begin}\nwhat we saw\n{end}" in page.read_text() and "One." in page.read_text()
    nothing = {**rows["guided@5"], "videos": 0, "seconds": None, "metrics": {}}
    write_page(page, [(folder, {**found, "rows": rows | {"guided@5": nothing}})], "All of a row failed.")
    assert "text-only@30 | guided@5" not in page.read_text()
    with pytest.raises(InputError, match="no results of jobs"):
        read_results(page.parent)


def test_rows_that_a_text_only_bundle_cannot_make_are_marked_absent(tmp_path: Path) -> None:
    path = make_public_bundle(tmp_path)
    (tmp_path / "prompts.txt").write_text(f"a red circle\na red circle\n{'ö' * 130}\n")
    flags = ["--bundle", str(path), "--rows", "guided@2", "text-only@1", "truth", "--output", str(tmp_path / "out")]
    flags += ["--export-vbench", str(tmp_path / "vbench")]
    result = run_script("evaluate", *flags, "--prompts", str(tmp_path / "prompts.txt"))
    assert result.returncode == 0, result.stderr
    found = json.loads((tmp_path / "out" / "results.json").read_text())["rows"]
    assert found["guided@2"] == {"absent": "the bundle has no AR"}
    assert found["truth"] == {"absent": "these prompts have no ground truth"}
    assert found["text-only@1"]["videos"] == 3 and "colour" not in found["text-only@1"]["metrics"]
    written = {path.name for path in (tmp_path / "vbench" / "text-only-1").iterdir()}
    assert written == {"a red circle-0.mp4", "a red circle-1.mp4", f"{'ö' * 110}-0.mp4"}


@pytest.mark.parametrize("part", ["dit", "ar", "vae"])
def test_weights_that_are_no_numbers_fail_their_videos_by_name(part: str, bundle: Path, tmp_path: Path) -> None:
    """As a training that diverged leaves them."""
    broken = load_bundle(bundle)
    for weight in getattr(broken, part).parameters():
        weight.fill_(torch.nan)
    prompts = held_out_prompts(broken, 2)
    result = Evaluator(broken, prompts, 0).row(parse_row("guided@1"))
    assert len(result.failures) == 2 and not result.metrics
    assert all(prompts[0].text in name or prompts[1].text in name for name in result.failures)
    assert all("not" in error and ("finite" in error or "numbers" in error) for error in result.failures.values())


def test_a_video_of_no_numbers_fails_by_name_and_the_others_go_on(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    render = DiTRenderer.render

    def sometimes(self: DiTRenderer, prompt: str, *arguments: object, **more: object) -> SegmentLatents:
        made = render(self, prompt, *arguments, **more)  # type: ignore[arg-type]
        return SegmentLatents(0, made.latents * (np.nan if "bad" in prompt else 1))

    monkeypatch.setattr(DiTRenderer, "render", sometimes)
    (tmp_path / "prompts.txt").write_text("a good one\na bad one\nanother\n")
    flags = ["--bundle", str(bundle), "--rows", "text-only@1", "--prompts", str(tmp_path / "prompts.txt")]
    result = run_script("evaluate", *flags, "--output", str(tmp_path / "out"))
    assert result.returncode == 1 and "video 1: a bad one: 5120 of 5120 latents are not finite" in result.stderr
    assert json.loads((tmp_path / "out" / "results.json").read_text())["rows"]["text-only@1"]["videos"] == 2


@pytest.mark.parametrize(
    "content, flags, expected",
    [
        ("a\n\nb\n\n", [], "line 2 is empty; line 4 is empty"),
        (b"a\n\xff\n", [], "not text in UTF-8 (invalid start byte at byte 2)"),
        (f"a\n{'circle ' * 100}\n", [], "line 2 has 102 tokens, at most 32"),
        ("", [], "no prompt in it"),
        ("a\n", ["--rows", "guided"], "--rows guided: expected"),
        ("a\n", ["--rows", "guided@5:stepz=3"], "stepz"),
        ("a\n", ["--rows", "guided@5:wrong=0.5"], "of true-tokens"),
        ("a\n", ["--rows", "guided@5:again=1"], "guided@5:again=1: the videos have segments 0 to 0"),
        ("a\n", ["--rows", "true-tokens@5:again=1"], "again is the number of a segment"),
        ("a\n", ["--rows", "truth:start=0.5"], "truth takes no options"),
        ("a\n", ["--tune", "guidance_scale=x"], "expected OPTION=NUMBER"),
        ("a\n", ["--tune", "guide=1"], "guide"),
        ("a\n", ["--tune-count", "0"], "--tune-count 0"),
        ("a\n", ["--count", "0"], "--count 0"),
    ],
)
def test_bad_input_is_one_line(
    bundle: Path, tmp_path: Path, content: str | bytes, flags: list[str], expected: str
) -> None:
    (tmp_path / "prompts.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    result = run_script("evaluate", "--bundle", str(bundle), "--prompts", str(tmp_path / "prompts.txt"), *flags)
    assert result.returncode == 2 and expected in result.stderr and result.stderr.count("\n") == 1
