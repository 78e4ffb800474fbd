"""A workflow graph learned from recorded agent sessions: who follows whom, and how often.

Each state of an agent becomes an ``llm`` node; after it one branch leads to what followed it in the
log, with the recorded gap as a tool node in front of the next call. A ``router`` node chooses the
agent. Loop lengths follow from the branch that ends the session.

By default a state is a call site and the counts are of first order. For agents without a graph
(one call site in a loop) a state can also hold the action asked for before, and as many earlier
symbols as change what comes next (`models.sequences`): a variable-order chain, as the same graph.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from models.importers import AgentSession
from models.sequences import START_SYMBOL, SequenceModel
from planner.domain.errors import InvalidInput
from planner.domain.estimates import Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.ids import NodeId, SiteId
from planner.domain.workflow import END, START, Branch, CallSite, Node, Outcome, Workflow

__all__ = ["mine_workflow", "session_symbols", "static_tokens"]

_ARRIVE = NodeId("arrive")
_END_OUTCOME = "end"


def site_node(source: str, site: str) -> str:
    """Return the node of a call site of one agent system."""
    return f"{source}/{site}"


def static_tokens(sessions: Sequence[AgentSession]) -> dict[str, int]:
    """Return, per source, how many leading prompt tokens all its sessions are taken to share.

    The logs hold lengths, not text. The shortest first prompt holds the system prompt and a short
    task, so 80 % of it is taken as the part that never changes.
    """
    shortest: dict[str, int] = {}
    for session in sessions:
        first = session.calls[0].prompt_tokens
        shortest[session.source] = min(first, shortest.get(session.source, first))
    return {source: int(0.8 * tokens) for source, tokens in sorted(shortest.items())}


def session_symbols(session: AgentSession, *, actions: bool) -> list[str]:
    """Return one symbol per call: its site, and with ``actions`` what was asked for before it."""
    before = ["", *(call.next_action for call in session.calls[:-1])]
    return [
        site_node(session.source, f"{call.site}@{action}" if actions and action else call.site)
        for call, action in zip(session.calls, before, strict=True)
    ]


def _states(symbols: Sequence[str], contexts: set[tuple[str, ...]], order: int) -> list[str]:
    """Return the state of each call: the longest context worth one, written backwards in time."""
    out = []
    path = (START_SYMBOL, *symbols)
    for place in range(1, len(path)):
        length = next(
            (
                size
                for size in range(min(order, place + 1), 1, -1)
                if path[place + 1 - size : place + 1] in contexts
            ),
            1,
        )
        # Sources are the same all along; only the newest symbol needs to name it.
        earlier = (one.split("/")[-1] for one in reversed(path[place + 1 - length : place]))
        out.append(" < ".join([path[place], *earlier]))
    return out


def mine_workflow(
    sessions: Sequence[AgentSession],
    *,
    name: str = "agents",
    order: int = 1,
    actions: bool = False,
) -> tuple[Workflow, WorkflowEstimate]:
    """Return the graph of a mixture of agents and its forecasts.

    Parameters
    ----------
    sessions
        Training sessions, at least one; sources keep their shares.
    order
        Most symbols a state remembers, >= 1; longer ones are used where they say something new.
    actions
        Whether the action asked for before a call is part of its symbol.

    Raises
    ------
    InvalidInput
        If there is no session.
    """
    if not sessions:
        raise InvalidInput("no session", where="mining", remedy="give at least one session")
    firsts: Counter[str] = Counter()
    follows: dict[str, Counter[str]] = defaultdict(Counter)
    outputs: dict[str, list[int]] = defaultdict(list)
    prompts: dict[str, list[int]] = defaultdict(list)
    growth: dict[str, list[int]] = defaultdict(list)
    gaps: dict[str, list[float]] = defaultdict(list)
    sources: dict[str, str] = {}
    symbols = [session_symbols(session, actions=actions) for session in sessions]
    contexts = SequenceModel(order).fit(symbols).informative_contexts() if order > 1 else set()
    for session, sequence in zip(sessions, symbols, strict=True):
        seen: dict[str, tuple[int, int]] = {}
        previous: str | None = None
        for call, node in zip(session.calls, _states(sequence, contexts, order), strict=True):
            sources[node] = session.source
            outputs[node].append(call.output_tokens)
            if node in seen:
                before, answer = seen[node]
                growth[node].append(call.prompt_tokens - before - answer)
            else:
                prompts[node].append(call.prompt_tokens)
            seen[node] = call.prompt_tokens, call.output_tokens
            if previous is None:
                firsts[node] += 1
            else:
                follows[previous][node] += 1
                gaps[node].append(call.gap_s)
            previous = node
        if previous is not None:
            follows[previous][_END_OUTCOME] += 1
    static = static_tokens(sessions)
    nodes = [Node(id=_ARRIVE, kind="router")]
    edges = [(START, _ARRIVE)]
    branches = [
        Branch(
            id="arrive",
            source=_ARRIVE,
            outcomes=tuple(Outcome(id=node, targets=(NodeId(node),)) for node in sorted(firsts)),
        )
    ]
    chances: dict[str, Mapping[str, tuple[float, ...]]] = {"arrive": _shares(firsts)}
    tools: dict[str, Quantiles] = {}
    estimates: dict[str, SiteEstimate] = {}
    for node in sorted(outputs):
        site = SiteId(f"{node}#0")
        nodes.append(Node(id=NodeId(node), kind="llm", call_sites=(CallSite(id=site),)))
        if gaps[node]:
            wait = NodeId(f"{node}.wait")
            nodes.append(Node(id=wait, kind="tool"))
            edges.append((wait, NodeId(node)))
            tools[wait] = Quantiles.from_samples(gaps[node])
        branch_id = f"{node}:next"
        branches.append(
            Branch(
                id=branch_id,
                source=NodeId(node),
                outcomes=tuple(
                    Outcome(
                        id=after,
                        targets=(END,) if after == _END_OUTCOME else (NodeId(f"{after}.wait"),),
                    )
                    for after in sorted(follows[node])
                ),
            )
        )
        chances[branch_id] = _shares(follows[node])
        added = [tokens for tokens in growth[node] if tokens >= 0]
        # Transcripts grow; a site whose prompt shrinks more often than not starts afresh.
        grows = len(added) * 2 > len(growth[node])
        estimates[site] = SiteEstimate(
            output_tokens=Quantiles.from_samples(outputs[node]),
            prompt_tokens=Quantiles.from_samples(prompts[node]),
            shared_prefix_tokens=float(static[sources[node]]),
            growth_tokens=Quantiles.from_samples(added) if grows else None,
        )
    workflow = Workflow(
        name=name,
        nodes=tuple(nodes),
        edges=tuple(edges),
        branches=tuple(branches),
        execution="dataflow",
    )
    return workflow, WorkflowEstimate(
        name=name,
        sites=estimates,
        tools=tools,
        branches=chances,
    )


def _shares(counts: Counter[str]) -> dict[str, tuple[float, ...]]:
    total = sum(counts.values())
    return {key: (float(np.round(counts[key] / total, 12)),) for key in sorted(counts)}
