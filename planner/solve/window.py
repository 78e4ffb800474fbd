"""Joint placement of the calls of a short window: ready, or ready within about a second (F2).

What one call costs alone is its own time and the delay it imposes on calls already there (the
live marginal cost). What a rule that looks at one call at a time cannot see is what the calls of
the window do to each other when they share an endpoint: the prefill of one delays the others,
each slows the steps of the rest, and a prefix that several share is computed once (a negative
delay). Calls of one join count together, by the last to finish, so over scenarios of lengths.

    cost = mean over scenarios of
             sum over joins of weight * max over its calls c of [tail_c + own_c + delays of c]
           + theta * sum over calls of imposed_c

A call outside any join is a join of one. Delays are pairwise: a call's delay is the sum of what
each other call on its endpoint costs it.

Bound: with multipliers that divide the weight of a join among its calls per scenario, the maximum
becomes a sum, and what is left is an assignment with pairwise costs, bounded by
`planner.solve.call_sets`. Without joins the bound is within a per cent; with joins, where delays
count for the last call only, it is looser, and the multipliers are improved in a few turns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from planner.domain.errors import Infeasible, InvalidInput, ModelInvalid
from planner.solve.budget import Budget
from planner.solve.call_sets import set_bound
from planner.solve.instance import Bools, Floats, Ints

__all__ = ["Window", "WindowModel", "WindowPlan", "greedy_window", "solve_window", "window_cost"]

_TICK_S = 1e-3
_STEPS_PER_CALL = 4
"""Improving steps of the descent at most, per call."""
_LEAST_GAIN_S = 1e-9
_SPREAD = 0.05
"""Spread of the bound's multipliers, relative to the mean finish."""
_SHIFT = 0.15
"""How far multipliers follow the relaxation in a turn, relative to what made them."""
_LEAST_SHARE = 1e-3
"""Added to each multiplier: one of zero could never grow."""
_FIRST_STEPS, _STEPS = 60, 15
_TURNS = 8
"""Subgradient steps of the first turn and of later ones, and turns, of which joins need several."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """A question: S scenarios, C calls, I endpoints.

    Parameters
    ----------
    own_s
        Seconds to the call's finish on an endpoint, the rest of the window elsewhere; (S, C, I).
    imposed_s
        Weighted seconds it delays the calls already there; (C, I).
    delay_s
        Seconds by which call d delays call c if both are on i, below zero if c profits;
        (S, C, D, I), 0 where c is d.
    allowed
        Whether an endpoint may take a call; (C, I).
    joins
        Groups of calls that are waited for together; calls in no group stand alone.
    weight
        Weight of each call's finish, that of a join being its largest; (C,).
    tail_s
        Seconds from the call's finish to the join, by call; (C,).
    theta
        Weight of the imposed delay, >= 0.
    """

    own_s: Floats
    imposed_s: Floats
    delay_s: Floats
    allowed: Bools
    joins: tuple[tuple[int, ...], ...] = ()
    weight: Floats
    tail_s: Floats
    theta: float = 1.0

    def __post_init__(self) -> None:
        samples, calls, endpoints = self.own_s.shape
        shapes = {
            "imposed_s": (self.imposed_s, (calls, endpoints)),
            "delay_s": (self.delay_s, (samples, calls, calls, endpoints)),
            "allowed": (self.allowed, (calls, endpoints)),
            "weight": (self.weight, (calls,)),
            "tail_s": (self.tail_s, (calls,)),
        }
        for name, (value, wanted) in shapes.items():
            if value.shape != wanted:
                raise InvalidInput(
                    f"shape {value.shape}", where=name, remedy=f"give an array of shape {wanted}"
                )
        members = [call for group in self.joins for call in group]
        if len(set(members)) < len(members) or any(not 0 <= c < calls for c in members):
            raise InvalidInput(
                f"groups {self.joins}", where="joins", remedy="name each call at most once"
            )
        for call in np.flatnonzero(~self.allowed.any(axis=1)).tolist():
            raise Infeasible(f"call {call} of the window fits no endpoint")

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """All calls by join, those that stand alone included."""
        members = {call for group in self.joins for call in group}
        alone = [(c,) for c in range(len(self.weight)) if c not in members]
        return (*self.joins, *alone)


@dataclass(frozen=True, slots=True, kw_only=True)
class WindowPlan:
    """An endpoint for each call; cost and proven least cost in weighted seconds.

    ``search_s`` is the time CP-SAT took, 0 if descent was near enough to the bound.
    """

    endpoints: tuple[int, ...]
    cost_s: float
    bound_s: float
    status: str
    search_s: float

    @property
    def gap(self) -> float:
        """Relative distance of the cost to the bound, >= 0."""
        return max(0.0, 1.0 - self.bound_s / self.cost_s) if self.cost_s > 0 else 0.0


def window_cost(window: Window, endpoints: Sequence[int]) -> float:
    """Return the cost of a placement in weighted seconds, straight from the definition."""
    total = 0.0
    samples = len(window.own_s)
    for s in range(samples):
        for group in window.groups:
            last = -np.inf
            for c in group:
                i = endpoints[c]
                finish = window.tail_s[c] + window.own_s[s, c, i]
                for d, other in enumerate(endpoints):
                    if other == i and d != c:
                        finish += window.delay_s[s, c, d, i]
                last = max(last, finish)
            total += max(window.weight[c] for c in group) * last / samples
    return float(
        total + window.theta * sum(window.imposed_s[c, i] for c, i in enumerate(endpoints))
    )


def greedy_window(window: Window) -> tuple[int, ...]:
    """Return a placement that no move and no exchange improves, built one call after the other.

    Calls with the most to lose from a second choice come first.
    """
    search = _Search(window)
    return tuple(search.descend(search.construct()).tolist())


def solve_window(window: Window, *, budget: Budget | None = None, seed: int = 0) -> WindowPlan:
    """Return the best joint placement found within a budget.

    Parameters
    ----------
    budget
        0.1 s of search on two workers to a 1 % gap unless given. Descent, bound and the building
        of the model come on top: for 24 calls on 8 endpoints about as much again.

    Raises
    ------
    ModelInvalid
        If the solver refuses the model (a bug).
    """
    budget = budget or Budget(wall_s=0.1, relative_gap=0.01)
    search = _Search(window)
    best = search.descend(search.construct())
    cost = search.cost(best)
    bound = _bound(window, search, best, cost)
    search_s = 0.0
    if cost - bound > budget.relative_gap * abs(cost):
        model = WindowModel(window, best, bound)
        solver = cp_model.CpSolver()
        budget.apply(solver, seed)
        solver.parameters.cp_model_probing_level = 0
        status = solver.solve(model.cp)
        search_s = solver.wall_time
        if status == cp_model.MODEL_INVALID:
            raise ModelInvalid(f"CP-SAT refused the window model: {model.cp.validate()}")
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            found = search.descend(model.read(solver))
            if search.cost(found) < cost:
                best, cost = found, search.cost(found)
        # Rounding to ticks may move the bound by one tick per term.
        proven = solver.best_objective_bound * model.unit_s - model.slack_s
        bound = max(bound, proven)
    bound = min(bound, cost)
    near = cost - bound <= max(1e-9, 1e-6 * abs(cost))
    return WindowPlan(
        endpoints=tuple(best.tolist()),
        cost_s=cost,
        bound_s=bound,
        status="optimal" if near else "feasible",
        search_s=search_s,
    )


class _Search:
    """Costs of many placements at once, and descent by moves and exchanges."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._calls = np.arange(len(window.weight))
        self._groups = [list(group) for group in window.groups]
        self._weights = np.array([window.weight[group].max() for group in self._groups])
        self._order = np.concatenate([np.array(group) for group in self._groups])
        sizes = [len(group) for group in self._groups]
        self._starts = np.concatenate(([0], np.cumsum(sizes[:-1]))).astype(np.int64)

    def finishes(self, batch: Ints) -> Floats:
        """Return finish plus tail of each call for placements (n, C); shape (n, S, C)."""
        window, calls = self._window, self._calls
        own = window.own_s[:, calls, batch].transpose(1, 0, 2)
        same = batch[:, :, None] == batch[:, None, :]
        delay = window.delay_s[:, calls[:, None], calls, batch[:, :, None]]
        return np.asarray(
            own + window.tail_s + np.einsum("sncd,ncd->nsc", delay, same, optimize=False)
        )

    def costs(self, batch: Ints) -> Floats:
        """Return the cost of each placement of a batch (n, C); shape (n,)."""
        imposed = self._window.imposed_s[self._calls, batch].sum(axis=1)
        return np.asarray(
            self._weighed(self.finishes(batch)) + self._window.theta * imposed, dtype=np.float64
        )

    def cost(self, placement: Ints) -> float:
        """Return the cost of one placement."""
        return float(self.costs(placement[np.newaxis])[0])

    def construct(self) -> Ints:
        """Place one call after the other where the calls placed so far cost least in all."""
        window = self._window
        alone = window.weight[:, None] * window.own_s.mean(axis=0)
        alone = np.where(window.allowed, alone + window.theta * window.imposed_s, np.inf)
        ranked = np.sort(alone, axis=1)
        loss = ranked[:, 1] - ranked[:, 0] if alone.shape[1] > 1 else ranked[:, 0]
        loss = np.where(np.isfinite(loss), loss, np.inf)
        pair = _pair_costs(window, np.repeat(window.weight[None], len(window.own_s), axis=0))
        placement = np.zeros(len(loss), dtype=np.int64)
        extra = np.zeros_like(alone)
        for c in np.argsort(-loss, kind="stable").tolist():
            i = int((alone[c] + extra[c]).argmin())
            placement[c] = i
            extra[:, i] += pair[:, c, i]
        return placement

    def descend(self, placement: Ints) -> Ints:
        """Take the best improving move or, failing that, exchange, until there is none."""
        allowed = self._window.allowed
        move_c, move_i = np.nonzero(allowed)
        one, two = np.triu_indices(len(allowed), k=1)
        placement = placement.copy()
        value = self.cost(placement)
        for _ in range(_STEPS_PER_CALL * len(allowed)):
            finish = self.finishes(placement[np.newaxis])[0]
            there = np.eye(allowed.shape[1])[placement]
            # Delay of each call by those on each endpoint, itself left out; (S, C, I).
            met = np.einsum("scdi,di->sci", self._window.delay_s, there, optimize=False)
            keep = placement[move_c] != move_i
            c, i = move_c[keep], move_i[keep]
            best = self._best(self._after(placement, finish, met, c, i), placement, c, i)
            if best is not None and best[1] < value - _LEAST_GAIN_S:
                position, value = best
                placement[c[position]] = i[position]
                continue
            keep = (
                (placement[one] != placement[two])
                & allowed[one, placement[two]]
                & allowed[two, placement[one]]
            )
            c, d = one[keep], two[keep]
            i, j = placement[c], placement[d]
            best = self._best(self._swapped(placement, finish, met, c, d), placement, c, j, d, i)
            if best is None or best[1] >= value - _LEAST_GAIN_S:
                break
            position, value = best
            placement[c[position]], placement[d[position]] = j[position], i[position]
        return placement

    def _after(self, placement: Ints, finish: Floats, met: Floats, c: Ints, i: Ints) -> Floats:
        """Return all finishes after call c[n] has gone to endpoint i[n]; shape (n, S, C)."""
        window = self._window
        out = np.repeat(finish[np.newaxis], len(c), axis=0)
        out += self._caused(placement, c, i) - self._caused(placement, c, placement[c])
        own = window.own_s[:, c, i] + window.tail_s[c] + met[:, c, i]
        out[np.arange(len(c)), :, c] = own.T
        return out

    def _swapped(self, placement: Ints, finish: Floats, met: Floats, c: Ints, d: Ints) -> Floats:
        """Return all finishes after calls c[n] and d[n] exchanged endpoints; (n, S, C)."""
        window, i, j = self._window, placement[c], placement[d]
        out = np.repeat(finish[np.newaxis], len(c), axis=0)
        for call, source, target in ((c, i, j), (d, j, i)):
            out += self._caused(placement, call, target) - self._caused(placement, call, source)
        rows = np.arange(len(c))
        for call, other, target in ((c, d, j), (d, c, i)):
            own = window.own_s[:, call, target] + window.tail_s[call] + met[:, call, target]
            out[rows, :, call] = (own - window.delay_s[:, call, other, target]).T
        return out

    def _caused(self, placement: Ints, c: Ints, i: Ints) -> Floats:
        """Return the delay of each call by call c[n] if that is on endpoint i[n]; (n, S, C)."""
        there = placement == i[:, None]
        return np.asarray(
            self._window.delay_s[:, :, c, i].transpose(2, 0, 1) * there[:, np.newaxis]
        )

    def _best(self, finishes: Floats, placement: Ints, *changes: Ints) -> tuple[int, float] | None:
        """Return position and cost of the best candidate; ``changes`` are calls and endpoints."""
        if not len(finishes):
            return None
        imposed = self._window.imposed_s
        extra = np.full(len(finishes), imposed[self._calls, placement].sum())
        for c, i in zip(changes[::2], changes[1::2], strict=True):
            extra += imposed[c, i] - imposed[c, placement[c]]
        costs = self._weighed(finishes) + self._window.theta * extra
        best = int(costs.argmin())
        return best, float(costs[best])

    def _weighed(self, finishes: Floats) -> Floats:
        """Return the weighted ends of all joins for finishes (n, S, C); shape (n,)."""
        last = np.maximum.reduceat(finishes[:, :, self._order], self._starts, axis=2)
        return np.asarray((last.mean(axis=1) * self._weights).sum(axis=1), dtype=np.float64)

    def multipliers(self, finish: Floats, spread_s: float) -> Floats:
        """Return each join's weight divided among its calls, most to the last; (S, C).

        A call that finishes ``spread_s`` before the last gets a share 1 / e of the last's.
        """
        return self.shifted(np.ones(finish.shape), finish, 1.0 / spread_s)

    def shifted(self, weights: Floats, finish: Floats, rate: float) -> Floats:
        """Return multipliers times the exponential of their finish, scaled anew; (S, C)."""
        out: Floats = np.zeros(finish.shape)
        for group, weight in zip(self._groups, self._weights, strict=True):
            late = finish[:, group]
            share = weights[:, group] + _LEAST_SHARE
            share = share * np.exp(rate * (late - late.max(axis=1, keepdims=True)))
            out[:, group] = weight * share / share.sum(axis=1, keepdims=True)
        return out


def _pair_costs(window: Window, weights: Floats) -> Floats:
    """Return what two calls cost each other on an endpoint, for weights (S, C); shape (C, C, I)."""
    one_way = np.einsum("sc,scdi->cdi", weights, window.delay_s) / len(weights)
    return np.asarray(one_way + one_way.transpose(1, 0, 2), dtype=np.float64)


def _bound(window: Window, search: _Search, placement: Ints, target: float) -> float:
    """Return a cost that no placement is below, by the sets of calls of the module's text.

    ``target`` is the cost of ``placement``, from which multipliers and prices start.
    """
    samples = len(window.own_s)
    finish = search.finishes(placement[np.newaxis])[0]
    spread_s = _SPREAD * max(abs(float(finish.mean())), _TICK_S)
    weights = search.multipliers(finish, spread_s)
    calls = np.arange(len(placement))
    same = (placement[:, None] == placement) & (calls[:, None] != calls)
    prices: Floats | None = None
    best = -np.inf
    joined = any(len(group) > 1 for group in window.groups)
    for turn in range(_TURNS if joined else 1):
        alone = np.einsum("sc,sci->ci", weights, window.own_s) / samples
        alone = np.where(window.allowed, alone + window.theta * window.imposed_s, np.inf)
        fixed = float((weights * window.tail_s).sum() / samples)
        pair = _pair_costs(window, weights)
        if prices is None:
            # What each call costs where it is, half of what it shares included.
            shared = pair[calls[:, None], calls, placement[:, None]]
            prices = alone[calls, placement] + (shared * same).sum(axis=1) / 2
        found = set_bound(
            alone, pair, prices, target=target - fixed, steps=_STEPS if turn else _FIRST_STEPS
        )
        best = max(best, found.value + fixed)
        prices = found.prices
        # Where the relaxation ends late, its multipliers should be larger.
        own = np.einsum("sci,ci->sc", window.own_s, found.use) + window.tail_s
        finish = own + np.einsum("scdi,cdi->sc", window.delay_s, found.both)
        weights = search.shifted(weights, finish, _SHIFT * (1.0 - turn / _TURNS) / spread_s)
    return best


class WindowModel:
    """The CP-SAT model: one literal per call and endpoint; delays bind only where both are."""

    def __init__(self, window: Window, hint: Ints, bound_s: float) -> None:
        self.cp = cp_model.CpModel()
        samples, calls, _ = window.own_s.shape
        self._use = {
            (c, i): self.cp.new_bool_var("") for c, i in np.argwhere(window.allowed).tolist()
        }
        for c in range(calls):
            self.cp.add_exactly_one(
                self._use[c, i] for i in np.flatnonzero(window.allowed[c]).tolist()
            )
        own = np.rint((window.own_s + window.tail_s[:, None]) / _TICK_S).astype(np.int64)
        delay = np.rint(window.delay_s / _TICK_S).astype(np.int64)
        far = int(np.abs(own).max() + np.abs(delay).sum(axis=2).max()) + 1
        expr = cp_model.LinearExpr.weighted_sum
        terms: list[cp_model.LinearExprT] = []
        rounding = 0.0
        for group in window.groups:
            weight = float(max(window.weight[c] for c in group))
            # Alone, a call's mean over the scenarios is all that counts: one row, not S.
            parts = [list(range(samples))] if len(group) == 1 else [[s] for s in range(samples)]
            for part in parts:
                last = self.cp.new_int_var(-far * samples, far * samples, "")
                for c in group:
                    for i in np.flatnonzero(window.allowed[c]).tolist():
                        others = [
                            d
                            for d in range(calls)
                            if d != c and (d, i) in self._use and delay[part, c, d, i].any()
                        ]
                        sums = [int(delay[part, c, d, i].sum()) for d in others]
                        row = self.cp.add(
                            last
                            >= expr([self._use[d, i] for d in others], sums)
                            + int(own[part, c, i].sum())
                        )
                        row.only_enforce_if(self._use[c, i])
                terms.append(round(1000 * weight) * last)
            # Half a tick per time, and half a thousandth of a weight.
            rounding += (0.5 * weight * calls + 5e-4 * far) * _TICK_S
        imposed = np.rint(1000 * samples * window.theta * window.imposed_s / _TICK_S)
        terms += [int(imposed[c, i]) * literal for (c, i), literal in self._use.items()]
        self.unit_s = _TICK_S / (1000 * samples)
        self.slack_s = rounding
        total = sum(terms)
        if math.isfinite(bound_s):
            self.cp.add(total >= math.floor((bound_s - self.slack_s) / self.unit_s))
        self.cp.minimize(total)
        for (c, i), literal in self._use.items():
            self.cp.add_hint(literal, int(hint[c] == i))

    def read(self, solver: cp_model.CpSolver) -> Ints:
        """Return the solver's placement."""
        placement = np.zeros(1 + max(c for c, _ in self._use), dtype=np.int64)
        for (c, i), literal in self._use.items():
            if solver.boolean_value(literal):
                placement[c] = i
        return placement
