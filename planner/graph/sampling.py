"""Draws runs from a workflow: branches, loop counts, lengths and delays, all realised.

Rules
-----
* ``supersteps`` (LangGraph): all tasks of a step finish before any of the next starts; a node
  triggered by several sources in one step runs once. ``dataflow``: each trigger starts a node.
* A join fires once ``need`` of its sources have fired since it last did. In ``dataflow`` the
  first ``need`` in order of the walk count, since times are not known here.
* A node entered for the ``max_visits``-th time takes only outcomes that lead towards the end.
* Common random numbers: one draw from the generator makes the run's root; each value then comes
  from a uniform number that depends on the root, what is drawn, where, and the visit, and on
  nothing else. Changing one forecast leaves every other draw as it was.
* A forecast is looked up in the estimates, then in the workflow's declarations, then the prior.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict, deque
from dataclasses import dataclass, field, replace

import numpy as np

from planner.domain.blocks import Segment
from planner.domain.errors import WorkflowError
from planner.domain.estimates import (
    PRIOR_TOOL,
    EstimateTable,
    Quantiles,
    SiteEstimate,
    WorkflowEstimate,
)
from planner.domain.ids import NodeId, RunId, SiteId
from planner.domain.run import RunSpec, Task, TaskKind
from planner.domain.workflow import END, START, Branch, CallSite, Join, Node, Outcome, Workflow
from planner.graph.shape import Shape, shape_of

__all__ = [
    "outcome_weights",
    "sample_run",
    "scenarios",
    "site_estimate",
    "stable_key",
    "tool_estimate",
]

_MOST_TASKS = 10_000
"""A run longer than this is a mistake in the graph (repeated triggers that double)."""
_UNIT = 2.0**-53


def stable_key(*parts: str | int) -> int:
    """Return a 62-bit integer made of the parts, the same in every process."""
    return _digest(parts) >> 2


def _digest(parts: tuple[str | int, ...]) -> int:
    text = "\x1f".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def site_estimate(
    site: CallSite, path: str, estimate: WorkflowEstimate, defaults: EstimateTable | None = None
) -> SiteEstimate:
    """Return the forecasts of a call site: estimated, else declared, else the prior.

    A declared mean output length keeps the shape of the prior.
    """
    known = estimate.sites.get(path)
    if known is not None:
        return known
    prior = (defaults or EstimateTable()).default_site
    if site.static_prefix_tokens is not None:
        prior = replace(prior, shared_prefix_tokens=float(site.static_prefix_tokens))
    if site.expected_output_tokens is not None:
        factor = site.expected_output_tokens / max(prior.output_tokens.mean, 1e-9)
        declared = Quantiles(
            values=tuple(value * factor for value in prior.output_tokens.values),
            mean=site.expected_output_tokens,
            provenance="declared",
        )
        prior = replace(prior, output_tokens=declared)
    return prior


def tool_estimate(node: Node, path: str, estimate: WorkflowEstimate) -> Quantiles:
    """Return the delay of a tool or code node in seconds: estimated, else declared, else prior.

    Routers and code take no time unless something says otherwise.
    """
    known = estimate.tools.get(path)
    if known is not None:
        return known
    if node.expected_delay_s is not None:
        return Quantiles.constant(node.expected_delay_s)
    return PRIOR_TOOL if node.kind == "tool" else Quantiles.constant(0.0, "prior")


def outcome_weights(
    branch: Branch, path: str, estimate: WorkflowEstimate, visit: int
) -> dict[str, float]:
    """Return the probability of each outcome on a visit (from 0); they sum to one.

    Estimated, else declared; outcomes nothing is known of share what is left equally.
    """
    known = estimate.branches.get(path)
    if known is not None:
        weights = {}
        for outcome in branch.outcomes:
            values = known.get(outcome.id, ())
            weights[outcome.id] = values[min(visit, len(values) - 1)] if values else 0.0
    else:
        open_ones = [o for o in branch.outcomes if o.probability is None]
        given = sum(o.probability for o in branch.outcomes if o.probability is not None)
        rest = max(0.0, 1.0 - given) / len(open_ones) if open_ones else 0.0
        weights = {o.id: rest if o.probability is None else o.probability for o in branch.outcomes}
    total = sum(weights.values())
    if total <= 0.0:
        return dict.fromkeys(weights, 1.0 / len(weights))
    return {outcome: weight / total for outcome, weight in weights.items()}


def sample_run(
    workflow: Workflow,
    estimate: WorkflowEstimate,
    rng: np.random.Generator,
    *,
    run_id: str,
    arrival_s: float = 0.0,
    max_visits: int = 64,
    defaults: EstimateTable | None = None,
) -> RunSpec:
    """Draw one run.

    Parameters
    ----------
    workflow, estimate
        The graph and its forecasts.
    rng
        Exactly one number is drawn from it.
    run_id
        Unique within the workload; run-specific text never equals that of another run.
    arrival_s
        When the run starts, s.
    max_visits
        Entries into one node before its branches must lead out, >= 1.
    defaults
        Whose ``default_site`` stands in for call sites without an estimate.

    Raises
    ------
    WorkflowError
        If a cycle has no way out, or the run grows beyond 10,000 tasks.
    """
    walk = _Walk(
        root=int(rng.integers(0, 2**63)),
        run_id=run_id,
        workflow_hash=workflow.content_hash,
        estimate=estimate,
        defaults=defaults,
        max_visits=max_visits,
    )
    walk.walk(workflow, "", ())
    return RunSpec(
        run_id=RunId(run_id),
        workflow=workflow.name,
        workflow_hash=workflow.content_hash,
        arrival_s=arrival_s,
        tasks=tuple(walk.tasks),
    )


def scenarios(
    workflow: Workflow,
    estimate: WorkflowEstimate,
    n: int,
    seed: int,
    *,
    max_visits: int = 64,
    defaults: EstimateTable | None = None,
) -> tuple[RunSpec, ...]:
    """Draw ``n`` runs for planning; scenario i depends on the seed and i only, not on ``n``."""
    return tuple(
        sample_run(
            workflow,
            estimate,
            np.random.default_rng((seed, position)),
            run_id=f"scenario-{position}",
            max_visits=max_visits,
            defaults=defaults,
        )
        for position in range(n)
    )


@dataclass(slots=True)
class _JoinState:
    """What has fired since the join last did: ends of the tasks by source."""

    join: Join
    fired: dict[NodeId, tuple[int, ...]] = field(default_factory=dict)

    def fire(self, source: NodeId, ends: tuple[int, ...]) -> tuple[int, ...] | None:
        """Note a source; return the tasks to wait for if the join fires now."""
        self.fired[source] = ends
        need = self.join.need if self.join.need is not None else len(set(self.join.sources))
        if len(self.fired) < need:
            return None
        waited = tuple(sorted({end for one in self.fired.values() for end in one}))
        self.fired.clear()
        return waited


@dataclass(slots=True)
class _Walk:
    """One run being drawn."""

    root: int
    run_id: str
    workflow_hash: str
    estimate: WorkflowEstimate
    defaults: EstimateTable | None
    max_visits: int
    tasks: list[Task] = field(default_factory=list)
    visits: defaultdict[NodeId, int] = field(default_factory=lambda: defaultdict(int))
    last_call: dict[SiteId, Task] = field(default_factory=dict)

    def walk(self, workflow: Workflow, prefix: str, preds: tuple[int, ...]) -> tuple[int, ...]:
        """Walk one level of the graph after ``preds``; return the tasks that end it."""
        shape = shape_of(workflow)
        joins = [_JoinState(join) for join in workflow.joins]
        visit = self.visits[NodeId(f"{prefix}{START}")]
        self.visits[NodeId(f"{prefix}{START}")] += 1
        outcomes = self._choose(shape, START, prefix, visit)
        first = _triggers(shape, joins, START, outcomes, preds)
        if workflow.execution == "supersteps":
            return self._supersteps(workflow, shape, joins, prefix, first, preds)
        return self._dataflow(workflow, shape, joins, prefix, first, preds)

    def _supersteps(
        self,
        workflow: Workflow,
        shape: Shape,
        joins: list[_JoinState],
        prefix: str,
        first: list[tuple[NodeId, tuple[int, ...]]],
        preds: tuple[int, ...],
    ) -> tuple[int, ...]:
        active = sorted({target for target, _ in first})
        while active:
            ends: list[int] = []
            following: set[NodeId] = set()
            for name in active:
                own, triggers = self._enter(workflow.node(name), shape, joins, prefix, preds)
                ends += own
                following.update(target for target, _ in triggers)
            preds = tuple(ends)
            active = sorted(following)
        return preds

    def _dataflow(
        self,
        workflow: Workflow,
        shape: Shape,
        joins: list[_JoinState],
        prefix: str,
        first: list[tuple[NodeId, tuple[int, ...]]],
        preds: tuple[int, ...],
    ) -> tuple[int, ...]:
        pending = deque(first)
        ends: set[int] = set()
        followed: set[int] = set()
        while pending:
            name, after = pending.popleft()
            own, triggers = self._enter(workflow.node(name), shape, joins, prefix, after)
            ends.update(own)
            followed.update(after)
            pending += triggers
        return tuple(sorted(ends - followed)) or preds

    def _enter(
        self,
        node: Node,
        shape: Shape,
        joins: list[_JoinState],
        prefix: str,
        preds: tuple[int, ...],
    ) -> tuple[tuple[int, ...], list[tuple[NodeId, tuple[int, ...]]]]:
        """Execute a node; return its last tasks and what it triggers."""
        path = NodeId(prefix + node.id)
        visit = self.visits[path]
        self.visits[path] += 1
        before = len(self.tasks)
        if node.subgraph is not None:
            ends = self.walk(node.subgraph, f"{path}/", preds)
        else:
            ends = preds
            for site in node.call_sites:
                ends = (self._call(site, path, prefix, visit, ends),)
        if len(self.tasks) == before:
            ends = (self._delay(node, path, visit, preds),)
        if len(self.tasks) > _MOST_TASKS:
            raise WorkflowError(
                f"a run grew beyond {_MOST_TASKS} tasks",
                where=f"node {path!r}",
                remedy="join the paths that trigger it again and again",
            )
        outcomes = self._choose(shape, node.id, prefix, visit)
        if outcomes:
            last = ends[-1]
            chosen = tuple((f"{prefix}{branch.id}", one.id) for branch, one in outcomes)
            self.tasks[last] = replace(
                self.tasks[last], outcomes=self.tasks[last].outcomes + chosen
            )
        return ends, _triggers(shape, joins, node.id, outcomes, ends)

    def _choose(
        self, shape: Shape, source: NodeId, prefix: str, visit: int
    ) -> list[tuple[Branch, Outcome]]:
        """Choose one outcome per branch of a node."""
        chosen = []
        for branch in shape.branches[source]:
            path = prefix + branch.id
            weights = outcome_weights(branch, path, self.estimate, visit)
            outcomes = sorted(branch.outcomes, key=lambda o: o.id)
            if visit >= self.max_visits - 1:
                rank = shape.exit_rank[source]
                outcomes = [o for o in outcomes if shape.outcome_rank(o.targets) < rank]
                if not any(weights[o.id] > 0.0 for o in outcomes):
                    outcomes = [min(outcomes, key=lambda o: shape.outcome_rank(o.targets))]
            total = sum(weights[o.id] for o in outcomes)
            threshold = self._uniform("branch", path, visit) * total
            pick = next((o for o in reversed(outcomes) if weights[o.id] > 0.0), outcomes[-1])
            for outcome in outcomes:
                threshold -= weights[outcome.id]
                if threshold < 0.0:
                    pick = outcome
                    break
            chosen.append((branch, pick))
        return chosen

    def _call(
        self, site: CallSite, node: NodeId, prefix: str, visit: int, preds: tuple[int, ...]
    ) -> int:
        path = SiteId(prefix + site.id)
        forecast = site_estimate(site, path, self.estimate, self.defaults)
        previous = self.last_call.get(path)
        if previous is not None and forecast.growth_tokens is not None:
            growth = forecast.growth_tokens.sample(self._uniform("growth", path, visit))
            start = (*previous.prompt, Segment(previous.output_key, previous.output_tokens))
            fresh = round(growth)
        else:
            length = forecast.prompt_tokens.sample(self._uniform("prompt", path, visit))
            static = round(forecast.shared_prefix_tokens)
            identity: tuple[str | int, ...] = (self.workflow_hash, path)
            if site.static_prefix_hash is not None:
                identity = (site.static_prefix_hash,)
            start = (Segment(stable_key(*identity, "static"), static),) if static else ()
            fresh = round(length) - static
        key = stable_key(self.run_id, path, visit, "prompt")
        output = forecast.output_tokens.sample(self._uniform("output", path, visit))
        task = self._emit(
            node,
            "llm",
            preds,
            site=path,
            prompt=(*start, Segment(key, max(1, fresh))),
            output_tokens=max(1, round(output)),
            output_key=stable_key(self.run_id, path, visit, "output"),
            visit=visit,
        )
        self.last_call[path] = task
        return task.index

    def _delay(self, node: Node, path: NodeId, visit: int, preds: tuple[int, ...]) -> int:
        delay = tool_estimate(node, path, self.estimate).sample(self._uniform("tool", path, visit))
        kind: TaskKind = "tool" if node.kind == "tool" else "code"
        return self._emit(path, kind, preds, delay_s=delay, visit=visit).index

    def _emit(
        self,
        node: NodeId,
        kind: TaskKind,
        preds: tuple[int, ...],
        *,
        visit: int,
        site: SiteId | None = None,
        prompt: tuple[Segment, ...] = (),
        output_tokens: int = 0,
        output_key: int = 0,
        delay_s: float = 0.0,
    ) -> Task:
        task = Task(
            index=len(self.tasks),
            node=node,
            kind=kind,
            preds=preds,
            site=site,
            prompt=prompt,
            output_tokens=output_tokens,
            output_key=output_key,
            delay_s=delay_s,
            visit=visit,
        )
        self.tasks.append(task)
        return task

    def _uniform(self, what: str, path: str, visit: int) -> float:
        """Return the uniform number in [0, 1) of one draw of this run."""
        return (_digest((self.root, what, path, visit)) >> 11) * _UNIT


def _triggers(
    shape: Shape,
    joins: list[_JoinState],
    source: NodeId,
    outcomes: list[tuple[Branch, Outcome]],
    ends: tuple[int, ...],
) -> list[tuple[NodeId, tuple[int, ...]]]:
    """Return (target, tasks to wait for) of everything a finished node starts."""
    targets = set(shape.edges[source])
    for _, outcome in outcomes:
        targets.update(outcome.targets)
    triggers = [(target, ends) for target in sorted(targets - {END})]
    for state in joins:
        if source in state.join.sources:
            waited = state.fire(source, ends)
            if waited is not None and state.join.target != END:
                triggers.append((state.join.target, waited))
    return triggers
