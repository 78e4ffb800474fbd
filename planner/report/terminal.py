"""The results table as aligned text."""

from __future__ import annotations

import math
from collections.abc import Sequence

from planner.metrics import Spread
from planner.report.comparison import (
    COLUMNS,
    COMPARED,
    Column,
    Comparison,
    compare,
    lost_runs,
    seeds_note,
)
from planner.report.results import Results

__all__ = ["align", "comparison_text", "percent", "results_table", "value_text"]

_COMPARED_NAMES = {"mean_s": "mean", "p95_s": "P95"}


def align(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines, the first column flush left and the others flush right.

    The first row is the heading; a rule is drawn under it.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def value_text(value: Spread | None, column: Column, *, seeds: int) -> str:
    """Return ``mean ± standard deviation`` of a metric over its seeds, or ``-`` if unknown."""
    if value is None:
        return "-"
    shown = f"{value.mean * column.scale:.{column.digits}f}"
    return f"{shown} ± {value.sd * column.scale:.{column.digits}f}" if seeds > 1 else shown


def percent(value: float) -> str:
    """Return a relative difference as signed per cent, without decimals from 100 % on."""
    return f"{value:+.{0 if abs(value) >= 1 else 1}%}"


def comparison_text(comparison: Comparison | None) -> str:
    """Return ``-12.3% [-14.0%, -10.1%] win``, or ``-`` where nothing was compared."""
    if comparison is None:
        return "-"
    mean, low, high = comparison.difference
    if not math.isfinite(low):
        return f"{percent(mean)} (one seed)"
    return f"{percent(mean)} [{percent(low)}, {percent(high)}] {comparison.verdict}"


def results_table(results: Results) -> str:
    """Return the table of some results for a terminal, with what its columns mean below it."""
    table = compare(results)
    names = [_COMPARED_NAMES[metric] for metric in COMPARED]
    head = ["policy", *(column.heading for column in COLUMNS)]
    head += [f"{name} vs best baseline" for name in names]
    lines = [head]
    for row in table.rows:
        cells = [row.label]
        for value, column in zip(row.values, COLUMNS, strict=True):
            cells.append(value_text(value, column, seeds=row.seeds))
        for comparison, best in zip(row.comparisons, table.best, strict=True):
            cells.append("best baseline" if row.label == best else comparison_text(comparison))
        lines.append(cells)
    seeds = max(row.seeds for row in table.rows)
    runs = max(row.runs for row in table.rows)
    notes = [
        f"{results.mode}; run latency in seconds, {runs} runs per policy over "
        f"{seeds} seed{'s' if seeds > 1 else ''}"
        + ("; ± is the standard deviation over seeds" if seeds > 1 else "")
    ]
    lost = [f"{row.label} {lost_runs(row)}" for row in table.rows if lost_runs(row)]
    if lost:
        notes.append(f"runs not counted above: {'; '.join(lost)}")
    if any(table.best):
        notes.append(
            "vs best baseline: mean relative difference of paired seeds with its 95 % bootstrap "
            "interval; less is better"
        )
        if warning := seeds_note(table):
            notes.append(warning)
    return "\n".join([results.title, align(lines), *notes])
