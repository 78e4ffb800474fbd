"""``almanac ir``: print, check, compare and draw; one clear error for what cannot be read."""

import argparse
import json
from pathlib import Path

import pytest

from planner.cli import ir
from planner.domain.errors import InvalidInput, WorkflowError
from planner.domain.workflow import load_workflow

DEMO = "runtime.langgraph.demo:app"
APP = """
from typing import Literal, TypedDict
from langgraph.graph import START, StateGraph
class S(TypedDict):
    x: int
def node(state: S): return {"x": 1}
def route(state: S)%s: return "b"
inner = StateGraph(S).add_node("deep", node).add_edge(START, "deep").compile()
builder = StateGraph(S).add_node("a", node).add_node("b", inner).add_edge(START, "a")
graph = builder.add_conditional_edges("a", route).compile(name="mine")
number = 3
def broken(): raise KeyError("no key")
"""


def almanac_ir(*argv: str) -> int:
    parser = argparse.ArgumentParser()
    ir.register(parser.add_subparsers())
    args = parser.parse_args(["ir", *argv])
    return int(args.run(args))


@pytest.fixture
def apps(tmp_path: Path) -> tuple[str, str]:
    """Give two sources: one whose router is annotated, one whose router says nothing."""
    for name, annotation in (("known", " -> Literal['b', '__end__']"), ("unknown", "")):
        (tmp_path / f"{name}_app.py").write_text(APP % annotation)
    return f"{tmp_path}/known_app.py:graph", f"{tmp_path}/unknown_app.py:graph"


def test_summary(capsys: pytest.CaptureFixture[str]) -> None:
    """By default: nodes with kinds, joins, branches, loops and the content hash."""
    assert almanac_ir(DEMO) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"workflow research  {ir.load(DEMO).content_hash}")
    for line in (
        "  search        tool  -> read",
        "  draft waits for all of legal, market, read",
        "  critic:route_critic: accept -> end | revise -> draft",
        "  draft: critic, draft",
    ):
        assert line in out.splitlines()


def test_json_and_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """``--json`` prints and ``--out`` writes the same workflow, which can be read back."""
    file = tmp_path / "ir.json"
    assert almanac_ir(DEMO, "--json", "--out", str(file), "--name", "other") == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == load_workflow(file).to_json() == json.loads(file.read_text())
    assert load_workflow(file).name == "other"
    assert ir.load(DEMO).content_hash in captured.err


def test_drawings(capsys: pytest.CaptureFixture[str], apps: tuple[str, str]) -> None:
    """Mermaid shows branches dotted and joins thick; the tree marks nodes met before."""
    almanac_ir(DEMO, "--draw", "mermaid")
    mermaid = capsys.readouterr().out.splitlines()
    assert mermaid[0] == "flowchart TD"
    assert sum(" ==> " in line for line in mermaid) == 3
    assert sum(' -. "' in line for line in mermaid) == 4
    almanac_ir(apps[0], "--draw", "mermaid")
    assert 'subgraph n1["b"]' in capsys.readouterr().out
    almanac_ir(DEMO, "--draw", "text")
    tree = capsys.readouterr().out
    assert "└─ draft [llm] after all of 3 ^" in tree
    assert "└─ draft [llm] if revise ^" in tree


def test_check(capsys: pytest.CaptureFixture[str], apps: tuple[str, str]) -> None:
    """``--check`` fails on a branch that could not be read, and says how to mend it."""
    known, unknown = apps
    assert almanac_ir(known, "--check") == 0
    assert almanac_ir(unknown) == 0
    assert "any node may follow" in capsys.readouterr().out
    assert almanac_ir(unknown, "--check") == 1
    assert "branch a:route could not be read; annotate" in capsys.readouterr().err


def test_diff(capsys: pytest.CaptureFixture[str], apps: tuple[str, str], tmp_path: Path) -> None:
    """Added, removed and changed parts, one line each; with ``--check`` a difference fails."""
    old, new = tmp_path / "old.json", tmp_path / "new.json"
    almanac_ir(apps[0], "--out", str(old))
    document = json.loads(old.read_text())
    document["nodes"][0]["kind"] = "tool"
    document["nodes"][1]["subgraph"]["nodes"][0]["dynamic"] = True
    document["nodes"].append({**document["nodes"][0], "id": "c", "kind": "code"})
    document["edges"].append(["a", "c"])
    document["edges"].append(["c", "__end__"])
    document["branches"][0]["outcomes"].pop(0)
    new.write_text(json.dumps(document))
    capsys.readouterr()
    assert almanac_ir(str(new), "--diff", str(old), "--check") == 1
    assert capsys.readouterr().out.splitlines() == [
        '~ node a: kind "code" -> "tool"',
        "~ node b|deep: dynamic false -> true",
        "+ node c",
        "+ edge a -> c",
        "+ edge c -> end",
        "~ branch a:route: outcomes {__end__, b} -> {b}",
    ]
    assert almanac_ir(str(old), "--diff", apps[0], "--check") == 0
    assert "no difference" in capsys.readouterr().out
    almanac_ir(str(old), "--diff", str(new), "--json")
    assert "- node c" in json.loads(capsys.readouterr().out)["changes"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("nowhere", "nowhere: not a graph's address; write MODULE:NAME"),
        ("no_such_module:x", "importing no_such_module failed: ModuleNotFoundError"),
        ("no_such_file.py:x", "no_such_file.py: no such file"),
        ("no_such_file.json", "no such workflow file"),
        ("{app}:missing", "no 'missing' in known_app; graphs found there: graph, inner"),
        ("{app}:number", "calling it failed: TypeError"),
        ("{app}:broken", "calling it failed: KeyError: 'no key'"),
        ("{app}:builder", r"StateGraph is not a compiled LangGraph; call .compile\(\) first"),
        ("{broken}:x", "importing .*broken_app.py failed: SyntaxError"),
        ("{quits}:x", "importing .*quits_app.py failed: SystemExit"),
    ],
)
def test_what_cannot_be_read(
    source: str, message: str, apps: tuple[str, str], tmp_path: Path
) -> None:
    """One clear error naming the source, what was found and what to do."""
    (tmp_path / "broken_app.py").write_text("def :")
    (tmp_path / "quits_app.py").write_text("raise SystemExit(3)")
    address = source.format(
        app=apps[0].removesuffix(":graph"),
        broken=tmp_path / "broken_app.py",
        quits=tmp_path / "quits_app.py",
    )
    with pytest.raises(InvalidInput, match=message):
        almanac_ir(address)


def test_a_file_that_breaks_a_rule(tmp_path: Path) -> None:
    """An IR file is checked like any other input."""
    file = tmp_path / "bad.json"
    file.write_text('{"schema": "almanac.workflow/1", "name": "x", "nodes": [{"id": 3}]}')
    with pytest.raises(WorkflowError, match=r"nodes\[0\].id"):
        almanac_ir(str(file))
