"""All pictures, for files and notebooks alike; every function returns a matplotlib `Figure`.

This module is where they are found. Distributions, comparisons, forecasts, tables and loads are
drawn here; the workflow graph, pictures over time and those of predictors live beside it. The house
rules are those of `planner.report.drawing`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from planner.dispatch.table import DispatchTable
from planner.domain.errors import InvalidInput
from planner.domain.trace import CallRecord, RunRecord, TraceRecord
from planner.metrics import PairedDifference
from planner.report.anatomy import PARTS, graph_weights, mean_parts, run_anatomy
from planner.report.comparison import COLUMNS, COMPARED, ComparisonTable
from planner.report.drawing import (
    DASHES,
    FAINT,
    GREY,
    HATCHES,
    MARKERS,
    PALETTE,
    STYLE,
    WIDE,
    is_own,
    new_figure,
    plain_number,
    tint,
    to_png,
)
from planner.report.graph_plot import workflow_graph
from planner.report.model_plots import calibration_plot, latency_plot, reliability_plot
from planner.report.terminal import comparison_text, percent
from planner.report.timelines import fleet_gantt, fleet_occupancy, run_gantt

__all__ = [
    "Forecast",
    "LoadPoint",
    "calibration_plot",
    "draw_load_curves",
    "effects",
    "fleet_gantt",
    "fleet_occupancy",
    "forecasts_of",
    "graph_weights",
    "latency_bars",
    "latency_cdfs",
    "latency_plot",
    "load_latency",
    "mean_parts",
    "predicted_vs_actual",
    "reliability_plot",
    "run_anatomy",
    "run_gantt",
    "search_progress",
    "table_heatmaps",
    "time_parts",
    "to_png",
    "workflow_graph",
]


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
                linewidth=2.4 if is_own(label) else 1.5,
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
            axes.xaxis.set_major_formatter(plain_number)
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
                    color=PALETTE[5] if is_own(row.policy) else "#CCCCCC",
                    hatch="///" if is_own(row.policy) else None,
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
                    axis.set_major_formatter(plain_number)
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
                        fontsize=7, color="white" if one.share > 0.55 else "black",
                    )  # fmt: skip
            image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1, aspect="auto")
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


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadPoint:
    """A time at a load, with its interval if there is one.

    Parameters
    ----------
    load
        Arrival rate over capacity, or runs per second.
    value_s
        Run latency, s, > 0.
    low_s, high_s
        Ends of its interval, s; None for none.
    """

    load: float
    value_s: float
    low_s: float | None = None
    high_s: float | None = None


def load_latency(
    curves: Mapping[str, Sequence[LoadPoint]],
    *,
    bound: Sequence[LoadPoint] = (),
    proven: str = "proven: no policy is faster",
    load: str = "load (arrival rate / capacity)",
    latency: str = "mean run latency (s)",
) -> Figure:
    """Draw run latency over load, a line per policy or fleet, with intervals as whiskers.

    Parameters
    ----------
    curves
        Label -> points, in any order; empty ones are left out.
    bound, proven
        What nothing can go below, drawn as a shaded floor, and what to call it.
    load, latency
        Axis labels, with units.

    Raises
    ------
    InvalidInput
        If no curve has a point.
    """
    shown = {label: points for label, points in curves.items() if points}
    if not shown:
        raise InvalidInput("no point", where="load and latency", remedy="give at least one")
    with rc_context(STYLE):
        figure = new_figure(7.2, 4.4)
        axes = figure.subplots()
        draw_load_curves(axes, shown)
        handles, labels = axes.get_legend_handles_labels()
        if bound:
            ordered = sorted(bound, key=lambda one: one.load)
            xs, ys = [one.load for one in ordered], [one.value_s for one in ordered]
            axes.fill_between(xs, ys, min(ys) / 100, color=FAINT, linewidth=0, zorder=0)
            (floor,) = axes.plot(xs, ys, color="black", linewidth=1.0)
            handles.append(floor)
            labels.append(proven)
        lows = [one.value_s for points in (*shown.values(), bound) for one in points]
        axes.set_ylim(bottom=min(lows) / 1.15)
        axes.set_xlabel(load)
        axes.set_ylabel(latency)
        figure.legend(
            handles, labels, loc="outside lower center", ncols=3, frameon=False, handlelength=3.6
        )
    return figure


_DECADE = 6.0
"""Below this ratio of largest to least, ticks at 1, 2 and 5 of each decade are too few."""


def draw_load_curves(axes: Axes, curves: Mapping[str, Sequence[LoadPoint]]) -> None:
    """Draw the lines of `load_latency` into axes; the latency axis gets logarithmic."""
    for position, (label, points) in enumerate(curves.items()):
        if not points:
            continue
        ordered = sorted(points, key=lambda one: one.load)
        whiskers = np.array(
            [
                (
                    one.value_s - (one.value_s if one.low_s is None else one.low_s),
                    (one.value_s if one.high_s is None else one.high_s) - one.value_s,
                )
                for one in ordered
            ]
        ).T
        axes.errorbar(
            [one.load for one in ordered], [one.value_s for one in ordered],
            yerr=whiskers if whiskers.any() else None,
            color=PALETTE[position % len(PALETTE)],
            linestyle=DASHES[position % len(DASHES)],
            marker=MARKERS[position % len(MARKERS)],
            markersize=4.5, linewidth=2.2 if is_own(label) else 1.3, elinewidth=0.9, capsize=2.5,
            label=label,
        )  # fmt: skip
    axes.set_yscale("log")
    values = [one.value_s for points in curves.values() for one in points]
    axes.yaxis.set_major_formatter(plain_number)
    axes.yaxis.set_minor_formatter(NullFormatter())
    if max(values, default=1.0) < _DECADE * min(values, default=1.0):
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))


def effects(
    rows: Mapping[str, PairedDifference], *, quantity: str = "mean run latency", against: str
) -> Figure:
    """Draw relative differences with their intervals, a row each; left of zero is less.

    A filled dot says that the whole interval lies on one side of zero.

    Parameters
    ----------
    rows
        Label -> difference, as of `planner.metrics.paired_bootstrap`.
    quantity, against
        What differs, and from what.

    Raises
    ------
    InvalidInput
        If there is no row.
    """
    if not rows:
        raise InvalidInput("no difference", where="effects", remedy="give at least one")
    with rc_context(STYLE):
        figure = new_figure(8.2, 1.1 + 0.32 * len(rows))
        axes = figure.subplots()
        axes.axvline(0.0, color="black", linewidth=1.0, zorder=1)
        for y, one in enumerate(rows.values()):
            mean, low, high = (100 * value for value in one)
            if math.isfinite(low) and math.isfinite(high):
                axes.plot([low, high], [y, y], color=GREY, linewidth=2.0, zorder=2)
                said = f"{percent(one.mean)} [{percent(one.low)}, {percent(one.high)}]"
            else:
                said = f"{percent(one.mean)} (one seed)"
            sure = low > 0 or high < 0
            colour = PALETTE[1] if mean > 0 else PALETTE[0]
            axes.plot(
                mean, y, marker="o" if mean <= 0 else "s", markersize=7, zorder=3,
                markerfacecolor=colour if sure else "white", markeredgecolor=colour,
            )  # fmt: skip
            axes.text(1.02, y, said, va="center", fontsize=8,
                      transform=axes.get_yaxis_transform())  # fmt: skip
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_xlabel(f"{quantity} against {against} (%)")
    return figure


_PART_NAMES = {
    "router": "waiting in the router",
    "prefill": "to first token (queue + prefill)",
    "decode": "decoding",
    "tool": "tools",
    "between": "between steps (application)",
}


def time_parts(rows: Mapping[str, Mapping[str, float]]) -> Figure:
    """Draw where the seconds of a run went, a bar each.

    Parameters
    ----------
    rows
        Label -> seconds by part of `planner.report.anatomy.PARTS`, of one run or of a mean one.

    Raises
    ------
    InvalidInput
        If there is no row.
    """
    if not rows:
        raise InvalidInput("no run", where="parts of runs", remedy="give at least one")
    looks = dict(zip(PARTS, zip(PALETTE, HATCHES, strict=False), strict=False))
    longest = max(sum(row.values()) for row in rows.values())
    # What cannot be seen needs no place in the legend.
    used = [p for p in PARTS if any(row.get(p, 0.0) > 0.002 * longest for row in rows.values())]
    with rc_context(STYLE):
        figure = new_figure(8.2, 1.2 + 0.38 * len(rows))
        axes = figure.subplots()
        for y, row in enumerate(rows.values()):
            left = 0.0
            for part in used:
                colour, hatch = looks[part]
                seconds = row.get(part, 0.0)
                axes.barh(y, seconds, left=left, height=0.62, facecolor=tint(colour, 0.45),
                          edgecolor=colour, hatch=hatch, linewidth=0.8)  # fmt: skip
                if seconds > 0.07 * longest:
                    axes.text(
                        left + seconds / 2, y, f"{seconds:.1f}", ha="center", va="center",
                        fontsize=8,
                        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
                    )  # fmt: skip
                left += seconds
            axes.text(left, y, f" {left:.2f} s", va="center", fontsize=8)
        axes.set_yticks(range(len(rows)), list(rows))
        axes.set_ylim(len(rows) - 0.4, -0.6)
        axes.set_xlim(0.0, longest * 1.1)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("seconds on the critical path (s)")
        figure.legend(
            handles=[
                Patch(facecolor=tint(looks[part][0], 0.45), edgecolor=looks[part][0],
                      hatch=looks[part][1], label=_PART_NAMES[part])
                for part in used
            ],
            loc="outside lower center", ncols=3, frameon=False,
        )  # fmt: skip
    return figure


def search_progress(log: Sequence[tuple[float, float, float]]) -> Figure:
    """Draw how a search closed in: the best plan and the proven bound over its time.

    Parameters
    ----------
    log
        (seconds since the search began, best objective in s, bound in s), by time.

    Raises
    ------
    InvalidInput
        If it is empty.
    """
    if not log:
        raise InvalidInput("no entry", where="search log", remedy="give that of a solved plan")
    times, best, bound = (np.array(column) for column in zip(*log, strict=True))
    # What was found stays found, and what was proven stays proven.
    best, bound = np.minimum.accumulate(best), np.maximum.accumulate(bound)
    with rc_context(STYLE):
        figure = new_figure(7.2, 3.4)
        axes = figure.subplots()
        axes.fill_between(times, bound, best, step="post", color=FAINT, linewidth=0)
        axes.step(times, best, where="post", color=PALETTE[0], linewidth=2.0, marker="o",
                  markersize=3.5, label="best plan so far")  # fmt: skip
        axes.step(times, bound, where="post", color=PALETTE[1], linewidth=1.5,
                  linestyle=DASHES[1], marker="^", markersize=3.5,
                  label="proven: no plan is better")  # fmt: skip
        gap = (best[-1] - bound[-1]) / best[-1]
        axes.set_title(f"{best[-1]:.2f} s, at least {bound[-1]:.2f} s: gap {gap:.1%}")
        axes.set_xlabel("search time (s)")
        axes.set_ylabel("expected run latency (s)")
        figure.legend(loc="outside lower center", ncols=2, frameon=False)
    return figure
