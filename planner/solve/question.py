"""The solver's view of a planning question: index arrays in place of domain objects.

Indices: k call site (over all workflows), m option (where a call can go: an endpoint that serves
it whole, or a prefill/decode pair), i endpoint, l level (position in the endpoint's grid), s
scenario (over all workflows), t task over all scenarios, r run class. Without pairs options and
endpoints are the same. `planner.solve.instance` makes instances.

Several workflows are one question: a run of the *mix* is a run of one of them, drawn by rate, and
class r holds one placement for each. Classes are exchangeable: all face the same scenarios, so
what a class costs depends on its placement and the levels only. (Scenarios of its own would let a
class choose its endpoints knowing its branches and lengths.)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.solve.arrays import Bools, Floats, Ints

__all__ = ["LOAD_UNIT", "Instance", "Memory", "Source", "level_grid"]

LOAD_UNIT = 1e-5
"""Resolution of loads in the model: busy calls per unit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """One workflow of the mix.

    Parameters
    ----------
    name, workflow_hash
        Of the workflow.
    rate_rps
        Runs per second, all classes together.
    weight
        Its weight in the objective, beside its rate; > 0.
    deadline_ticks
        Deadline of a run in ticks, or None; ``hard`` if every scenario has to keep it.
    deadline_s
        The same in seconds, as it was given.
    sites, paths
        Indices of its call sites, and their paths in the workflow.
    """

    name: str
    workflow_hash: str
    rate_rps: float
    weight: float = 1.0
    deadline_ticks: int | None = None
    deadline_s: float | None = None
    hard: bool = False
    sites: range
    paths: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """KV tokens: what the placements hold on average, and what is lost where they do not fit.

    Parameters
    ----------
    tokens
        Tokens each endpoint may hold on average; shape (I,).
    active_tokens
        Context of a busy call of a site beyond its static prefix; shape (K,).
    prefix
        Static prefix of each site, -1 for none; sites of one prefix share it. Shape (K,).
    prefix_tokens
        Tokens of each prefix; shape (P,).
    held_tokens
        Tokens that kept sessions of a site hold on average, all classes together; shape (K,).
        0 for sites that no run visits again.
    visits, later
        Visits per run of the mix, and those that continue a session; shape (K,).
    gap_s, context_tokens
        Mean seconds to the next visit, mean tokens after a visit; shape (K,).
    cold_ticks, lost_ticks
        Extra ticks of each call whose prefix, or whose session, is not there; shape (T, M).
    cold_work_s, lost_work_s
        Extra seconds of service per run of the mix; shape (K, M).
    whole
        Whether an option is an endpoint that serves calls whole; shape (M,).
    """

    tokens: Ints
    active_tokens: Floats
    prefix: Ints
    prefix_tokens: Ints
    held_tokens: Floats
    visits: Floats
    later: Floats
    gap_s: Floats
    context_tokens: Floats
    cold_ticks: Ints
    lost_ticks: Ints
    cold_work_s: Floats
    lost_work_s: Floats
    whole: Bools


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """A planning question in arrays.

    Parameters
    ----------
    sources
        The workflows.
    fleet_hash
        The fleet it was made from.
    sites, endpoints
        Call sites and endpoints by index; K and I of them.
    option_endpoint, option_prefill
        Endpoint that decodes and whose level counts, and the one that computes the prompt (-1 if
        it is the same); shape (M,).
    levels
        Level grid of each endpoint, increasing.
    run_classes
        R.
    arrival_rate_rps
        Runs per second of the mix, all classes together.
    utilisation_cap
        Largest share of a level's slots that may be busy on average.
    scenarios
        S, of all workflows together.
    scenario_source, scenario_weight
        Workflow of each scenario, and its whole-numbered weight in the objective; shape (S,).
    task_scenario, task_site, task_preds
        Scenario, call site (-1 for a delay) and predecessors of each task, in an order in which
        predecessors come first.
    delay_ticks
        Ticks of each delay, 0 for calls; shape (T,).
    service_ticks
        Ticks of each call at option m and level l; shape (T, M, L), 0 for delays.
    work_s
        Expected seconds of service a run of the mix needs at site k from the endpoint of option
        m at level l; shape (K, M, L).
    lane_work_s
        The same from the prefill endpoint of a pair; shape (K, M), 0 without one.
    allowed
        Whether option m may serve site k; shape (K, M).
    memory
        KV capacities and needs.
    """

    sources: tuple[Source, ...]
    fleet_hash: str
    sites: tuple[str, ...]
    endpoints: tuple[str, ...]
    option_endpoint: Ints
    option_prefill: Ints
    levels: tuple[tuple[int, ...], ...]
    run_classes: int
    arrival_rate_rps: float
    utilisation_cap: float
    scenarios: int
    scenario_source: Ints
    scenario_weight: Ints
    task_scenario: tuple[int, ...]
    task_site: tuple[int, ...]
    task_preds: tuple[tuple[int, ...], ...]
    delay_ticks: Ints
    service_ticks: Ints
    work_s: Floats
    lane_work_s: Floats
    allowed: Bools
    memory: Memory

    @property
    def workflow_hash(self) -> str:
        """The workflow of a question about one."""
        return self.sources[0].workflow_hash

    @property
    def level_count(self) -> int:
        """L: length of the longest level grid."""
        return int(self.work_s.shape[2])

    @property
    def total_weight(self) -> int:
        """Sum of the scenarios' weights over all classes."""
        return self.run_classes * int(self.scenario_weight.sum())

    @property
    def pairs(self) -> bool:
        """Whether any option is a prefill/decode pair."""
        return bool((self.option_prefill >= 0).any())

    def option_name(self, m: int) -> str:
        """Return an option for people: ``decode``, or ``prefill>decode``."""
        name, lane = self.endpoints[self.option_endpoint[m]], self.option_prefill[m]
        return name if lane < 0 else f"{self.endpoints[lane]}>{name}"

    @property
    def option_grids(self) -> tuple[tuple[int, ...], ...]:
        """Level grid that counts for each option."""
        return tuple(self.levels[i] for i in self.option_endpoint)

    @property
    def modes(self) -> Bools:
        """Whether site k may be served by option m at level l; shape (K, M, L)."""
        out = np.zeros(self.work_s.shape, dtype=bool)
        for m, grid in enumerate(self.option_grids):
            out[:, m, : len(grid)] = self.allowed[:, m, np.newaxis]
        return out

    @property
    def class_load(self) -> Ints:
        """Busy calls one class brings at site k by option m at level l, in load units: (K, M, L).

        Rounded up, so that a plan within the room in units is within it in truth.
        """
        return self.in_units(self.work_s)

    @property
    def lane_load(self) -> Ints:
        """Share of the prefill endpoint's time that one class takes, in load units: (K, M)."""
        return self.in_units(self.lane_work_s)

    def in_units(self, work_s: Floats) -> Ints:
        """Return the load of one class in units, rounded up, for seconds of service per run."""
        busy = work_s * (self.arrival_rate_rps / self.run_classes)
        return np.ceil(busy / LOAD_UNIT - 1e-9).astype(np.int64)

    @property
    def room(self) -> Ints:
        """Busy calls allowed on endpoint i at level l, in units, -1 beyond its grid: (I, L)."""
        out = np.full((len(self.endpoints), self.level_count), -1, dtype=np.int64)
        for i, grid in enumerate(self.levels):
            out[i, : len(grid)] = np.floor(
                np.array(grid) * (self.utilisation_cap / LOAD_UNIT) + 1e-9
            )
        return out

    @property
    def twins(self) -> tuple[tuple[int, ...], ...]:
        """Groups of two or more endpoints that no plan can tell apart."""
        if self.pairs:
            return ()
        groups: dict[tuple[object, ...], list[int]] = {}
        for i, grid in enumerate(self.levels):
            extras = self.memory.cold_ticks[:, i], self.memory.lost_ticks[:, i]
            parts = (self.service_ticks[:, i], self.work_s[:, i], self.allowed[:, i], *extras)
            key = (grid, int(self.memory.tokens[i]), *(part.tobytes() for part in parts))
            groups.setdefault(key, []).append(i)
        return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def level_grid(slots: int, most: int) -> tuple[int, ...]:
    """Return powers of two up to ``min(slots, most)``, and that number itself; at least 1."""
    top = max(1, min(slots, most))
    grid = [1 << power for power in range(top.bit_length()) if 1 << power < top]
    return (*grid, top)
