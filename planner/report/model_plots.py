"""Pictures of predictors: coverage, reliability, and observed against forecast seconds.

Input is plain data (the curves of `almanac evaluate`), because reports and estimators are rooms
that never meet.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from planner.report.drawing import (
    DASHES,
    FAINT,
    GREY,
    MARKERS,
    PALETTE,
    STYLE,
    new_figure,
    plain_number,
)

__all__ = ["Rows", "calibration_plot", "latency_plot", "reliability_plot"]

Rows = Sequence[Mapping[str, Any]]
"""Curves: ``name``, ``promised``, ``observed`` and, where points differ in size, ``weight``."""


def calibration_plot(curves: Rows) -> Figure:
    """Draw observed coverage less promised coverage against the promise, offline and online.

    Parameters
    ----------
    curves
        Rows with ``name`` (ends in ``, offline`` or ``, online``), ``promised``, ``observed``.
    """
    halves = {
        heading: [one for one in curves if str(one["name"]).endswith(f", {heading}")]
        for heading in ("offline", "online")
    }
    names = [str(one["name"]).removesuffix(", offline") for one in halves["offline"]]
    with rc_context(STYLE):
        figure = new_figure(10.5, 4.6 + 0.1 * len(names))
        panels = np.atleast_1d(figure.subplots(1, 2, sharey=True))
        for axes, (heading, rows) in zip(panels, halves.items(), strict=True):
            axes.axhspan(-2, 2, color=FAINT, linewidth=0, zorder=0)
            axes.axhline(0, color="black", linewidth=1.0, zorder=1)
            for position, one in enumerate(rows):
                promised = np.array(one["promised"])
                axes.plot(
                    100 * promised, 100 * (np.array(one["observed"]) - promised),
                    color=PALETTE[position % len(PALETTE)],
                    linestyle=DASHES[position % len(DASHES)],
                    # Colours come round sooner than lines end; then markers must not.
                    marker=MARKERS[(position + position // len(PALETTE)) % len(MARKERS)],
                    markersize=4, linewidth=1.1,
                )  # fmt: skip
            axes.set_title("as fitted" if heading == "offline" else "after online correction")
            axes.set_xlabel("promised coverage of the quantile (%)")
            axes.set_xticks([5, 10, 25, 50, 75, 90, 95])
        panels[0].set_ylabel("observed less promised (percentage points)")
        figure.legend(
            panels[0].get_lines()[1:], names, loc="outside lower center", ncols=2, frameon=False
        )
    return figure


def reliability_plot(curves: Rows) -> Figure:
    """Draw how often outcomes happened against the probability they were given, per dataset."""
    columns = min(3, len(curves))
    lines = math.ceil(len(curves) / columns)
    with rc_context(STYLE):
        figure = new_figure(3.5 * columns, 3.5 * lines)
        grid = np.atleast_1d(figure.subplots(lines, columns, squeeze=False)).ravel()
        for axes, one in zip(grid, curves, strict=False):
            _identity(axes, 0.0, 100.0)
            weight = np.array(one["weight"])
            axes.plot(
                100 * np.array(one["promised"]), 100 * np.array(one["observed"]),
                color=PALETTE[0], linewidth=1.1, zorder=2,
            )  # fmt: skip
            axes.scatter(
                100 * np.array(one["promised"]), 100 * np.array(one["observed"]),
                s=12 + 90 * np.sqrt(weight / weight.max()), color=PALETTE[0], alpha=0.7, zorder=3,
                linewidths=0,
            )  # fmt: skip
            axes.set_title(str(one["name"]).removeprefix("branching, "))
            axes.set_xlabel("forecast probability (%)")
            axes.set_ylabel("happened (%)")
            axes.set_aspect("equal")
        for axes in grid[len(curves) :]:
            axes.set_visible(False)
    return figure


def latency_plot(curves: Rows) -> Figure:
    """Draw observed against forecast end-to-end seconds, with the identity and +-20 %."""
    with rc_context(STYLE):
        figure = new_figure(4.9 * len(curves), 4.6)
        for axes, one in zip(np.atleast_1d(figure.subplots(1, len(curves))), curves, strict=True):
            forecast, observed = np.array(one["promised"]), np.array(one["observed"])
            low = min(forecast.min(), observed.min())
            high = max(forecast.max(), observed.max())
            axes.fill_between(
                [low, high], [low * 0.8, high * 0.8], [low * 1.2, high * 1.2],
                color=FAINT, linewidth=0, zorder=0,
            )  # fmt: skip
            _identity(axes, low, high)
            axes.scatter(
                forecast, observed, s=7, alpha=0.4, linewidths=0, color=PALETTE[0], zorder=2
            )
            axes.set_xscale("log")
            axes.set_yscale("log")
            for axis in (axes.xaxis, axes.yaxis):
                axis.set_major_formatter(plain_number)
                # Within one decade only the minor ticks say where one is.
                axis.set_minor_formatter(plain_number if high < 10 * low else NullFormatter())
            error = float(np.median(np.abs(forecast / observed - 1)))
            axes.set_title(f"{one['name']}\nmedian error {100 * error:.1f} %, grey: within 20 %")
            axes.set_xlabel("forecast seconds to the last token (s)")
            axes.set_ylabel("observed (s)")
    return figure


def _identity(axes: Axes, low: float, high: float) -> None:
    axes.plot([low, high], [low, high], color=GREY, linewidth=1.0, zorder=1)
