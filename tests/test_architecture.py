"""The architecture: import contracts (`.importlinter`), import weight, listed public names."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("planner", "models", "runtime")
HEAVY = (
    "aiohttp", "httpx", "joblib", "langchain_core", "langgraph", "matplotlib", "numpy", "openai",
    "ortools", "pandas", "sklearn",
)  # fmt: skip


def python(code: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that sees the packages of a folder first."""
    preamble = f"import sys; sys.path.insert(0, {str(folder)!r})\n"
    return subprocess.run(  # noqa: S603
        [sys.executable, "-c", preamble + code],
        check=False,
        capture_output=True,
        text=True,
        cwd=folder,
    )


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter on the packages of a folder."""
    return python(
        "from importlinter.cli import lint_imports\n"
        "sys.exit(lint_imports(no_cache=True, is_debug_mode=False))",
        folder,
    )


def contract_names() -> list[str]:
    """Return the names of all contracts."""
    config = ConfigParser()
    config.read(ROOT / ".importlinter")
    return [config[one]["name"] for one in config.sections() if "contract" in one]


def test_import_contracts_hold() -> None:
    """Every contract in .importlinter is kept."""
    done = lint(ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


OFFENCES = {
    "planner/graph/offence.py": "import httpx, langgraph, matplotlib, ortools, sklearn, time\n"
    "from planner.sim import engine\n",
    "planner/verify.py": "import planner.metrics\n",
    "runtime/offence.py": "def lazily():\n    import pandas\n    import planner.solve.solver\n",
    "runtime/langgraph/offence.py": "import planner.domain\n",
}


def test_import_contracts_bite(tmp_path: Path) -> None:
    """Each contract is broken by code that offends it, lazy imports included."""
    for package in PACKAGES:
        ignore = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / package, tmp_path / package, ignore=ignore)
    shutil.copy(ROOT / ".importlinter", tmp_path)
    for name, code in OFFENCES.items():
        with (tmp_path / name).open("a", encoding="utf-8") as file:
            file.write(f"\n{code}")
    shown = lint(tmp_path).stdout
    assert [name for name in contract_names() if f"{name} BROKEN" not in shown] == [], shown


@pytest.mark.parametrize(
    ("what", "code"),
    [
        *((f"import {name}", f"import {name}") for name in (*PACKAGES, "almanac")),
        ("almanac --help", "from planner.cli.main import main; main(['--help'])"),
        ("almanac nonsense", "from planner.cli.main import main; main(['nonsense'])"),
    ],
)
def test_light_imports(what: str, code: str) -> None:
    """Packages, façade and help load no heavy library: those come on first use."""
    done = python(f"{code}\nfor name in {HEAVY}:\n    if name in sys.modules: sys.exit(name)")
    assert done.returncode == 0, f"{what} loads {done.stderr}"


@pytest.mark.parametrize("command", ["serve", "mock_fleet"])
def test_light_services(command: str) -> None:
    """What runs for long beside an application loads neither estimators nor solver nor plots."""
    heavy = ("matplotlib", "ortools", "pandas", "sklearn")
    code = (
        f"import planner.cli.{command}, runtime.gateway, runtime.mock\n"
        f"for name in {heavy}:\n    if name in sys.modules: sys.exit(name)"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr


def modules() -> list[Path]:
    """Return every module of the packages, package markers left out."""
    found = [path for name in PACKAGES for path in sorted((ROOT / name).rglob("*.py"))]
    return [path for path in found if path.name != "__init__.py"]


def test_public_names_are_listed() -> None:
    """Each module lists its public names, and defines what it lists."""
    wrong = []
    for path in modules():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        listed: list[str] | None = None
        defined: set[str] = set()
        for node in tree.body:
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                defined.add(node.name)
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                defined |= {(one.asname or one.name).partition(".")[0] for one in node.names}
            elif isinstance(node, (ast.Assign, ast.AnnAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                flat = (leaf for one in targets for leaf in ast.walk(one))
                names = {leaf.id for leaf in flat if isinstance(leaf, ast.Name)}
                defined |= names
                if "__all__" in names and node.value is not None:
                    listed = ast.literal_eval(node.value)
        name = path.relative_to(ROOT).as_posix()
        if listed is None:
            wrong.append(f"{name}: no __all__")
        elif unknown := set(listed) - defined:
            wrong.append(f"{name}: lists {', '.join(sorted(unknown))}")
    assert wrong == []
