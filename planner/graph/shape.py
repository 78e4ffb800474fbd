"""A workflow arranged for walking: followers by node, and which outcomes lead out of loops.

Nodes, call sites and branches inside sub-graphs are named by their path, ``outer/inner``; the
estimates use the same paths.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from planner.domain.errors import WorkflowError
from planner.domain.ids import NodeId, SiteId
from planner.domain.workflow import END, START, Branch, CallSite, Join, Node, Workflow

__all__ = ["Shape", "all_nodes", "all_sites", "shape_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The followers of each node of one workflow level.

    Parameters
    ----------
    edges
        Plain edge targets by source, sorted, END left out.
    joins
        Joins by source.
    branches
        Branches by source, in order of id.
    exit_rank
        Steps to the end when each branch takes its shortest way out, by node. Every path that
        keeps to outcomes of smaller rank than their source ends, whatever cycles the graph has.
    """

    edges: Mapping[NodeId, tuple[NodeId, ...]]
    joins: Mapping[NodeId, tuple[Join, ...]]
    branches: Mapping[NodeId, tuple[Branch, ...]]
    exit_rank: Mapping[NodeId, float]

    def outcome_rank(self, targets: tuple[NodeId, ...]) -> float:
        """Return the largest exit rank among the targets of an outcome."""
        return max((self.exit_rank[target] for target in targets), default=0.0)


@lru_cache(maxsize=64)
def shape_of(workflow: Workflow) -> Shape:
    """Return the arranged form of one level of a workflow.

    Raises
    ------
    WorkflowError
        If a cycle has no way out because no branch lies on it.
    """
    names = (START, *sorted(node.id for node in workflow.nodes))
    edges: dict[NodeId, tuple[NodeId, ...]] = {}
    joins: dict[NodeId, tuple[Join, ...]] = {}
    branches: dict[NodeId, tuple[Branch, ...]] = {}
    for name in names:
        edges[name] = tuple(
            sorted({target for source, target in workflow.edges if source == name} - {END})
        )
        joins[name] = tuple(join for join in workflow.joins if name in join.sources)
        branches[name] = tuple(
            sorted((b for b in workflow.branches if b.source == name), key=lambda b: b.id)
        )
    rank = _exit_ranks(names, edges, joins, branches)
    for name in names:
        if math.isinf(rank[name]):
            raise WorkflowError(
                "lies on a cycle that nothing leads out of, or leads into one",
                where=f"workflow {workflow.name!r}: node {name!r}",
                remedy="leave the cycle by a branch with an outcome that leads to the end",
            )
    return Shape(edges=edges, joins=joins, branches=branches, exit_rank=rank)


def _exit_ranks(
    names: tuple[NodeId, ...],
    edges: Mapping[NodeId, tuple[NodeId, ...]],
    joins: Mapping[NodeId, tuple[Join, ...]],
    branches: Mapping[NodeId, tuple[Branch, ...]],
) -> dict[NodeId, float]:
    """Least fixed point of rank = 1 + max(all edges, each branch's best outcome)."""
    rank = dict.fromkeys(names, math.inf) | {END: 0.0}
    changed = True
    while changed:
        changed = False
        for name in names:
            forced = [rank[target] for target in edges[name]]
            forced += [rank[join.target] for join in joins[name]]
            forced += [
                min(max((rank[t] for t in o.targets), default=0.0) for o in branch.outcomes)
                for branch in branches[name]
            ]
            value = 1.0 + max(forced, default=0.0)
            if value < rank[name]:
                rank[name] = value
                changed = True
    return rank


def all_nodes(workflow: Workflow, prefix: str = "") -> Iterator[tuple[NodeId, Node]]:
    """Yield (path, node) for every node that does work, those of sub-graphs included."""
    for node in workflow.nodes:
        path = NodeId(prefix + node.id)
        if node.subgraph is not None:
            yield from all_nodes(node.subgraph, f"{path}/")
        else:
            yield path, node


def all_sites(workflow: Workflow, prefix: str = "") -> dict[SiteId, CallSite]:
    """Return every call site by path, those of sub-graphs included, in node order."""
    out: dict[SiteId, CallSite] = {}
    for node in workflow.nodes:
        out.update({SiteId(prefix + site.id): site for site in node.call_sites})
        if node.subgraph is not None:
            out.update(all_sites(node.subgraph, f"{prefix}{node.id}/"))
    return out
