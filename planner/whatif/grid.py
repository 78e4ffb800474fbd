"""Grids of what-if: scenarios by loads by policies, in parallel, resumable, as one table.

The file of a grid::

    schema: almanac.whatif-grid/1
    changes: ["", "+1xh100", "-l4, retention off"]     # each a scenario; "" is the fleet as it is
    loads: [0.5, 0.75, 1.0, 1.25]                      # times the arrival rates; [1.0] unless given
    policies: [marginal_cost, least_expected_finish]   # the question's own unless given

The knee of a fleet is the load that gives most for what it costs: rate over mean run latency is
largest there. Below it capacity is idle, beyond it latency grows faster than work gets done.

References
----------
Kleinrock, Power and deterministic rules of thumb for probabilistic problems in computer
communications, ICC 1979.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from planner.dispatch.policies import parse_policy
from planner.domain.check import closed_mapping, items, number
from planner.domain.errors import InvalidInput
from planner.domain.files import read_yaml
from planner.report.terminal import align
from planner.whatif.answer import Answer
from planner.whatif.asking import ask
from planner.whatif.changes import ScaleLoad, Scenario
from planner.whatif.effort import Effort, bounded
from planner.whatif.notation import parse_scenario
from planner.whatif.question import Question, Target, check_deadlines
from planner.whatif.store import Store
from planner.whatif.tables import answer_table, flat_row

__all__ = ["GRID_SCHEMA", "Cell", "Grid", "GridResult", "Knee", "knees", "load_grid", "run_grid"]

GRID_SCHEMA = "almanac.whatif-grid/1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """What is tried: every scenario at every load under every policy.

    Parameters
    ----------
    scenarios
        Changes of the question.
    loads
        Factors of all arrival rates, > 0.
    policies
        As in `Question.policy`; empty keeps the question's own.
    """

    scenarios: tuple[Scenario, ...]
    loads: tuple[float, ...] = (1.0,)
    policies: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.scenarios or not self.loads:
            raise InvalidInput("nothing to try", where="grid", remedy="give changes and loads")
        for policy in self.policies:
            parse_policy(policy)


def load_grid(path: Path) -> Grid:
    """Read a grid file (YAML, see above).

    Raises
    ------
    InvalidInput
        Naming file, field, value and remedy.
    """
    raw = read_yaml(path, what="grid file")
    try:
        return _grid(raw)
    except InvalidInput as error:
        where = f"{path}: {error.where}" if error.where else str(path)
        raise InvalidInput(error.what, where=where, remedy=error.remedy) from error


def _grid(raw: Any) -> Grid:
    found = closed_mapping(raw, "", {"schema", "changes", "loads", "policies"})
    if found.get("schema") != GRID_SCHEMA:
        raise InvalidInput(
            f"{found.get('schema')!r} is not a schema this version reads",
            where="schema",
            remedy=f"write schema: {GRID_SCHEMA}",
        )
    changes = items(found.get("changes", [""]), "changes")
    loads = items(found.get("loads", [1.0]), "loads")
    return Grid(
        scenarios=tuple(parse_scenario(str(one or "")) for one in changes),
        loads=tuple(number(one, f"loads[{n}]", least=1e-6) for n, one in enumerate(loads)),
        policies=tuple(str(one) for one in items(found.get("policies", []), "policies")),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """A point of the grid; ``factor`` is its load relative to the question's."""

    scenario: str
    policy: str
    factor: float
    answer: Answer


@dataclass(frozen=True, slots=True, kw_only=True)
class Knee:
    """The best load of a fleet under a policy, among those tried.

    ``inside`` says that loads on both sides were tried and are worse; else the knee may lie
    beyond the loads of the grid.
    """

    scenario: str
    policy: str
    rate_rps: float
    load: float
    mean_s: float
    inside: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GridResult:
    """All cells, scenario by scenario, with what they say together."""

    cells: tuple[Cell, ...]
    target: Target | None = None

    @property
    def knees(self) -> tuple[Knee, ...]:
        """The knee of each fleet under each policy."""
        return knees(self.cells)

    @property
    def cheapest(self) -> Cell | None:
        """The cell that meets the target for least money at the question's own load, if any.

        Without prices that of the fewest endpoints.
        """
        if self.target is None:
            return None
        target = self.target
        able = [
            one
            for one in self.cells
            if one.factor == 1.0
            and (figure := one.answer.figures.get(target.metric)) is not None
            and target.met(figure.value)
        ]
        return min(able, key=_cost, default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        cheapest = self.cheapest
        return {
            "schema": "almanac.whatif-grid-result/1",
            "target": None if self.target is None else str(self.target),
            "cheapest": None
            if cheapest is None
            else {"scenario": cheapest.scenario, "policy": cheapest.policy},
            "cells": [
                {"scenario": one.scenario, "factor": one.factor, **one.answer.to_json()}
                for one in self.cells
            ],
            "knees": [
                {name: getattr(one, name) for name in Knee.__dataclass_fields__}
                for one in self.knees
            ],
        }

    def rows(self) -> list[dict[str, Any]]:
        """Return one flat row per cell."""
        rows = []
        for one in self.cells:
            row = {"scenario": one.scenario, "factor": one.factor}
            row |= {k: v for k, v in flat_row(one.answer).items() if k != "scenario"}
            if self.target is not None:
                figure = one.answer.figures.get(self.target.metric)
                row["meets_target"] = figure is not None and self.target.met(figure.value)
                row["proven_impossible"] = one.answer.impossible(self.target)
            rows.append(row)
        return rows

    def to_csv(self) -> str:
        """Return the rows as CSV, with a header."""
        rows = self.rows()
        out = io.StringIO()
        writer = csv.DictWriter(out, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return out.getvalue()

    def to_frame(self) -> Any:
        """Return the rows as a pandas data frame."""
        import pandas as pd

        return pd.DataFrame(self.rows())

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        return str(self.to_frame().to_html(index=False, float_format=lambda x: f"{x:.3g}"))

    def text(self) -> str:
        """Return the table, the knees and the cheapest for a terminal."""
        parts = [answer_table([one.answer for one in self.cells]), "", _knee_table(self.knees)]
        if self.target is not None:
            found = self.cheapest
            if found is None:
                parts += ["", f"{self.target}: no cell at the present load meets it"]
            else:
                price = found.answer.question.usd_per_hour
                cost = "" if price is None else f" for {price:.2f} $/h"
                parts += [
                    "",
                    f"{self.target}: cheapest is {found.scenario} under {found.policy}{cost}",
                ]
        return "\n".join(parts)


def _cost(cell: Cell) -> tuple[float, int, float]:
    """Return what a cell is chosen by: money, endpoints, mean latency."""
    question = cell.answer.question
    price = question.usd_per_hour
    return (
        price if price is not None else 0.0,
        len(question.fleet.endpoints),
        cell.answer.figures["mean_s"].value,
    )


def run_grid(
    question: Question,
    grid: Grid,
    *,
    target: Target | None = None,
    effort: Effort | None = None,
    store: Store | None = None,
) -> GridResult:
    """Return the answers of a grid.

    Raises
    ------
    InvalidInput
        If a change does not fit the question.
    """
    check_deadlines(target, question.streams)
    effort = bounded(effort or Effort(seeds=3, runs=100), target)
    points = []
    for scenario in grid.scenarios:
        changed = scenario.apply(question)
        for policy in grid.policies or (changed.policy,):
            for factor in grid.loads:
                asked = replace(ScaleLoad(factor=factor).apply(changed), policy=policy)
                points.append((str(scenario), policy, factor, asked))
    answers = ask([(one[0], one[3]) for one in points], effort, store=store or Store())
    cells = tuple(
        Cell(scenario=scenario, policy=policy, factor=factor, answer=answer)
        for (scenario, policy, factor, _), answer in zip(points, answers, strict=True)
    )
    return GridResult(cells=cells, target=target)


def knees(cells: Sequence[Cell]) -> tuple[Knee, ...]:
    """Return the knee of each scenario under each policy, in order of appearance."""
    groups: dict[tuple[str, str], list[Cell]] = {}
    for one in cells:
        if "mean_s" in one.answer.figures:
            groups.setdefault((one.scenario, one.policy), []).append(one)
    found = []
    for (scenario, policy), group in groups.items():
        ordered = sorted(group, key=lambda one: one.factor)
        power = [_power(one) for one in ordered]
        place = max(range(len(power)), key=lambda i: (power[i], -i))
        best = ordered[place]
        found.append(
            Knee(
                scenario=scenario,
                policy=policy,
                rate_rps=best.answer.question.rate_rps,
                load=best.answer.load,
                mean_s=best.answer.figures["mean_s"].value,
                inside=0 < place < len(ordered) - 1,
            )
        )
    return tuple(found)


def _power(cell: Cell) -> float:
    return cell.answer.question.rate_rps / cell.answer.figures["mean_s"].value


def _knee_table(found: Sequence[Knee]) -> str:
    rows = [["knee of", "policy", "runs/s", "load", "mean s", ""]]
    rows += [
        [
            one.scenario,
            one.policy,
            f"{one.rate_rps:.3g}",
            f"{one.load:.2f}",
            f"{one.mean_s:.2f}",
            "" if one.inside else "at the edge of the grid",
        ]
        for one in found
    ]
    return align(rows)
