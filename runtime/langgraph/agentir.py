"""For programs written against AgentIR's SDKs: its decorators, and its contracts as workflows.

Change ``from agentir_langgraph import llm_call, writes`` to ``from runtime.langgraph.agentir
import llm_call, writes`` and build the graph with LangGraph's own ``StateGraph`` in place of
``GraphProxy``: `instrument` reads edges, joins, routers and sub-graphs from it, so that
``annotate_conditional_edge`` and ``build_contract`` have nothing left to do.

A contract (``{"entry", "end", "nodes", "edges"}``), of the Python or the TypeScript SDK, becomes a
workflow by `workflow_from_contract`, on the command line by ``almanac ir contract.json``:

* Edges of one source with equal labels ``conditional_<n>`` or ``conditional::<source>::<branch>``
  are one outcome of its branch; ``all_or_nothing::<source>::<group>`` is an outcome too where there
  are several, and a plain fan-out where there is one.
* Nodes named ``...join_<n>`` wait for all their predecessors.
* Pseudo-nodes (START, END, the guard ``__gp_ensure_rid``) and synthetic variables (``seq_*``, and
  ``result::*`` that nothing writes) are left out; the former are the workflow's own start and end.
* ``static_vars`` are texts or names of variables; a contract cannot say what a name stands for, so
  only texts count there. The decorator looks names up among the function's globals and closure.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from langgraph.graph import END, START

from runtime.langgraph.declare import CallDeclaration, declare_calls, declared_calls
from runtime.langgraph.ir import Ir, Structure, call_site, outcomes

__all__ = ["llm_call", "workflow_from_contract", "writes"]

F = TypeVar("F", bound=Callable[..., Any])

_WRITES = "__lg_writes__"  # AgentIR's own attribute
_PSEUDO = {"START": START, "END": END, "__gp_ensure_rid": START}
_SYNTHETIC = re.compile(r"seq_[0-9a-f]{8}")
_OUTCOME = re.compile(r"conditional_(?P<group>\d+)|conditional::.*::(?P<branch>[^:]+)")
_WHOLE = re.compile(r"all_or_nothing::.*::(?P<group>[^:]+)")
_JOIN = re.compile(r"(^|[._])join_\d+$|\.join$")
_TOOL = re.compile(r"\.tool\.[^.]+$")


def writes(*keys: str) -> Callable[[F], F]:
    """Declare the state keys a node produces; stacked, they add up."""

    def declare(function: F) -> F:
        known = {*getattr(function, _WRITES, ()), *keys}
        setattr(function, _WRITES, known)
        return _with_writes(function, declared_calls(function))

    return declare


def llm_call(
    *,
    model: str | None = None,
    reads: Iterable[str] | None = None,
    static_vars: Iterable[str] | None = None,
) -> Callable[[F], F]:
    """Declare one call to a language model inside a node function; stack it once per call.

    Parameters
    ----------
    model
        Model the call needs.
    reads
        State keys its prompt uses.
    static_vars
        What its prompt always holds: texts, or names of text variables that the function sees.
        Together, in this order, they identify the static prefix.
    """
    keys, parts = tuple(reads or ()), tuple(static_vars or ())

    def declare(function: F) -> F:
        texts = [text for part in parts if (text := _text_of(part, function)) is not None]
        declaration = CallDeclaration(
            model=model, reads=keys, static_prefix="\n".join(texts) if texts else None
        )
        return _with_writes(function, (declaration, *declared_calls(function)))

    return declare


def _with_writes(function: F, calls: Iterable[CallDeclaration]) -> F:
    keys = tuple(sorted(getattr(function, _WRITES, ())))
    return declare_calls(function, (dataclasses.replace(call, writes=keys) for call in calls))


def _text_of(part: str, function: Callable[..., Any]) -> str | None:
    if not part.isidentifier():
        return part
    value: object = getattr(function, "__globals__", {}).get(part)
    code = getattr(function, "__code__", None)
    for name, cell in zip(
        getattr(code, "co_freevars", ()), getattr(function, "__closure__", None) or (), strict=False
    ):
        if name == part:
            with contextlib.suppress(ValueError):  # not bound yet
                value = cell.cell_contents
    return value if isinstance(value, str) else None


def workflow_from_contract(contract: Any, name: str = "workflow") -> Ir:
    """Return a contract as a workflow in canonical JSON form.

    Raises
    ------
    ValueError
        If it is no contract; naming the field, what was found and what it must be.
    """
    raw = _mapping(contract, "contract")
    listed = _mapping(raw.get("nodes"), "nodes")
    nodes = {
        node: _mapping(facts, f"nodes.{node}")
        for node, facts in listed.items()
        if _name(node) not in (START, END)
    }
    edges = _edges(raw, nodes)
    structure = Structure(nodes=set(nodes), edges=set(), joins=set(), branches=[])
    _connect(structure, edges)
    structure.mend(name)
    written = {key for node, facts in nodes.items() for key in _keys(facts, "writes", node)}
    typescript = any("::" in label for _, _, label in edges)
    return structure.document(
        name,
        [_node(node, nodes[node], written) for node in sorted(structure.nodes)],
        "dataflow" if typescript else "supersteps",
    )


def _edges(raw: Mapping[str, Any], nodes: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return (source, target, label) for every edge, those of start and end included."""
    listed = raw.get("edges")
    if not isinstance(listed, list):
        raise _wrong(listed, "edges", "a list")
    found = []
    for position, one in enumerate(listed):
        where = f"edges[{position}]"
        facts = _mapping(one, where)
        ends = [_end(facts.get(key), f"{where}.{key}", nodes) for key in ("src", "dst")]
        label = facts.get("label")
        if not isinstance(label, (str, type(None))):
            raise _wrong(label, f"{where}.label", "a text or null")
        found.append((ends[0], ends[1], label or ""))
    entry = _end(raw.get("entry"), "entry", nodes)
    found.append((START, entry, ""))
    if raw.get("end") is not None:
        found.append((_end(raw["end"], "end", nodes), END, ""))
    # What leads to the guard leads to the start itself.
    return [edge for edge in found if edge[0] != END and edge[1] != START]


def _connect(structure: Structure, edges: Iterable[tuple[str, str, str]]) -> None:
    choices: dict[str, dict[str, set[str]]] = {}
    whole: dict[str, dict[str, set[str]]] = {}
    for source, target, label in edges:
        if found := _OUTCOME.fullmatch(label):
            outcome = found["branch"] or found["group"]
            choices.setdefault(source, {}).setdefault(outcome, set()).add(target)
        elif found := _WHOLE.fullmatch(label):
            whole.setdefault(source, {}).setdefault(found["group"], set()).add(target)
        else:
            structure.edges.add((source, target))
    for source, groups in whole.items():
        if len(groups) == 1 and source not in choices:
            structure.edges |= {(source, target) for one in groups.values() for target in one}
        else:
            choices.setdefault(source, {}).update(groups)
    structure.branches += [
        {
            "id": f"{source}:conditional",
            "source": source,
            "exhaustive": True,
            "outcomes": outcomes(taken),
        }
        for source, taken in choices.items()
    ]
    for node in filter(_JOIN.search, structure.nodes):
        into = {edge for edge in structure.edges if edge[1] == node}
        if len(into) > 1:
            structure.edges -= into
            structure.joins.add((tuple(sorted(source for source, _ in into)), node))


def _node(node: str, facts: Mapping[str, Any], written: set[str]) -> Ir:
    calls = facts.get("llm_calls") or []
    if not isinstance(calls, list):
        raise _wrong(calls, f"nodes.{node}.llm_calls", "a list")
    kind = "llm" if calls else "tool" if _TOOL.search(node) else "code"
    return {
        "id": node,
        "kind": kind,
        "dynamic": False,
        "expected_delay_s": None,
        "subgraph": None,
        "call_sites": [
            call_site(f"{node}#{position}", _call(node, position, call, facts, written))
            for position, call in enumerate(calls)
        ],
    }


def _call(
    node: str, position: int, call: Any, facts: Mapping[str, Any], written: set[str]
) -> CallDeclaration:
    where = f"{node}.llm_calls[{position}]"
    call = _mapping(call, f"nodes.{where}")
    model = call.get("model")
    if not isinstance(model, (str, type(None))):
        raise _wrong(model, f"nodes.{where}.model", "a text or null")
    texts = [part for part in _keys(call, "static_vars", where) if not part.isidentifier()]
    reads = _keys(call, "reads", where)
    return CallDeclaration(
        model=model,
        reads=tuple(key for key in reads if key in written or not key.startswith("result::")),
        writes=tuple(_keys(facts, "writes", node)),
        static_prefix="\n".join(texts) if texts else None,
    )


def _keys(facts: Mapping[str, Any], field: str, where: str) -> list[str]:
    listed = facts.get(field) or []
    if not isinstance(listed, list) or not all(isinstance(key, str) for key in listed):
        raise _wrong(listed, f"nodes.{where}.{field}", "a list of texts")
    return [key for key in listed if not _SYNTHETIC.fullmatch(key)]


def _name(node: str) -> str:
    return _PSEUDO.get(node, node)


def _end(value: Any, where: str, nodes: Mapping[str, Any]) -> str:
    name = _name(value) if isinstance(value, str) else None
    if name is None or (name not in nodes and name not in (START, END)):
        raise _wrong(value, where, f"one of the nodes {', '.join(sorted(nodes))}")
    return name


def _mapping(value: Any, where: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise _wrong(value, where, "a JSON object")
    return value


def _wrong(value: Any, where: str, wanted: str) -> ValueError:
    return ValueError(f"{where} is {value!r:.80}; it must be {wanted}")
