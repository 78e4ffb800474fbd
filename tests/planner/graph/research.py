"""The small research workflow that the tests of graph, checker and solver share.

triage -> quick | outline -> {search, market, legal} -> read -> draft (join) -> critic
-> revise -> draft | accept.
"""

from __future__ import annotations

from planner.domain.estimates import Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.ids import NodeId, SiteId
from planner.domain.workflow import (
    END,
    START,
    Branch,
    CallSite,
    Join,
    Node,
    Outcome,
    Workflow,
)

SITES = ("triage", "quick", "outline", "market", "legal", "read", "draft", "critic", "revise")


def llm(name: str, model: str | None = None) -> Node:
    """Return a node with one call."""
    return Node(
        id=NodeId(name), kind="llm", call_sites=(CallSite(id=SiteId(f"{name}#0"), model=model),)
    )


def edge(source: str, target: str) -> tuple[NodeId, NodeId]:
    """Return an edge."""
    return NodeId(source), NodeId(target)


def branch(name: str, source: str, **outcomes: tuple[str, ...]) -> Branch:
    """Return a branch; each keyword is an outcome with its targets."""
    return Branch(
        id=name,
        source=NodeId(source),
        outcomes=tuple(
            Outcome(id=key, targets=tuple(map(NodeId, targets)))
            for key, targets in outcomes.items()
        ),
    )


def research_workflow() -> Workflow:
    """Return the workflow: nine call sites, a tool, two branches, a join and a loop."""
    return Workflow(
        name="research",
        nodes=(*map(llm, SITES), Node(id=NodeId("search"), kind="tool")),
        edges=(
            edge(START, "triage"),
            edge("quick", END),
            edge("outline", "search"),
            edge("outline", "market"),
            edge("outline", "legal"),
            edge("search", "read"),
            edge("draft", "critic"),
            edge("revise", "critic"),
        ),
        joins=(
            Join(
                target=NodeId("draft"),
                sources=(NodeId("read"), NodeId("market"), NodeId("legal")),
            ),
        ),
        branches=(
            branch("route", "triage", quick=("quick",), deep=("outline",)),
            branch("verdict", "critic", revise=("revise",), accept=(END,)),
        ),
    )


def research_estimate() -> WorkflowEstimate:
    """Return forecasts: short triage, long drafts, a loop that repeats at 0.5 then 0.2."""
    sizes = {
        "triage": (300, 12),
        "quick": (400, 180),
        "outline": (600, 220),
        "market": (1500, 320),
        "legal": (1700, 150),
        "read": (3000, 260),
        "draft": (3500, 700),
        "critic": (2500, 160),
        "revise": (2600, 450),
    }
    spread = (0.4, 0.5, 0.75, 1.0, 1.3, 1.7, 2.0)

    def quantiles(mean: float) -> Quantiles:
        return Quantiles(values=tuple(mean * s for s in spread), mean=mean * 1.05)

    return WorkflowEstimate(
        name="research",
        sites={
            f"{name}#0": SiteEstimate(
                output_tokens=quantiles(output),
                prompt_tokens=quantiles(prompt),
                shared_prefix_tokens=200.0,
                growth_tokens=quantiles(120.0) if name in ("critic", "revise") else None,
            )
            for name, (prompt, output) in sizes.items()
        },
        tools={"search": quantiles(1.5)},
        branches={
            "route": {"quick": (0.3,), "deep": (0.7,)},
            "verdict": {"revise": (0.5, 0.2), "accept": (0.5, 0.8)},
        },
    )
