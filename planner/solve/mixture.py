"""Several workflows as one question: a workflow whose first branch says which of them a run is.

Each workflow becomes a sub-graph of its own, so that the planner and the checker need nothing
new: capacity is shared, and the objective is the mean run latency over all runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable, WorkflowEstimate
from planner.domain.ids import NodeId, RunId
from planner.domain.run import RunSpec
from planner.domain.workflow import END, START, Branch, Node, Outcome, Workflow
from planner.graph.sampling import scenarios

__all__ = ["Mixture", "mix"]

_BRANCH = "workflow"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mixture:
    """A workflow that stands for several, and how its call sites are called in theirs.

    Parameters
    ----------
    workflow, estimates
        What to plan, with its forecasts.
    runs
        Sampled runs, each workflow in proportion to its rate, but at least one.
    rate_rps
        Runs per second of all workflows together.
    """

    workflow: Workflow
    estimates: EstimateTable
    runs: tuple[RunSpec, ...]
    rate_rps: float
    parts: Mapping[str, Workflow]

    def origin(self, site: str) -> tuple[str, str]:
        """Return (workflow hash, call site) of a call site of the mixture."""
        if not self.parts:
            return self.workflow.content_hash, site
        part, _, own = site.partition("/")
        return self.parts[part].content_hash, own


def mix(
    workflows: Sequence[Workflow],
    loads_rps: Mapping[str, float],
    estimates: EstimateTable,
    *,
    samples: int,
    seed: int,
) -> Mixture:
    """Return the mixture of the workflows that have a load; a single one is left as it is.

    Parameters
    ----------
    loads_rps
        Runs per second by workflow hash, > 0.
    samples
        Sampled runs per workflow on average, >= 1.
    seed
        Of the samples.

    Raises
    ------
    InvalidInput
        If no workflow has a load.
    """
    loaded = sorted(
        (one for one in workflows if loads_rps.get(one.content_hash, 0.0) > 0),
        key=lambda one: one.content_hash,
    )
    if not loaded:
        raise InvalidInput(
            "no workflow has arrivals", where="snapshot: rates_rps", remedy="give a rate above 0"
        )
    total_rps = sum(loads_rps[one.content_hash] for one in loaded)
    known = {one.content_hash: estimates.workflows.get(one.content_hash) for one in loaded}
    if len(loaded) == 1:
        (only,) = loaded
        estimate = known[only.content_hash] or WorkflowEstimate()
        return Mixture(
            workflow=only,
            estimates=estimates,
            runs=scenarios(only, estimate, samples, seed, defaults=estimates),
            rate_rps=total_rps,
            parts={},
        )
    parts = {f"w{position}": one for position, one in enumerate(loaded)}
    whole = _joined(parts)
    estimate = _joined_estimate(
        {name: known[one.content_hash] or WorkflowEstimate() for name, one in parts.items()}
    )
    runs: list[RunSpec] = []
    for name, one in parts.items():
        share = loads_rps[one.content_hash] / total_rps
        # Drawn by workflow and not by lot, so that a rare workflow is in every sample.
        certain = {other: (float(other == name),) for other in parts}
        fixed = replace(estimate, branches={**estimate.branches, _BRANCH: certain})
        count = max(1, round(samples * len(parts) * share))
        runs += [
            replace(run, run_id=RunId(f"{name}/{run.run_id}"))
            for run in scenarios(whole, fixed, count, seed, defaults=estimates)
        ]
    return Mixture(
        workflow=whole,
        estimates=replace(
            estimates, workflows={**estimates.workflows, whole.content_hash: estimate}
        ),
        runs=tuple(runs),
        rate_rps=total_rps,
        parts=parts,
    )


def _joined(parts: Mapping[str, Workflow]) -> Workflow:
    return Workflow(
        name="mixture",
        nodes=tuple(
            Node(id=NodeId(name), kind="subgraph", subgraph=one) for name, one in parts.items()
        ),
        edges=tuple((NodeId(name), END) for name in parts),
        branches=(
            Branch(
                id=_BRANCH,
                source=START,
                outcomes=tuple(Outcome(id=name, targets=(NodeId(name),)) for name in parts),
            ),
        ),
    )


def _joined_estimate(parts: Mapping[str, WorkflowEstimate]) -> WorkflowEstimate:
    return WorkflowEstimate(
        name="mixture",
        sites={f"{k}/{path}": v for k, one in parts.items() for path, v in one.sites.items()},
        tools={f"{k}/{path}": v for k, one in parts.items() for path, v in one.tools.items()},
        branches={f"{k}/{path}": v for k, one in parts.items() for path, v in one.branches.items()},
    )
