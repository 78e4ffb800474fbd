"""Notebooks are thin, carry no output, and run from top to bottom."""

import ast
import asyncio
import contextlib
import inspect
import io
import json
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def code_cells(path: Path) -> list[str]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    sources = [cell["source"] for cell in cells if cell["cell_type"] == "code"]
    # Magics are the notebook's own (how figures are shown).
    return ["".join(line for line in lines if not line.startswith("%")) for lines in sources]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_thin_and_stripped(path: Path) -> None:
    """No outputs are stored, and no cell is longer than a screen."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs")
        assert len(cell["source"]) <= 30


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path) -> None:
    """Every cell runs, in order, in one namespace and one event loop; what it shows can be shown.

    A last expression is what a notebook displays: its table or picture is made, too.
    """
    namespace: dict[str, object] = {"__name__": "__main__"}
    with asyncio.Runner() as loop:
        for number, source in enumerate(code_cells(path)):
            where = f"{path.name}, code cell {number}"
            with (
                contextlib.redirect_stdout(io.StringIO()),
                contextlib.redirect_stderr(io.StringIO()),
            ):
                loop.run(_cell(source, where, namespace))


async def _cell(source: str, where: str, namespace: dict[str, object]) -> None:
    """Run a cell as a notebook does: awaits at the top level, and its last value shown."""
    tree = ast.parse(source, where)
    shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    await _evaluated(compile(tree, where, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), namespace)
    if isinstance(shown, ast.Expr):
        body = ast.Expression(shown.value)
        value = await _evaluated(
            compile(body, where, "eval", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT), namespace
        )
        if isinstance(value, Figure):
            value.canvas.draw()
        elif hasattr(value, "_repr_html_"):
            assert value._repr_html_()


async def _evaluated(code: CodeType, namespace: dict[str, object]) -> Any:
    value = eval(code, namespace)  # noqa: S307 - our own notebook
    return await value if inspect.iscoroutine(value) else value


def test_there_are_notebooks() -> None:
    """The seven of the series are found, in order."""
    assert [path.stem[0] for path in NOTEBOOKS] == list("1234567")
