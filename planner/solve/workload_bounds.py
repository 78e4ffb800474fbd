"""Run latencies that no policy can beat on a given workload: arrivals, realised runs, a fleet.

The bounds hold for every policy, clairvoyant ones included, on engines whose steps take what the
fleet's latency rows say (the simulator without noise and disturbances; calls fail nowhere). Let a
step of endpoint i have decode base d, cost e per decoding call, f per token of context, b and c
per prefilled token; slots are the most calls of a step.

critical path
    A call takes at least one step for its prompt and one for each further token, each at least
    ``d``; its own context is in the batch, and of the prompt at least what does not fill a block
    has to be computed. So it takes at least ``d + prefill(u) + (o - 1)(d + e) + f * contexts`` on
    i, and the least over the endpoints anywhere. Predecessors end before it starts, hence a run
    takes at least its longest chain of such times and delays.
prefix
    The same, where tokens can only be cached if another call that is not a successor of this one
    could have left them: no cache holds what nobody has computed.
load
    Share the time of each step among its calls: ``d`` in equal parts (at least ``d / slots``
    each), the rest by who causes it. A call then uses at least ``w[c, i]`` seconds of endpoint i,
    and i hands out at most one second per second. In units of ``a[c] = min over i of w[c, i]`` it
    hands out at most ``1 / s[i]`` per second, ``s[i] = min over c of w[c, i] / a[c]``, so the
    fleet is no faster than one machine of speed ``V = sum of 1 / s[i]`` that may work on anything
    at any time. On it, a run is a job of work A (the sum of its a), there from its arrival plus
    the least delay before a call, and ended no sooner than its work plus the least delay after
    the last call. Preemptive shortest-remaining-processing-time gives the least sum of flow times
    of such jobs (Schrage 1968), which bounds the mean.
lp
    On the same machine, divide time into intervals: x[r, t] is the share of run r's work done in
    interval t, ``sum over r of A x <= V length``. The work of r, done at most at speed V, ends no
    sooner than its mean instant plus A / (2 V). Latencies are at least that *and* the run's
    prefix bound; the least mean under these constraints bounds the mean, and unlike the others
    counts long chains and queues together.

For a percentile: a share of runs ends within x only if for each window of time the runs that
arrive and end inside it, less the largest ones allowed to be late, fit into it at speed V; and
order statistics of the runs' prefix bounds are bounds of order statistics.

References
----------
Schrage, A proof of the optimality of the shortest remaining processing time discipline, Operations
Research 16 (1968). Goemans, Queyranne, Schulz, Skutella, Wang, Single machine scheduling with
release dates, SIAM J. Discrete Math. 15 (2002), for mean instants.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ortools.linear_solver.python import model_builder

from planner.domain.errors import InvalidInput
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.run import RunSpec, Task
from planner.graph.analysis import finish_times, upward_ranks
from planner.solve.arrays import Floats

__all__ = ["WorkloadBound", "workload_bound"]

_INTERVALS = 100
_TRUST = 1e-6
"""Relative error of the linear solver's optimum that the bound allows for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkloadBound:
    """What no policy can beat.

    Parameters
    ----------
    mean_s
        No policy's mean run latency is below, s.
    name
        The bound that it comes from.
    parts
        Every bound of the mean by name, s.
    percentile_s
        Percent -> seconds that this percentile of run latency is not below.
    """

    mean_s: float
    name: str
    parts: Mapping[str, float]
    percentile_s: Mapping[int, float]


def workload_bound(
    specs: Sequence[RunSpec], fleet: Fleet, *, percentiles: Sequence[int] = (50, 95)
) -> WorkloadBound:
    """Return the largest of the bounds on a workload.

    Parameters
    ----------
    specs
        The realised runs with their arrivals; at least one.
    fleet
        Where they run. Any endpoint may serve any call that fits it.
    percentiles
        In percent, from 1 to 100, as order statistics: the least latency that this share of the
        runs does not exceed.

    Raises
    ------
    InvalidInput
        If there is no run, or a call fits no endpoint.
    """
    if not specs:
        raise InvalidInput("no run", where="workload", remedy="give at least one")
    warm = [_chain_s(spec, fleet, _all_cached(spec)) for spec in specs]
    cached = _cacheable(specs)
    cold = np.array([_chain_s(spec, fleet, own) for spec, own in zip(specs, cached, strict=True)])
    jobs = _Jobs(specs, fleet, cached)
    parts = {
        "critical path": float(np.mean(warm)),
        "prefix": float(cold.mean()),
        "load": jobs.mean_flow_s(),
    }
    together = jobs.linear_s(cold)
    if together is not None:
        parts["lp"] = together
    name = max(parts, key=lambda one: parts[one])
    return WorkloadBound(
        mean_s=parts[name],
        name=name,
        parts=parts,
        percentile_s={q: max(_order(cold, q), jobs.percentile_s(q)) for q in percentiles},
    )


# -- calls --------------------------------------------------------------------------------------


def _all_cached(spec: RunSpec) -> list[int]:
    return [max(0, task.prompt_tokens - 1) for task in spec.tasks]


def _cacheable(specs: Sequence[RunSpec]) -> list[list[int]]:
    """Return for each task the leading prompt tokens that some other call can have left."""
    tree = _Tree()
    after = [_successors(spec) for spec in specs]
    for r, spec in enumerate(specs):
        for task in spec.tasks:
            if task.site is not None:
                tree.add(task, r)
    return [
        [
            0 if task.site is None else tree.shared(task, r, after[r][task.index])
            for task in spec.tasks
        ]
        for r, spec in enumerate(specs)
    ]


def _successors(spec: RunSpec) -> list[set[int]]:
    """Return for each task itself and all tasks that wait for it, directly or not."""
    after: list[set[int]] = [{task.index} for task in spec.tasks]
    for task in reversed(spec.tasks):
        for pred in task.preds:
            after[pred] |= after[task.index]
    return after


class _Tree:
    """Texts by their starts: which calls hold the first n segments, and how much of the next."""

    def __init__(self) -> None:
        # Keys of the segments so far -> (run, task) -> tokens of the last of them.
        self._holders: dict[tuple[int, ...], dict[tuple[int, int], int]] = {}

    def add(self, task: Task, run: int) -> None:
        """Note what a call leaves in a cache: its prompt and its answer."""
        path: tuple[int, ...] = ()
        texts = [(one.key, one.tokens) for one in task.prompt]
        for key, tokens in (*texts, (task.output_key, task.output_tokens)):
            path = (*path, key)
            self._holders.setdefault(path, {})[run, task.index] = tokens

    def shared(self, task: Task, run: int, after: set[int]) -> int:
        """Return the longest start of a prompt that a call other than those ``after`` it holds."""
        path: tuple[int, ...] = ()
        total = 0
        alive: set[tuple[int, int]] | None = None
        for segment in task.prompt:
            path = (*path, segment.key)
            holders = {
                who: tokens
                for who, tokens in self._holders[path].items()
                if (who[0] != run or who[1] not in after) and (alive is None or who in alive)
            }
            if not holders:
                break
            total += min(segment.tokens, max(holders.values()))
            # Those whose segment has another length share no more than the shorter of the two.
            alive = {who for who, tokens in holders.items() if tokens == segment.tokens}
            if not alive:
                break
        return total


def _step_s(endpoint: Endpoint) -> tuple[float, float, float]:
    """Return base, seconds per decoding call and per token of context of a step."""
    row = endpoint.latency
    return (
        row.scale * row.decode_base_ms * 1e-3,
        row.scale * row.decode_us_per_call * 1e-6,
        row.scale * row.decode_ns_per_kv_token * 1e-9,
    )


def _parts_s(task: Task, endpoint: Endpoint, cached: int, calls: int) -> tuple[float, float]:
    """Return the least seconds for prompt and for answer where ``calls`` share each step's base."""
    base, per_call, per_token = _step_s(endpoint)
    blocks = min(cached, task.prompt_tokens - 1) // endpoint.block_tokens
    held = blocks * endpoint.block_tokens
    first = base / calls + endpoint.latency.prefill_marginal_s(task.prompt_tokens - held, held)
    steps = task.output_tokens - 1
    contexts = steps * task.prompt_tokens + steps * (steps + 1) / 2
    return first, steps * (base / calls + per_call) + per_token * contexts


def _least_s(task: Task, fleet: Fleet, cached: int) -> float:
    """Return the least service time of a call."""
    whole = [math.inf]
    first, last = [math.inf], [math.inf]
    for endpoint in _fitting(task, fleet):
        prompt_s, answer_s = _parts_s(task, endpoint, cached, 1)
        if endpoint.role == "both":
            whole.append(prompt_s + answer_s)
        (last if endpoint.role == "decode" else first).append(
            answer_s if endpoint.role == "decode" else prompt_s
        )
        if endpoint.role == "both":
            last.append(answer_s)
    split = min(first) + min(last) if _has_pools(fleet) else math.inf
    return min(*whole, split) if len(whole) > 1 else split


def _has_pools(fleet: Fleet) -> bool:
    return any(endpoint.role != "both" for endpoint in fleet.endpoints)


def _fitting(task: Task, fleet: Fleet) -> list[Endpoint]:
    need = task.prompt_tokens + task.output_tokens
    found = [e for e in fleet.endpoints if need <= min(e.max_model_len, e.kv_tokens)]
    if not found:
        raise InvalidInput(
            f"call site {task.site!r} needs {need} tokens of context, more than any endpoint holds",
            where="workload",
            remedy="use a fleet that fits it",
        )
    return found


def _durations(spec: RunSpec, fleet: Fleet, cached: Sequence[int]) -> list[float]:
    return [
        task.delay_s + (0.0 if task.site is None else _least_s(task, fleet, cached[task.index]))
        for task in spec.tasks
    ]


def _chain_s(spec: RunSpec, fleet: Fleet, cached: Sequence[int]) -> float:
    return max(finish_times(spec, _durations(spec, fleet, cached)), default=0.0)


def _order(values: Floats, percent: int) -> float:
    """Return the least value that ``percent`` of the values do not exceed."""
    return float(np.sort(values)[math.ceil(percent / 100 * values.size) - 1])


# -- load ---------------------------------------------------------------------------------------


class _Jobs:
    """Runs as jobs of one fluid machine."""

    def __init__(
        self, specs: Sequence[RunSpec], fleet: Fleet, cached: Sequence[Sequence[int]]
    ) -> None:
        needs: list[Floats] = []
        work = np.zeros(len(specs))
        self.arrival = np.array([spec.arrival_s for spec in specs])
        self.head, self.tail = np.zeros(len(specs)), np.zeros(len(specs))
        for r, (spec, own) in enumerate(zip(specs, cached, strict=True)):
            durations = _durations(spec, fleet, own)
            ranks = upward_ranks(spec, durations)
            finish = finish_times(spec, durations)
            calls = [task for task in spec.tasks if task.site is not None]
            if not calls:
                self.tail[r] = max(finish, default=0.0)
                continue
            for task in calls:
                for need in _needs(task, fleet, own[task.index]):
                    needs.append(need)
                    work[r] += float(need.min())
            self.head[r] = min(finish[t.index] - durations[t.index] + t.delay_s for t in calls)
            self.tail[r] = min(ranks[t.index] - durations[t.index] for t in calls)
        self.work = work
        if needs:
            table = np.array(needs)
            slowness = (table / table.min(axis=1, keepdims=True)).min(axis=0)
            self.speed = float((1.0 / slowness).sum())
        else:
            self.speed = math.inf

    def mean_flow_s(self) -> float:
        """Return the mean latency under shortest remaining processing time."""
        return float((self._finish() + self.tail - self.arrival).mean())

    def _finish(self) -> Floats:
        """Return when the work of each run ends under shortest remaining processing time."""
        release = self.arrival + self.head
        order = np.argsort(release, kind="stable")
        finish = release.copy()
        queue: list[tuple[float, int]] = []
        now = 0.0
        for position, r in enumerate(order.tolist()):
            now = max(now, float(release[r])) if not queue else float(release[r])
            heapq.heappush(queue, (float(self.work[r] / self.speed), r))
            until = math.inf
            if position + 1 < order.size:
                until = float(release[order[position + 1]])
            while queue and now < until:
                left, job = heapq.heappop(queue)
                if now + left <= until:
                    now += left
                    finish[job] = now
                else:
                    heapq.heappush(queue, (left - (until - now), job))
                    now = until
        return finish

    def linear_s(self, least_s: Floats) -> float | None:
        """Return the least mean of the linear program, None if the linear solver fails."""
        if not math.isfinite(self.speed):
            return None
        release = self.arrival + self.head
        end = float(release.max() + self.work.sum() / self.speed)
        # Intervals are short where much happens; any division gives a bound.
        instants = np.concatenate((release, self._finish(), [end]))
        edges = np.unique(np.quantile(instants, np.linspace(0.0, 1.0, _INTERVALS + 1)))
        count = edges.size - 1
        if count < 1:
            return None
        model = model_builder.Model()  # type: ignore[no-untyped-call]
        total = model_builder.LinearExpr.weighted_sum
        filled: list[list[tuple[float, model_builder.Variable]]] = [[] for _ in edges[:-1]]
        latencies = []
        for r in range(release.size):
            latency = model.new_num_var(float(least_s[r]), math.inf, "")
            latencies.append(latency)
            if self.work[r] <= 0:
                continue
            first = min(int(np.searchsorted(edges, release[r], side="right")) - 1, count - 1)
            shares = [model.new_num_var(0.0, 1.0, "") for _ in range(first, count)]
            starts = [max(float(edges[t]), float(release[r])) for t in range(first, count)]
            model.add_linear_constraint(total(shares, [1.0] * len(shares)), lb=1.0, ub=1.0)
            for t, share in zip(range(first, count), shares, strict=True):
                filled[t].append((float(self.work[r]), share))
            # Instants are those of the intervals' starts or of the release, so never too late.
            half = float(self.work[r]) / (2 * self.speed)
            model.add_linear_constraint(
                total([latency, *shares], [1.0, *(-start for start in starts)]),
                lb=half + float(self.tail[r]) - float(self.arrival[r]),
            )
        for users, length in zip(filled, np.diff(edges).tolist(), strict=True):
            if users:
                works = [work for work, _ in users]
                model.add_linear_constraint(
                    total([share for _, share in users], works), ub=self.speed * length
                )
        model.minimize(total(latencies, [1.0 / len(latencies)] * len(latencies)))
        solver = model_builder.Solver("GLOP")
        if solver.solve(model) != model_builder.SolveStatus.OPTIMAL:
            return None
        return float(solver.objective_value) * (1 - _TRUST)

    def percentile_s(self, percent: int) -> float:
        """Return seconds within which fewer runs than ``percent`` can end, by windows of time."""
        if not math.isfinite(self.speed):
            return 0.0
        late = self.work.size - math.ceil(percent / 100 * self.work.size)
        low, high = 0.0, float((self.work.sum() / self.speed) + np.ptp(self.arrival))
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self._fits(middle, late) else (middle, high)
        return low

    def _fits(self, within_s: float, late: int) -> bool:
        """Whether in no window the runs that have to end inside it need more than it offers."""
        order = np.argsort(self.arrival, kind="stable")
        arrival, work = self.arrival[order], self.work[order]
        for begin in range(arrival.size):
            # The largest that may be late inside the window are left out of its sum.
            spared: list[float] = []
            spared_sum = total = 0.0
            for position in range(begin, arrival.size):
                total += float(work[position])
                heapq.heappush(spared, float(work[position]))
                spared_sum += float(work[position])
                if len(spared) > late:
                    spared_sum -= heapq.heappop(spared)
                room = (float(arrival[position] - arrival[begin]) + within_s) * self.speed
                if total - spared_sum > room * (1 + 1e-9):
                    return False
        return True


def _needs(task: Task, fleet: Fleet, cached: int) -> list[Floats]:
    """Return the seconds of each endpoint that a call uses, or its two parts where pools serve."""
    fitting = {endpoint.id for endpoint in _fitting(task, fleet)}
    whole = np.full(len(fleet.endpoints), np.inf)
    first, last = whole.copy(), whole.copy()
    for i, endpoint in enumerate(fleet.endpoints):
        if endpoint.id not in fitting:
            continue
        prompt_s, answer_s = _parts_s(task, endpoint, cached, endpoint.max_num_seqs)
        if endpoint.role != "decode":
            first[i] = prompt_s
        if endpoint.role != "prefill":
            last[i] = answer_s
        whole[i] = prompt_s + answer_s
    if not _has_pools(fleet):
        return [whole]
    return [one for one in (first, last) if 0 < one.min() < math.inf]
