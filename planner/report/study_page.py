"""The page of a study: latency over load, a table per setting, and where it all came from.

Input is the study's document as plain data. No script, no external asset; the same document gives
the same bytes.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from planner import __version__
from planner.domain.files import atomic_write
from planner.report.drawing import STYLE, new_figure, to_png
from planner.report.plots import LoadPoint, draw_load_curves

__all__ = ["load_plot", "write_study_page"]

Setting = Mapping[str, Any]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 0 auto;
  max-width: 80rem; padding: 1.5rem; }
h1 { font-size: 1.7rem; } h2 { margin-top: 2.2rem; border-bottom: 1px solid #999; }
h3 { font-size: 1rem; margin-bottom: .2rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: .84rem; }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ccc;
  font-variant-numeric: tabular-nums; }
th:first-child, td:first-child { text-align: left; }
.win { background: #cfe4f2; } .loss { background: #fbd9bd; } .tie { background: #eee; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; height: auto; }
figcaption { color: #333; font-size: .92rem; max-width: 50rem; }
footer { margin-top: 3rem; color: #444; font-size: .85rem; }
""".strip()
_COLUMNS = (
    ("mean_s", "mean s", 1.0, 2),
    ("p50_s", "P50 s", 1.0, 2),
    ("p95_s", "P95 s", 1.0, 2),
    ("p99_s", "P99 s", 1.0, 2),
    ("stretch_p95", "Req95", 1.0, 2),
    ("stretch_p99", "Req99", 1.0, 2),
    ("jain", "Jain", 1.0, 3),
    ("throughput_rps", "runs/s", 1.0, 2),
    ("prefix_hit_ratio", "hit %", 100.0, 1),
    ("refilled_tokens", "refilled kilotokens", 1e-3, 0),
    ("dispatch_p50_us", "decision us", 1.0, 0),
)
_SHOWN = (("mean_s", "mean"), ("stretch_p95", "Req95"))


def load_plot(settings: Sequence[Setting]) -> Figure:
    """Draw mean run latency over load, a panel per group of settings that differ in load only."""
    panels = _panels(settings)
    columns = min(3, len(panels))
    lines = -(-len(panels) // columns)
    with rc_context(STYLE):
        figure = new_figure(3.6 * columns, 3.1 * lines + 0.5)
        grid = figure.subplots(lines, columns, squeeze=False).ravel()
        names = list(dict.fromkeys(p["policy"] for one in settings for p in one["policies"]))
        for axes, (title, group) in zip(grid, panels.items(), strict=False):
            draw_load_curves(
                axes,
                {
                    name: [
                        LoadPoint(
                            load=one["setting"]["load"], value_s=policy["metrics"]["mean_s"]["mean"]
                        )
                        for one in group
                        for policy in one["policies"]
                        if policy["policy"] == name and policy["metrics"]["mean_s"]
                    ]
                    for name in names
                },
            )
            axes.set_title(title)
            axes.set_xlabel("load (arrival rate / capacity)")
            axes.set_ylabel("mean run latency (s)")
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        handles, labels = grid[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    return figure


def _panels(settings: Sequence[Setting]) -> dict[str, list[Setting]]:
    panels: dict[str, list[Setting]] = {}
    for one in settings:
        fields = one["setting"]
        title = f"{fields['fleet']}, {fields['mix']}, {fields['kv']} KV, {fields['arrivals']}"
        panels.setdefault(title, []).append(one)
    return panels


def write_study_page(document: Mapping[str, Any], out: Path) -> Path:
    """Write the page of a study document (schema ``almanac.study/1``); return its path."""
    settings = document["settings"]
    title = f"Study: {document['study']}"
    facts = {**document["config"], **document["code"], **document["hardware"]}
    image = base64.b64encode(to_png(load_plot(settings))).decode("ascii")
    picture = (
        '<figure><img alt="Mean run latency over load, by policy; the figures are in the tables '
        f'below" src="data:image/png;base64,{image}"><figcaption>Mean run latency over load. '
        "Logarithmic axis.</figcaption></figure>"
    )
    main = [
        picture,
        "<h2>Settings</h2>",
        *(_setting(one) for one in settings),
        "<h2>Threats to validity</h2><ul>",
        *(f"<li>{escape(one)}</li>" for one in document["threats"]),
        "</ul><h2>How it was made</h2><table>",
        *(
            f"<tr><td>{escape(key)}</td><td>{escape(json.dumps(value))}</td></tr>"
            for key, value in facts.items()
        ),
        "</table>",
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(title)}</h1>\n<p>{escape(document['question'])}</p></header>\n"
        f"<main>\n{''.join(main)}</main>\n"
        f"<footer>Made by almanac {escape(__version__)}.</footer>\n</body>\n</html>\n"
    )
    with atomic_write(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out


def _setting(one: Setting) -> str:
    head = ["policy", *(heading for _, heading, _, _ in _COLUMNS)]
    head += [f"{name} against {whom}" for _, name in _SHOWN for whom in ("baseline", "best other")]
    rows = []
    for policy in one["policies"]:
        cells = [f"<td>{escape(policy['policy'])}</td>"]
        for metric, _, scale, digits in _COLUMNS:
            value = policy["metrics"][metric]
            text = "-" if value is None else f"{value['mean'] * scale:.{digits}f}"
            cells.append(f"<td>{text}</td>")
        for metric, _ in _SHOWN:
            cells += [_compared(policy[whom], metric) for whom in _AGAINST]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<h3>{escape(one['name'])} ({one['rate_rps']:.3g} runs/s)</h3>"
        f'<div class="scroll"><table><thead><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>\n{_clairvoyant(one['clairvoyant'])}"
    )


_AGAINST = ("against_baseline", "against_best")


def _compared(found: Sequence[Mapping[str, Any]], metric: str) -> str:
    for one in found:
        if one["metric"] == metric:
            said = f"{one['text']} ({one['baseline']})"
            return f'<td class="{one["verdict"]}">{escape(said)}</td>'
    return "<td>-</td>"


def _clairvoyant(rows: Sequence[Mapping[str, float]]) -> str:
    if not rows:
        return ""

    def mean(key: str) -> float:
        return sum(row[key] for row in rows) / len(rows)

    return (
        f"<p>Clairvoyant local search, {len(rows)} seeds: marginal cost {mean('learned_s'):.2f} s, "
        f"with exact lengths {mean('exact_s'):.2f} s, best placement found {mean('found_s'):.2f} s "
        f"(saves {mean('gap'):.1%} at least), critical path {mean('bound_s'):.2f} s.</p>\n"
    )
