"""The page that `evaluate.py` and `ablate.py` write: tables, the plot of wrong tokens, pictures, failures."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arlon_ray.artifact import one_line
from arlon_ray.evaluation.metrics import DIMENSIONS, bootstrap
from jobs.command_line import InputError
from jobs.evaluation import Row
from jobs.tables import costs_table, results_table

Found = Mapping[str, Any]
#: Metrics whose decline is plotted against the share of wrong tokens.
PLOTTED = ("action", "multiple_objects", "spatial_relationship")
#: Rows of which pictures are shown.
PICTURED = ("text-only@30", "guided@5", "true-tokens@5")
WRONG = "true-tokens@5:wrong="
#: Variants that are the whole method.
WHOLE = ("full", "bundle")
NOTES = ("<!-- notes: kept when this page is written anew -->", "<!-- end of notes -->")
FEW = ("guided@3", "guided@5", "guided@6")
#: Beside results.json: of each row and metric, the value of each caption's video.
VIDEOS = "videos.json"


def read_results(folder: Path) -> tuple[Path, Found]:
    """A folder and its results.json. Raises InputError if there is none of this version."""
    try:
        found = json.loads((folder / "results.json").read_text())
        videos = folder / VIDEOS
        found["values"] = json.loads(videos.read_text()) if videos.is_file() else {}
        return folder, found | {name: found[name] for name in ("variant", "what", "rows", "prompts")}
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"{folder}: no results of jobs/evaluate.py: {one_line(error)}") from None


def write_page(page: Path, found: Sequence[tuple[Path, Found]], told: str) -> None:
    """Write `page` and its pictures (in a folder of its name) from folders of results and their results.json.

    `told` says what was trained and how. What a person has written between `NOTES` stays where the page is written
    anew.
    """
    folders, results = [folder for folder, _ in found], [result for _, result in found]
    pictures = page.parent / page.stem
    pictures.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Results",
        "",
        f"{told} `@N`: denoising steps; ±: half of the 95 % interval over "
        f"{max(result['prompts'] for result in results)} held-out captions (Wilson's of shares, else bootstrap); "
        "guidance: text / tokens / AR.",
        "",
        *_table(results),
        "",
        *_notes(page),
        "",
    ]
    if (compared := _comparison(results)) is not None:
        lines += ["## Guided in few steps against text-only in 30", "", *compared, ""]
    if plot_wrong_tokens(pictures / "wrong_tokens.png", results):
        lines += ["## Wrong tokens", "", f"![quality against wrong tokens]({page.stem}/wrong_tokens.png)", ""]
    for result in results:
        if result["variant"] in WHOLE and "parts" in result:
            lines += ["## What each part costs", "", costs_table(result["parts"]), ""]
        if "tokens" in result:
            lines += ["## Tokens", "", *_tokens(result), ""]
    lines += _pictures(page, pictures, zip(folders, results, strict=True))
    page.write_text("\n".join(lines).rstrip() + "\n")


def _notes(page: Path) -> list[str]:
    """The lines of an earlier page between its markers, and these."""
    begin, end = NOTES
    text = page.read_text() if page.is_file() else ""
    kept = text.partition(begin)[2].partition(end)[0] if begin in text and end in text else "\n"
    return [f"{begin}{kept}{end}"]


def _rows(found: Sequence[Found]) -> list[tuple[str, str, Found]]:
    """(variant, row, report) of all rows that were measured."""
    return [
        (result["variant"], name, row) for result in found for name, row in result["rows"].items() if "metrics" in row
    ]


def _table(found: Sequence[Found]) -> list[str]:
    rows = [
        ((result["variant"], name), result["rows"][name])
        for result in found
        for name in sorted(result["rows"], key=_by_numbers)
    ]
    told = [f"- **{result['variant']}**: {result['what']}{_loss(result)}" for result in found]
    told += [
        "- FVD: rows with true tokens, `vae` and `truth` show the very scenes that they are compared with. The others "
        "do not: the true videos of as many other captions, with all that captions do not say drawn anew, are "
        f"{result['frechet_chance']:.3f} away: so much of the distance can be chance."
        for result in found[:1]
        if result.get("frechet_chance")
    ]
    return [results_table(rows, ("variant", "row")), "", *told]


def _by_numbers(name: str) -> list[tuple[int, float, str]]:
    """@3 before @10."""
    parts = re.split(r"(\d+(?:\.\d+)?)", name)
    return [(1, float(part), "") if number % 2 else (0, 0.0, part) for number, part in enumerate(parts)]


def _loss(result: Found) -> str:
    return "" if result.get("loss") is None else f"; held-out loss {result['loss']:.4f}"


def _comparison(found: Sequence[Found]) -> list[str] | None:
    """On how many of VBench's dimensions the method in at most 6 steps is better than text-only in 30, and by how much.

    In percent of what text-only has. More motion than the truth has is no merit: where the truth was measured,
    dynamic_degree counts by how near it is.
    """
    truth: Found = next((row["metrics"] for _, name, row in _rows(found) if name == "truth"), {})
    values = {(result["variant"], name): its for result in found for name, its in result.get("values", {}).items()}
    true_motion = next((its.get("dynamic_degree") for (_, name), its in values.items() if name == "truth"), None)
    made = [
        (variant, name, row) for variant, name, row in _rows(found) if row["seconds"]
    ]  # not where all videos failed
    for whole in reversed(WHOLE):
        few = [(name, row) for variant, name, row in made if variant == whole and _plain(name) in FEW]
        theirs = whole if whole == "bundle" else "text-only"
        rivals = [(name, row) for v, name, row in made if v == theirs and _plain(name) == "text-only@30"]
        if few and rivals:
            break
    else:
        return None
    lines: list[str] = []
    rival, base = rivals[0]
    for chosen, ours in few:
        lines += [f"| dimension | {rival} | {chosen} | gain | 95 % |", "|---|---|---|---|---|"]
        gains, better_for_sure, worse_for_sure = [], [], []
        of_ours, of_base = values.get((whole, chosen), {}), values.get((theirs, rival), {})
        for name in DIMENSIONS:
            if name not in base["metrics"] or name not in ours["metrics"]:
                continue
            other, own, told = base["metrics"][name], ours["metrics"][name], name
            gain, true_values = own["mean"] - other["mean"], None
            if name == "dynamic_degree" and name in truth:
                true = truth[name]["mean"]
                gain, told = abs(other["mean"] - true) - abs(own["mean"] - true), f"{name} (truth: {true:.3f})"
                true_values = true_motion
            gains.append(gain / other["mean"] if other["mean"] > 0 else float(np.sign(gain)))  # from nothing: 100 %
            ends = gain_interval(of_ours.get(name, {}), of_base.get(name, {}), true_values)
            if ends is not None:
                better_for_sure += [name] if ends[0] > 0 else []
                worse_for_sure += [name] if ends[1] < 0 else []
            lines.append(
                f"| {told} | {other['mean']:.3f} | {own['mean']:.3f} | {gain:+.3f} ({gains[-1]:+.1%}) | "
                f"{'–' if ends is None else f'{ends[0]:+.3f} to {ends[1]:+.3f}'} |"
            )
        better, equal = sum(gain > 0 for gain in gains), sum(gain == 0 for gain in gains)
        faster = base["seconds"] / ours["seconds"]
        lines += [
            "",
            f"{chosen}: better on {better} of {len(gains)}, equal on {equal}, at worst "
            f"{min([0.0, *gains]):+.1%}; the interval of the difference, caption by caption, lies above zero for "
            f"{', '.join(better_for_sure) or 'none'}, below it for {', '.join(worse_for_sure) or 'none'}; "
            f"{faster:.2f} times as fast, AR included.",
            "",
        ]
    return lines[:-1]


def gain_interval(
    ours: Mapping[str, float], theirs: Mapping[str, float], truth: Mapping[str, float] | None = None
) -> tuple[float, float] | None:
    """95 % interval of the mean difference, by resampling captions that both have; None where there are none.

    With a `truth`: of how much nearer our mean is to its mean.
    """
    shared = sorted(ours.keys() & theirs.keys() & (ours.keys() if truth is None else truth.keys()))
    if not shared:
        return None
    own, other = (np.array([of[index] for index in shared]) for of in (ours, theirs))
    if truth is None:
        return bootstrap(own - other)
    true = np.array([truth[index] for index in shared])
    away = np.stack([other - true, own - true], 1)
    return bootstrap(away, figure=lambda means: abs(means[:, 0]) - abs(means[:, 1]))


def _plain(name: str) -> str:
    """A row's name without guidance scales that were chosen for it; other options make it another row."""
    return ":".join(part for part in name.split(":") if "guidance_scale=" not in part)


def _tokens(result: Found) -> list[str]:
    figures, errors = result["tokens"], result["guide_errors"]
    lines = ["| figure | value |", "|---|---|", *(f"| {name} | {value:.4g} |" for name, value in figures.items())]
    lines += [
        "",
        "The guide of the DiT against that of the true tokens: error relative to its variance, and the share that",
        "a change of every channel's mean and deviation explains (all that uncertainty sampling imitates).",
        "",
        "| tokens | error | in statistics |",
        "|---|---|---|",
    ]
    told = {
        "ar": "drawn by the AR, each given the true ones before it",
        "coarse": "of the coarse codec",
        "wrong": "as many wrong ones as the AR's, evenly spread",
    }
    for name, what in told.items():
        lines.append(f"| {what} | {errors[name]['error']:.3f} | {errors[name]['statistics']:.0%} |")
    profile = errors["profile"]
    even, places = "", ""
    if "wrong_at" in profile:  # not of earlier versions
        lines_of = (", ".join(f"{share:.2f}" for share in line) for line in profile["wrong_at"])
        even = f" (as many, drawn evenly: {profile['beside_even'][0]:.0%})"
        places = f" By place, rows from above: {'; '.join(lines_of)}."
    frames = ", ".join(f"{share:.2f}" for share in profile["wrong"])
    distance = float(sum(profile["distance"]) / len(profile["distance"]))
    return [
        *lines,
        "",
        f"Share of tokens that the AR draws otherwise, by latent frame: {frames}. They lie {distance:.2f}",
        "times as far from the true code as two random codes; "
        f"{profile['beside'][0]:.0%} of them have another one directly before or after{even}.{places}",
    ]


def plot_wrong_tokens(path: Path, found: Sequence[Found], shown: Sequence[str] = PLOTTED) -> bool:
    """Draw quality against the share of wrong tokens, a line a variant, a metric a panel. False: none has such rows."""
    curves = {
        result["variant"]: sorted(
            (float(name.removeprefix(WRONG)) if name.startswith(WRONG) else 0.0, row["metrics"])
            for name, row in result["rows"].items()
            if "metrics" in row and (_plain(name) == "true-tokens@5" or name.startswith(WRONG))
        )
        for result in found
    }
    curves = {variant: curve for variant, curve in curves.items() if len(curve) > 2}
    if not curves:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(shown), figsize=(4 * len(shown), 3.2), sharey=True)
    for axis, metric in zip(axes, shown, strict=True):
        for variant, curve in curves.items():
            points = [(share, metrics[metric]["mean"]) for share, metrics in curve if metric in metrics]
            axis.plot(*zip(*points, strict=True), marker="o", label=variant)
        axis.set(title=metric, xlabel="share of wrong tokens", ylim=(0, 1.02))
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _pictures(page: Path, pictures: Path, found: Iterable[tuple[Path, Found]]) -> list[str]:
    lines = ["## Pictures", "", "Six held-out captions, each a row of eight frames.", ""]
    failures: list[str] = []
    for folder, result in found:
        for name in result["rows"]:
            stem = Row(name, "").file_name
            source, target = folder / f"{stem}.png", pictures / f"{result['variant']}-{stem}.png"
            if _plain(name) in PICTURED and result["variant"] in ("text-only", *WHOLE) and source.is_file():
                shutil.copyfile(source, target)
                lines += [f"{result['variant']}, {name}", "", f"![{name}]({page.stem}/{target.name})", ""]
            wrong = folder / f"{stem}-failures.png"
            if _plain(name) == "guided@5" and result["variant"] in WHOLE and wrong.is_file():
                shutil.copyfile(wrong, pictures / "failures.png")
                told = wrong.with_suffix(".txt").read_text().splitlines()
                failures = ["## Failures of guided@5", "", f"![failures]({page.stem}/failures.png)", ""]
                failures += [f"{number}. {text}" for number, text in enumerate(told, start=1)] + [""]
    return lines + failures
