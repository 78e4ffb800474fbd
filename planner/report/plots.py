"""All pictures, for files and notebooks alike; every function returns a matplotlib `Figure`.

House rules: the object interface only (no pyplot, no global state), a unit on every axis, the
Okabe-Ito palette, and never colour alone: a line style, a hatch or a word says the same thing, so
that a picture survives a grey printer and colour-blind eyes. Input order is drawing order.

References
----------
Okabe, Ito, Color Universal Design, 2008 (palette).
"""

from __future__ import annotations

import io
import itertools
import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch, Polygon
from matplotlib.path import Path as Outline

from planner.dispatch.table import DispatchTable
from planner.domain.errors import InvalidInput
from planner.domain.ids import NodeId
from planner.domain.trace import CallRecord, RunRecord, ToolRecord, TraceRecord
from planner.domain.workflow import END, START, Workflow
from planner.report.comparison import COLUMNS, COMPARED, ComparisonTable
from planner.report.layout import Layout, lay_out
from planner.report.terminal import comparison_text

__all__ = [
    "Forecast",
    "forecasts_of",
    "latency_bars",
    "latency_cdfs",
    "new_figure",
    "predicted_vs_actual",
    "run_gantt",
    "table_heatmaps",
    "to_png",
    "workflow_graph",
]

PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B5A900",
)  # fmt: skip
"""Okabe and Ito, with the yellow darkened so that a line of it shows on white."""
DASHES = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (8, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
WIDE = 5.0
"""Beyond this ratio of worst to best a linear axis hides the good ones."""
GREY, FAINT = "#555555", "#dddddd"
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
}


def to_png(figure: Figure, dpi: int = 130) -> bytes:
    """Return the figure as PNG bytes; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def _own(name: str) -> bool:
    return name.startswith("almanac")


def _plain_number(value: float, _: object) -> str:
    return f"{value:g}"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, laid out by constraints."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def latency_cdfs(curves: Mapping[str, Sequence[float]]) -> Figure:
    """Draw the share of runs that are done within a time, one curve per policy.

    Parameters
    ----------
    curves
        Label -> run latencies in seconds; empty ones are left out.

    Raises
    ------
    InvalidInput
        If no curve has a value.
    """
    shown = {label: np.sort(values) for label, values in curves.items() if len(values)}
    if not shown:
        raise InvalidInput("no run ended well", where="CDF", remedy="give finished runs")
    with rc_context(STYLE):
        figure = new_figure(7.2, 4.2)
        axes = figure.subplots()
        for position, (label, values) in enumerate(shown.items()):
            share = np.arange(1, values.size + 1) / values.size
            axes.step(
                np.concatenate([[values[0]], values]),
                np.concatenate([[0.0], share]),
                where="post",
                color=PALETTE[position % len(PALETTE)],
                linestyle=DASHES[position % len(DASHES)],
                linewidth=2.4 if _own(label) else 1.5,
                label=label,
            )
        for level in (0.5, 0.95):
            axes.axhline(level, color=FAINT, linewidth=0.8, zorder=0)
            axes.text(
                1.0, level, f" P{level * 100:.0f}", color=GREY, va="center",
                transform=axes.get_yaxis_transform(),
            )  # fmt: skip
        # A few stragglers must not squeeze the part that matters: the axis ends at the worst P99.5.
        ends = [float(np.quantile(values, 0.995)) for values in shown.values()]
        if max(ends) > WIDE * min(ends):
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(_plain_number)
            axes.set_xlim(right=max(ends))
        else:
            axes.set_xlim(0.0, max(ends) * 1.04)
        axes.set_ylim(0.0, 1.005)
        axes.set_xlabel("run latency (s)")
        axes.set_ylabel("share of runs done")
        axes.legend(loc="best", frameon=False, handlelength=3.6)
    return figure


def latency_bars(table: ComparisonTable) -> Figure:
    """Draw mean and P95 run latency per policy with the range over seeds.

    Beside each bar stands the paired difference to the best baseline with its 95 % interval.
    """
    names = {column.metric: column.heading for column in COLUMNS}
    where = {column.metric: position for position, column in enumerate(COLUMNS)}
    labels = [row.label for row in table.rows]
    with rc_context(STYLE):
        figure = new_figure(10.4, 0.9 + 0.4 * len(labels))
        panels = figure.subplots(1, len(COMPARED), sharey=True)
        for number, (axes, metric) in enumerate(zip(panels, COMPARED, strict=True)):
            values = [row.values[where[metric]] for row in table.rows]
            known = [value for value in values if value]
            reach = max((value.most for value in known), default=1.0)
            end = min(reach, WIDE * min((value.mean for value in known), default=reach)) * 1.04
            for y, (row, value) in enumerate(zip(table.rows, values, strict=True)):
                if value is None:
                    continue
                axes.barh(
                    y, value.mean, height=0.62, edgecolor="black", linewidth=0.6,
                    color=PALETTE[5] if _own(row.policy) else "#CCCCCC",
                    hatch="///" if _own(row.policy) else None,
                )  # fmt: skip
                if value.mean > end:
                    axes.text(end, y, "off the axis \u25b6 ", ha="right", va="center", fontsize=7.5)
                else:
                    axes.errorbar(
                        value.mean, y,
                        xerr=[[value.mean - value.least], [value.most - value.mean]],
                        color="black", capsize=3, linewidth=1.1,
                    )  # fmt: skip
                best = table.best[number] == row.label
                note = "best baseline" if best else comparison_text(row.comparisons[number])
                axes.text(
                    1.02, y, f"{value.mean:.2f} s   {note}", va="center", fontsize=8,
                    transform=axes.get_yaxis_transform(),
                )  # fmt: skip
            axes.set_xlim(0.0, end)
            axes.set_xlabel(f"{names[metric].removesuffix(' s')} run latency (s)")
            axes.set_yticks(range(len(labels)), labels)
            axes.tick_params(axis="y", length=0)
        panels[0].invert_yaxis()
    return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """Forecast and outcome of some durations: ``predicted_s[i]`` belongs to ``actual_s[i]``."""

    label: str
    predicted_s: tuple[float, ...]
    actual_s: tuple[float, ...]


def forecasts_of(records: Sequence[TraceRecord], label: str) -> tuple[Forecast, Forecast]:
    """Return the forecasts of a trace: run latencies, and calls from dispatch to finish.

    Calls are measured from dispatch, not on the trace's clock: two clock readings late in a trace
    agree to many digits however bad the forecast.
    """
    runs = [
        (one.predicted_s, one.finish_s - one.arrival_s)
        for one in records
        if isinstance(one, RunRecord) and one.status == "ok" and one.predicted_s is not None
    ]
    calls = [
        (one.predicted_finish_s - one.sent_s, one.finish_s - one.sent_s)
        for one in records
        if isinstance(one, CallRecord)
        and one.status == "ok"
        and one.predicted_finish_s is not None
        and one.finish_s is not None
    ]
    return _forecast(label, runs), _forecast(label, calls)


def _forecast(label: str, pairs: Sequence[tuple[float, float]]) -> Forecast:
    return Forecast(
        label=label,
        predicted_s=tuple(predicted for predicted, _ in pairs),
        actual_s=tuple(actual for _, actual in pairs),
    )


def predicted_vs_actual(panels: Mapping[str, Sequence[Forecast]]) -> Figure:
    """Draw forecasts against outcomes, one panel per kind of duration, with the identity line.

    A panel's title states the median relative error, and the share within 25 % of the forecast.

    Parameters
    ----------
    panels
        Heading -> forecasts, one series per label; panels without a positive pair are left out.

    Raises
    ------
    InvalidInput
        If nothing is left.
    """
    kept = {}
    for heading, series in panels.items():
        pairs = [_positive(one) for one in series]
        if sum(len(one.actual_s) for one in pairs):
            kept[heading] = pairs
    if not kept:
        raise InvalidInput(
            "no forecast in the traces", where="predicted against actual", remedy="none to draw"
        )
    with rc_context(STYLE):
        figure = new_figure(4.9 * len(kept), 4.8)
        for axes, (heading, series) in zip(
            np.atleast_1d(figure.subplots(1, len(kept))), kept.items(), strict=True
        ):
            predicted = np.concatenate([one.predicted_s for one in series])
            actual = np.concatenate([one.actual_s for one in series])
            low = min(predicted.min(), actual.min())
            high = max(predicted.max(), actual.max())
            axes.plot([low, high], [low, high], color="black", linewidth=1.0, zorder=1)
            axes.fill_between(
                [low, high], [low / 1.25, high / 1.25], [low * 1.25, high * 1.25],
                color=FAINT, zorder=0, linewidth=0,
            )  # fmt: skip
            for position, one in enumerate(series):
                if one.actual_s:
                    axes.scatter(
                        one.predicted_s, one.actual_s, s=11, alpha=0.45, linewidths=0, zorder=2,
                        marker=MARKERS[position % len(MARKERS)],
                        color=PALETTE[position % len(PALETTE)], label=one.label,
                    )  # fmt: skip
            if high > WIDE * low:
                axes.set_xscale("log")
                axes.set_yscale("log")
                limits = (low / 1.2, high * 1.2)
                for axis in (axes.xaxis, axes.yaxis):
                    axis.set_major_formatter(_plain_number)
            else:
                limits = (0.0, high * 1.05)
            axes.set_xlim(limits)
            axes.set_ylim(limits)
            axes.set_box_aspect(1)
            ratio = actual / predicted
            within = float(np.mean((ratio >= 1 / 1.25) & (ratio <= 1.25)))
            error = float(np.median(np.abs(actual - predicted) / actual))
            axes.set_title(
                f"{heading} (n = {actual.size}): median error {error:.0%},\n"
                f"{within:.0%} within a factor of 1.25 (grey band)"
            )
            axes.set_xlabel("predicted (s)")
            axes.set_ylabel("actual (s)")
            if len(series) > 1:
                axes.legend(frameon=False, loc="upper left")
    return figure


def _positive(one: Forecast) -> Forecast:
    pairs = [
        (predicted, actual)
        for predicted, actual in zip(one.predicted_s, one.actual_s, strict=True)
        if predicted > 0 and actual > 0
    ]
    return _forecast(one.label, pairs)


def run_gantt(panels: Sequence[tuple[str, Sequence[TraceRecord]]], run_id: str) -> Figure:
    """Draw one run as it went under several policies, stacked on one time axis.

    Each call and tool has a row, by the time it became ready. White is waiting in the router, the
    dotted tint runs from dispatch to the first token (engine queue and prefill), full colour is
    decoding; the colour, and the word beside the bar, name the endpoint. Tools are grey and
    hatched.

    Raises
    ------
    InvalidInput
        If a panel does not hold the run.
    """
    rows = [_gantt_rows(label, records, run_id) for label, records in panels]
    endpoints = sorted({one.endpoint for part in rows for one in part if one.endpoint})
    colours = {name: PALETTE[k % len(PALETTE)] for k, name in enumerate(endpoints)}
    span_s = max(one.finish_s for part in rows for one in part)
    heights = [len(part) + 1.6 for part in rows]
    with rc_context(STYLE):
        figure = new_figure(9.6, 0.9 + 0.235 * sum(heights))
        stack = figure.subplots(len(rows), 1, sharex=True, height_ratios=heights, squeeze=False)
        for axes, (label, _), part in zip(stack[:, 0], panels, rows, strict=True):
            for number, one in enumerate(part):
                _gantt_bar(axes, number, one, colours, span_s)
            done_s = max(one.finish_s for one in part)
            axes.axvline(done_s, color="black", linewidth=1.0, linestyle=DASHES[1], zorder=0.5)
            axes.set_title(f"{label}: done after {done_s:.2f} s", loc="left", fontweight="bold")
            axes.set_yticks(range(len(part)), [one.name for one in part])
            axes.set_ylim(len(part) - 0.4, -0.6)
            axes.tick_params(axis="y", length=0)
            axes.grid(axis="x", color=FAINT, linewidth=0.6)
            axes.set_axisbelow(True)
        stack[-1, 0].set_xlim(0.0, span_s * 1.1)
        stack[-1, 0].set_xlabel("time since the run arrived (s)")
        figure.legend(
            handles=[
                Patch(facecolor="white", edgecolor=GREY, label="waiting in the router"),
                Patch(facecolor="#cccccc", edgecolor=GREY, hatch="....",
                      label="to first token (queue + prefill)"),
                Patch(facecolor=GREY, edgecolor=GREY, label="decoding"),
                Patch(facecolor="white", edgecolor=GREY, hatch="\\\\\\\\", label="tool"),
                *(Patch(facecolor=colour, label=name) for name, colour in colours.items()),
            ],
            loc="outside lower center", ncols=5, frameon=False,
        )  # fmt: skip
    return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class _GanttRow:
    """One bar; times from the arrival of the run, a tool has no endpoint."""

    name: str
    ready_s: float
    sent_s: float
    first_token_s: float
    finish_s: float
    endpoint: str = ""
    failed: bool = False


def _gantt_rows(label: str, records: Sequence[TraceRecord], run_id: str) -> list[_GanttRow]:
    runs = [one for one in records if isinstance(one, RunRecord) and one.run_id == run_id]
    mine = [one for one in records if one.run_id == run_id]
    starts = [one.arrival_s for one in runs] or [
        one.ready_s for one in mine if isinstance(one, CallRecord)
    ]
    if not starts:
        raise InvalidInput(
            f"no run {run_id!r}", where=f"trace of {label}", remedy="name a run of that trace"
        )
    origin = min(starts)
    rows = []
    for one in mine:
        if isinstance(one, CallRecord):
            end = one.finish_s if one.finish_s is not None else one.sent_s
            visit = f" ({one.visit + 1})" if one.visit else ""
            again = f" try {one.attempt + 1}" if one.attempt else ""
            rows.append(
                _GanttRow(
                    name=f"{one.node}{visit}{again}",
                    ready_s=one.ready_s - origin,
                    sent_s=one.sent_s - origin,
                    first_token_s=(end if one.first_token_s is None else one.first_token_s)
                    - origin,
                    finish_s=end - origin,
                    endpoint=one.endpoint,
                    failed=one.status != "ok",
                )
            )
        elif isinstance(one, ToolRecord):
            start, end = one.start_s - origin, one.finish_s - origin
            rows.append(
                _GanttRow(
                    name=one.node, ready_s=start, sent_s=start, first_token_s=start, finish_s=end,
                    failed=one.status != "ok",
                )
            )  # fmt: skip
    return sorted(rows, key=lambda one: (one.ready_s, one.finish_s, one.name))


def _gantt_bar(
    axes: Axes, number: int, one: _GanttRow, colours: Mapping[str, str], span_s: float
) -> None:
    def bar(start: float, end: float, **style: object) -> None:
        # A sliver that cannot be seen is left out; its edge alone would look like a bar.
        if end - start > span_s / 2000:
            axes.barh(number, end - start, left=start, height=0.66, **style)  # type: ignore[arg-type]

    if one.endpoint:
        colour = colours[one.endpoint]
        bar(one.ready_s, one.sent_s, facecolor="white", edgecolor=GREY, linewidth=0.8)
        bar(one.sent_s, one.first_token_s, facecolor=_tint(colour), edgecolor=colour,
            hatch="....", linewidth=0.8)  # fmt: skip
        bar(one.first_token_s, one.finish_s, facecolor=colour, edgecolor=colour, linewidth=0.8)
    else:
        bar(one.ready_s, one.finish_s, facecolor="white", edgecolor=GREY, hatch="\\\\\\\\",
            linewidth=0.8)  # fmt: skip
    word = one.endpoint or "tool"
    axes.annotate(
        f"{word}{' failed' if one.failed else ''}", (one.finish_s, number), xytext=(3, 0),
        textcoords="offset points", va="center", fontsize=7.5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.2},
    )  # fmt: skip


def _tint(colour: str, strength: float = 0.25) -> tuple[float, float, float]:
    red, green, blue = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
    return (
        1 - strength * (1 - red),
        1 - strength * (1 - green),
        1 - strength * (1 - blue),
    )


def table_heatmaps(table: DispatchTable, workflow_hash: str | None = None) -> Figure:
    """Draw the dispatch table: share of each call site's traffic per endpoint, a panel per bucket.

    Cells state the share and, below it, the cost in seconds.

    Parameters
    ----------
    workflow_hash
        Workflow to draw; the first of the table if None.

    Raises
    ------
    InvalidInput
        If the table has no row of that workflow.
    """
    hashes = sorted({row.workflow_hash for row in table.rows})
    chosen = workflow_hash if workflow_hash is not None else (hashes or [""])[0]
    rows = [row for row in table.rows if row.workflow_hash == chosen]
    if not rows:
        raise InvalidInput(
            f"no row of workflow {chosen!r}", where="table", remedy=f"known: {', '.join(hashes)}"
        )
    sites = list(dict.fromkeys(row.site for row in rows))
    buckets = len(table.bounds)
    across = min(2, buckets)
    down = math.ceil(buckets / across)
    with rc_context(STYLE):
        figure = new_figure(
            1.6 + across * (0.6 + 0.86 * len(table.endpoints)), down * (0.8 + 0.42 * len(sites))
        )
        panels = figure.subplots(down, across, squeeze=False).flatten()
        for unused in panels[buckets:]:
            unused.remove()
        for bucket, axes in enumerate(panels[:buckets]):
            share = np.zeros((len(sites), len(table.endpoints)))
            for row in rows:
                if row.bucket != bucket:
                    continue
                for one in row.ranked:
                    y, x = sites.index(row.site), table.endpoints.index(one.endpoint)
                    share[y, x] = one.share
                    axes.text(
                        x, y, f"{one.share:.0%}\n{one.cost_s:.2f} s", ha="center", va="center",
                        fontsize=7, color="black" if one.share > 0.55 else "white",
                    )  # fmt: skip
            image = axes.imshow(share, cmap="cividis", vmin=0, vmax=1, aspect="auto")
            upper = table.bounds[bucket]
            lower = 0.0 if bucket == 0 else table.bounds[bucket - 1]
            span = f"above {lower:.2g}" if math.isinf(upper) else f"{lower:.2g} to {upper:.2g}"
            axes.set_title(f"load {span} calls per slot")
            axes.set_xticks(range(len(table.endpoints)), table.endpoints)
            axes.set_yticks(range(len(sites)), sites if bucket % across == 0 else [""] * len(sites))
            if bucket >= buckets - across:
                axes.set_xlabel("endpoint")
            if bucket % across == 0:
                axes.set_ylabel("call site")
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
        figure.colorbar(
            image, ax=list(panels[:buckets]), label="planned share of traffic",
            fraction=0.04, pad=0.01,
        )  # fmt: skip
    return figure


_KINDS = {
    "llm": ("#CFE4F2", "language model call"),
    "tool": ("#FBE3B5", "tool"),
    "router": ("#D9EFE6", "router"),
    "code": ("#EEEEEE", "code"),
    "subgraph": ("#F3DCEA", "sub-graph"),
}
_X, _Y, _BOX_W, _BOX_H = 2.05, 1.0, 1.3, 0.5


def workflow_graph(workflow: Workflow) -> Figure:
    """Draw one level of a workflow graph as compiled, left to right.

    Shape, colour and legend give a node's kind. A bar before a node is a join (``all``, or how
    many of how many); a small diamond after a node is a branch, its edges labelled with outcome
    and probability where known; dashed curves lead back (loops). ``*`` marks nodes started a
    number of times known only at run time.
    """
    layout = lay_out(workflow)
    heights = [y for _, y in layout.positions.values()] + [
        y for route in layout.routes.values() for _, y in route
    ]
    arcs = _arc_heights(layout)
    bottom = min([min(heights) - 0.7, *(y - 0.35 for y in arcs.values())])
    top = max(heights) + 0.7
    spots = {node: (x * _X, y * _Y) for node, (x, y) in layout.positions.items()}
    joined = {(source, one.target) for one in workflow.joins for source in one.sources}
    outcomes = _edge_outcomes(workflow)
    with rc_context(STYLE):
        figure = new_figure(
            max(6.0, 0.78 * _X * layout.layers), max(2.4, 0.78 * (top - bottom) + 0.6)
        )
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_xlim(-0.8, (layout.layers - 1) * _X + 0.8)
        axes.set_ylim(bottom, top)
        axes.set_aspect("equal")
        for edge, route in layout.routes.items():
            _draw_edge(axes, workflow, edge, route, joined=edge in joined, label=outcomes.get(edge))
        for edge in layout.back_edges:
            _draw_back_edge(axes, spots, edge, arcs[edge] * _Y, outcomes.get(edge))
        for node, spot in spots.items():
            _draw_node(axes, workflow, node, spot)
        for join in workflow.joins:
            x, y = spots[join.target]
            left = x - _half_width(workflow, join.target) - 0.09
            axes.plot([left, left], [y - 0.3, y + 0.3], color="black", linewidth=3.2,
                      solid_capstyle="butt", zorder=4)  # fmt: skip
            need = "all" if join.need is None else f"{join.need} of {len(join.sources)}"
            axes.text(left, y + 0.34, f"join: {need}", ha="center", va="bottom", fontsize=7.5)
        used = [kind for kind in _KINDS if any(node.kind == kind for node in workflow.nodes)]
        handles: list[Patch | Line2D] = [
            Patch(facecolor=_KINDS[kind][0], edgecolor="black", label=_KINDS[kind][1])
            for kind in used
        ]
        if workflow.branches:
            handles.append(Line2D([], [], color="white", marker="D", markersize=6,
                                  markeredgecolor="black", label="branch"))  # fmt: skip
        if workflow.joins:
            handles.append(Line2D([], [], color="black", linewidth=3.2, label="join"))
        if layout.back_edges:
            handles.append(Line2D([], [], color=PALETTE[1], linestyle=DASHES[1], label="loop"))
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles),
                      frameon=False)  # fmt: skip
    return figure


def _half_width(workflow: Workflow, node: NodeId) -> float:
    if node in (START, END):
        return 0.26
    return 0.78 if workflow.node(node).kind == "router" else _BOX_W / 2


def _edge_outcomes(workflow: Workflow) -> dict[tuple[NodeId, NodeId], str]:
    """Return edge -> outcome names with probabilities, of edges that a branch makes."""
    labels: dict[tuple[NodeId, NodeId], list[str]] = {}
    for branch in workflow.branches:
        for outcome in branch.outcomes:
            chance = "" if outcome.probability is None else f" {outcome.probability:.2f}"
            for target in outcome.targets or (END,):
                labels.setdefault((branch.source, target), []).append(f"{outcome.id}{chance}")
    return {edge: "\n".join(names) for edge, names in labels.items()}


def _draw_edge(
    axes: Axes,
    workflow: Workflow,
    edge: tuple[NodeId, NodeId],
    route: Sequence[tuple[float, float]],
    *,
    joined: bool,
    label: str | None,
) -> None:
    source, target = edge
    points = [(x * _X, y * _Y) for x, y in route]
    gap = 0.12 if joined else 0.02
    start = (points[0][0] + _half_width(workflow, source) + (0.16 if label else 0.0), points[0][1])
    end = (points[-1][0] - _half_width(workflow, target) - gap, points[-1][1])
    points = [start, *points[1:-1], end]
    vertices, codes = [points[0]], [Outline.MOVETO]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        middle = (x0 + x1) / 2
        vertices += [(middle, y0), (middle, y1), (x1, y1)]
        codes += [Outline.CURVE4] * 3
    axes.add_patch(
        FancyArrowPatch(
            path=Outline(vertices, codes),
            arrowstyle="-" if joined else "-|>", mutation_scale=9, linewidth=1.1,
            color="black", shrinkA=0, shrinkB=0, zorder=2,
        )
    )  # fmt: skip
    if label is not None:
        x0, y0 = points[0]
        x1, y1 = points[1]
        axes.add_patch(_diamond(x0 - 0.08, y0, 0.08))
        _edge_label(axes, (x0 + x1) / 2, (y0 + y1) / 2, label)


def _edge_label(axes: Axes, x: float, y: float, label: str) -> None:
    axes.text(
        x, y, label, ha="center", va="center", fontsize=7.5, zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip


def _diamond(x: float, y: float, radius: float) -> Polygon:
    corners = [(x - radius, y), (x, y + radius), (x + radius, y), (x, y - radius)]
    return Polygon(corners, closed=True, facecolor="white", edgecolor="black", zorder=4)


def _arc_heights(layout: Layout) -> dict[tuple[NodeId, NodeId], float]:
    """Return how low each back edge dips: below everything between its ends, apart in steps."""
    depth = {}
    for number, (source, target) in enumerate(layout.back_edges):
        left, right = sorted((layout.positions[source][0], layout.positions[target][0]))
        inside = [y for x, y in layout.positions.values() if left <= x <= right]
        inside += [y for route in layout.routes.values() for x, y in route if left <= x <= right]
        depth[source, target] = min(inside) - 0.75 - 0.3 * number
    return depth


def _draw_back_edge(
    axes: Axes,
    spots: Mapping[NodeId, tuple[float, float]],
    edge: tuple[NodeId, NodeId],
    low: float,
    label: str | None,
) -> None:
    (x0, y0), (x1, y1) = spots[edge[0]], spots[edge[1]]
    y0, y1 = y0 - _BOX_H / 2, y1 - _BOX_H / 2 - 0.02
    if edge[0] == edge[1]:
        x0, x1 = x0 + 0.35, x1 - 0.35
    # A cubic reaches three quarters of the way to its control points.
    deep = (low - (y0 + y1) / 8) / 0.75
    axes.add_patch(
        FancyArrowPatch(
            path=Outline(
                [(x0, y0), (x0, deep), (x1, deep), (x1, y1)],
                [Outline.MOVETO, Outline.CURVE4, Outline.CURVE4, Outline.CURVE4],
            ),
            arrowstyle="-|>", mutation_scale=9, linewidth=1.3, linestyle=DASHES[1],
            color=PALETTE[1], shrinkA=0, shrinkB=0, zorder=2,
        )
    )  # fmt: skip
    _edge_label(axes, (x0 + x1) / 2, low, f"again\n{label}" if label else "again")


def _draw_node(axes: Axes, workflow: Workflow, node: NodeId, spot: tuple[float, float]) -> None:
    x, y = spot
    if node in (START, END):
        face = "white" if node == START else "black"
        axes.add_patch(Circle((x, y), 0.24, facecolor=face, edgecolor="black", zorder=3))
        word = "start" if node == START else "end"
        axes.text(x, y, word, ha="center", va="center", fontsize=7.5, zorder=4,
                  color="black" if node == START else "white")  # fmt: skip
        return
    record = workflow.node(node)
    face = _KINDS[record.kind][0]
    left, low = x - _BOX_W / 2, y - _BOX_H / 2
    if record.kind == "router":
        half = _half_width(workflow, node)
        inner, high = half - 0.25, y + _BOX_H / 2
        corners = [(x - half, y), (x - inner, high), (x + inner, high),
                   (x + half, y), (x + inner, low), (x - inner, low)]  # fmt: skip
        axes.add_patch(Polygon(corners, closed=True, facecolor=face, edgecolor="black", zorder=3))
    else:
        rounding = 0.18 if record.kind == "llm" else 0.001
        axes.add_patch(
            FancyBboxPatch(
                (left, low), _BOX_W, _BOX_H, facecolor=face, edgecolor="black", zorder=3,
                boxstyle=f"round,pad=0,rounding_size={rounding}",
                linestyle="--" if record.kind == "tool" else "-",
            )
        )  # fmt: skip
        if record.kind == "subgraph":
            axes.add_patch(
                FancyBboxPatch(
                    (left + 0.06, low + 0.06), _BOX_W - 0.12, _BOX_H - 0.12, facecolor="none",
                    edgecolor="black", linewidth=0.7, zorder=3,
                    boxstyle="round,pad=0,rounding_size=0.001",
                )
            )  # fmt: skip
    name = "\n".join(textwrap.wrap(node, 14, break_long_words=True)[:2])
    axes.text(x, y, f"{name}{' *' if record.dynamic else ''}", ha="center", va="center",
              fontsize=8, zorder=4)  # fmt: skip
