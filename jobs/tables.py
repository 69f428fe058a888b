"""Results as Markdown tables, from what `results.json` holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from arlon_ray.evaluation.metrics import DIMENSIONS

Found = Mapping[str, Any]


def results_table(rows: Sequence[tuple[Sequence[str], Found]], names: Sequence[str] = ("row",)) -> str:
    """A line for each row's report, after its `names`: means, and half the width of the 95 % interval."""
    measured = {name for _, report in rows for name in report.get("metrics", ())}
    metrics = [*(name for name in DIMENSIONS if name in measured), *sorted(measured - set(DIMENSIONS))]
    titles = [*names, "videos", "s/video", "AR", "guidance", "FVD", *metrics]
    lines = [f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    for named, report in rows:
        if "absent" in report:
            cells = [*named, f"absent: {report['absent']}"]
            cells += [""] * (len(titles) - len(cells))
        else:
            cells = [*named, *_cells(report), *(_interval(report["metrics"].get(name)) for name in metrics)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(report: Found) -> list[str]:
    seconds, planning = report["seconds"], report["seconds_of"].get("ar", 0.0)
    distance = report["frechet_video_distance"]
    return [
        str(report["videos"]),
        f"{seconds:.2f}" if seconds else "–",
        f"{planning / seconds:.0%}" if seconds and planning else "–",
        report["guidance"],
        "–" if distance is None else f"{distance:.3f}",
    ]


def _interval(value: Found | None) -> str:
    return "–" if value is None else f"{value['mean']:.3f} ±{(value['high'] - value['low']) / 2:.3f}"


def figures_table(columns: Mapping[str, Found], name: str) -> str:
    """A line for each figure of `summary`, a column for each of several: mean, interval, and of how many videos."""
    figures = sorted({figure for found in columns.values() for figure in found})
    lines = [f"| {name} | {' | '.join(columns)} |", f"|{'---|' * (1 + len(columns))}"]
    for figure in figures:
        found = [column.get(figure) for column in columns.values()]
        cells = [f"{_interval(value)} ({value['videos']})" if value else "–" for value in found]
        lines.append(f"| {figure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def costs_table(parts: Mapping[str, Mapping[str, float]]) -> str:
    """What `jobs.evaluate.costs` found."""
    lines = ["| part | parameters | weights | GFLOP | peak memory |", "|---|---|---|---|---|"]
    for name, cost in parts.items():
        figures = (
            f"{cost['parameters'] / 1e6:.2f} M", f"{cost['weight_bytes'] / 2**20:.1f} MiB",
            f"{cost['flops'] / 1e9:.2f}", f"{cost['peak_bytes'] / 2**20:.1f} MiB",
        )  # fmt: skip
        lines.append(f"| {name} | {' | '.join(figures)} |")
    return "\n".join(lines)
