"""`report.html`: what was kept, what was not and why, as one page that needs nothing else.

Names and captions are users': every text passes through `escape`. Pictures and plots are inside the page.
"""

from __future__ import annotations

import base64
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from data_pipeline.schema import FILTER_REASONS, Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: How many of each are shown; the rest is in the Parquet files.
KEPT_SHOWN, REJECTED_SHOWN, FILES_SHOWN, SOURCES_SHOWN, BUCKETS_SHOWN = 24, 12, 20, 30, 12
#: Bars of a histogram. Beyond this percentile a value counts in the last bar, lest a few hide the others.
BARS, LAST_PERCENTILE = 30, 99
KEPT_COLOUR, REJECTED_COLOUR, THRESHOLD_COLOUR = "#2a9d6f", "#e08a1e", "#d0342c"
#: Stands for the page's own text colour, light or dark, which Matplotlib does not know.
TEXT_COLOUR = "#010203"

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882 }
body { font: 16px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem }
h1 { font-size: 1.6rem } h2 { font-size: 1.25rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line) }
h3 { font-size: 1rem } .scroll { overflow-x: auto } .note { opacity: .75; font-size: .9em }
table { border-collapse: collapse; font-size: .9rem } th { text-align: left }
td, th { padding: .2rem .8rem .2rem 0; border-bottom: 1px solid var(--line); overflow-wrap: anywhere }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(10rem, 1fr)); gap: .8rem }
.card { background: var(--soft); border-radius: .4rem; padding: .5rem; font-size: .8rem; overflow-wrap: anywhere }
.card img, .missing { width: 100%; aspect-ratio: 16 / 10; object-fit: contain; background: #0003 }
.missing { display: grid; place-items: center; opacity: .6 } .card p { margin: .3rem 0 0 }
.plots { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(21rem, 100%), 1fr)); gap: 1rem }
.plots svg { width: 100%; height: auto } li { overflow-wrap: anywhere }
"""


#: What has a histogram: its unit, and the settings of its filter.
MEASURES = {
    "length": ("seconds",),
    "black": ("share of frames", "max_black"),
    "frozen": ("share of frames", "max_frozen"),
    "motion": ("shorter sides a second", "min_motion", "max_motion"),
    "sharpness": ("variance of the Laplacian", "min_sharpness"),
    "text": ("share of the picture", "max_text"),
}
#: What spreads over orders of magnitude.
LOGARITHMIC = frozenset({"sharpness"})


def chosen_clips(clips: pa.Table, rejects: pa.Table) -> list[int]:
    """Ids of the clips that the page shows: of the kept ones and of every reason some, evenly over their order."""
    rejected = _by_reason(rejects.filter(pc.is_valid(rejects["clip_id"]))).values()
    shown = [_spread(clips, KEPT_SHOWN), *(_spread(rows, REJECTED_SHOWN) for rows in rejected)]
    return list(dict.fromkeys(number for table in shown for number in table["clip_id"].to_pylist()))


def write_report_page(
    path: Path,
    report: Mapping[str, Any],
    clips: pa.Table,
    rejects: pa.Table,
    pictures: Mapping[int, bytes],
    settings: Mapping[str, Any],
) -> None:
    """Write the page to `path`.

    `report` is that of `report.py`; `clips` the kept clips (`schema.CLIP` and `schema.SCORES`); `rejects` has
    `schema.REJECT`; `pictures` are JPEGs by clip id, of `chosen_clips`, as far as there are any; `settings` those of
    the dataset, its `filters` a dict of `FilterConfig`.
    """
    reasons = _by_reason(rejects, report["reasons"])
    body = [
        "<h1>Dataset report</h1>",
        *_totals(report),
        *_contents(reasons),
        *_plots(clips, rejects, settings["filters"]),
        '<h2 id="kept">Kept clips</h2>',
        *_cards(_spread(clips, KEPT_SHOWN), pictures, len(clips)),
    ]
    for number, (reason, rows) in enumerate(reasons.items(), start=1):
        body += _rejected(number, reason, rows, pictures)
    body += [*_sources(report["sources"]), *_settings(settings)]
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Dataset report</title><style>{_STYLE}</style>"
    )
    page = "\n".join(["<!DOCTYPE html>", f'<html lang="en"><head>{head}</head><body>', *body, "</body></html>", ""])
    # a file name that is not UTF-8 arrives with surrogates
    path.write_text(page, encoding="utf-8", errors="backslashreplace")


def _by_reason(rejects: pa.Table, order: Iterable[str] = ()) -> dict[str, pa.Table]:
    """Reject rows by reason, in the report's order, what it does not name last."""
    names = list(dict.fromkeys([*order, *sorted(pc.unique(rejects["reason"]).to_pylist())]))
    return {name: rejects.filter(pc.equal(rejects["reason"], name)) for name in names}


def _spread(table: pa.Table, count: int) -> pa.Table:
    """`count` rows, evenly over all of them."""
    return table.take(np.unique(np.linspace(0, len(table) - 1, min(count, len(table))).round().astype(np.int64)))


def _totals(report: Mapping[str, Any]) -> Iterator[str]:
    counts = {"files": report["files"], **report["total"]}
    yield _table(counts, [[f"{count:,}" for count in counts.values()]], numbers=range(5))
    yield '<p class="note">in = kept + filtered + failed, in clips; a file without any clip counts as one.</p>'


def _contents(reasons: Mapping[str, pa.Table]) -> Iterator[str]:
    links = {"histograms": "Histograms", "kept": "Kept clips", "sources": "Sources", "settings": "Settings"}
    yield "<nav><p>" + " · ".join(f'<a href="#{anchor}">{name}</a>' for anchor, name in links.items()) + "</p>"
    yield "<h2>Not in the dataset</h2>"
    rows = []
    for number, (reason, found) in enumerate(reasons.items(), start=1):
        kind = "filtered" if reason in FILTER_REASONS else "failed"
        rows.append([f'<a href="#reason-{number}">{escape(reason)}</a>', kind, f"{len(found):,}"])
    yield _table(("reason", "kind", "number"), rows, numbers=[2]) if rows else "<p>Nothing was left out.</p>"
    yield "</nav>"


def _rejected(number: int, reason: str, rows: pa.Table, pictures: Mapping[int, bytes]) -> Iterator[str]:
    """The section of one reason: its clips as cards, what is no clip as a list."""
    yield f'<h2 id="reason-{number}">{escape(reason)} ({len(rows):,})</h2>'
    found = rows.filter(pc.is_valid(rows["clip_id"]))
    if len(found):
        yield from _cards(_spread(found, REJECTED_SHOWN), pictures, len(found))
    files = rows.filter(pc.is_null(rows["clip_id"]))
    if len(files):
        yield "<h3>Files</h3><ul>"
        for row in files.slice(0, FILES_SHOWN).to_pylist():
            told = f": {escape(row['error'])}" if row["error"] else ""
            yield f"<li><b>{escape(row['source'])}</b>{_span(row)}{told}</li>"
        yield "</ul>"
        yield _more(len(files) - FILES_SHOWN, "rejects.parquet")


def _cards(shown: pa.Table, pictures: Mapping[int, bytes], count: int) -> Iterator[str]:
    if not count:
        yield "<p>None.</p>"
        return
    if len(shown) < count:
        yield f'<p class="note">{len(shown)} of {count:,}, evenly over all of them.</p>'
    yield '<div class="cards">'
    for row in shown.to_pylist():
        data = pictures.get(row["clip_id"])
        if data is None:
            picture = '<div class="missing">no picture</div>'
        else:
            code = base64.b64encode(data).decode()
            picture = f'<img loading="lazy" alt="clip {row["clip_id"]}" src="data:image/jpeg;base64,{code}">'
        scores = " · ".join(f"{name} {_short(row[name])}" for name in [*MEASURES][1:] if row[name] is not None)
        lines = [f"<b>{escape(row['source'])}</b>{_span(row)}"]
        lines += [escape(row[name]) for name in ("caption", "error") if row.get(name)]
        lines += [f'<span class="note">{line}</span>' for line in (escape(row.get("bucket", "")), scores) if line]
        yield f'<div class="card">{picture}{"".join(f"<p>{line}</p>" for line in lines)}</div>'
    yield "</div>"


def _span(row: Row) -> str:
    if row["start_s"] is None or row["end_s"] is None:
        return ""
    return f" {row['start_s']:.2f}–{row['end_s']:.2f} s"


def _sources(sources: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """The sources, those that lost most first."""
    yield '<h2 id="sources">Sources</h2>'
    lost = {name: counts["filtered"] + counts["failed"] for name, counts in sources.items()}
    first = sorted(sources, key=lambda name: (-lost[name], name))[:SOURCES_SHOWN]
    columns = ("in", "kept", "filtered", "failed")
    rows = [[escape(name), *(f"{sources[name][column]:,}" for column in columns)] for name in first]
    yield _table(("source", *columns), rows, numbers=range(1, 5))
    yield _more(len(sources) - SOURCES_SHOWN, "report.json")


def _settings(settings: Mapping[str, Any]) -> Iterator[str]:
    yield '<h2 id="settings">Settings</h2>'
    rows = [[escape(name), escape(json.dumps(value, default=str))] for name, value in _flat(settings, "")]
    yield _table(("setting", "value"), sorted(dict(rows).items()))


def _flat(settings: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _table(head: Iterable[str], rows: Iterable[Iterable[str]], numbers: Sequence[int] = ()) -> str:
    """A table of cells that are HTML; the columns `numbers` are set flush right."""
    flush = {True: ' class="number"', False: ""}
    lines = ["".join(f"<th{flush[place in numbers]}>{cell}</th>" for place, cell in enumerate(head))]
    lines += ["".join(f"<td{flush[place in numbers]}>{cell}</td>" for place, cell in enumerate(row)) for row in rows]
    return f'<div class="scroll"><table><tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _more(count: int, where: str) -> str:
    return f'<p class="note">… and {count:,} more ({where}).</p>' if count > 0 else ""


def _plots(clips: pa.Table, rejects: pa.Table, filters: Mapping[str, Any]) -> Iterator[str]:
    """The histograms, kept and rejected clips side by side."""
    yield '<h2 id="histograms">Histograms</h2>'
    yield (
        f'<p class="note"><b style="color:{KEPT_COLOUR}">kept</b>, <b style="color:{REJECTED_COLOUR}">rejected</b>; a '
        f'<span style="color:{THRESHOLD_COLOUR}">dashed line</span> is the threshold of a filter. '
        "A clip counts where the quantity was measured.</p>"
    )
    yield '<div class="plots">'
    counts = sorted(Counter(clips["bucket"].to_pylist()).items(), key=lambda item: (-item[1], item[0]))[:BUCKETS_SHOWN]
    yield _figure("bucket", "kept clips by bucket", lambda axes: _draw_buckets(axes, counts))
    for name, (unit, *bounds) in MEASURES.items():
        values = [_values(table, name) for table in (clips, rejects)]
        lines = [float(filters[bound]) for bound in bounds if filters[bound] is not None]
        if sum(map(len, values)):
            draw = partial(_draw_histogram, values=values, thresholds=lines, logarithmic=name in LOGARITHMIC)
            yield _figure(name, f"{name}, {unit}", draw)
        else:
            yield f'<p class="note">{name}: measured of no clip.</p>'
    yield "</div>"


def _values(table: pa.Table, name: str) -> NDArray[np.float64]:
    """What is there of a quantity, null left out: [n]."""
    column = pc.subtract(table["end_s"], table["start_s"]) if name == "length" else table[name]
    return column.drop_null().to_numpy().astype(np.float64)


def _draw_buckets(axes: Axes, counts: Sequence[tuple[str, int]]) -> None:
    bars = axes.barh([name for name, _ in counts], [count for _, count in counts], height=0.6, color=KEPT_COLOUR)
    axes.bar_label(bars, padding=3, color=TEXT_COLOUR)
    axes.invert_yaxis()
    axes.margins(x=0.15)


def _draw_histogram(
    axes: Axes, values: Sequence[NDArray[np.float64]], thresholds: Sequence[float], logarithmic: bool
) -> None:
    whole = np.concatenate(values)
    low = min([whole.min(), *thresholds])
    high = max([np.percentile(whole, LAST_PERCENTILE), *thresholds])
    if high - low < 1e-6 * max(abs(high), 1):  # all are equal
        low, high = low - 0.5, high + 0.5
    edges = np.linspace(low, high, BARS + 1)
    if logarithmic:
        edges = np.geomspace(max(low, 0.1), max(high, 1), BARS + 1)
        axes.set_xscale("log")
    width = np.diff(edges)
    for side, (part, colour) in enumerate(zip(values, (KEPT_COLOUR, REJECTED_COLOUR), strict=True)):
        counts, _ = np.histogram(np.clip(part, edges[0], edges[-1]), edges)
        axes.bar(edges[:-1] + (0.27 + 0.46 * side) * width, counts, 0.46 * width, color=colour)
    for threshold in thresholds:
        axes.axvline(threshold, color=THRESHOLD_COLOUR, linestyle="--", linewidth=1.2)
    if whole.max() > edges[-1]:
        axes.set_xlabel(f"the last bar goes on to {_short(whole.max())}", fontsize=8, loc="right")


def _figure(name: str, title: str, draw: Callable[[Axes], None]) -> str:
    """A plot as SVG within HTML: in the page's text colour, with ids that no other plot has."""
    from matplotlib import rc_context  # takes a second to import
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    figure = Figure(figsize=(4.2, 2.6))  # laid out by hand: a tenth of the time
    axes = figure.add_axes((0.22, 0.18, 0.76, 0.7))
    draw(axes)
    axes.set_title(title, fontsize=10, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, color=TEXT_COLOUR)
    for item in figure.findobj(Text):
        item.set_color(TEXT_COLOUR)
    axes.spines[:].set_color(TEXT_COLOUR)
    drawn = StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = drawn.getvalue().partition("<svg")[2].replace(TEXT_COLOUR, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return "<svg" + re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
