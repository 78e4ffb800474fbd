r"""Bounds on the makespan of flow shops: of each stage alone, and of all stages in one program.

If a set A of activities shares m alike machines and none of it starts before r, then however the
machines divide it, with durations p and p(A) their sum,

    sum over A of p * start  >=  r * p(A) + p(A)^2 / (2 m) - (sum over A of p^2) / 2.

It holds for each set and, since time may as well run backwards, for the ends before the makespan,
with r the least work that follows. The linear program minimises the makespan under the order of
stages within chains, and under these inequalities as far as solutions violate them. For a given r
the most violated sets are found among those by earliest start, as on one machine without r. Where
stages are alike in load this goes beyond each stage alone: what ends early on one stage must start
late on the next.

Floating point decides nothing: what is returned is the value that multipliers of the rows prove
by weak duality, with starts limited to where a schedule can have them.

References
----------
Queyranne, Structure of a simple scheduling polyhedron, Mathematical Programming 1993, for one
machine and how to separate; Schulz, Scheduling to minimize total weighted completion time,
IPCO 1996, for m alike machines; both here shifted by heads and tails.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
from ortools.math_opt.python import mathopt  # type: ignore[import-untyped]

from planner.solve.effort import Effort
from planner.solve.flow_decode import Flow

__all__ = ["flow_bound", "least_makespan"]

_Floats = npt.NDArray[np.float64]
_Columns = npt.NDArray[np.intp]

_LEVELS = (0.0, 0.1, 0.25, 0.5, 0.75)
"""Shares of the chains whose heads, or tails, are below those of the sets tried."""
_VIOLATION = 1e-3
"""Least violation of an inequality that counts, in mean durations and over the norm of p."""
_PIVOTS = 500
"""Steps of the simplex method between two looks at the effort."""
_ROWS_PER_STEP = 12
"""Rows that a simplex step passes while numpy is called once, about."""


def least_makespan(flow: Flow) -> int:
    """Return a makespan in ticks that no schedule is below.

    Each machine of a stage waits for the first chain and is followed by the rest of the last; at
    best these are the shortest ways to the stage and from it.
    """
    chains = flow.ticks.shape[1]
    ends = flow.ticks.cumsum(axis=0)
    least = int(ends[-1].max())
    for s, machines in enumerate(flow.machines):
        used = min(machines, chains)
        before = np.sort(ends[s] - flow.ticks[s])[:used].sum()
        after = np.sort(ends[-1] - ends[s])[:used].sum()
        least = max(least, -int(-(before + flow.ticks[s].sum() + after) // used))
    return least


def flow_bound(flow: Flow, *, makespan: int, effort: Effort, share: float = 1.0) -> int:
    """Return a makespan in ticks that no schedule is below, at least that of `least_makespan`.

    It holds whenever the search ends: further inequalities only raise it.

    Parameters
    ----------
    makespan
        Of a known schedule, in ticks: the search ends there, and goes up to there.
    effort, share
        What may be spent: this share of the effort, with what is spent of it before.
    """
    least = min(least_makespan(flow), makespan)
    program = None
    while least < makespan and effort.within(share):
        program = program or _Program(flow, least, makespan)
        if not program.solve(effort, share):
            break
        least = max(least, min(program.proven(), makespan))
        if not program.tighten(effort):
            break
    return least


class _Program:
    """The linear program: starts (S, J) and the makespan, all in mean durations; rows are >=."""

    def __init__(self, flow: Flow, least: int, makespan: int) -> None:
        self._unit = float(flow.ticks.mean()) or 1.0
        self._ticks = flow.ticks / self._unit
        self._machines = flow.machines
        ends = self._ticks.cumsum(axis=0)
        self._heads = ends - self._ticks
        self._tails = ends[-1] - ends
        latest = makespan / self._unit - self._ticks - self._tails
        self._lower = np.append(self._heads, least / self._unit)
        self._upper = np.append(latest, makespan / self._unit)
        self._values = self._lower
        self._multipliers = np.empty(0)
        self._model = mathopt.Model()
        self._variables = [self._model.add_variable(lb=float(low)) for low in self._lower]
        self._model.minimize(self._variables[-1])
        self._rows: list[mathopt.LinearConstraint] = []
        self._columns: list[_Columns] = []
        self._coefficients: list[_Floats] = []
        self._right: list[float] = []
        self._order_stages()
        self._solver = mathopt.IncrementalSolver(self._model, mathopt.SolverType.GLOP)

    def _order_stages(self) -> None:
        """Each stage of a chain after the one before, the makespan after the last."""
        stages, chains = self._ticks.shape
        at = np.arange(stages * chains).reshape(stages, chains)
        then = np.vstack([at[1:], np.full(chains, stages * chains)])
        for before, after, ticks in zip(at.flat, then.flat, self._ticks.flat, strict=True):
            self._add(np.array([after, before]), np.array([1.0, -1.0]), float(ticks))

    def _add(self, columns: _Columns, coefficients: _Floats, right: float) -> None:
        row = self._model.add_linear_constraint(lb=right)
        for column, coefficient in zip(columns.tolist(), coefficients.tolist(), strict=True):
            row.set_coefficient(self._variables[column], coefficient)
        self._rows.append(row)
        self._columns.append(columns)
        self._coefficients.append(coefficients)
        self._right.append(right)

    def solve(self, effort: Effort, share: float) -> bool:
        """Solve from the last basis; return whether that came to an end within the effort."""
        # New rows leave a basis dual feasible, and presolving would forget it.
        parameters = mathopt.SolveParameters(
            lp_algorithm=mathopt.LPAlgorithm.DUAL_SIMPLEX,
            presolve=mathopt.Emphasis.OFF,
            iteration_limit=_PIVOTS,
            threads=1,
        )
        while effort.within(share):
            try:
                result = self._solver.solve(params=parameters)
            except (RuntimeError, AttributeError):
                # On numerical trouble, which the bindings of OR-Tools 9.15 report by the wrong
                # error. What is proven so far stays.
                return False
            steps = max(1, result.solve_stats.simplex_iterations)
            effort.count(steps * len(self._rows) // _ROWS_PER_STEP)
            if result.termination.reason == mathopt.TerminationReason.OPTIMAL:
                self._values = np.array(result.variable_values(self._variables))
                self._multipliers = np.array(result.dual_values(self._rows))
                return True
        return False

    def proven(self) -> int:
        """Return the makespan in ticks that the multipliers of the last solution prove.

        For multipliers y >= 0 of rows A x >= b, no x between its limits has a makespan below
        y b + min over x of (cost - y A) x, whatever rounding made of y.
        """
        multipliers = np.maximum(self._multipliers, 0.0)
        weights = np.repeat(multipliers, [len(row) for row in self._columns])
        used = np.bincount(
            np.concatenate(self._columns),
            weights=weights * np.concatenate(self._coefficients),
            minlength=len(self._lower),
        )
        left = -used
        left[-1] += 1.0
        rest = (left * np.where(left > 0, self._lower, self._upper)).sum()
        value = self._unit * float(multipliers @ np.array(self._right) + rest)
        return math.ceil(value * (1 - 1e-9) - 1e-6)

    def tighten(self, effort: Effort) -> bool:
        """Add the inequalities that the last solution violates; return whether there are any."""
        stages, chains = self._ticks.shape
        rows = len(self._rows)
        makespan = float(self._values[-1])
        starts = self._values[:-1].reshape(stages, chains)
        for s, (ticks, machines) in enumerate(zip(self._ticks, self._machines, strict=True)):
            effort.count(50 * len(_LEVELS))
            for chosen, shares, right in _violated(ticks, machines, self._heads[s], starts[s]):
                self._add(s * chains + chosen, shares, right)
            before_end = makespan - starts[s] - ticks
            for chosen, shares, right in _violated(ticks, machines, self._tails[s], before_end):
                columns = np.append(s * chains + chosen, stages * chains)
                self._add(columns, np.append(-shares, 1.0), right + float(shares @ ticks[chosen]))
        return len(self._rows) > rows


def _violated(
    ticks: _Floats, machines: int, heads: _Floats, starts: _Floats
) -> Iterator[tuple[_Columns, _Floats, float]]:
    """Yield sets of chains with the inequalities of one stage that their starts violate.

    Each is the chains, the share of each in their work, and what the sum of shares times starts
    must at least be.
    """
    order = starts.argsort(kind="stable")
    # What takes no time is on no machine.
    order = order[ticks[order] > 0]
    if not order.size:
        return
    for head in np.unique(np.quantile(heads[order], _LEVELS, method="lower")):
        some = order[heads[order] >= head]
        work = ticks[some].cumsum()
        squares = (ticks[some] ** 2).cumsum()
        used = np.minimum(np.arange(1, len(some) + 1), machines)
        least = head * work + work**2 / (2 * used) - squares / 2
        violation = (least - (ticks[some] * starts[some]).cumsum()) / np.sqrt(squares)
        last = int(violation.argmax())
        if violation[last] > _VIOLATION:
            chosen = some[: last + 1]
            yield chosen, ticks[chosen] / work[last], float(least[last] / work[last])
