"""The workflow graph (intermediate representation, IR): a template of nodes, not a run.

Rules
-----
* ``START`` and ``END`` are implicit nodes; edges and outcomes may name them.
* A node starts when *any* plain edge into it fires; a `Join` makes it wait for all (or k) of the
  named sources instead.
* A branch is a set of outcomes; an outcome is the set of nodes taken together. Probabilities are
  optional: None means not known.
* ``execution`` says when triggered nodes start. ``supersteps`` (LangGraph): all nodes of one step
  finish before any of the next starts. ``dataflow``: at once.
* Cycles are kept. `Workflow.loops` derives the back edges; nothing is unrolled here.

The content hash covers the structure (not the name, not probabilities, not counts), so it stays
the same while forecasts are learned, and is the same in every process.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

from planner.domain.check import closed_mapping, integer, items, number, one_of, text
from planner.domain.errors import InvalidInput, WorkflowError
from planner.domain.files import atomic_write, read_json
from planner.domain.ids import NodeId, SiteId, WorkflowHash

__all__ = [
    "END",
    "START",
    "WORKFLOW_SCHEMA",
    "Branch",
    "CallSite",
    "Join",
    "Loop",
    "Node",
    "NodeKind",
    "Outcome",
    "Workflow",
    "load_workflow",
    "save_workflow",
]

WORKFLOW_SCHEMA = "almanac.workflow/1"
START, END = NodeId("__start__"), NodeId("__end__")
NodeKind = Literal["llm", "tool", "router", "code", "subgraph"]
NODE_KINDS = ("llm", "tool", "router", "code", "subgraph")


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSite:
    """One place in a node that calls a language model.

    Parameters
    ----------
    id
        Unique in the workflow; ``<node>#<n>`` by convention, n from 0.
    model
        Model name, or None for the default of the fleet.
    static_prefix_hash, static_prefix_tokens
        Identity and length of the prompt part that never changes, if known.
    expected_output_tokens
        Declared hint, or None.
    """

    id: SiteId
    model: str | None = None
    static_prefix_hash: str | None = None
    static_prefix_tokens: int | None = None
    expected_output_tokens: float | None = None
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """One node of the graph.

    Parameters
    ----------
    id
        Unique in the workflow.
    kind
        ``llm`` has call sites; ``tool`` has a delay; ``router`` and ``code`` take no time to
        speak of; ``subgraph`` holds a workflow of its own.
    call_sites
        In order of execution inside the node.
    subgraph
        The inner workflow of a ``subgraph`` node.
    dynamic
        True if the node may be started a number of times that is known only at run time
        (LangGraph ``Send``).
    expected_delay_s
        Declared hint for tools, or None.
    """

    id: NodeId
    kind: NodeKind
    call_sites: tuple[CallSite, ...] = ()
    subgraph: Workflow | None = None
    dynamic: bool = False
    expected_delay_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Join:
    """``target`` waits for ``need`` of its ``sources`` (all of them if None)."""

    target: NodeId
    sources: tuple[NodeId, ...]
    need: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Nodes taken together after a branch, with the probability if it is known."""

    id: str
    targets: tuple[NodeId, ...]
    probability: float | None = None
    count: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """A choice after ``source``: exactly one outcome is taken.

    ``exhaustive`` is False when outcomes could not be read from the program and any node may
    follow; the outcomes are then the ones seen so far.
    """

    id: str
    source: NodeId
    outcomes: tuple[Outcome, ...]
    exhaustive: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Loop:
    """A cycle: ``header`` is entered again over the ``back_edges`` (source, target)."""

    id: str
    header: NodeId
    nodes: tuple[NodeId, ...]
    back_edges: tuple[tuple[NodeId, NodeId], ...]


@dataclass(frozen=True, kw_only=True)
class Workflow:
    """A workflow graph, checked once when made.

    Raises
    ------
    WorkflowError
        If an id repeats, an edge, join or outcome names an unknown node, a node cannot be
        reached from START or cannot reach END, probabilities do not sum to one, or a sub-graph
        is missing.
    """

    name: str
    nodes: tuple[Node, ...]
    edges: tuple[tuple[NodeId, NodeId], ...]
    joins: tuple[Join, ...] = ()
    branches: tuple[Branch, ...] = ()
    execution: Literal["supersteps", "dataflow"] = "supersteps"
    _by_id: dict[NodeId, Node] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_id: dict[NodeId, Node] = {}
        sites: set[str] = set()
        for node in self.nodes:
            where = f"node {node.id!r}"
            if node.id in by_id or node.id in (START, END):
                raise WorkflowError("id is used twice", where=where, remedy="rename one")
            by_id[node.id] = node
            for site in node.call_sites:
                if site.id in sites:
                    raise WorkflowError(
                        f"call site {site.id!r} is used twice", where=where, remedy="rename one"
                    )
                sites.add(site.id)
            if (node.kind == "subgraph") != (node.subgraph is not None):
                raise WorkflowError(
                    f"kind {node.kind!r} with{'' if node.subgraph else 'out'} an inner workflow",
                    where=where,
                    remedy="a subgraph node needs exactly one",
                )
        object.__setattr__(self, "_by_id", by_id)
        self._check_names()
        self._check_probabilities()
        self._check_reachable()

    def _check_names(self) -> None:
        known = {*self._by_id, START, END}
        for source, target in self.edges:
            for name in (source, target):
                if name not in known:
                    raise WorkflowError(
                        f"unknown node {name!r}",
                        where=f"edge {source} -> {target}",
                        remedy=f"known nodes: {', '.join(sorted(self._by_id))}",
                    )
        for join in self.joins:
            for name in (*join.sources, join.target):
                if name not in known:
                    raise WorkflowError(
                        f"unknown node {name!r}",
                        where=f"join of {join.target!r}",
                        remedy="name nodes of this workflow",
                    )
            if join.need is not None and not 1 <= join.need <= len(join.sources):
                raise WorkflowError(
                    f"waits for {join.need} of {len(join.sources)} sources",
                    where=f"join of {join.target!r}",
                    remedy="wait for at least 1 and at most all",
                )
        branch_ids: set[str] = set()
        for branch in self.branches:
            where = f"branch {branch.id!r}"
            if branch.id in branch_ids:
                raise WorkflowError("id is used twice", where=where, remedy="rename one")
            branch_ids.add(branch.id)
            if not branch.outcomes:
                raise WorkflowError("no outcome", where=where, remedy="list at least one")
            if len({outcome.id for outcome in branch.outcomes}) < len(branch.outcomes):
                raise WorkflowError("outcome ids repeat", where=where, remedy="rename one")
            for name in (branch.source, *(t for o in branch.outcomes for t in o.targets)):
                if name not in known:
                    raise WorkflowError(
                        f"unknown node {name!r}", where=where, remedy="name nodes of this workflow"
                    )

    def _check_probabilities(self) -> None:
        for branch in self.branches:
            given = [o.probability for o in branch.outcomes if o.probability is not None]
            if any(not 0 <= p <= 1 for p in given):
                raise WorkflowError(
                    f"probabilities {given}",
                    where=f"branch {branch.id!r}",
                    remedy="use numbers from 0 to 1",
                )
            total = sum(given)
            full = len(given) == len(branch.outcomes)
            if (full and abs(total - 1) > 1e-6) or total > 1 + 1e-6:
                raise WorkflowError(
                    f"probabilities sum to {total:.6g}",
                    where=f"branch {branch.id!r}",
                    remedy="make them sum to 1, or leave them out to have them learned",
                )

    def _check_reachable(self) -> None:
        forward = self.successors
        backward: dict[NodeId, set[NodeId]] = {}
        for source, targets in forward.items():
            for target in targets:
                backward.setdefault(target, set()).add(source)
        reached = _closure(START, forward)
        for node in self.nodes:
            if node.id not in reached:
                raise WorkflowError(
                    "cannot be reached from the start",
                    where=f"node {node.id!r}",
                    remedy="add an edge to it or delete it",
                )
        finishing = _closure(END, backward)
        for node in self.nodes:
            if node.id not in finishing:
                raise WorkflowError(
                    "never leads to the end",
                    where=f"node {node.id!r}",
                    remedy="add an edge or an outcome that leads to the end",
                )

    @cached_property
    def successors(self) -> Mapping[NodeId, tuple[NodeId, ...]]:
        """Nodes that may follow each node directly, START included, sorted."""
        out: dict[NodeId, set[NodeId]] = {START: set()}
        for node in self.nodes:
            out[node.id] = set()
        for source, target in self.edges:
            out[source].add(target)
        for join in self.joins:
            for source in join.sources:
                out[source].add(join.target)
        for branch in self.branches:
            for outcome in branch.outcomes:
                # An outcome without targets ends this path of the run.
                out[branch.source].update(outcome.targets or (END,))
        return {source: tuple(sorted(targets)) for source, targets in out.items()}

    @cached_property
    def loops(self) -> tuple[Loop, ...]:
        """Cycles, one per header, found by depth-first search from START in sorted order."""
        return _find_loops(self.successors)

    def node(self, node_id: NodeId) -> Node:
        """Return a node by id.

        Raises
        ------
        WorkflowError
            If there is none.
        """
        try:
            return self._by_id[node_id]
        except KeyError:
            raise WorkflowError(
                f"no node {node_id!r}",
                where=f"workflow {self.name!r}",
                remedy=f"known: {', '.join(sorted(self._by_id))}",
            ) from None

    def has_node(self, node_id: str) -> bool:
        """Return whether the workflow has such a node (START and END do not count)."""
        return node_id in self._by_id

    @cached_property
    def call_sites(self) -> Mapping[SiteId, NodeId]:
        """All call sites of this level with their nodes, in node order."""
        return {site.id: node.id for node in self.nodes for site in node.call_sites}

    @cached_property
    def content_hash(self) -> WorkflowHash:
        """16 hex digits of the structure."""
        return WorkflowHash(structure_hash(self.to_json()))

    def to_json(self) -> dict[str, Any]:
        """Return the versioned JSON form, in canonical order."""
        return {
            "schema": WORKFLOW_SCHEMA,
            "name": self.name,
            "execution": self.execution,
            "nodes": [_node_to_json(node) for node in sorted(self.nodes, key=lambda n: n.id)],
            "edges": sorted([source, target] for source, target in self.edges),
            "joins": sorted(
                (
                    {"target": j.target, "sources": sorted(j.sources), "need": j.need}
                    for j in self.joins
                ),
                key=lambda row: (str(row["target"]), cast("list[str]", row["sources"])),
            ),
            "branches": [
                {
                    "id": branch.id,
                    "source": branch.source,
                    "exhaustive": branch.exhaustive,
                    "outcomes": [
                        {
                            "id": outcome.id,
                            "targets": sorted(outcome.targets),
                            "probability": outcome.probability,
                            "count": outcome.count,
                        }
                        for outcome in sorted(branch.outcomes, key=lambda o: o.id)
                    ],
                }
                for branch in sorted(self.branches, key=lambda b: b.id)
            ],
        }

    @classmethod
    def from_json(cls, raw: Any, where: str = "workflow") -> Workflow:
        """Rebuild and check a workflow.

        Raises
        ------
        WorkflowError
            Naming the field, the value and the remedy.
        """
        try:
            return _workflow_from_json(raw)
        except InvalidInput as error:
            place = f"{where}: {error.where}" if error.where else where
            raise WorkflowError(error.what, where=place, remedy=error.remedy) from error


def structure_hash(raw: Mapping[str, Any]) -> str:
    """Return the content hash of a workflow in its canonical JSON form.

    Name, probabilities, counts and declared expectations are left out, at every level.
    """
    payload = json.dumps(_structure(raw), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(payload.encode()).hexdigest()[:16]


_NOT_STRUCTURE = {"name", "probability", "count", "expected_output_tokens", "expected_delay_s"}


def _structure(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _structure(v) for k, v in value.items() if k not in _NOT_STRUCTURE}
    if isinstance(value, (list, tuple)):
        return [_structure(item) for item in value]
    return value


def _closure(
    origin: NodeId, follow: Mapping[NodeId, tuple[NodeId, ...] | set[NodeId]]
) -> set[NodeId]:
    reached, stack = {origin}, [origin]
    while stack:
        for target in follow.get(stack.pop(), ()):
            if target not in reached:
                reached.add(target)
                stack.append(target)
    return reached


def _find_loops(successors: Mapping[NodeId, tuple[NodeId, ...]]) -> tuple[Loop, ...]:
    back: dict[NodeId, list[NodeId]] = {}
    state: dict[NodeId, int] = {}
    stack: list[tuple[NodeId, int]] = [(START, 0)]
    state[START] = 1
    while stack:
        node, position = stack.pop()
        targets = successors.get(node, ())
        if position < len(targets):
            stack.append((node, position + 1))
            target = targets[position]
            if state.get(target) == 1:
                back.setdefault(target, []).append(node)
            elif target not in state:
                state[target] = 1
                stack.append((target, 0))
        else:
            state[node] = 2
    predecessors: dict[NodeId, set[NodeId]] = {}
    for source, targets in successors.items():
        for target in targets:
            predecessors.setdefault(target, set()).add(source)
    loops = []
    for header in sorted(back):
        body = {header}
        pending = list(back[header])
        while pending:
            node = pending.pop()
            if node not in body:
                body.add(node)
                pending += predecessors.get(node, ())
        loops.append(
            Loop(
                id=f"loop:{header}",
                header=header,
                nodes=tuple(sorted(body)),
                back_edges=tuple((source, header) for source in sorted(back[header])),
            )
        )
    return tuple(loops)


def _node_to_json(node: Node) -> dict[str, Any]:
    return {
        "id": node.id,
        "kind": node.kind,
        "dynamic": node.dynamic,
        "expected_delay_s": node.expected_delay_s,
        "subgraph": node.subgraph.to_json() if node.subgraph else None,
        "call_sites": [
            {
                "id": site.id,
                "model": site.model,
                "static_prefix_hash": site.static_prefix_hash,
                "static_prefix_tokens": site.static_prefix_tokens,
                "expected_output_tokens": site.expected_output_tokens,
                "reads": sorted(site.reads),
                "writes": sorted(site.writes),
            }
            for site in node.call_sites
        ],
    }


def _workflow_from_json(document: Any) -> Workflow:
    known = {"schema", "name", "execution", "nodes", "edges", "joins", "branches"}
    raw = closed_mapping(document, "", known, WorkflowError)
    if raw.get("schema") != WORKFLOW_SCHEMA:
        raise WorkflowError(
            f"{raw.get('schema')!r} is not a schema this version reads",
            where="schema",
            remedy=f"use {WORKFLOW_SCHEMA}",
        )
    edges = []
    for position, edge in enumerate(items(raw.get("edges", ()), "edges", WorkflowError)):
        where = f"edges[{position}]"
        pair = items(edge, where, WorkflowError)
        if len(pair) != 2:
            raise WorkflowError(f"{pair!r}", where=where, remedy="write [source, target]")
        edges.append((NodeId(text(pair[0], where)), NodeId(text(pair[1], where))))
    execution = one_of(raw.get("execution", "supersteps"), "execution", ("supersteps", "dataflow"))
    return Workflow(
        name=text(raw.get("name"), "name", WorkflowError),
        execution=cast("Literal['supersteps', 'dataflow']", execution),
        nodes=tuple(
            _node_from_json(node, f"nodes[{position}]")
            for position, node in enumerate(items(raw.get("nodes"), "nodes", WorkflowError))
        ),
        edges=tuple(edges),
        joins=tuple(
            _join_from_json(join, f"joins[{position}]")
            for position, join in enumerate(items(raw.get("joins", ()), "joins", WorkflowError))
        ),
        branches=tuple(
            _branch_from_json(branch, f"branches[{position}]")
            for position, branch in enumerate(
                items(raw.get("branches", ()), "branches", WorkflowError)
            )
        ),
    )


def _node_from_json(value: Any, where: str) -> Node:
    known = {"id", "kind", "dynamic", "expected_delay_s", "subgraph", "call_sites"}
    raw = closed_mapping(value, where, known, WorkflowError)
    delay = raw.get("expected_delay_s")
    inner = raw.get("subgraph")
    sites = []
    for position, site in enumerate(items(raw.get("call_sites", ()), f"{where}.call_sites")):
        sites.append(_site_from_json(site, f"{where}.call_sites[{position}]"))
    return Node(
        id=NodeId(text(raw.get("id"), f"{where}.id", WorkflowError)),
        kind=cast("NodeKind", one_of(raw.get("kind"), f"{where}.kind", NODE_KINDS, WorkflowError)),
        call_sites=tuple(sites),
        subgraph=None if inner is None else Workflow.from_json(inner, f"{where}.subgraph"),
        dynamic=bool(raw.get("dynamic", False)),
        expected_delay_s=None
        if delay is None
        else number(delay, f"{where}.expected_delay_s", least=0),
    )


def _site_from_json(value: Any, where: str) -> CallSite:
    known = {
        "id", "model", "static_prefix_hash", "static_prefix_tokens", "expected_output_tokens",
        "reads", "writes",
    }  # fmt: skip
    raw = closed_mapping(value, where, known, WorkflowError)

    def optional_text(name: str) -> str | None:
        return None if raw.get(name) is None else text(raw[name], f"{where}.{name}")

    tokens = raw.get("static_prefix_tokens")
    expected = raw.get("expected_output_tokens")
    return CallSite(
        id=SiteId(text(raw.get("id"), f"{where}.id", WorkflowError)),
        model=optional_text("model"),
        static_prefix_hash=optional_text("static_prefix_hash"),
        static_prefix_tokens=None
        if tokens is None
        else integer(tokens, f"{where}.static_prefix_tokens"),
        expected_output_tokens=None
        if expected is None
        else number(expected, f"{where}.expected_output_tokens", least=0),
        reads=tuple(map(str, items(raw.get("reads", ()), f"{where}.reads"))),
        writes=tuple(map(str, items(raw.get("writes", ()), f"{where}.writes"))),
    )


def _join_from_json(value: Any, where: str) -> Join:
    raw = closed_mapping(value, where, {"target", "sources", "need"}, WorkflowError)
    need = raw.get("need")
    return Join(
        target=NodeId(text(raw.get("target"), f"{where}.target")),
        sources=tuple(
            NodeId(text(s, f"{where}.sources")) for s in items(raw.get("sources"), where)
        ),
        need=None if need is None else integer(need, f"{where}.need", least=1),
    )


def _branch_from_json(value: Any, where: str) -> Branch:
    raw = closed_mapping(value, where, {"id", "source", "exhaustive", "outcomes"}, WorkflowError)
    outcomes = []
    for position, item in enumerate(items(raw.get("outcomes"), f"{where}.outcomes")):
        place = f"{where}.outcomes[{position}]"
        one = closed_mapping(item, place, {"id", "targets", "probability", "count"}, WorkflowError)
        probability = one.get("probability")
        outcomes.append(
            Outcome(
                id=text(one.get("id"), f"{place}.id"),
                targets=tuple(
                    NodeId(text(t, f"{place}.targets"))
                    for t in items(one.get("targets", ()), f"{place}.targets")
                ),
                probability=None
                if probability is None
                else number(probability, f"{place}.probability"),
                count=integer(one.get("count", 0), f"{place}.count"),
            )
        )
    return Branch(
        id=text(raw.get("id"), f"{where}.id"),
        source=NodeId(text(raw.get("source"), f"{where}.source")),
        exhaustive=bool(raw.get("exhaustive", True)),
        outcomes=tuple(outcomes),
    )


def load_workflow(path: Path) -> Workflow:
    """Read a workflow file (JSON, schema ``almanac.workflow/1``)."""
    return Workflow.from_json(read_json(path, what="workflow file"), where=str(path))


def save_workflow(workflow: Workflow, path: Path) -> None:
    """Write a workflow as JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(workflow.to_json(), indent=1) + "\n", encoding="utf-8")
