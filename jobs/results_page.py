"""The page of results that `jobs/ablate.py` writes: tables, the plot of wrong tokens, strips of pictures, failures."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from arlon_ray.evaluation.metrics import DIMENSIONS
from jobs.evaluate import costs_table

Found = Mapping[str, Any]
#: Metrics whose decline is plotted against the share of wrong tokens.
PLOTTED = ("action", "multiple_objects", "spatial_relationship")
#: Rows of which pictures are shown.
PICTURED = ("text-only@30", "guided@5", "true-tokens@5")
WRONG = "true-tokens@5:wrong="


def write_page(page: Path, output: Path, found: Sequence[Found], steps: int) -> None:
    """Write `page` and its pictures (`<name of the page>/`) from what every variant's results.json holds."""
    pictures = page.parent / page.stem
    pictures.mkdir(parents=True, exist_ok=True)
    lines = [
        "# Results",
        "",
        "Written by `jobs/ablate.py`. Every DiT starts from one text-only DiT and gets the same "
        f"{steps} steps, data and seed; `@N`: denoising steps; ±: half of the 95 % bootstrap interval over "
        f"{max(result['prompts'] for result in found)} held-out captions; guidance: text / tokens / AR.",
        "",
        *_table(found),
        "",
    ]
    if (compared := _comparison(found)) is not None:
        lines += ["## Guided in few steps against text-only in 30", "", *compared, ""]
    if _plot(pictures / "wrong_tokens.png", found):
        lines += ["## Wrong tokens", "", f"![quality against wrong tokens]({page.stem}/wrong_tokens.png)", ""]
    for result in found:
        if result["variant"] == "full" and "parts" in result:
            lines += ["## What each part costs", "", costs_table(result["parts"]), ""]
    lines += _pictures(page, output, pictures, found)
    page.write_text("\n".join(lines).rstrip() + "\n")


def _rows(found: Sequence[Found]) -> list[tuple[str, str, Found]]:
    """(variant, row, report) of all rows that were measured."""
    return [
        (result["variant"], name, row) for result in found for name, row in result["rows"].items() if "metrics" in row
    ]


def _table(found: Sequence[Found]) -> list[str]:
    names = [name for name in DIMENSIONS if any(name in row["metrics"] for _, _, row in _rows(found))]
    titles = ["variant", "row", "s/video", "AR", "guidance", "FVD", *names]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for variant, name, row in _rows(found):
        share = row["seconds_of"]["ar"] / row["seconds"] if row["seconds"] else 0.0
        distance = row["frechet_video_distance"]
        cells = [
            variant, name, f"{row['seconds']:.2f}", f"{share:.0%}" if name.startswith("guided") else "–",
            " / ".join(f"{value:g}" for key, value in row["options"].items() if key.endswith("guidance_scale")) or "–",
            "–" if distance is None else f"{distance:.3f}",
            *(_cell(row["metrics"].get(metric)) for metric in names),
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    told = [
        f"- **{result['variant']}**: {result['what']}; training loss at the end {_loss(result)}" for result in found
    ]
    return [*lines, "", *told]


def _loss(result: Found) -> str:
    return "–" if result.get("loss") is None else f"{result['loss']:.4f}"


def _cell(value: Found | None) -> str:
    return "–" if value is None else f"{value['mean']:.3f} ±{(value['high'] - value['low']) / 2:.3f}"


def _comparison(found: Sequence[Found]) -> list[str] | None:
    """On how many of VBench's dimensions the method in at most 6 steps is better than text-only in 30."""
    rows = {(variant, name): row for variant, name, row in _rows(found)}
    base, ours = rows.get(("text-only", "text-only@30")), rows.get(("full", "guided@5"))
    if base is None or ours is None:
        return None
    lines = ["| dimension | text-only@30 | guided@5 | difference |", "|---|---|---|---|"]
    better, worst = 0, 0.0
    for name in DIMENSIONS:
        if name in base["metrics"] and name in ours["metrics"]:
            theirs, own = base["metrics"][name]["mean"], ours["metrics"][name]["mean"]
            better += own > theirs
            worst = min(worst, own - theirs)
            lines.append(f"| {name} | {theirs:.3f} | {own:.3f} | {own - theirs:+.3f} |")
    faster = base["seconds"] / ours["seconds"]
    told = (
        f"Better on {better} of {len(lines) - 2}, at worst {worst:+.3f}; {faster:.2f} times as fast, the AR included."
    )
    return [*lines, "", told]


def _plot(path: Path, found: Sequence[Found]) -> bool:
    curves = {
        result["variant"]: sorted(
            (float(name.removeprefix(WRONG)) if name.startswith(WRONG) else 0.0, row["metrics"])
            for name, row in result["rows"].items()
            if "metrics" in row and (name == "true-tokens@5" or name.startswith(WRONG))
        )
        for result in found
    }
    curves = {variant: curve for variant, curve in curves.items() if len(curve) > 2}
    if not curves:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PLOTTED), figsize=(4 * len(PLOTTED), 3.2), sharey=True)
    for axis, metric in zip(axes, PLOTTED, strict=True):
        for variant, curve in curves.items():
            points = [(share, metrics[metric]["mean"]) for share, metrics in curve if metric in metrics]
            axis.plot(*zip(*points, strict=True), marker="o", label=variant)
        axis.set(title=metric, xlabel="share of wrong tokens", ylim=(0, 1.02))
    axes[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return True


def _pictures(page: Path, output: Path, pictures: Path, found: Sequence[Found]) -> list[str]:
    lines = ["## Pictures", "", "Six held-out captions, each a row of eight frames.", ""]
    for result in found:
        for name in result["rows"]:
            stem = name.replace("@", "-")
            source, target = output / result["variant"] / f"{stem}.png", pictures / f"{result['variant']}-{stem}.png"
            if name in PICTURED and result["variant"] in ("text-only", "full") and source.is_file():
                shutil.copyfile(source, target)
                lines += [f"{result['variant']}, {name}", "", f"![{name}]({page.stem}/{target.name})", ""]
    failures = output / "full" / "guided-5-failures.png"
    if failures.is_file():
        shutil.copyfile(failures, pictures / "failures.png")
        told = (failures.with_suffix(".txt")).read_text().splitlines()
        lines += ["## Failures of guided@5", "", f"![failures]({page.stem}/failures.png)", ""]
        lines += [f"{number}. {text}" for number, text in enumerate(told, start=1)] + [""]
    return lines
