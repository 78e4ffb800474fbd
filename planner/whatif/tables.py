"""Answers and effects as tables: aligned text for terminals, flat rows for data frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from planner.report.terminal import align
from planner.whatif.answer import Answer
from planner.whatif.effects import Effect
from planner.whatif.question import METRICS, Metric

__all__ = ["answer_table", "effect_table", "flat_row"]

_HEADINGS: Mapping[Metric, str] = {
    "mean_s": "mean s",
    "p50_s": "P50 s",
    "p95_s": "P95 s",
    "p99_s": "P99 s",
    "attainment": "in time",
}


def answer_table(answers: Sequence[Answer]) -> str:
    """Return answers as aligned text."""
    shown = [name for name in METRICS if any(name in one.figures for one in answers)]
    head = ["scenario", "policy", "runs/s", "load", *(_HEADINGS[one] for one in shown)]
    rows = [[*head, "bound mean", "bound P95", "$/h", "$/run"]]
    for one in answers:
        question = one.question
        cells = [one.label, question.policy, f"{question.rate_rps:.3g}", f"{one.load:.2f}"]
        for name in shown:
            figure = one.figures.get(name)
            cells.append("-" if figure is None else figure.text(3 if name == "attainment" else 2))
        for metric in ("mean_s", "p95_s"):
            bound = one.bounds.get(metric)
            cells.append(
                "-" if bound is None else f"{bound:.2f} ({one.distance(metric) or 0:+.0%})"
            )
        cells.append(_money(question.usd_per_hour, 2))
        cells.append(_money(question.usd_per_run, 4))
        rows.append(cells)
    return align(rows)


def _money(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def effect_table(effects: Sequence[Effect]) -> str:
    """Return effects as aligned text, in per cent (shares in points)."""
    shown = [name for name in METRICS if any(name in one.changes for one in effects)]
    rows = [["change", *(_HEADINGS[one].removesuffix(" s") + " %" for one in shown)]]
    for one in effects:
        cells = [one.changes[name].text(1, 100.0) if name in one.changes else "-" for name in shown]
        rows.append([one.label, *cells])
    return align(rows)


def flat_row(one: Answer) -> dict[str, Any]:
    """Return an answer as one flat row, for data frames and CSV."""
    row: dict[str, Any] = {
        "scenario": one.label,
        "policy": one.question.policy,
        "rate_rps": one.question.rate_rps,
        "load": one.load,
    }
    for metric in METRICS:
        figure = one.figures.get(metric)
        for part in ("value", "low", "high"):
            name = metric if part == "value" else f"{metric}_{part}"
            row[name] = None if figure is None else getattr(figure, part)
    row |= {f"bound_{metric}": one.bounds.get(metric) for metric in ("mean_s", "p95_s")}
    row |= {"usd_per_hour": one.question.usd_per_hour, "usd_per_run": one.question.usd_per_run}
    return row
