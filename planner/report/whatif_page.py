"""Pictures and page of a what-if grid: latency over load with the knees, cost against P95.

Input is the grid's document as plain data (schema ``almanac.whatif-grid-result/1``). No script, no
external asset; the same document gives the same bytes.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from planner import __version__
from planner.domain.files import atomic_write
from planner.report.drawing import DASHES, GREY, MARKERS, PALETTE, STYLE, new_figure, to_png

__all__ = ["grid_figure", "write_grid_page"]

Document = Mapping[str, Any]
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 0 auto;
  max-width: 80rem; padding: 1.5rem; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #999; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ccc;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; height: auto; }
figcaption { color: #333; font-size: .92rem; max-width: 50rem; }
footer { margin-top: 3rem; color: #444; font-size: .85rem; }
""".strip()
_METRICS = (("mean_s", "mean s"), ("p50_s", "P50 s"), ("p95_s", "P95 s"), ("p99_s", "P99 s"))


def grid_figure(document: Document) -> Figure:
    """Draw mean run latency over the arrival rate, and cost per run against P95.

    Each scenario has a colour, a dash and a marker, policies of one scenario share the colour. A
    ring marks the knee; the dotted line is what no policy can go below at the present load.
    """
    cells = [one for one in document["cells"] if "mean_s" in one["figures"]]
    priced = [one for one in cells if one["usd_per_run"] is not None]
    with rc_context(STYLE):
        figure = new_figure(8.4 if priced else 5.0, 4.6)
        axes = figure.subplots(1, 2 if priced else 1, squeeze=False)[0]
        _over_load(axes[0], document, cells)
        if priced:
            _cost(axes[1], priced)
        handles, labels = axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    return figure


def _lines(cells: Sequence[Document]) -> dict[tuple[str, str], list[Document]]:
    lines: dict[tuple[str, str], list[Document]] = {}
    for one in cells:
        lines.setdefault((one["scenario"], one["policy"]), []).append(one)
    return lines


def _look(cells: Sequence[Document], scenario: str, policy: str) -> dict[str, Any]:
    colour = list(dict.fromkeys(one["scenario"] for one in cells)).index(scenario)
    shape = list(dict.fromkeys(one["policy"] for one in cells)).index(policy)
    return {
        "color": PALETTE[colour % len(PALETTE)],
        "linestyle": DASHES[shape % len(DASHES)],
        "marker": MARKERS[(colour + shape) % len(MARKERS)],
        "markersize": 4,
        "linewidth": 1.3,
    }


def _over_load(axes: Axes, document: Document, cells: Sequence[Document]) -> None:
    policies = {one["policy"] for one in cells}
    for (scenario, policy), line in _lines(cells).items():
        points = sorted((one["rate_rps"], one["figures"]["mean_s"]["value"]) for one in line)
        label = scenario if len(policies) == 1 else f"{scenario}, {policy}"
        look = _look(cells, scenario, policy)
        axes.plot(*zip(*points, strict=True), label=label, **look)
    knees = [one for one in document["knees"] if one["inside"]]
    if knees:
        axes.plot(
            [one["rate_rps"] for one in knees],
            [one["mean_s"] for one in knees],
            linestyle="none", marker="o", markersize=10, fillstyle="none", color=GREY,
            label="knee",
        )  # fmt: skip
    bounds = sorted(
        (one["rate_rps"], one["bounds"]["mean_s"])
        for one in cells
        if one["scenario"] == cells[0]["scenario"]
        and one["policy"] == cells[0]["policy"]
        and "mean_s" in one["bounds"]
    )
    if bounds:
        axes.plot(
            *zip(*bounds, strict=True), color=GREY, linestyle=":", linewidth=1.0,
            label=f"bound, {cells[0]['scenario']}",
        )  # fmt: skip
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("arrival rate (runs/s)")
    axes.set_ylabel("mean run latency (s)")
    axes.set_title("Completion time against load")


def _cost(axes: Axes, cells: Sequence[Document]) -> None:
    for (scenario, policy), line in _lines(cells).items():
        points = sorted((one["figures"]["p95_s"]["value"], one["usd_per_run"]) for one in line)
        axes.plot(*zip(*points, strict=True), **_look(cells, scenario, policy))
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("P95 run latency (s)")
    axes.set_ylabel("cost per run ($)")
    axes.set_title("Cost against P95")


def write_grid_page(document: Document, out: Path) -> Path:
    """Write the page of a grid's document; return its path."""
    image = base64.b64encode(to_png(grid_figure(document))).decode("ascii")
    head = [
        "scenario", "policy", "runs/s", "load", *(name for _, name in _METRICS), "in time",
        "no policy below: mean s", "P95 s", "$/h", "$/run", "notes",
    ]  # fmt: skip
    rows = "".join(_row(one) for one in document["cells"])
    knees = "".join(
        f"<tr><td>{escape(one['scenario'])}</td><td>{escape(one['policy'])}</td>"
        f"<td>{one['rate_rps']:.3g}</td><td>{one['mean_s']:.2f}</td>"
        f"<td>{'' if one['inside'] else 'at the edge of the grid'}</td></tr>"
        for one in document["knees"]
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>What if</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        "<header><h1>What if</h1></header>\n<main>\n"
        '<figure><img alt="Mean run latency over load, and cost per run against P95; the figures '
        f'are in the table below" src="data:image/png;base64,{image}"><figcaption>Every scenario '
        "at every load and under every policy. Rings are knees: the load that gives most runs per "
        "second of latency. Logarithmic axes.</figcaption></figure>\n"
        f"{_target(document)}<h2>All cells</h2>\n"
        f'<div class="scroll"><table><thead><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr>'
        f"</thead><tbody>{rows}</tbody></table></div>\n<h2>Knees</h2>\n<table><thead><tr>"
        "<th>scenario</th><th>policy</th><th>runs/s</th><th>mean s</th><th></th></tr></thead>"
        f"<tbody>{knees}</tbody></table>\n</main>\n"
        f"<footer>Made by almanac {escape(__version__)}.</footer>\n</body>\n</html>\n"
    )
    with atomic_write(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out


def _target(document: Document) -> str:
    if document["target"] is None:
        return ""
    found = document["cheapest"]
    said = (
        "no cell at the present load meets it"
        if found is None
        else f"cheapest is {found['scenario']} under {found['policy']}"
    )
    return f"<p>Target {escape(document['target'])}: {escape(said)}.</p>\n"


def _row(one: Document) -> str:
    cells = [f"<td>{escape(one['scenario'])}</td>", f"<td>{escape(one['policy'])}</td>"]
    cells += [f"<td>{one['rate_rps']:.3g}</td>", f"<td>{_number(one['load'], 2)}</td>"]
    for name in (*(metric for metric, _ in _METRICS), "attainment"):
        figure = one["figures"].get(name)
        digits = 3 if name == "attainment" else 2
        text = "-"
        if figure is not None:
            ends = (_number(figure["low"], digits), _number(figure["high"], digits))
            text = f"{_number(figure['value'], digits)} [{ends[0]}, {ends[1]}]"
        cells.append(f"<td>{text}</td>")
    for name in ("mean_s", "p95_s"):
        cells.append(f"<td>{_number(one['bounds'].get(name), 2)}</td>")
    cells.append(f"<td>{_number(one['usd_per_hour'], 2)}</td>")
    cells.append(f"<td>{_number(one['usd_per_run'], 4)}</td>")
    cells.append(f"<td>{escape('; '.join(one['notes']))}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
