"""Tiny planning questions by hand, and an enumerator that shares nothing with the solver.

Endpoints take 1 ms per uncached prompt token, and 9 ms plus 1 ms per call side by side for each
output token, times their scale; so a call of 200 uncached and 100 output tokens takes 1.2 s alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from planner.domain.estimates import EstimateTable, Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId, NodeId, SiteId
from planner.domain.latency import LatencyRow
from planner.domain.objective import MEAN, Objective
from planner.domain.plan import Assignment, Plan
from planner.domain.run import RunSpec
from planner.domain.workflow import END, START, Branch, CallSite, Node, Outcome, Workflow
from planner.graph.sampling import scenarios
from planner.solve.instance import Instance, build_instance
from planner.solve.solver import Budget, PlanResult, solve_plan
from planner.verify import verify_plan

EXACT = Budget.reproducible(deterministic=30.0, relative_gap=0.0)


def endpoint(
    name: str, scale: float = 1.0, slots: int = 4, model: str = "m", kv_blocks: int = 10_000
) -> Endpoint:
    """Return an endpoint, ``scale`` times slower than the usual one."""
    return Endpoint(
        id=EndpointId(name),
        model=model,
        gpu="G",
        latency=LatencyRow(
            prefill_base_ms=0.0,
            prefill_us_per_token=1000.0,
            prefill_ns_per_token_sq=0.0,
            decode_base_ms=9.0,
            decode_us_per_call=1000.0,
            decode_ns_per_kv_token=0.0,
            scale=scale,
        ),
        kv_blocks=kv_blocks,
        max_num_seqs=slots,
    )


def fleet(*endpoints: Endpoint) -> Fleet:
    """Return a fleet."""
    return Fleet(name="small", endpoints=endpoints)


def node(name: str) -> Node:
    """Return a node with one call to model m."""
    return Node(
        id=NodeId(name), kind="llm", call_sites=(CallSite(id=SiteId(f"{name}#0"), model="m"),)
    )


def chain(*names: str) -> Workflow:
    """Return nodes one after the other."""
    stops = (START, *map(NodeId, names), END)
    return Workflow(
        name="chain", nodes=tuple(map(node, names)), edges=tuple(itertools.pairwise(stops))
    )


def fan(*names: str) -> Workflow:
    """Return the first node, then all but the last side by side, then the last."""
    first, *middle, last = map(NodeId, names)
    edges = [(START, first), (last, END)]
    edges += [(first, one) for one in middle] + [(one, last) for one in middle]
    return Workflow(name="fan", nodes=tuple(map(node, names)), edges=tuple(edges))


@dataclass(frozen=True, slots=True)
class Case:
    """A planning question; ``scarce`` has the enumerator try what to keep in KV, too."""

    workflow: Workflow
    fleet: Fleet
    estimates: EstimateTable
    rate: float
    classes: int = 1
    samples: int = 2
    objective: Objective = MEAN
    deadline_s: float | None = None
    hard: bool = False
    scarce: bool = False

    @property
    def runs(self) -> tuple[RunSpec, ...]:
        """The scenarios of seed 0."""
        estimate = self.estimates.workflows[self.workflow.content_hash]
        return scenarios(self.workflow, estimate, self.samples, 0)

    def instance(self) -> Instance:
        """Return the question in arrays."""
        return build_instance(
            self.workflow,
            self.fleet,
            self.estimates,
            self.runs,
            arrival_rate_rps=self.rate,
            run_classes=self.classes,
        )

    def solve(self, budget: Budget = EXACT) -> PlanResult:
        """Return the plan."""
        return solve_plan(
            self.workflow,
            self.fleet,
            self.estimates,
            arrival_rate_rps=self.rate,
            run_classes=self.classes,
            scenarios=self.samples,
            budget=budget,
            objective=self.objective,
            deadline_s=self.deadline_s,
            hard_deadline=self.hard,
        )


def case(
    workflow: Workflow,
    machines: Fleet,
    rate: float,
    outputs: Sequence[float] | None = None,
    classes: int = 1,
    spread: Sequence[float] = (1.0,) * 7,
) -> Case:
    """Return a question whose sites have 300 prompt tokens, 100 of them static.

    ``outputs`` are output tokens by site in node order; ``spread`` the factors of the quantiles.
    """
    lengths = outputs or [100.0] * len(workflow.call_sites)
    sites = {
        str(site): SiteEstimate(
            output_tokens=Quantiles(values=tuple(length * s for s in spread), mean=length),
            prompt_tokens=Quantiles.constant(300.0),
            shared_prefix_tokens=100.0,
        )
        for site, length in zip(workflow.call_sites, lengths, strict=True)
    }
    table = EstimateTable(workflows={workflow.content_hash: WorkflowEstimate(sites=sites)})
    return Case(workflow, machines, table, rate, classes)


def session(rounds: int = 3, growth: float = 50.0) -> tuple[Workflow, WorkflowEstimate]:
    """Return a call that is visited ``rounds`` times with a tool of 2 s between."""
    a, t = NodeId("a"), NodeId("t")
    branch = Branch(
        id="b",
        source=a,
        outcomes=(Outcome(id="again", targets=(t,)), Outcome(id="done", targets=(END,))),
    )
    workflow = Workflow(
        name="session",
        nodes=(node("a"), Node(id=t, kind="tool")),
        edges=((START, a), (t, a)),
        branches=(branch,),
    )
    again = (1.0,) * (rounds - 1) + (0.0,)
    estimate = WorkflowEstimate(
        sites={
            "a#0": SiteEstimate(
                output_tokens=Quantiles.constant(100.0),
                prompt_tokens=Quantiles.constant(300.0),
                shared_prefix_tokens=100.0,
                growth_tokens=Quantiles.constant(growth),
            )
        },
        tools={"t": Quantiles.constant(2.0)},
        branches={"b": {"again": again, "done": tuple(1 - p for p in again)}},
    )
    return workflow, estimate


def _choices(question: Case, cells: Sequence[tuple[int, str]]) -> Iterator[list[Assignment]]:
    """Yield every way to place the cells; where KV matters, with and without what may be kept."""
    ways: list[tuple[str, str | None]] = [
        (str(one.id), None) for one in question.fleet.endpoints if one.role == "both"
    ]
    ways += [
        (str(last.id), str(first.id))
        for first in question.fleet.endpoints
        for last in question.fleet.endpoints
        if (first.role, last.role) == ("prefill", "decode")
    ]
    flags = (True, False) if question.scarce else (True,)
    for homes in itertools.product(itertools.product(ways, flags, flags), repeat=len(cells)):
        yield [
            Assignment(run_class=r, site=site, endpoint=name, prefill=prefill, warm=warm, keep=keep)
            for (r, site), ((name, prefill), warm, keep) in zip(cells, homes, strict=True)
        ]


def enumerate_best(question: Case) -> float | None:
    """Return the least objective over all placements and levels that the checker accepts.

    None if it accepts none. The checker computes the objective, so nothing of the solver is
    used.
    """
    runs = question.runs
    sites = list(question.workflow.call_sites)
    cells = [(r, site) for r in range(question.classes) for site in sites]
    slots = {str(one.id): one.max_num_seqs for one in question.fleet.endpoints}
    lanes = {str(one.id) for one in question.fleet.endpoints if one.role == "prefill"}
    best: float | None = None
    for assignments in _choices(question, cells):
        used = sorted({x for one in assignments for x in (one.endpoint, one.prefill) if x})
        grids = ([1] if n in lanes else [1, 2, 4][: slots[n].bit_length()] for n in used)
        for levels in itertools.product(*grids):
            plan = Plan(
                workflow_hash=question.workflow.content_hash,
                fleet_hash=question.fleet.content_hash(),
                arrival_rate_rps=question.rate,
                run_classes=question.classes,
                assignments=tuple(assignments),
                levels=dict(zip(used, levels, strict=True)),
                objective_s=-1.0,
                bound_s=-1.0,
                status="optimal",
                scenarios=len(runs),
                seed=0,
                objective=question.objective,
                deadline_s=question.deadline_s,
                hard_deadline=question.hard,
            )
            report = verify_plan(plan, question.workflow, question.fleet, question.estimates, runs)
            # The stated objective is wrong on purpose; only other rules count here.
            if {v.rule for v in report.violations} == {"objective"}:
                assert report.objective_s is not None
                if best is None or report.objective_s < best:
                    best = report.objective_s
    return best
