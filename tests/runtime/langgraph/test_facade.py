"""``import almanac``: light, lazy, and clear about a module that stands in its way."""

import subprocess
import sys
from pathlib import Path

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
    """The facade loads nothing; all of it never loads planner, models or OpenAI's client."""
    program = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); import almanac\n"
        "def loaded(*names):\n"
        "    return sorted(set(names) & {name.partition('.')[0] for name in sys.modules})\n"
        "assert not loaded('langgraph', 'httpx', 'runtime', 'planner'), sys.modules\n"
        "[getattr(almanac, name) for name in almanac.__all__]\n"
        "print(loaded('planner', 'models', 'sklearn', 'ortools', 'openai', 'pandas'))"
    )
    done = python(program, tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


def test_host_modules_named_planner_and_models_do_not_matter(tmp_path: Path) -> None:
    """A project with its own planner.py and models/ works."""
    (tmp_path / "planner.py").write_text("raise RuntimeError('the host\\'s planner was imported')")
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "__init__.py").write_text("raise RuntimeError('the host\\'s models')")
    done = python("import almanac; print(almanac.instrument.__name__)", tmp_path)
    assert done.stdout.strip() == "instrument", done.stderr


def test_a_host_module_named_runtime_is_named(tmp_path: Path) -> None:
    """A project with its own runtime.py gets one error that says which file is in the way."""
    shadow = tmp_path / "runtime.py"
    shadow.write_text("")
    for program in ("import almanac; almanac.run", "import runtime, almanac; almanac.run"):
        done = python(program, tmp_path)
        last = done.stderr.strip().splitlines()[-1]
        assert last.startswith(f"ImportError: {shadow.resolve()} shadows")
        assert "rename that module" in last
