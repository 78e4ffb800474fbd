"""The page of a study: its bars, pictures, losses beside wins, a table per setting, its origin.

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

from matplotlib.figure import Figure

from planner import __version__
from planner.domain.files import atomic_write
from planner.metrics import standard_error
from planner.report.drawing import to_png
from planner.report.study_plots import OURS, attainment_plot, forest_plot, load_plot, panels

__all__ = ["write_study_page"]

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
    ("goodput_rps", "good runs/s", 1.0, 2),
    ("prefix_hit_ratio", "hit %", 100.0, 1),
    ("refilled_tokens", "refilled kilotokens", 1e-3, 0),
    ("refilled_share", "refilled %", 100.0, 1),
    ("belady_ratio", "/ Belady", 1.0, 2),
    ("belady_refills", "refills / Belady", 1.0, 2),
    ("kv_usage", "KV in use %", 100.0, 1),
    ("dispatch_p50_us", "decision us", 1.0, 0),
)
_TENANT_COLUMNS = (
    ("mean_s", "mean s", 1.0, 2),
    ("stretch_p95", "Req95", 1.0, 2),
    ("stretch_p99", "Req99", 1.0, 2),
    ("within_deadline", "in time %", 100.0, 1),
)
_SHOWN = (("mean_s", "mean"), ("p95_s", "P95"), ("stretch_p95", "Req95"))
_LEGEND = (
    "<p>Quantiles of runs are over the runs of all seeds together. A run is good if it keeps its "
    "deadline or, without one, takes at most {scale:g} times its time alone. Regret is against a "
    "bound that no policy beats.{more}</p>\n"
)
_MORE = (
    " All policies ran on {seeds} seeds, those near the best on {more_seeds} more: these count in "
    "the differences between them, not in the other figures."
)
_FOREST = (("mean_s", "mean run latency"), ("p95_s", "P95 of run latency"))


def write_study_page(document: Mapping[str, Any], out: Path) -> Path:
    """Write the page of a study document (schema ``almanac.study/2``); return its path."""
    settings = document["settings"]
    title = f"Study: {document['study']}"
    facts = {**document["config"], **document["code"], **document["hardware"]}
    main = [
        _bars(document["bars"]),
        _against_best(settings),
        _pictures(settings),
        "<h2>Settings</h2>",
        _LEGEND.format(
            scale=document["config"]["good_scale"],
            more=_MORE.format(**document["config"]) if document["config"]["more_seeds"] else "",
        ),
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


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    return (
        f'<div class="scroll"><table><thead><tr>{"".join(f"<th>{h}</th>" for h in head)}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>\n"
    )


def _bars(bars: Sequence[Mapping[str, Any]]) -> str:
    if not bars:
        return ""
    rows = []
    for bar in bars:
        interval = bar["interval"]
        within = "-" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}"
        cells = [f"{bar['value']:.4g} {bar['unit']}", within, bar["range"]]
        verdict = ("win", "yes") if bar["holds"] else ("loss", "no")
        rows.append(
            f"<tr><td>{escape(bar['name'])}</td>"
            + "".join(f"<td>{escape(cell)}</td>" for cell in cells)
            + f'<td class="{verdict[0]}">{verdict[1]}</td><td>{escape(bar["source"] or "-")}</td>'
            "</tr>"
        )
    held = sum(bar["holds"] for bar in bars)
    head = ["bar", "figure", "95 % interval", "expected", "holds", "published"]
    return f"<h2>Bars</h2>\n<p>{held} of {len(bars)} hold.</p>{_table(head, rows)}"


def _against_best(settings: Sequence[Setting]) -> str:
    """Return losses beside wins: almanac against the best other policy of each setting."""
    rows, counts = [], {"win": 0, "tie": 0, "loss": 0}
    for one in settings:
        for policy in one["policies"]:
            if policy["policy"] == OURS and policy["against_best"]:
                cells = "".join(_compared(policy["against_best"], metric) for metric, _ in _SHOWN)
                rows.append(f"<tr><td>{escape(one['name'])}</td>{cells}</tr>")
                for found in policy["against_best"]:
                    if found["metric"] in dict(_FOREST):
                        counts[found["verdict"]] += 1
    if not rows:
        return ""
    head = ["setting", *(name for _, name in _SHOWN)]
    said = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
    return (
        f"<h2>{OURS} against the best other policy</h2>\n<p>Mean and P95: {said}. The best is "
        f"chosen for each setting and figure anew, on the same runs.</p>{_table(head, rows)}"
    )


def _pictures(settings: Sequence[Setting]) -> str:
    made = []
    if any(_ours(one) for one in settings):
        made += [
            _picture(forest_plot(settings, metric, name), f"Differences in {name}, 95 % intervals.")
            for metric, name in _FOREST
        ]
    groups = panels(settings)
    if groups:
        made.append(_picture(load_plot(groups), "Mean run latency over load. Logarithmic axis."))
    made.append(
        _picture(
            attainment_plot(settings),
            "Attainment: the share of runs that took at most so many times their time alone. "
            "The line at 95 % crosses a curve at its Req95.",
        )
    )
    return f"<h2>Pictures</h2>\n{''.join(made)}"


def _ours(one: Setting) -> bool:
    return any(p["policy"] == OURS and p["against_best"] for p in one["policies"])


def _picture(figure: Figure, caption: str) -> str:
    image = base64.b64encode(to_png(figure)).decode("ascii")
    said = escape(caption)
    return (
        f'<figure><img alt="{said} The figures are in the tables." '
        f'src="data:image/png;base64,{image}"><figcaption>{said}</figcaption></figure>\n'
    )


def _setting(one: Setting) -> str:
    head = ["policy", *(heading for _, heading, _, _ in _COLUMNS), "regret %"]
    head += [f"{name} against {whom}" for _, name in _SHOWN for whom in ("baseline", "best other")]
    rows = []
    for policy in one["policies"]:
        cells = [f"<td>{escape(policy['policy'])}</td>"]
        for metric, _, scale, digits in _COLUMNS:
            value = policy["metrics"][metric]
            text = "-" if value is None else f"{value['mean'] * scale:.{digits}f}"
            cells.append(f"<td>{text}</td>")
        regret = policy["regret"]
        cells.append(f"<td>{'-' if regret is None else f'{100.0 * regret:.0f}'}</td>")
        for metric, _ in _SHOWN:
            cells += [_compared(policy[whom], metric) for whom in _AGAINST]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f"<h3>{escape(one['name'])} ({one['rate_rps']:.3g} runs/s)</h3>"
        f"{_table(head, rows)}{_tenants(one)}{_clairvoyant(one['clairvoyant'])}"
    )


def _tenants(one: Setting) -> str:
    """Return what each tenant got from each policy; nothing if there is only one."""
    names = sorted({tenant for policy in one["policies"] for tenant in policy["tenants"]})
    if len(names) < 2:
        return ""
    head = ["policy", *(f"{name}: {said}" for name in names for _, said, _, _ in _TENANT_COLUMNS)]
    rows = []
    for policy in one["policies"]:
        cells = [f"<td>{escape(policy['policy'])}</td>"]
        for name in names:
            for figure, _, scale, digits in _TENANT_COLUMNS:
                value = policy["tenants"].get(name, {}).get(figure)
                text = "-" if value is None else f"{value * scale:.{digits}f}"
                cells.append(f"<td>{text}</td>")
        rows.append(f"<tr>{''.join(cells)}</tr>")
    return f"<p>By tenant, means over the seeds:</p>{_table(head, rows)}"


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

    error = standard_error([row["gap"] for row in rows])
    return (
        f"<p>Clairvoyant local search, {len(rows)} seeds: marginal cost {mean('learned_s'):.2f} s, "
        f"with exact lengths {mean('exact_s'):.2f} s, best placement found {mean('found_s'):.2f} s "
        f"(saves {mean('gap'):.1%} at least, standard error {error:.1%}), critical path "
        f"{mean('bound_s'):.2f} s.</p>\n"
    )
