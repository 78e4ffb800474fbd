"""``almanac ir``: print, check, compare and draw the workflow graph of a LangGraph application."""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from planner.domain.errors import InvalidInput
from planner.domain.files import read_json
from planner.domain.ids import NodeId
from planner.domain.workflow import END, START, Workflow, load_workflow, save_workflow

__all__ = ["diff", "load", "mermaid", "register", "run", "summary", "tree"]

_KIND = {"llm": "calls a model", "tool": "tool", "subgraph": "sub-graph", "router": "router"}


def register(subparsers: Any) -> None:
    """Add the command to the ``almanac`` parser."""
    parser = subparsers.add_parser(
        "ir",
        help="print, check, compare and draw a workflow graph",
        description=(
            "Read the workflow graph (IR) of a compiled LangGraph without running it. SOURCE is "
            "MODULE:NAME or FILE.py:NAME, where NAME is a compiled graph or a function without "
            "arguments that returns one, or the path of an IR file or AgentIR contract (.json)."
        ),
    )
    parser.add_argument("source", metavar="SOURCE", help="MODULE:NAME, FILE.py:NAME or FILE.json")
    parser.add_argument("--name", help="name of the workflow (default: the graph's own)")
    parser.add_argument("--json", action="store_true", help="print the IR as JSON")
    parser.add_argument("--draw", choices=("mermaid", "text"), help="print a drawing")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the IR to a file")
    parser.add_argument(
        "--diff", metavar="OTHER", help="print what changed from OTHER (a SOURCE) to SOURCE"
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="exit with 1 if a branch could not be read from the program, or if --diff finds any",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Execute the command; 0 if all is well, 1 if ``--check`` found something.

    Raises
    ------
    InvalidInput
        If a source cannot be imported, is not a graph, or breaks a rule of workflows.
    """
    workflow = load(args.source, args.name)
    changes = None if args.diff is None else diff(load(args.diff, None), workflow)
    if args.out is not None:
        save_workflow(workflow, args.out)
        print(f"{args.out}: {workflow.name} {workflow.content_hash}", file=sys.stderr)
    if args.json:
        document: dict[str, Any] = workflow.to_json()
        if changes is not None:
            document = {"content_hash": workflow.content_hash, "changes": changes}
        print(json.dumps(document, indent=1))
    elif args.draw == "mermaid":
        print(mermaid(workflow))
    elif args.draw == "text":
        print("\n".join(tree(workflow)))
    elif changes is not None:
        print("\n".join(changes) or f"no difference: {workflow.content_hash}")
    elif args.out is None:
        print("\n".join(summary(workflow)))
    if not args.check:
        return 0
    open_branches = list(_unread(workflow))
    for branch in open_branches:
        print(
            f"branch {branch} could not be read; annotate the router's answer with Literal[...], "
            "give path_map, or declare @almanac.branch(outcomes=[...])",
            file=sys.stderr,
        )
    return 1 if open_branches or changes else 0


def load(source: str, name: str | None = None) -> Workflow:
    """Return the workflow of a source: ``module:name``, ``file.py:name`` or a JSON file.

    A JSON file is a workflow, or a contract of AgentIR.

    Raises
    ------
    InvalidInput
        Naming the source, what was found and what to do.
    """
    if source.endswith(".json"):
        return _from_file(Path(source), name)
    module_name, _, attribute = source.partition(":")
    if not module_name or not attribute:
        raise InvalidInput(
            "not a graph's address", where=source, remedy="write MODULE:NAME or FILE.json"
        )
    graph = _attribute(_module(module_name, source), attribute, source)
    from runtime.langgraph.ir import workflow_ir

    try:
        if not hasattr(graph, "invoke") and not hasattr(graph, "compile"):
            graph = _call(graph, source)
        document = workflow_ir(graph, name)
    except (TypeError, ValueError) as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(
            str(error),
            where=source,
            remedy="name a compiled graph, or a function that returns one",
        ) from error
    return Workflow.from_json(document, where=source)


def _from_file(path: Path, name: str | None) -> Workflow:
    """Return the workflow of a JSON file, which may be a contract of AgentIR."""
    document = read_json(path, what="workflow file")
    if not isinstance(document, dict) or "entry" not in document:
        return load_workflow(path)
    from runtime.langgraph.agentir import workflow_from_contract

    try:
        document = workflow_from_contract(document, name or path.stem)
    except ValueError as error:
        raise InvalidInput(
            str(error), where=str(path), remedy="give a contract of AgentIR or a workflow file"
        ) from error
    return Workflow.from_json(document, where=str(path))


def _module(name: str, source: str) -> ModuleType:
    try:
        if name.endswith(".py"):
            return _module_from_file(Path(name), source)
        # As ``python -m`` would: the folder the user stands in comes first.
        if (here := str(Path.cwd())) not in sys.path:
            sys.path.insert(0, here)
        return importlib.import_module(name)
    except InvalidInput:
        raise
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        raise InvalidInput(
            f"importing {name} failed: {type(error).__name__}: {error}",
            where=source,
            remedy="make the module importable from this folder",
        ) from error


def _module_from_file(path: Path, source: str) -> ModuleType:
    if not path.is_file():
        raise InvalidInput("no such file", where=str(path), remedy="check the path")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InvalidInput("not a Python file", where=source, remedy="name a .py file")
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)
    spec.loader.exec_module(module)
    return module


def _attribute(module: ModuleType, attribute: str, source: str) -> Any:
    value: Any = module
    for part in attribute.split("."):
        try:
            value = getattr(value, part)
        except AttributeError as error:
            known = sorted(
                name
                for name, found in vars(module).items()
                if hasattr(found, "get_graph") and hasattr(found, "builder")
            )
            raise InvalidInput(
                f"no {part!r} in {module.__name__}",
                where=source,
                remedy=f"graphs found there: {', '.join(known) or 'none'}",
            ) from error
    return value


def _call(factory: Callable[[], Any], source: str) -> Any:
    try:
        return factory()
    except Exception as error:
        raise InvalidInput(
            f"calling it failed: {type(error).__name__}: {error}",
            where=source,
            remedy="name a compiled graph, or a function without arguments that returns one",
        ) from error


def summary(workflow: Workflow, indent: str = "") -> list[str]:
    """Return a description in lines: nodes, joins, branches, loops, content hash."""
    lines = [
        f"workflow {workflow.name}  {workflow.content_hash}  ({workflow.execution})",
        f"nodes ({len(workflow.nodes)})",
    ]
    width = max((len(node.id) for node in workflow.nodes), default=0)
    for node in sorted(workflow.nodes, key=lambda node: node.id):
        facts = [_KIND.get(node.kind, node.kind)]
        if node.kind == "llm" and len(node.call_sites) > 1:
            facts.append(f"{len(node.call_sites)} call sites")
        if node.dynamic:
            facts.append("started any number of times")
        if node.expected_delay_s is not None:
            facts.append(f"about {node.expected_delay_s:g} s")
        follow = ", ".join(_label(target) for target in workflow.successors[node.id])
        lines.append(f"  {node.id:<{width}}  {', '.join(facts)}  -> {follow}")
        if node.subgraph is not None:
            lines += summary(node.subgraph, "    ")
    lines += _section(
        "joins",
        (
            f"{join.target} waits for {'all' if join.need is None else join.need} of "
            f"{', '.join(join.sources)}"
            for join in workflow.joins
        ),
    )
    lines += _section(
        "branches",
        (
            f"{branch.id}: "
            + " | ".join(
                f"{outcome.id} -> {', '.join(map(_label, outcome.targets)) or 'end'}"
                for outcome in branch.outcomes
            )
            + ("" if branch.exhaustive else "  (not read from the program: any node may follow)")
            for branch in workflow.branches
        ),
    )
    lines += _section(
        "loops", (f"{loop.header}: {', '.join(loop.nodes)}" for loop in workflow.loops)
    )
    return [indent + line for line in lines]


def _section(title: str, rows: Iterable[str]) -> list[str]:
    listed = [f"  {row}" for row in rows]
    return [f"{title} ({len(listed)})", *listed] if listed else []


def tree(workflow: Workflow) -> list[str]:
    """Return the graph as an indented tree from the start; a node met again is marked ``^``."""
    lines = ["start"]
    seen: set[NodeId] = set()

    def visit(source: NodeId, indent: str) -> None:
        targets = workflow.successors[source]
        for position, target in enumerate(targets):
            last = position == len(targets) - 1
            known = target in seen or target == END
            kind = "" if target == END else f" [{workflow.node(target).kind}]"
            why = _why(workflow, source, target)
            mark = " ^" if target in seen else ""
            lines.append(f"{indent}{'└─ ' if last else '├─ '}{_label(target)}{kind}{why}{mark}")
            if not known:
                seen.add(target)
                visit(target, indent + ("   " if last else "│  "))

    visit(START, "")
    return lines


def _why(workflow: Workflow, source: NodeId, target: NodeId) -> str:
    labels = [
        outcome.id
        for branch in workflow.branches
        if branch.source == source
        for outcome in branch.outcomes
        if target in outcome.targets
    ]
    if labels:
        return f" if {' or '.join(labels)}"
    for join in workflow.joins:
        if join.target == target and source in join.sources:
            return f" after {'all' if join.need is None else join.need} of {len(join.sources)}"
    return ""


def mermaid(workflow: Workflow) -> str:
    """Return the graph as Mermaid text; dotted arrows are branch outcomes, thick ones joins."""
    lines = ["flowchart TD"]
    _mermaid_body(workflow, "", lines, "  ")
    return "\n".join(lines)


_SHAPES = {"llm": '(["{}"])', "tool": '[["{}"]]', "subgraph": '["{}"]', "router": '{{"{}"}}'}


def _mermaid_body(workflow: Workflow, prefix: str, lines: list[str], indent: str) -> None:
    names = {START: f"{prefix}start", END: f"{prefix}end_"}
    lines += [f'{indent}{names[START]}(("start"))', f'{indent}{names[END]}(("end"))']
    for number, node in enumerate(sorted(workflow.nodes, key=lambda node: node.id)):
        names[node.id] = f"{prefix}n{number}"
        if node.subgraph is not None:
            lines.append(f'{indent}subgraph {names[node.id]}["{_quoted(node.id)}"]')
            _mermaid_body(node.subgraph, f"{names[node.id]}_", lines, indent + "  ")
            lines.append(f"{indent}end")
            continue
        shape = _SHAPES.get(node.kind, '["{}"]')
        lines.append(f"{indent}{names[node.id]}{shape.format(_quoted(node.id))}")
    for source, target in sorted(workflow.edges):
        lines.append(f"{indent}{names[source]} --> {names[target]}")
    for join in workflow.joins:
        lines += [f"{indent}{names[s]} ==> {names[join.target]}" for s in sorted(join.sources)]
    for branch in workflow.branches:
        for outcome in branch.outcomes:
            for target in outcome.targets or (END,):
                lines.append(
                    f'{indent}{names[branch.source]} -. "{_quoted(outcome.id)}" .-> {names[target]}'
                )


def _quoted(text: str) -> str:
    return text.replace('"', "#quot;")


def diff(old: Workflow, new: Workflow) -> list[str]:
    """Return what changed, one line each; ``+`` added, ``-`` removed, ``~`` changed."""
    return _diff(old.to_json(), new.to_json(), "")


def _diff(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str) -> list[str]:
    lines: list[str] = []
    for title, key in (
        ("node", lambda row: row["id"]),
        ("edge", lambda row: f"{_label(row[0])} -> {_label(row[1])}"),
        ("join", lambda row: f"{', '.join(row['sources'])} => {_label(row['target'])}"),
        ("branch", lambda row: row["id"]),
    ):
        field = {"branch": "branches"}.get(title, f"{title}s")
        before = {key(row): row for row in old[field]}
        after = {key(row): row for row in new[field]}
        for name in sorted(before.keys() | after.keys()):
            if name not in after:
                lines.append(f"- {title} {prefix}{name}")
            elif name not in before:
                lines.append(f"+ {title} {prefix}{name}")
            elif before[name] != after[name]:
                lines += _changed(title, f"{prefix}{name}", before[name], after[name])
    if old["execution"] != new["execution"]:
        lines.append(f"~ execution {old['execution']} -> {new['execution']}")
    return lines


def _changed(title: str, name: str, old: Any, new: Any) -> list[str]:
    if title == "node" and old["subgraph"] and new["subgraph"]:
        inner = _diff(old["subgraph"], new["subgraph"], f"{name}|")
        old, new = {**old, "subgraph": None}, {**new, "subgraph": None}
        if old == new:
            return inner
        return [*_changed(title, name, old, new), *inner]
    changes = [
        f"{field} {_brief(field, old[field])} -> {_brief(field, new[field])}"
        for field in old
        if old[field] != new[field]
    ]
    return [f"~ {title} {name}: {'; '.join(changes)}"]


def _brief(field: str, value: Any) -> str:
    if field == "outcomes":
        return "{" + ", ".join(row["id"] for row in value) + "}"
    if field == "subgraph":
        return "none" if value is None else str(value["name"])
    return json.dumps(value)


def _unread(workflow: Workflow) -> Iterable[str]:
    for branch in workflow.branches:
        if not branch.exhaustive:
            yield branch.id
    for node in workflow.nodes:
        if node.subgraph is not None:
            yield from _unread(node.subgraph)


def _label(node: str) -> str:
    return {START: "start", END: "end"}.get(NodeId(node), node)
