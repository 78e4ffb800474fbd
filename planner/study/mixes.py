"""Mixes of workflows: what arrives, in which shares, of which tenants.

`joined` puts all workflows of a mix into one graph with a choice at its start: what a load is a
share of.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable, WorkflowEstimate
from planner.domain.ids import NodeId
from planner.domain.run import RunSpec
from planner.domain.workflow import END, START, Branch, Node, Outcome, Workflow
from planner.graph.sampling import sample_run
from planner.study.graphs import TEMPLATES, Template

__all__ = ["MIXES", "Mix", "Part", "joined", "make_mix"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One workflow of a mix.

    Parameters
    ----------
    template
        Name in `planner.study.graphs.TEMPLATES`.
    share
        Share of the arriving runs, (0, 1].
    tenant
        Whose runs they are.
    deadline_s
        Hard limit after arrival, > 0, or None.
    """

    template: str
    share: float
    tenant: str = "default"
    deadline_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Mix:
    """Workflows with shares that sum to one."""

    name: str
    parts: tuple[Part, ...]

    @property
    def templates(self) -> tuple[Template, ...]:
        """The workflows, in the order of the parts."""
        return tuple(TEMPLATES[part.template] for part in self.parts)

    @property
    def workflows(self) -> tuple[Workflow, ...]:
        """Their graphs."""
        return tuple(template.workflow for template in self.templates)

    @property
    def fingerprint(self) -> str:
        """16 hex digits that change when anything that its runs are drawn from changes."""
        content = repr([self.parts, self.templates])
        return hashlib.sha256(content.encode()).hexdigest()[:16]

    def runs(self, arrivals_s: Iterable[float], *, seed: int) -> tuple[RunSpec, ...]:
        """Return one realised run per arrival.

        Run number n depends on the seed and n only: not on the arrival times, nor on how many
        runs there are.
        """
        rng = np.random.default_rng([seed, 1])
        bounds = np.cumsum([part.share for part in self.parts])
        made = []
        for number, arrival_s in enumerate(arrivals_s):
            draws = rng.random(2)
            position = min(int(np.searchsorted(bounds, draws[0], "right")), len(self.parts) - 1)
            part, template = self.parts[position], self.templates[position]
            truth = template.truth
            if template.classes:
                shares = np.cumsum([share for share, _ in template.classes])
                pick = min(int(np.searchsorted(shares, draws[1], "right")), len(shares) - 1)
                truth = template.classes[pick][1]
            run = sample_run(
                template.workflow, truth, rng, run_id=f"s{seed}-r{number}",
                arrival_s=float(arrival_s),
            )  # fmt: skip
            made.append(replace(run, tenant=part.tenant, deadline_s=part.deadline_s))
        return tuple(made)


_TENANTS = (
    Part(template="extraction", share=0.3, tenant="light", deadline_s=15.0),
    Part(template="chat", share=0.2, tenant="light", deadline_s=120.0),
    Part(template="rag", share=0.2, tenant="medium", deadline_s=45.0),
    Part(template="react", share=0.15, tenant="medium", deadline_s=60.0),
    Part(template="mapreduce", share=0.08, tenant="heavy", deadline_s=60.0),
    Part(template="tool_heavy", share=0.07, tenant="heavy", deadline_s=300.0),
)
_AGENTS = {"rag": 0.4, "react": 0.3, "extraction": 0.2, "mapreduce": 0.1}
MIXES: Mapping[str, Mix] = {
    "agents": Mix(
        name="agents", parts=tuple(Part(template=n, share=s) for n, s in _AGENTS.items())
    ),
    "multi_tenant": Mix(name="multi_tenant", parts=_TENANTS),
    **{name: Mix(name=name, parts=(Part(template=name, share=1.0),)) for name in TEMPLATES},
}
"""Mixes by name; each single workflow is one too."""


def make_mix(name: str) -> Mix:
    """Return a mix by name.

    Raises
    ------
    InvalidInput
        If there is none.
    """
    try:
        return MIXES[name]
    except KeyError:
        raise InvalidInput(
            f"{name!r} is unknown", where="mix", remedy=f"use one of {', '.join(MIXES)}"
        ) from None


def joined(mix: Mix, estimates: EstimateTable) -> tuple[Workflow, EstimateTable]:
    """Return the whole mix as one workflow, with the estimates of its parts.

    Parameters
    ----------
    estimates
        Of the single workflows; endpoints and defaults are kept.
    """
    names = [part.template for part in mix.parts]
    workflow = Workflow(
        name=mix.name,
        nodes=tuple(
            Node(id=NodeId(name), kind="subgraph", subgraph=graph)
            for name, graph in zip(names, mix.workflows, strict=True)
        ),
        edges=tuple((NodeId(name), END) for name in names),
        branches=(
            Branch(
                id="mix",
                source=START,
                outcomes=tuple(
                    Outcome(id=part.template, targets=(NodeId(part.template),),
                            probability=part.share)
                    for part in mix.parts
                ),
            ),
        ),
    )  # fmt: skip
    known = {
        name: estimates.workflows.get(graph.content_hash, WorkflowEstimate())
        for name, graph in zip(names, mix.workflows, strict=True)
    }
    whole = WorkflowEstimate(
        name=mix.name,
        sites={f"{n}/{site}": one for n, e in known.items() for site, one in e.sites.items()},
        tools={f"{n}/{tool}": one for n, e in known.items() for tool, one in e.tools.items()},
        branches={f"{n}/{b}": one for n, e in known.items() for b, one in e.branches.items()},
    )
    return workflow, replace(estimates, workflows={workflow.content_hash: whole})
