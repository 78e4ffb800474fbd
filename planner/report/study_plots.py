"""The pictures of a study, drawn from its document as plain data.

Two dozen policies do not fit a legend: where there are many, the best few of a panel are named.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from planner.metrics import PairedDifference
from planner.report.drawing import DASHES, PALETTE, STYLE, new_figure
from planner.report.plots import LoadPoint, draw_load_curves, effects

__all__ = ["attainment_plot", "forest_plot", "load_plot", "panels"]

Setting = Mapping[str, Any]
OURS = "almanac"
_NAMED = 5
_LEAST_LOADS = 3
_FAINT = "#bbbbbb"


def panels(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    """Return the settings that differ in load only, by title; groups without a curve left out.

    A curve takes a policy at three loads: the line between two would say what nobody simulated.
    Settings of a fixed rate have no load.
    """
    groups: dict[str, list[Setting]] = {}
    for one in settings:
        fields = one["setting"]
        if fields["fixed_rps"] is not None:
            continue
        title = f"{fields['fleet']}, {fields['mix']}, {fields['kv']} KV, {fields['arrivals']}"
        if fields["forecasts"] != "learned":
            title += f", {fields['forecasts']} forecasts"
        groups.setdefault(title, []).append(one)
    return {title: group for title, group in groups.items() if _load_curves(group)}


def load_plot(groups: Mapping[str, Sequence[Setting]]) -> Figure:
    """Draw mean run latency in s over load, a panel per group of `panels`.

    All panels show the same policies, ours and the best few of the others, with the same looks.
    """
    curves = {title: _load_curves(group) for title, group in groups.items()}
    badness: dict[str, list[float]] = {}
    for panel in curves.values():
        # The best are those at the highest load, where policies lie apart.
        last_s = {name: points[-1].value_s for name, points in panel.items()}
        for name, value_s in last_s.items():
            badness.setdefault(name, []).append(value_s / min(last_s.values()))
    named = _named({name: fmean(values) for name, values in badness.items()})
    with rc_context(STYLE):
        figure, grid = _grid(len(groups))
        for axes, (title, panel) in zip(grid, curves.items(), strict=True):
            draw_load_curves(axes, {name: panel[name] for name in named if name in panel})
            axes.legend(frameon=False, fontsize=6.5)
            axes.set_title(title)
            closed = groups[title][0]["setting"]["arrivals"] == "closed"
            axes.set_xlabel(f"load ({'clients / slots' if closed else 'arrival rate / capacity'})")
            axes.set_ylabel("mean run latency (s)")
    return figure


def _load_curves(group: Sequence[Setting]) -> dict[str, list[LoadPoint]]:
    """Return the points, by load, of each policy that has enough of them."""
    curves: dict[str, list[LoadPoint]] = {}
    for one in sorted(group, key=lambda one: one["setting"]["load"]):
        for policy in one["policies"]:
            if policy["metrics"]["mean_s"]:
                value_s = policy["metrics"]["mean_s"]["mean"]
                point = LoadPoint(load=one["setting"]["load"], value_s=value_s)
                curves.setdefault(policy["policy"], []).append(point)
    return {name: points for name, points in curves.items() if len(points) >= _LEAST_LOADS}


def attainment_plot(settings: Sequence[Setting]) -> Figure:
    """Draw the share of runs within a multiple of their time alone, a panel per setting.

    Each panel names its best few; a policy looks the same wherever it is named.
    """
    curves = [
        {
            policy["policy"]: [(scale, 100.0 * share) for scale, share in policy["attainment"]]
            for policy in one["policies"]
            if policy["attainment"]
        }
        for one in settings
    ]
    # The best has most runs within the scales shown.
    named = [_named({n: -sum(share for _, share in c) for n, c in p.items()}) for p in curves]
    # Those named most often come first: the plainest looks are theirs.
    often = Counter(name for names in named for name in names)
    place = {name: place for place, (name, _) in enumerate(often.most_common())}
    with rc_context(STYLE):
        figure, grid = _grid(len(settings))
        for axes, one, lines, names in zip(grid, settings, curves, named, strict=True):
            for name, line in lines.items():
                if name not in names:
                    axes.plot(*zip(*line, strict=True), color=_FAINT, linewidth=0.7)
            for name in names:
                axes.plot(
                    *zip(*lines[name], strict=True),
                    color=PALETTE[place[name] % len(PALETTE)],
                    linestyle=DASHES[place[name] % len(DASHES)],
                    linewidth=2.4 if name == OURS else 1.2,
                    label=name,
                )
            axes.legend(frameon=False, fontsize=6.5)
            axes.axhline(95.0, color=_FAINT, linewidth=0.8)
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter("")
            axes.set_ylim(40.0, 100.5)
            axes.set_title(one["name"], fontsize=8.0)
            axes.set_xlabel("run latency / its time alone")
            axes.set_ylabel("runs within (%)")
    return figure


def forest_plot(settings: Sequence[Setting], metric: str, name: str) -> Figure:
    """Draw almanac's difference to the best other policy, setting by setting, with intervals.

    At least one setting has to have one.
    """
    rows = {
        f"{one['name']}  vs {found['baseline']}": PairedDifference(
            found["difference"],
            -math.inf if found["low"] is None else found["low"],
            math.inf if found["high"] is None else found["high"],
        )
        for one in settings
        for policy in one["policies"]
        if policy["policy"] == OURS
        for found in policy["against_best"]
        if found["metric"] == metric
    }
    return effects(rows, quantity=name, against="the best other policy")


def _grid(count: int) -> tuple[Figure, list[Axes]]:
    columns = min(3, count)
    lines = -(-count // columns)
    figure = new_figure(3.7 * columns, 3.2 * lines)
    every = figure.subplots(lines, columns, squeeze=False).ravel()
    for axes in every[count:]:
        axes.set_visible(False)
    return figure, list(every[:count])


def _named(badness: Mapping[str, float]) -> list[str]:
    """Return ours, if it is there, and the best few others."""
    ranked = sorted(badness, key=lambda name: badness[name])
    return [*([OURS] if OURS in ranked else []), *[n for n in ranked if n != OURS][:_NAMED]]
