"""Pictures over time: a run as it went, the calls of each endpoint, how full the fleet was."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import numpy.typing as npt
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from planner.domain.errors import InvalidInput
from planner.domain.trace import CallRecord, TraceRecord
from planner.domain.workflow import Workflow
from planner.report.anatomy import RunAnatomy, Step, run_anatomy
from planner.report.drawing import DASHES, FAINT, GREY, PALETTE, STYLE, new_figure, tint

__all__ = ["fleet_gantt", "fleet_occupancy", "run_gantt"]

Span = tuple[float, float, str]
"""When an endpoint had a call, s, and of which run."""


def run_gantt(
    panels: Sequence[tuple[str, Sequence[TraceRecord]]],
    run_id: str,
    *,
    workflow: Workflow | None = None,
) -> Figure:
    """Draw one run as it went under several policies, stacked on one time axis.

    Each call and tool has a row, by the time it became ready. White is waiting in the router, the
    dotted tint runs from dispatch to the first token (engine queue and prefill), full colour is
    decoding; the colour, and the word beside the bar, name the endpoint. Tools are white and
    hatched. The line through the bars is the critical path, whose names are bold; knowing
    ``workflow`` makes it more certain.

    Raises
    ------
    InvalidInput
        If a panel does not hold the run.
    """
    runs = [(label, run_anatomy(records, run_id, workflow=workflow)) for label, records in panels]
    endpoints = sorted({one.endpoint for _, run in runs for one in run.steps if one.endpoint})
    colours = {name: PALETTE[k % len(PALETTE)] for k, name in enumerate(endpoints)}
    span_s = max(run.latency_s for _, run in runs)
    heights = [len(run.steps) + 1.6 for _, run in runs]
    with rc_context(STYLE):
        figure = new_figure(9.6, 0.9 + 0.235 * sum(heights))
        stack = figure.subplots(len(runs), 1, sharex=True, height_ratios=heights, squeeze=False)
        for axes, (label, run) in zip(stack[:, 0], runs, strict=True):
            _draw_run(axes, run, colours, span_s)
            axes.set_title(
                f"{label}: done after {run.latency_s:.2f} s", loc="left", fontweight="bold"
            )
        stack[-1, 0].set_xlim(0.0, span_s * 1.1)
        stack[-1, 0].set_xlabel("time since the run arrived (s)")
        figure.legend(
            handles=[
                Patch(facecolor="white", edgecolor=GREY, label="waiting in the router"),
                Patch(facecolor="#cccccc", edgecolor=GREY, hatch="....",
                      label="to first token (queue + prefill)"),
                Patch(facecolor=GREY, edgecolor=GREY, label="decoding"),
                Patch(facecolor="white", edgecolor=GREY, hatch="\\\\\\\\", label="tool"),
                Line2D([], [], color="black", linewidth=1.3, marker="|", label="critical path"),
                *(Patch(facecolor=colour, label=name) for name, colour in colours.items()),
            ],
            loc="outside lower center", ncols=5, frameon=False,
        )  # fmt: skip
    return figure


def _draw_run(axes: Axes, run: RunAnatomy, colours: Mapping[str, str], span_s: float) -> None:
    for number, one in enumerate(run.steps):
        _gantt_bar(axes, number, one, colours, span_s)
    places = {id(one): number for number, one in enumerate(run.steps)}
    path = [(places[id(one)], one) for one in run.critical_path]
    corners = [(at, y) for y, one in path for at in (one.begin_s, one.finish_s)]
    if corners:
        # Under the bars, so that it shows between them: where the run went from one to the next.
        axes.plot(*zip(*corners, strict=True), color="black", linewidth=1.3, zorder=0.6)
    axes.axvline(run.latency_s, color="black", linewidth=1.0, linestyle=DASHES[1], zorder=0.5)
    axes.set_yticks(range(len(run.steps)), [one.name for one in run.steps])
    for text, one in zip(axes.get_yticklabels(), run.steps, strict=True):
        text.set_fontweight("bold" if one.critical else "normal")
    axes.set_ylim(len(run.steps) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", color=FAINT, linewidth=0.6)
    axes.set_axisbelow(True)


def _gantt_bar(
    axes: Axes, number: int, one: Step, colours: Mapping[str, str], span_s: float
) -> None:
    def bar(start: float, end: float, **style: object) -> None:
        # A sliver that cannot be seen is left out; its edge alone would look like a bar.
        if end - start > span_s / 2000:
            axes.barh(number, end - start, left=start, height=0.66, **style)  # type: ignore[arg-type]

    if one.endpoint:
        colour = colours[one.endpoint]
        bar(one.ready_s, one.sent_s, facecolor="white", edgecolor=GREY, linewidth=0.8)
        bar(one.sent_s, one.first_token_s, facecolor=tint(colour), edgecolor=colour,
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


def _spans(records: Iterable[TraceRecord]) -> dict[str, list[Span]]:
    """Return, by endpoint, the time each call was there, by the instant it was sent.

    A call with a prefill endpoint is there until its first token, and on the other from then on.
    """
    spans: dict[str, list[Span]] = {}
    for one in records:
        if not isinstance(one, CallRecord) or one.finish_s is None:
            continue
        begin = one.sent_s
        if one.prefill_endpoint is not None and one.first_token_s is not None:
            spans.setdefault(one.prefill_endpoint, []).append(
                (begin, one.first_token_s, one.run_id)
            )
            begin = one.first_token_s
        spans.setdefault(one.endpoint, []).append((begin, one.finish_s, one.run_id))
    if not spans:
        raise InvalidInput("no call finished", where="trace", remedy="give a trace with calls")
    return {endpoint: sorted(found) for endpoint, found in spans.items()}


def fleet_gantt(
    records: Iterable[TraceRecord],
    endpoints: Sequence[str],
    *,
    run_id: str,
    margin_s: float = 2.0,
) -> Figure:
    """Draw the calls on every endpoint while one run was under way, that run's in full colour.

    Parameters
    ----------
    endpoints
        In drawing order, from the top; those without a call in this time keep an empty row.
    run_id
        The run; others are light grey.
    margin_s
        Time shown before it and after it, s.

    Raises
    ------
    InvalidInput
        If the trace does not hold the run's calls.
    """
    spans = _spans(records)
    own = [one for found in spans.values() for one in found if one[2] == run_id]
    if not own:
        raise InvalidInput(
            f"no call of run {run_id!r}", where="trace", remedy="name a run of that trace"
        )
    first = min(one[0] for one in own)
    low, high = -margin_s, max(one[1] for one in own) - first + margin_s
    lanes = {
        endpoint: [
            (lane, span)
            for lane, span in _lanes(spans.get(endpoint, ()))
            if span[0] < first + high and span[1] > first + low
        ]
        for endpoint in endpoints
    }
    with rc_context(STYLE):
        rows = {
            name: 1 + max((lane for lane, _ in part), default=0) for name, part in lanes.items()
        }
        figure = new_figure(9.6, 1.2 + 0.14 * sum(rows.values()) + 0.12 * len(rows))
        axes = figure.subplots()
        top, centres = 0.0, []
        for endpoint, part in lanes.items():
            for lane, (start, end, whose) in part:
                mine = whose == run_id
                axes.barh(
                    top + lane, end - start, left=start - first, height=0.8, linewidth=0.5,
                    facecolor=PALETTE[0] if mine else "#e4e4e4",
                    edgecolor="black" if mine else GREY, zorder=3 if mine else 2,
                )  # fmt: skip
            centres.append(top + (rows[endpoint] - 1) / 2)
            top += rows[endpoint] + 0.8
            axes.axhline(top - 0.9, color=GREY, linewidth=0.6)
        axes.set_yticks(centres, list(lanes))
        axes.tick_params(axis="y", length=0)
        axes.set_ylabel("endpoint (a row per call side by side)")
        axes.set_ylim(top - 0.6, -0.9)
        axes.set_xlim(low, high)
        axes.set_xlabel("time since the first call of the run was sent (s)")
        axes.grid(axis="x", color=FAINT, linewidth=0.6)
        axes.set_axisbelow(True)
        figure.legend(
            handles=[
                Patch(facecolor=PALETTE[0], edgecolor="black", label=f"calls of run {run_id}"),
                Patch(facecolor="#e4e4e4", edgecolor=GREY, label="calls of other runs"),
            ],
            loc="outside lower center", ncols=2, frameon=False,
        )  # fmt: skip
    return figure


def _lanes(spans: Sequence[Span]) -> list[tuple[int, Span]]:
    """Return each span with the lowest row that is free when it begins."""
    busy: list[tuple[float, int]] = []
    free: list[int] = []
    placed = []
    for span in spans:
        while busy and busy[0][0] <= span[0]:
            heapq.heappush(free, heapq.heappop(busy)[1])
        lane = heapq.heappop(free) if free else len(busy)
        heapq.heappush(busy, (span[1], lane))
        placed.append((lane, span))
    return placed


def fleet_occupancy(records: Iterable[TraceRecord], slots: Mapping[str, int]) -> Figure:
    """Draw the calls on each endpoint over time, against its slots.

    Plain colour is calls in service, hatched above the line is calls that find no slot and queue
    in the engine. Beside each panel stands the share of its slots that was busy.

    Parameters
    ----------
    slots
        Endpoint -> calls it serves side by side, >= 1; drawing order from the top.

    Raises
    ------
    InvalidInput
        If no call finished.
    """
    spans = _spans(records)
    first = min(found[0][0] for found in spans.values())
    last = max(end for found in spans.values() for _, end, _ in found)
    with rc_context(STYLE):
        figure = new_figure(9.6, 0.9 + 0.95 * len(slots))
        stack = figure.subplots(len(slots), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (endpoint, room) in zip(stack, slots.items(), strict=True):
            times, calls = _counts(spans.get(endpoint, ()), first, last)
            served = np.minimum(calls, room)
            axes.fill_between(
                times - first, served, step="post", facecolor=PALETTE[5], edgecolor=PALETTE[0],
                linewidth=0.7,
            )  # fmt: skip
            axes.fill_between(
                times - first, served, calls, where=calls > room, step="post", facecolor="white",
                edgecolor=PALETTE[1], hatch="////", linewidth=0.7,
            )  # fmt: skip
            axes.axhline(room, color="black", linewidth=1.0, linestyle=DASHES[1])
            area = float(np.sum(served[:-1] * np.diff(times)))
            axes.text(
                1.01, 0.5, f"{area / max(room * (last - first), 1e-9):.0%} of\n{room} slots busy",
                transform=axes.transAxes, va="center", fontsize=8,
            )  # fmt: skip
            axes.set_ylim(0, 1.12 * max(room, float(calls.max())))
            axes.yaxis.get_major_locator().set_params(integer=True, nbins=3)
            axes.set_ylabel(f"{endpoint}\n(calls)")
        stack[-1].set_xlim(0.0, last - first)
        stack[-1].set_xlabel("time since the first call was sent (s)")
        figure.legend(
            handles=[
                Patch(facecolor=PALETTE[5], edgecolor=PALETTE[0], label="in service"),
                Patch(facecolor="white", edgecolor=PALETTE[1], hatch="////",
                      label="queued in the engine"),
                Line2D([], [], color="black", linestyle=DASHES[1], label="slots"),
            ],
            loc="outside lower center", ncols=3, frameon=False,
        )  # fmt: skip
    return figure


def _counts(
    spans: Sequence[Span], first: float, last: float
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the instants at which the number of calls changes, and the number from then on."""
    events = [(first, 0), (last, 0)]
    events += [(start, 1) for start, _, _ in spans] + [(end, -1) for _, end, _ in spans]
    times, steps = zip(*sorted(events), strict=True)
    return np.array(times), np.cumsum(steps)
