"""The model report: which bars hold, and pictures of promised against observed.

Input is plain data (bars and curves as `almanac evaluate` has them), because reports and
estimators are rooms that never meet. No script, no external asset; the same data gives the same
bytes.
"""

from __future__ import annotations

import base64
import json
from html import escape
from pathlib import Path

from planner import __version__
from planner.domain.files import atomic_write
from planner.report.drawing import to_png
from planner.report.model_plots import Rows, calibration_plot, latency_plot, reliability_plot

__all__ = ["write_model_page"]

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
