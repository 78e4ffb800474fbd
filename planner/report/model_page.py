"""The model report: which bars hold, and pictures of promised against observed.

Input is plain data (bars and curves as `almanac evaluate` has them), because reports and
estimators are rooms that never meet. No script, no external asset; the same data gives the same
bytes.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

from planner import __version__
from planner.domain.files import atomic_write
from planner.report.plots import DASHES, FAINT, GREY, MARKERS, PALETTE, STYLE, new_figure, to_png

__all__ = ["calibration_plot", "latency_plot", "reliability_plot", "write_model_page"]

Rows = Sequence[Mapping[str, Any]]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 0 auto;
  max-width: 76rem; padding: 1.5rem; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #999; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .86rem; }
th, td { padding: .2rem .6rem; text-align: left; border-bottom: 1px solid #ccc;
  vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.holds { background: #cfe4f2; } .missed { background: #fbd9bd; font-weight: 700; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; height: auto; }
figcaption { color: #333; font-size: .92rem; max-width: 50rem; }
footer { margin-top: 3rem; color: #444; font-size: .85rem; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } table { font-size: 7.5pt; }
  figure, tr { break-inside: avoid; } .holds, .missed { background: none; } }
""".strip()


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
                axis.set_major_formatter(_plain)
                # Within one decade only the minor ticks say where one is.
                axis.set_minor_formatter(_plain if high < 10 * low else NullFormatter())
            error = float(np.median(np.abs(forecast / observed - 1)))
            axes.set_title(f"{one['name']}\nmedian error {100 * error:.1f} %, grey: within 20 %")
            axes.set_xlabel("forecast seconds to the last token (s)")
            axes.set_ylabel("observed (s)")
    return figure


def _plain(value: float, _: object) -> str:
    return f"{value:g}"


def _identity(axes: Axes, low: float, high: float) -> None:
    axes.plot([low, high], [low, high], color=GREY, linewidth=1.0, zorder=1)


def write_model_page(bars: Rows, curves: Rows, folder: Path) -> list[Path]:
    """Write ``report.html``, ``bars.json`` and the pictures into a folder; return their paths.

    Parameters
    ----------
    bars
        Rows of name, value, unit, bar, holds, note.
    curves
        Rows of kind, name, promised, observed, weight.
    """
    kinds = {kind: [one for one in curves if one["kind"] == kind] for kind in _PICTURES}
    pictures = {
        kind: (to_png(draw(rows)), caption)
        for kind, (draw, caption) in _PICTURES.items()
        if (rows := kinds[kind])
    }
    judged = [one for one in bars if one["holds"] is not None]
    held = sum(one["holds"] for one in judged)
    figures = "\n".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(png).decode()}" '
        f'alt="{escape(caption)}">\n<figcaption>{escape(caption)}</figcaption></figure>'
        for png, caption in pictures.values()
    )
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>Model report</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        f"<h1>Model report</h1>\n<p>{held} of {len(judged)} bars hold. Every figure is measured on "
        "rows the predictors have not seen; figures without a bar are reported for "
        f"information.</p>\n<h2>Bars</h2>\n{_table(judged)}\n<h2>Pictures</h2>\n{figures}\n"
        f"<h2>Further figures</h2>\n{_table([one for one in bars if one['holds'] is None])}\n"
        f"<footer>Made by almanac {escape(__version__)}.</footer>\n</body>\n</html>\n"
    )
    written = []
    contents: dict[str, bytes] = {
        "report.html": page.encode(),
        "bars.json": (json.dumps(list(bars), indent=1, allow_nan=False) + "\n").encode(),
        **{f"{kind}.png": png for kind, (png, _) in pictures.items()},
    }
    for name, content in contents.items():
        with atomic_write(folder / name) as temporary:
            temporary.write_bytes(content)
        written.append(folder / name)
    return written


def _table(rows: Rows) -> str:
    lines = []
    for one in rows:
        value = "-" if one["value"] is None else f"{one['value']:.4g}"
        state, word = {True: ("holds", "holds"), False: ("missed", "missed")}.get(
            one["holds"], ("", "")
        )
        lines.append(
            f"<tr><td>{escape(one['name'])}</td><td class=number>{value}</td>"
            f"<td>{escape(one['unit'])}</td><td>{escape(one['bar'] or '')}</td>"
            f'<td class="{state}">{word}</td><td>{escape(one["note"])}</td></tr>'
        )
    head = "".join(f"<th>{name}</th>" for name in ("what", "value", "unit", "bar", "", "note"))
    return (
        f'<div class="scroll"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n'
        + "\n".join(lines)
        + "\n</tbody></table></div>"
    )


_PICTURES = {
    "calibration": (
        calibration_plot,
        (
            "Coverage of each quantile, observed less promised; grey: within two points. Left as "
            "fitted, right after online correction, each row corrected by the rows before it."
        ),
    ),
    "reliability": (
        reliability_plot,
        (
            "Next action: how often outcomes happened against the probability they were given; "
            "area grows with the number of forecasts."
        ),
    ),
    "latency": (
        latency_plot,
        "Seconds to the last token, observed against forecast, output length given.",
    ),
}
