"""One self-contained HTML file from a results folder: tables, pictures, plan, models, notes.

No script, no external asset: pictures are inline PNGs with alternative text that states the main
figures. The same folder gives the same bytes. What the folder lacks is left out; what it holds and
cannot be read is an error.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from planner import __version__
from planner.dispatch.table import DispatchTable, load_table
from planner.domain.errors import InvalidInput
from planner.domain.files import atomic_write, read_json
from planner.domain.plan import Plan, load_plan
from planner.domain.trace import RunRecord, TraceRecord, load_trace
from planner.domain.workflow import Workflow, load_workflow
from planner.metrics import relative_difference, spread
from planner.report import plots
from planner.report.anatomy import GraphWeights
from planner.report.comparison import (
    COLUMNS,
    COMPARED,
    Comparison,
    ComparisonTable,
    compare,
    lost_runs,
    seeds_note,
)
from planner.report.results import PolicyResult, Results, load_results
from planner.report.terminal import comparison_text, percent, value_text

__all__ = ["write_report"]

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #111; background: #fff; margin: 0 auto;
  max-width: 90rem; padding: 1.5rem; }
h1 { font-size: 1.7rem; line-height: 1.2; }
h2 { margin-top: 2.4rem; border-bottom: 1px solid #999; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: .8rem 0; font-size: .88rem; }
caption { text-align: left; color: #333; padding-bottom: .4rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #ccc;
  font-variant-numeric: tabular-nums; vertical-align: top; }
th:first-child, td:first-child, .words th, .words td { text-align: left; }
thead th { border-bottom: 2px solid #333; }
.words td { min-width: 4rem; } .nowrap td, .nowrap th { white-space: nowrap; font-size: .8rem; }
.verdict { font-weight: 700; border: 1px solid #333; border-radius: .2rem; padding: 0 .3rem; }
.win { background: #cfe4f2; } .loss { background: #fbd9bd; } .tie { background: #eee; }
figure { margin: 1.2rem 0; } figure img { max-width: 100%; height: auto; }
figcaption { color: #333; font-size: .92rem; max-width: 50rem; }
footer { margin-top: 3rem; color: #444; font-size: .85rem; }
@media print { body { max-width: none; padding: 0; font-size: 10pt; } .scroll { overflow: visible; }
  figure, table { break-inside: avoid; } h2, h3 { break-after: avoid; }
  .win, .loss, .tie { background: none; } table { font-size: 7.5pt; }
  th, td { padding: .15rem .3rem; } }
""".strip()


def write_report(folder: Path, out: Path) -> Path:
    """Write the report of a results folder to one HTML file and return its path.

    Raises
    ------
    InvalidInput
        If the folder has no readable ``results.json``, if an optional file in it is malformed, if
        a trace named in the results is missing, or if ``out`` cannot be written.
    """
    if not folder.is_dir():
        raise InvalidInput(
            "no such folder",
            where=str(folder),
            remedy="name the output folder of `almanac run` or `almanac simulate`",
        )
    results = load_results(folder)
    table = compare(results)
    pair = _pair(results, table)
    # The first policy listed is the plainest; beside it one sees what placement does at all.
    shown = tuple(dict.fromkeys((results.policies[0].label, *pair)))
    traces = {label: _traces(folder, results.policy(label)) for label in shown}
    sections = [
        _results_section(table),
        _pictures_section(results, table, pair, traces),
        _twin_section(folder, results),
        _study_section(folder),
        _workflow_section(folder, traces[pair[-1]]),
        _plan_section(folder),
        _models_section(folder, results),
        _settings_section(results),
        _notes_section(results, table),
    ]
    page = (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(results.title)}</title>\n<style>\n{_STYLE}\n</style>\n</head>\n<body>\n"
        f"<header><h1>{escape(results.title)}</h1>\n<p>{_summary(results, table)}</p></header>\n"
        f"<main>\n{''.join(section for section in sections)}</main>\n"
        f"<footer>Made by almanac {escape(__version__)}.</footer>\n</body>\n</html>\n"
    )
    with atomic_write(out) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return out


# Sections: each returns HTML, or nothing if the folder holds nothing for it.


def _summary(results: Results, table: ComparisonTable) -> str:
    own = [row for row in table.rows if row.policy.startswith("almanac")]
    said = [
        f"{escape(row.label)}: {_NAMES[one.metric]} run latency {_difference(one)}"
        f" than {escape(one.baseline)}, the best baseline on it "
        f'<span class="verdict {one.verdict}">{one.verdict}</span>'
        for row in own
        for one in row.comparisons
        if one
    ]
    kind = "Measured live" if results.mode == "live" else "Simulated"
    return f"{kind}, {_counts(table)}. {'; '.join(said)}{'.' if said else ''}"


def _results_section(table: ComparisonTable) -> str:
    return _section("Results", _comparison_table(table))


def _comparison_table(table: ComparisonTable) -> str:
    head = ["policy", *(column.heading for column in COLUMNS)]
    head += [f"{_NAMES[metric]} against best baseline" for metric in COMPARED]
    rows = []
    for row in table.rows:
        cells = [escape(row.label)]
        for value, column in zip(row.values, COLUMNS, strict=True):
            cells.append(escape(value_text(value, column, seeds=row.seeds)))
        for comparison, best in zip(row.comparisons, table.best, strict=True):
            cells.append("best baseline" if best == row.label else _comparison(comparison))
        rows.append(cells)
    caption = (
        "Run latency is the time from the arrival of a run to its last finish. ± is the standard "
        "deviation over seeds. Against the best baseline: mean relative difference of paired seeds "
        "with its 95 % bootstrap interval; less time is better. A win (loss) needs the whole "
        "interval below (above) zero. Best baseline: "
        + ", ".join(
            f"{best} on the {_NAMES[metric]}"
            for metric, best in zip(COMPARED, table.best, strict=True)
            if best
        )
        + "."
    )
    return _table(head, rows, escape(caption), style="nowrap")


def _pictures_section(
    results: Results,
    table: ComparisonTable,
    pair: Sequence[str],
    traces: Mapping[str, Mapping[int, Sequence[TraceRecord]]],
) -> str:
    """Draw what compares policies; ``pair`` is looked at closely, ``traces`` may hold more."""
    curves = {
        policy.label: [value for one in policy.seeds for value in one.metrics.latencies_s]
        for policy in results.policies
    }
    parts = [
        _picture(
            plots.latency_bars(table),
            "Mean and P95 run latency by policy. " + _figures(table),
            "Mean and P95 run latency; the whisker spans the seeds. Hatched blue is Almanac.",
        )
    ]
    if any(curves.values()):
        parts.append(
            _picture(
                plots.latency_cdfs(curves),
                "Share of runs done within a time, one curve per policy. " + _figures(table),
                "Run latency of all seeds together. A curve further left is faster; the slowest "
                "half per cent of the runs may lie beyond the right edge.",
            )
        )
    spent = {
        label: plots.mean_parts(seeds[min(seeds)])
        for label, seeds in traces.items()
        if seeds and _ok_runs(seeds[min(seeds)])
    }
    if spent:
        parts.append(
            _picture(
                plots.time_parts(spent),
                "Seconds of the mean run by what was done on its critical path: "
                + "; ".join(
                    f"{label}: " + ", ".join(f"{part} {value:.2f} s" for part, value in row.items())
                    for label, row in spent.items()
                )
                + ".",
                "Where the seconds of the mean run went, on its critical path, in the first "
                "traced seed.",
            )
        )
    chosen = _typical_run(pair, traces)
    if chosen is not None:
        seed, run_id, latency_s = chosen.seed, chosen.run_id, chosen.latency_s
        parts.append(
            _picture(
                plots.run_gantt([(label, part[seed]) for label, part in traces.items()], run_id),
                f"Timeline of run {run_id}: done after "
                + ", ".join(
                    f"{value:.2f} s under {label}"
                    for label, value in zip(traces, latency_s, strict=True)
                )
                + ".",
                f"Run {escape(run_id)} of seed {seed} under {len(traces)} policies, on one time "
                "axis. It was chosen, among the runs with at least the median number of calls, as "
                f"the one whose difference between {escape(' and '.join(pair))} "
                f"({percent(chosen.difference)}) is nearest to their median difference.",
            )
        )
    forecasts: dict[str, list[plots.Forecast]] = {"runs": [], "calls": []}
    for label in pair:
        records = [record for part in traces[label].values() for record in part]
        for heading, forecast in zip(forecasts, plots.forecasts_of(records, label), strict=True):
            forecasts[heading].append(forecast)
    if any(one.actual_s for series in forecasts.values() for one in series):
        parts.append(
            _picture(
                plots.predicted_vs_actual(forecasts),
                "Predicted against actual durations of runs and calls, with the identity line.",
                "Forecast when a run arrived, and when a call was dispatched, against what "
                "happened. Above the line: it took longer than predicted.",
            )
        )
    return _section("Pictures", "".join(parts))


def _twin_section(folder: Path, results: Results) -> str:
    path = folder / "simulated.json"
    if not path.exists():
        return ""
    twin = load_results(path)
    table = compare(twin)
    rows = []
    for row in table.rows:
        live = [policy for policy in results.policies if policy.label == row.label]
        cells = [escape(row.label)]
        for metric in COMPARED:
            here = spread([*live[0].values(metric).values()]) if _has(live, metric) else None
            there = row.values[[column.metric for column in COLUMNS].index(metric)]
            cells += [
                "-" if here is None else f"{here.mean:.2f}",
                "-" if there is None else f"{there.mean:.2f}",
                "-"
                if here is None or there is None or here.mean <= 0
                else percent(relative_difference(here.mean, there.mean)),
            ]
        rows.append(cells)
    head = ["policy"]
    for metric in COMPARED:
        head += [f"{_NAMES[metric]} {results.mode} s", f"{_NAMES[metric]} {twin.mode} s", "off by"]
    caption = escape(f"{twin.title}: the same runs in the simulator.")
    return _section("Simulated twin", _table(head, rows, caption, style="nowrap"))


def _study_section(folder: Path) -> str:
    """Show the same question over more seeds than can be run live."""
    path = folder / "study.json"
    if not path.exists():
        return ""
    study = load_results(path)
    table = compare(study)
    bars = _picture(
        plots.latency_bars(table),
        f"Bars of mean and P95 run latency by policy: {_figures(table)}",
        "Mean and P95 run latency in the simulator; the whisker spans the seeds.",
    )
    return _section(f"More seeds: {study.title}", _comparison_table(table) + bars)


def _has(policies: Sequence[PolicyResult], metric: str) -> bool:
    return bool(policies) and bool(policies[0].values(metric))


def _workflow_section(folder: Path, traces: Mapping[int, Sequence[TraceRecord]]) -> str:
    """Draw the graph with what the runs of the first traced seed did, if there is one."""
    path = folder / "workflow.json"
    if not path.exists():
        return ""
    parts = []
    for workflow in _levels(load_workflow(path)):
        loops = len(workflow.loops)
        parts.append(
            _picture(
                plots.workflow_graph(workflow, _weights(workflow, traces)),
                f"Graph of workflow {workflow.name}: {len(workflow.nodes)} nodes, "
                f"{len(workflow.branches)} branches, {len(workflow.joins)} joins, {loops} loops.",
                f"Workflow {escape(workflow.name)} as compiled (content hash "
                f"<code>{workflow.content_hash}</code>), with outcome probabilities where known.",
            )
        )
    return _section("Workflow", "".join(parts))


def _weights(
    workflow: Workflow, traces: Mapping[int, Sequence[TraceRecord]]
) -> GraphWeights | None:
    first = traces[min(traces)] if traces else ()
    known = any(one.workflow_hash == workflow.content_hash for one in _ok_runs(first).values())
    return plots.graph_weights(workflow, first) if known else None


def _levels(workflow: Workflow) -> list[Workflow]:
    inner = [level for node in workflow.nodes if node.subgraph for level in _levels(node.subgraph)]
    return [workflow, *inner]


def _plan_section(folder: Path) -> str:
    parts = []
    if (folder / "plan.json").exists():
        parts.append(_plan_html(load_plan(folder / "plan.json")))
    if (folder / "table.json").exists():
        table = load_table(folder / "table.json")
        for number, workflow_hash in enumerate(sorted({row.workflow_hash for row in table.rows})):
            parts.append(_table_picture(table, workflow_hash, many=number > 0))
    return _section("Plan", "".join(parts)) if parts else ""


def _plan_html(plan: Plan) -> str:
    facts = [
        ["status", escape(plan.status)],
        ["expected run latency (objective)", f"{plan.objective_s:.3f} s"],
        ["proven least (bound)", f"{plan.bound_s:.3f} s"],
        ["gap", f"{plan.gap:.2%}"],
        ["planned load", f"{plan.arrival_rate_rps:.4g} runs/s"],
        ["run classes, scenarios each, seed", f"{plan.run_classes}, {plan.scenarios}, {plan.seed}"],
        ["solving time", f"{plan.wall_s:.1f} s"],
    ]
    shares = plan.shares()
    endpoints = sorted({endpoint for row in shares.values() for endpoint in row})
    rows = [
        [escape(site), *(f"{row[e]:.0%}" if e in row else "" for e in endpoints)]
        for site, row in sorted(shares.items())
    ]
    rows.append(["<em>calls side by side</em>", *(str(plan.levels.get(e, 0)) for e in endpoints)])
    return _table(["fact", "value"], facts, "What the solver found.", style="words") + _table(
        ["call site", *map(escape, endpoints)],
        rows,
        "Placement: share of each call site's traffic.",
    )


def _table_picture(table: DispatchTable, workflow_hash: str, *, many: bool) -> str:
    name = f" of workflow {workflow_hash}" if many else ""
    return _picture(
        plots.table_heatmaps(table, workflow_hash),
        f"Dispatch table{name}: share and cost of each endpoint per call site and load bucket.",
        f"Dispatch table <code>{table.version}</code>{name}: planned share of each call site's "
        "traffic and seconds of service there, by fleet load.",
    )


def _models_section(folder: Path, results: Results) -> str:
    named = results.settings.get("model_card")
    path = folder / (named if isinstance(named, str) else "models/model_card.json")
    if not path.exists():
        return ""
    card = read_json(path, what="model card")
    if not isinstance(card, Mapping):
        return _section("Predictors", _value(card))
    # Each table of the card at full width; a table inside a table's cell is hard to read.
    parts = []
    for name in sorted(card, key=lambda key: key != "results"):
        value = card[name]
        if isinstance(value, list) and value:
            parts.append(f"<h3>{escape(str(name)).replace('_', ' ')}</h3>\n{_value(value)}")
    facts = {key: value for key, value in card.items() if not isinstance(value, list)}
    return _section("Predictors", "".join(parts) + _value(facts))


def _settings_section(results: Results) -> str:
    facts = [
        [escape(str(key)), _value(value)]
        for key, value in results.settings.items()
        if key != "notes"
    ]
    parameters = [
        [
            escape(policy.label),
            escape(", ".join(f"{k} = {_plain(v)}" for k, v in policy.parameters.items()) or "none"),
        ]
        for policy in results.policies
    ]
    return _section(
        "Settings",
        _table(["setting", "value"], [["mode", results.mode], *facts], "", style="words")
        + _table(["policy", "parameters"], parameters, "Policies as they were run.", style="words"),
    )


def _notes_section(results: Results, table: ComparisonTable) -> str:
    notes = []
    dilation = results.settings.get("dilation")
    if isinstance(dilation, (int, float)) and dilation != 1:
        notes.append(
            f"Time was dilated by a factor of {dilation:g}, the same for every policy; all times "
            "in this report are on the model's clock."
        )
    if results.mode == "simulated":
        notes.append(
            "Simulated: endpoints follow a model of the engine, not hardware. What it leaves out "
            "(network, tokeniser, client) is left out for every policy alike."
        )
    seeds = min(row.seeds for row in table.rows)
    notes.append(
        f"{seeds} seed{'s' if seeds != 1 else ''} per policy; equal seeds saw the same runs, so "
        f"differences are paired. {seeds_note(table)}".rstrip()
    )
    notes.append(
        "The best baseline is chosen on these same runs, separately for each metric; that favours "
        "the baseline."
    )
    notes += [
        f"{row.label}: runs {lost_runs(row)}; latencies are of the runs that ended well."
        for row in table.rows
        if lost_runs(row)
    ]
    extra = results.settings.get("notes", ())
    notes += [str(note) for note in (extra if isinstance(extra, (list, tuple)) else [extra])]
    return _section(
        "Notes", "<ul>\n" + "".join(f"<li>{escape(note)}</li>\n" for note in notes) + "</ul>\n"
    )


# The two policies that are looked at closely, and one typical run of them.


def _pair(results: Results, table: ComparisonTable) -> tuple[str, ...]:
    """Return the labels of the best baseline (by mean) and of Almanac, or of first and last."""
    labels = [policy.label for policy in results.policies]
    own = [policy.label for policy in results.policies if policy.policy.startswith("almanac")]
    first = table.best[0] or labels[0]
    last = own[-1] if own else labels[-1]
    return tuple(dict.fromkeys((first, last)))


def _traces(folder: Path, policy: PolicyResult) -> dict[int, list[TraceRecord]]:
    return {one.seed: load_trace(folder / one.trace) for one in policy.seeds if one.trace}


@dataclass(frozen=True, slots=True)
class _Everywhere:
    """A run that ended well under every policy; ``difference`` is between the pair's latencies."""

    seed: int
    run_id: str
    calls: int
    latency_s: tuple[float, ...]
    difference: float


def _typical_run(
    pair: Sequence[str], traces: Mapping[str, Mapping[int, Sequence[TraceRecord]]]
) -> _Everywhere | None:
    found = []
    for seed in sorted(set.intersection(*map(set, traces.values()))):
        runs = {label: _ok_runs(part[seed]) for label, part in traces.items()}
        for run_id in sorted(set.intersection(*map(set, runs.values()))):
            records = {label: part[run_id] for label, part in runs.items()}
            latency_s = {label: one.finish_s - one.arrival_s for label, one in records.items()}
            if latency_s[pair[0]] > 0:
                found.append(
                    _Everywhere(
                        seed,
                        run_id,
                        records[pair[0]].calls,
                        tuple(latency_s.values()),
                        relative_difference(latency_s[pair[0]], latency_s[pair[-1]]),
                    )
                )
    if not found:
        return None
    enough = sorted(one.calls for one in found)[len(found) // 2]
    large = sorted(
        (one for one in found if one.calls >= enough),
        key=lambda one: (one.difference, one.seed, one.run_id),
    )
    return large[len(large) // 2]


def _ok_runs(records: Iterable[TraceRecord]) -> dict[str, RunRecord]:
    return {one.run_id: one for one in records if isinstance(one, RunRecord) and one.status == "ok"}


# Pieces of HTML.

_NAMES = {"mean_s": "mean", "p95_s": "P95"}


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}</section>\n"


def _picture(figure: Figure, alt: str, caption: str) -> str:
    data = base64.b64encode(plots.to_png(figure)).decode("ascii")
    return (
        f'<figure><img alt="{escape(alt)}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{caption}</figcaption></figure>\n"
    )


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], caption: str, *, style: str = ""
) -> str:
    """Return a table; cells, heads and caption are HTML already."""
    lines = [f'<div class="scroll"><table class="{style}">']
    if caption:
        lines.append(f"<caption>{caption}</caption>")
    heads = "".join(f'<th scope="col">{one}</th>' for one in head)
    lines.append(f"<thead><tr>{heads}</tr></thead>\n<tbody>")
    for first, *rest in rows:
        cells = "".join(f"<td>{cell}</td>" for cell in rest)
        lines.append(f'<tr><th scope="row">{first}</th>{cells}</tr>')
    lines.append("</tbody></table></div>\n")
    return "\n".join(lines)


def _comparison(one: Comparison | None) -> str:
    words = comparison_text(one)
    if one is None or one.pairs == 1:
        return words
    numbers = words.removesuffix(one.verdict)
    return f'{numbers}<span class="verdict {one.verdict}">{one.verdict}</span>'


def _difference(one: Comparison) -> str:
    return f"{abs(one.difference.mean):.1%} {'less' if one.difference.mean < 0 else 'more'}"


def _counts(table: ComparisonTable) -> str:
    runs, seeds = (max(getattr(row, name) for row in table.rows) for name in ("runs", "seeds"))
    return f"{runs} runs per policy over {seeds} seed{'s' if seeds != 1 else ''}"


def _figures(table: ComparisonTable) -> str:
    """Return mean and P95 of every policy as a sentence, for readers who cannot see the picture."""
    where = [column.metric for column in COLUMNS]
    said = []
    for row in table.rows:
        values = [(_NAMES[metric], row.values[where.index(metric)]) for metric in COMPARED]
        known = [f"{name} {value.mean:.2f} s" for name, value in values if value]
        said.append(f"{row.label}: {', '.join(known) or 'no run ended well'}")
    return "; ".join(said) + "."


def _value(value: Any) -> str:
    """Return any JSON value as HTML: records as tables, lists of like records as one table."""
    if isinstance(value, Mapping) and value:
        rows = [[escape(str(key)), _value(inner)] for key, inner in value.items()]
        return _table(["field", "value"], rows, "", style="words")
    if isinstance(value, list) and value and all(isinstance(one, Mapping) for one in value):
        keys = list(dict.fromkeys(key for one in value for key in one))
        rows = [[_value(one[key]) if key in one else "" for key in keys] for one in value]
        return _table([escape(str(key)) for key in keys], rows, "", style="words")
    if isinstance(value, list):
        return ", ".join(_value(one) for one in value)
    return escape(_plain(value))


def _plain(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)
