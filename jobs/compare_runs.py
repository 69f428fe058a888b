"""Put MLflow runs side by side in one HTML file: curves against steps and hours, figures, settings, lineage, samples.

`python jobs/compare_runs.py --uri sqlite:///runs/tiny/mlflow.db --stage dit --output runs/compare.html`
`… --runs ID ID` names them; otherwise the newest of the experiment, of one stage if `--stage` is given.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jobs.command_line import InputError, parser, run

#: Pictures shown of a run, and curves drawn: the rest is in MLflow itself.
MOST_PICTURES, MOST_CURVES = 4, 12
#: Tags that say where a run comes from.
LINEAGE = ("parent.", "code_version", "mlflow.source.", "key", "bundle", "row", "artifact")
STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem; color: #1b1f24 }
table { border-collapse: collapse; margin: .5rem 0 1.5rem } td, th { border: 1px solid #d0d7de; padding: .25rem .6rem;
text-align: left; font-variant-numeric: tabular-nums; overflow-wrap: anywhere } th { background: #f6f8fa }
.differs { background: #fff8c5 } img { max-width: 100%; image-rendering: pixelated } figure { margin: 0 0 1rem }
"""


def find_runs(
    client: Any, experiment: str, ids: Sequence[str], stage: str | None, count: int, rows: bool = False
) -> list[Any]:
    """The runs to compare. Raises InputError if one of them, or the experiment, is unknown."""
    from mlflow.exceptions import MlflowException

    if ids:
        runs = []
        for run_id in ids:
            try:
                runs.append(client.get_run(run_id))
            except MlflowException:
                raise InputError(f"--runs {run_id}: no such run") from None
        return runs
    found = client.get_experiment_by_name(experiment)
    if found is None:
        raise InputError(f"--experiment {experiment}: no such experiment")
    wanted = " and ".join([f"tags.stage = '{stage}'"] * bool(stage) + ["tags.row LIKE '%'"] * rows)
    runs = client.search_runs([found.experiment_id], wanted, order_by=["attributes.start_time DESC"], max_results=count)
    if not runs:
        kind = f" of stage {stage}" if stage else " of rows" if rows else ""
        raise InputError(f"--experiment {experiment}: no runs{kind}")
    return list(runs)


def report(client: Any, runs: Sequence[Any]) -> str:
    """The HTML page."""
    names = [f"{run.info.run_name} {run.info.run_id[:8]}" for run in runs]
    parts = [
        ("Curves", _curves(client, runs, names)),
        ("Figures", _differences(names, [_figures(run) for run in runs], mark=False)),
        ("Lineage", _differences(names, [_lineage(run) for run in runs])),
        ("Settings that differ", _differences(names, [dict(run.data.params) for run in runs], only_different=True)),
        ("Pictures", "".join(_pictures(client, run, name) for run, name in zip(runs, names, strict=True))),
    ]
    body = "".join(f"<h2>{title}</h2>{text or '<p>none</p>'}" for title, text in parts)
    title = f"{len(runs)} runs side by side"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style><h1>{title}</h1>{body}</html>"
    )


def _figures(run: Any) -> dict[str, str]:
    figures = {name: f"{value:.5g}" for name, value in sorted(run.data.metrics.items())}
    if run.info.end_time:
        figures["minutes"] = f"{(run.info.end_time - run.info.start_time) / 60_000:.1f}"
    return {"status": str(run.info.status), **figures}


def _lineage(run: Any) -> dict[str, str]:
    return {name: value for name, value in sorted(run.data.tags.items()) if name.startswith(LINEAGE)}


def _differences(
    names: Sequence[str], columns: Sequence[Mapping[str, str]], *, mark: bool = True, only_different: bool = False
) -> str:
    """A table of what the runs say of each key; rows that differ are marked."""
    rows = []
    for key in dict.fromkeys(key for column in columns for key in column):
        values = [column.get(key, "–") for column in columns]
        differs = len(set(values)) > 1
        if differs or not only_different:
            cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in values)
            rows.append(f"<tr{' class=differs' if differs and mark else ''}><th>{html.escape(key)}</th>{cells}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in names)
    return f"<table><tr><th></th>{head}</tr>{''.join(rows)}</table>" if rows else ""


def _curves(client: Any, runs: Sequence[Any], names: Sequence[str]) -> str:
    """One figure a metric that any run logged more than once: against steps, and against hours."""
    found: dict[str, dict[str, list[Any]]] = {}
    for run_, name in zip(runs, names, strict=True):
        for metric in run_.data.metrics:
            history = client.get_metric_history(run_.info.run_id, metric)
            if len(history) > 1:
                found.setdefault(metric, {})[name] = sorted(history, key=lambda point: point.step)
    chosen = sorted(found, key=lambda metric: (metric != "loss", metric))[:MOST_CURVES]
    return "".join(_curve(metric, found[metric]) for metric in chosen)


def _curve(metric: str, histories: Mapping[str, list[Any]]) -> str:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (by_step, by_hour) = pyplot.subplots(1, 2, figsize=(11, 3), sharey=True)
    for name, points in histories.items():
        values, begin = [point.value for point in points], min(point.timestamp for point in points)
        by_step.plot([point.step for point in points], values, label=name)
        by_hour.plot([(point.timestamp - begin) / 3_600_000 for point in points], values)
    by_step.set(xlabel="steps", ylabel=metric)
    by_hour.set(xlabel="hours")
    by_step.legend(fontsize=7)
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=90)
    pyplot.close(figure)
    return _image(buffer.getvalue(), metric)


def _pictures(client: Any, run: Any, name: str) -> str:
    """The newest pictures that a run logged."""
    found, folders = [], [""]
    while folders:
        for item in client.list_artifacts(run.info.run_id, folders.pop() or None):
            if item.is_dir:
                folders.append(item.path)
            elif item.path.endswith(".png"):
                found.append(item.path)
    shown = "".join(
        _image(Path(client.download_artifacts(run.info.run_id, path)).read_bytes(), path)
        for path in sorted(found)[-MOST_PICTURES:]
    )
    return f"<h3>{html.escape(name)}</h3>{shown}" if shown else ""


def _image(data: bytes, caption: str) -> str:
    text = html.escape(caption)
    encoded = base64.b64encode(data).decode()
    return f'<figure><img alt="{text}" src="data:image/png;base64,{encoded}"><figcaption>{text}</figcaption></figure>'


def main() -> None:
    """Command line."""
    flags = parser(__doc__ or "", output="runs/compare.html", config=False)
    flags.add_argument("--uri", metavar="URI", help="MLflow store (default: MLFLOW_TRACKING_URI)")
    flags.add_argument("--experiment", default="arlon-ray", metavar="NAME")
    flags.add_argument("--runs", nargs="+", default=[], metavar="ID", help="run ids (default: the newest)")
    flags.add_argument("--stage", metavar="NAME", help="only runs of this stage: dit, dit_base, ar, vqvae_fine, …")
    flags.add_argument("--rows", action="store_true", help="only rows of tables: runs of evaluate.py and ablate.py")
    flags.add_argument("--count", type=int, default=6, help="how many of the newest (default: 6)")
    arguments = flags.parse_args()
    if arguments.count < 1:
        raise InputError(f"--count {arguments.count}: expected 1 or more")
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    try:
        client = MlflowClient(arguments.uri)
        runs = find_runs(client, arguments.experiment, arguments.runs, arguments.stage, arguments.count, arguments.rows)
    except MlflowException as error:
        raise InputError(f"--uri {arguments.uri}: {' '.join(str(error).split())[:200]}") from None
    output = Path(arguments.output).expanduser().absolute()
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(report(client, runs))
    for run_ in runs:
        figures = "  ".join(f"{name} {value:.4g}" for name, value in sorted(run_.data.metrics.items())[:6])
        print(f"{run_.info.run_id[:8]}  {run_.info.run_name:<16} {run_.info.status:<9} {figures}")
    print(output)


if __name__ == "__main__":
    run(main)
