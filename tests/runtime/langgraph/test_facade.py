"""``import almanac``: light, lazy, and clear about a module that stands in its way."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import almanac

ROOT = Path(almanac.__file__).parent


def python(program: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603 our own interpreter and program
        [sys.executable, "-c", program], cwd=folder, capture_output=True, text=True, check=False
    )


def test_every_public_name_is_there() -> None:
    """All names resolve; an unknown one is an AttributeError."""
    for name in almanac.__all__:
        assert callable(getattr(almanac, name))
    assert set(almanac.__all__) == set(dir(almanac))
    with pytest.raises(AttributeError, match="nothing_like_this"):
        almanac.nothing_like_this  # noqa: B018 the access is the test


def test_import_is_light_and_alone(tmp_path: Path) -> None:
    """The facade loads nothing; only embedding and what-if ever load planner or models."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import almanac\n"
        "def loaded(*names):\n"
        "    return sorted(set(names) & {name.partition('.')[0] for name in sys.modules})\n"
        "assert not loaded('langgraph', 'httpx', 'runtime', 'planner'), sys.modules\n"
        "apart = set(almanac.__all__) - almanac._NEEDS_PLANNER\n"
        "[getattr(almanac, name) for name in apart]\n"
        "print(loaded('planner', 'models', 'sklearn', 'ortools', 'openai', 'pandas'))"
    )
    done = python(program, tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """Give a project with a planner.py and a models/ of its own, both used by its application."""
    (tmp_path / "planner.py").write_text("def plan(): return ['first', 'second']")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("NAME = 'm'")
    (tmp_path / "app.py").write_text(HOST_APP)
    return tmp_path


HOST_APP = """
import sys
from typing import TypedDict

import almanac
import httpx
import models
import planner
from langgraph.graph import START, StateGraph

URL = sys.argv[1]
client = httpx.Client(event_hooks={"request": [almanac.request_hook]})


class State(TypedDict, total=False):
    x: int


@almanac.llm_call(expected_output_tokens=3)
def node(state):
    client.post(URL + "/v1/chat/completions", json={"model": models.NAME})
    return {}


graph = StateGraph(State)
for name in planner.plan():
    graph.add_node(name, node)
graph.add_edge(START, "first")
graph.add_edge("first", "second")
app = almanac.instrument(graph.compile(name="host"), gateway=URL)
app.invoke({"x": 1}, almanac.run(run_id="r"))
app.close()
print(planner.__file__, models.__file__)
"""


def test_an_application_with_planner_and_models_of_its_own(host: Path, stub: Any) -> None:
    """Its own modules are used by it and not by us; graph, identity and events arrive."""
    done = subprocess.run(  # noqa: S603 our own interpreter and program
        [sys.executable, "app.py", stub.url], cwd=host, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == [
        str(host.resolve() / "planner.py"),
        str(host.resolve() / "models" / "__init__.py"),
    ], done.stderr
    assert stub.headers("x-almanac-site") == ["first#0", "second#0"]
    assert set(stub.headers("x-almanac-run-id")) == {"r"}
    assert [one["name"] for one in stub.workflows] == ["host"]
    assert [one["type"] for one in stub.events] == ["run_start", "run_end"]


@pytest.mark.parametrize(
    ("shadow", "program"),
    [
        ("runtime.py", "import almanac; almanac.instrument"),
        ("runtime.py", "import runtime, almanac; almanac.run"),
        ("runtime/__init__.py", "import almanac; almanac.instrument"),
        ("runtime.py", "import almanac; almanac.embed"),
        ("planner.py", "import almanac; almanac.embed"),
        ("planner.py", "import planner, almanac; almanac.embed"),
        ("planner/__init__.py", "import almanac; almanac.embed"),
    ],
)
def test_a_clash_that_cannot_be_survived_is_named(host: Path, shadow: str, program: str) -> None:
    """One error with the file that is in the way and what to do about it."""
    (host / "planner.py").unlink()
    file = host / shadow
    file.parent.mkdir(exist_ok=True)
    file.write_text("")
    done = python(program, host)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: {file.resolve()} shadows Almanac's package"), done.stderr
    assert "rename that module, or put Almanac's folder before it" in last
