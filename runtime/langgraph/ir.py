"""The workflow graph of an unmodified compiled LangGraph, as JSON (``almanac.workflow/1``).

Rules
-----
* Everything is read from the builder that the compiled graph keeps: nodes, edges, waiting edges
  (joins), routers, ``Command`` destinations, sub-graphs. No node is run, nothing is wrapped.
* The result is canonical: sorted, the same in every process, and always a valid workflow. Where
  the program does not say where a router leads, the branch is marked ``exhaustive: false`` and
  lists every node.
* Kinds: a declaration wins; then ``ToolNode`` is a tool, a compiled graph a sub-graph, a node that
  refers to a chat model or an OpenAI client a language-model node; anything else is code.
* Ids of call sites and branches inside a sub-graph carry the path of the sub-graph's node,
  ``outer|inner#0``, so that they are unique in the whole tree and equal the request headers. The
  separator is LangGraph's own and cannot occur in a node's name.
* Error handlers of nodes (``add_node(error_handler=)``) are not part of the graph: they run only
  after a failure. A deferred node (``defer=True``) is listed as an ordinary one: the schema has
  no word for "when nothing else is left".
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from langgraph.graph import END, START
from langgraph.prebuilt import ToolNode
from langgraph.pregel import Pregel

from runtime.langgraph.declare import (
    CallDeclaration,
    declared_calls,
    declared_outcomes,
    declared_tool,
)
from runtime.langgraph.references import (
    calls_model,
    code_constants,
    functions_of,
    jumps,
    sends,
)

__all__ = [
    "SEPARATOR",
    "WORKFLOW_SCHEMA",
    "Structure",
    "call_site",
    "content_hash",
    "declared_sites",
    "outcome_id",
    "outcomes",
    "walk",
    "workflow_ir",
]

WORKFLOW_SCHEMA = "almanac.workflow/1"
SEPARATOR = "|"

_log = logging.getLogger(__name__)

Ir = dict[str, Any]


def workflow_ir(compiled_graph: Any, name: str | None = None) -> Ir:
    """Return the workflow graph of a compiled LangGraph in canonical JSON form.

    Parameters
    ----------
    compiled_graph
        What ``StateGraph(...).compile()`` returned. It is only read.
    name
        Name of the workflow; the compiled graph's own if None, ``workflow`` if it has none.

    Raises
    ------
    TypeError
        If the object is not a compiled graph with a builder.
    ValueError
        If a `branch` declaration names a label the router does not have.
    """
    if not isinstance(compiled_graph, Pregel):
        hint = "; call .compile() first" if hasattr(compiled_graph, "compile") else ""
        raise TypeError(f"{type(compiled_graph).__name__} is not a compiled LangGraph{hint}")
    if not _has_graph(compiled_graph):
        raise TypeError(
            f"{type(compiled_graph).__name__} has no graph to read (functional API); its calls "
            "still carry their identity"
        )
    return _graph_ir(compiled_graph, name or _name_of(compiled_graph), prefix="", above=())


def content_hash(ir: Mapping[str, Any]) -> str:
    """Return 16 hex digits of the structure of a canonical workflow.

    Names, probabilities, counts and declared expectations are left out at every level, so the
    hash stays the same while forecasts are learned.
    """
    payload = json.dumps(_structure(ir), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(payload.encode()).hexdigest()[:16]


def outcome_id(labels: Iterable[str]) -> str:
    """Return the id of the outcome that takes these labels together."""
    return "+".join(sorted(set(labels))) or END


def walk(ir: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (path, node) for every node, sub-graphs included; a path is ``outer|inner``."""
    for node in ir["nodes"]:
        path = prefix + node["id"]
        yield path, node
        if node["subgraph"] is not None:
            yield from walk(node["subgraph"], path + SEPARATOR)


def declared_sites(compiled_graph: Any) -> dict[str, CallDeclaration]:
    """Return what `llm_call` declares, by call site, sub-graphs included."""
    return dict(_declared_sites(compiled_graph, prefix="", above=()))


def _declared_sites(
    graph: Any, *, prefix: str, above: tuple[Any, ...]
) -> Iterator[tuple[str, CallDeclaration]]:
    inner = dict(graph.get_subgraphs())
    for node, spec in graph.builder.nodes.items():
        calls = _calls_of(spec.runnable)
        for position, declaration in enumerate(calls):
            yield f"{prefix}{node}#{position}", declaration
        child: Any = spec.runnable if isinstance(spec.runnable, Pregel) else inner.get(node)
        if not calls and _has_graph(child) and child.builder not in above:
            yield from _declared_sites(
                child, prefix=f"{prefix}{node}{SEPARATOR}", above=(*above, graph.builder)
            )


def _calls_of(runnable: Any) -> tuple[CallDeclaration, ...]:
    return next(filter(None, map(declared_calls, functions_of(runnable))), ())


_NOT_STRUCTURE = {"name", "probability", "count", "expected_output_tokens", "expected_delay_s"}


def _structure(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {k: _structure(v) for k, v in value.items() if k not in _NOT_STRUCTURE}
    if isinstance(value, (list, tuple)):
        return [_structure(item) for item in value]
    return value


def _has_graph(value: Any) -> bool:
    return getattr(value, "builder", None) is not None


def _name_of(graph: Any) -> str:
    name = getattr(graph, "name", None)
    return name if isinstance(name, str) and name not in ("", "LangGraph") else "workflow"


def _graph_ir(graph: Any, name: str, *, prefix: str, above: tuple[Any, ...]) -> Ir:
    builder = graph.builder
    specs = {n: s for n, s in builder.nodes.items() if not getattr(s, "is_error_handler", False)}
    waiting = {(tuple(sorted(set(sources))), target) for sources, target in builder.waiting_edges}
    branches, dynamic = _branches(builder, specs, prefix)
    # Waiting for one node is an ordinary edge.
    single = {(group[0], target) for group, target in waiting if len(group) == 1}
    structure = Structure(
        nodes=set(specs),
        edges=set(builder.edges) | single,
        joins={join for join in waiting if len(join[0]) > 1},
        branches=branches,
    )
    structure.mend(name)
    inner = dict(graph.get_subgraphs())
    nodes = [
        _node(
            node,
            specs[node].runnable,
            inner.get(node),
            prefix=prefix,
            above=(*above, builder),
            dynamic=node in dynamic,
        )
        for node in sorted(structure.nodes)
    ]
    return structure.document(name, nodes)


@dataclass(slots=True, kw_only=True)
class Structure:
    """Nodes and what connects them, while it is made into a valid workflow."""

    nodes: set[str]
    edges: set[tuple[str, str]]
    joins: set[tuple[tuple[str, ...], str]]
    branches: list[Ir]

    def mend(self, name: str) -> None:
        """Make it valid: every node can be reached, and from every node the end."""
        self.drop_unreachable(name)
        self.end_dead_ends()
        self.end_endless_cycles()

    def document(self, name: str, nodes: list[Ir], execution: str = "supersteps") -> Ir:
        """Return the workflow in canonical form, with its nodes as they are to be listed."""
        return {
            "schema": WORKFLOW_SCHEMA,
            "name": name,
            "execution": execution,
            "nodes": nodes,
            "edges": sorted([source, target] for source, target in self.edges),
            "joins": [
                {"target": target, "sources": list(sources), "need": None}
                for sources, target in sorted(self.joins, key=lambda join: (join[1], join[0]))
            ],
            "branches": sorted(self.branches, key=lambda branch: str(branch["id"])),
        }

    def drop_unreachable(self, name: str) -> None:
        """Leave out nodes that nothing leads to, and joins that can never be complete."""
        dropped: set[str] = set()
        while gone := self.nodes - _reach(START, self._successors()):
            dropped |= gone
            self.nodes -= gone
            self.edges = {edge for edge in self.edges if edge[0] not in gone}
            self.joins = {join for join in self.joins if gone.isdisjoint(join[0])}
            self.branches = [branch for branch in self.branches if branch["source"] not in gone]
        if dropped:
            _log.warning(
                "workflow graph leaves out nodes that nothing leads to",
                extra={"workflow": name, "nodes": sorted(dropped)},
            )

    def end_dead_ends(self) -> None:
        """Lead nodes without successors to END: their path of the run ends there."""
        sources = {source for source, _ in self.edges}
        sources |= {source for group, _ in self.joins for source in group}
        sources |= {branch["source"] for branch in self.branches}
        self.edges |= {(node, END) for node in self.nodes - sources}

    def end_endless_cycles(self) -> None:
        """Lead cycles without an exit to END: only LangGraph's recursion limit stops them."""
        backward: dict[str, set[str]] = {}
        for source, targets in self._successors().items():
            for target in targets:
                backward.setdefault(target, set()).add(source)
        self.edges |= {(node, END) for node in self.nodes - _reach(END, backward)}

    def _successors(self) -> dict[str, set[str]]:
        forward: dict[str, set[str]] = {}
        pairs = [*self.edges, *((s, target) for group, target in self.joins for s in group)]
        for branch in self.branches:
            pairs += [(branch["source"], t) for o in branch["outcomes"] for t in o["targets"]]
        for source, target in pairs:
            forward.setdefault(source, set()).add(target)
        return forward


def _reach(origin: str, follow: Mapping[str, set[str]]) -> set[str]:
    reached, pending = {origin}, [origin]
    while pending:
        for target in follow.get(pending.pop(), ()):
            if target not in reached:
                reached.add(target)
                pending.append(target)
    return reached


def _branches(builder: Any, specs: Mapping[str, Any], prefix: str) -> tuple[list[Ir], set[str]]:
    """Return the branches, and the nodes that may be started by `Send`."""
    branches: list[Ir] = []
    dynamic: set[str] = set()

    def note_sends(runnable: Any, targets: Iterable[str] | None) -> None:
        # Where the targets are not listed, their names stand in the code.
        if sends(runnable):
            reach = code_constants(runnable) if targets is None else targets
            dynamic.update(set(reach) & set(specs))

    for source, routers in builder.branches.items():
        for router, spec in routers.items():
            branches.append(_branch(prefix, source, router, spec, specs))
            note_sends(spec.path, spec.ends.values() if spec.ends else None)
    for source, spec in specs.items():
        if spec.ends:
            branches.append(_command_branch(prefix, source, list(spec.ends), exhaustive=True))
            note_sends(spec.runnable, spec.ends)
        elif jumps(spec.runnable):
            branches.append(_command_branch(prefix, source, [*specs, END], exhaustive=False))
            note_sends(spec.runnable, None)
    return branches, dynamic


def _branch(prefix: str, source: str, router: str, spec: Any, nodes: Iterable[str]) -> Ir:
    where = f"{prefix}{source}:{router}"
    if spec.ends:
        targets = {str(label): str(target) for label, target in spec.ends.items()}
    else:
        targets = {node: node for node in (*nodes, END)}
    declared = next(filter(None, map(declared_outcomes, functions_of(spec.path))), ())
    for labels in declared:
        for label in labels:
            if label not in targets:
                raise ValueError(
                    f"branch {where!r} declares the outcome {label!r}; "
                    f"its labels are {', '.join(sorted(targets))}"
                )
    return {
        "id": where,
        "source": source,
        "exhaustive": bool(spec.ends or declared),
        "outcomes": outcomes(
            {
                outcome_id(labels): {targets[label] for label in labels}
                for labels in (declared or ((label,) for label in targets))
            }
        ),
    }


def _command_branch(prefix: str, source: str, targets: list[str], *, exhaustive: bool) -> Ir:
    return {
        "id": f"{prefix}{source}:goto",
        "source": source,
        "exhaustive": exhaustive,
        "outcomes": outcomes({target: {target} for target in targets}),
    }


def outcomes(targets: Mapping[str, set[str]]) -> list[Ir]:
    """Return the outcomes of a branch from their ids and the nodes taken together."""
    return [
        {"id": key, "targets": sorted(targets[key]), "probability": None, "count": 0}
        for key in sorted(targets)
    ]


def _node(
    node: str,
    runnable: Any,
    inner: Any,
    *,
    prefix: str,
    above: tuple[Any, ...],
    dynamic: bool,
) -> Ir:
    inner = runnable if isinstance(runnable, Pregel) else inner
    functions = list(functions_of(runnable))
    calls = _calls_of(runnable)
    tool = next(filter(None, map(declared_tool, functions)), None)
    subgraph = None
    delay_s = None if tool is None else tool.expected_latency_s
    if calls:
        kind = "llm"
    elif tool is not None:
        kind = "tool"
    elif isinstance(runnable, ToolNode):
        kind, delay_s = "tool", _tool_delay_s(runnable)
    elif calls_model(runnable):
        kind = "llm"
    elif _has_graph(inner) and inner.builder not in above:
        # A graph that calls itself is listed once; further down it counts as code.
        kind = "subgraph"
        subgraph = _graph_ir(
            inner, _name_of(inner), prefix=f"{prefix}{node}{SEPARATOR}", above=above
        )
    else:
        kind = "code"
    return {
        "id": node,
        "kind": kind,
        "dynamic": dynamic,
        "expected_delay_s": delay_s,
        "subgraph": subgraph,
        "call_sites": [
            call_site(f"{prefix}{node}#{position}", calls[position] if calls else None)
            for position in range(len(calls) or 1)
        ]
        if kind == "llm"
        else [],
    }


def call_site(site: str, declared: CallDeclaration | None) -> Ir:
    """Return a call site from its id and what is declared about it."""
    prefix = getattr(declared, "static_prefix", None)
    return {
        "id": site,
        "model": getattr(declared, "model", None),
        "static_prefix_hash": None
        if prefix is None
        else hashlib.sha256(prefix.encode()).hexdigest()[:16],
        "static_prefix_tokens": getattr(declared, "static_prefix_tokens", None),
        "expected_output_tokens": getattr(declared, "expected_output_tokens", None),
        "reads": sorted(getattr(declared, "reads", ())),
        "writes": sorted(getattr(declared, "writes", ())),
    }


def _tool_delay_s(node: ToolNode) -> float | None:
    """Mean of the declared delays of a tool node's tools: which one is called is not known."""
    declared = []
    for one in node.tools_by_name.values():
        for function in (getattr(one, "func", None), getattr(one, "coroutine", None)):
            found = declared_tool(function)
            if found is not None and found.expected_latency_s is not None:
                declared.append(found.expected_latency_s)
                break
    return sum(declared) / len(declared) if declared else None
