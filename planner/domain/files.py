"""Reading and writing the project's small text files, with one clear error each.

A file is written to a temporary name in the same folder and renamed, so that a reader never
sees half of it and a failed write leaves the old one in place.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from planner.domain.errors import InvalidInput

__all__ = ["atomic_write", "data_dir", "read_json", "read_jsonl", "read_text", "read_yaml"]


def data_dir() -> Path:
    """Return the folder of the bundled data.

    It is the one that ``ALMANAC_DATA`` names, or ``data/`` beside the packages in a clone, or
    where the wheel was installed to.

    Raises
    ------
    InvalidInput
        If it is absent, which happens when the packages were copied without it.
    """
    override = os.environ.get("ALMANAC_DATA")
    path = Path(override) if override else Path(__file__).resolve().parents[2] / "data"
    if not (override or (path / "gpus.csv").is_file()):
        path = _installed_data() or path
    if not path.is_dir():
        raise InvalidInput(
            f"no folder {path}",
            where="bundled data",
            remedy="install the wheel, run from a clone of the repository, or set ALMANAC_DATA to "
            "its data/ folder",
        )
    return path


def _installed_data() -> Path | None:
    """Return the folder that the installer put the wheel's data into, if there was a wheel."""
    from importlib import metadata  # seldom needed, and slow to load

    try:
        installed = metadata.files("almanac-scheduler") or ()
    except metadata.PackageNotFoundError:
        return None
    # The installer chooses the folder (virtual environment, user, system): its record knows.
    tables = (Path(str(file.locate())) for file in installed if file.name == "gpus.csv")
    return next((table.resolve().parent for table in tables), None)


def read_text(path: Path, *, what: str) -> str:
    """Return the text of a UTF-8 file; ``what`` names it in errors (``fleet file``).

    Raises
    ------
    InvalidInput
        If the file is missing, is a folder, cannot be read or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise InvalidInput(f"no such {what}", where=str(path), remedy="check the path") from error
    except IsADirectoryError as error:
        raise InvalidInput(
            f"the {what} is a folder", where=str(path), remedy="name a file inside it"
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInput(
            f"the {what} is not UTF-8 text", where=str(path), remedy="save it as UTF-8"
        ) from error
    except OSError as error:
        raise InvalidInput(
            f"cannot read the {what}: {error.strerror}", where=str(path), remedy="check it"
        ) from error


def read_json(path: Path, *, what: str) -> Any:
    """Return the parsed JSON of a file, or raise `InvalidInput` naming line and column."""
    try:
        return json.loads(read_text(path, what=what))
    except json.JSONDecodeError as error:
        raise InvalidInput(
            f"not valid JSON ({error.msg})",
            where=f"{path}:{error.lineno}:{error.colno}",
            remedy="mend the syntax there",
        ) from error


def read_yaml(path: Path, *, what: str) -> Any:
    """Return the parsed YAML of a file, or raise `InvalidInput` naming the line."""
    try:
        return yaml.safe_load(read_text(path, what=what))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}:{mark.column + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or "syntax error"
        raise InvalidInput(
            f"not valid YAML ({problem})", where=where, remedy="mend the syntax there"
        ) from error


def read_jsonl(path: Path, *, what: str) -> Iterator[tuple[int, Any]]:
    """Yield (line number from 1, parsed value) for each non-empty line of a JSON Lines file."""
    for number, line in enumerate(read_text(path, what=what).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise InvalidInput(
                f"not valid JSON ({error.msg})",
                where=f"{path}:{number}",
                remedy="mend or delete that line",
            ) from error


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Give a temporary path beside ``path``; rename it there on success, delete it on failure.

    Raises
    ------
    InvalidInput
        If ``path`` is a folder, or its folder cannot be created or written to.
    """
    if path.is_dir():
        raise InvalidInput("it is a folder", where=str(path), remedy="name a file inside it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
    except OSError as error:
        raise InvalidInput(
            f"cannot write there: {error.strerror}", where=str(path), remedy="choose another path"
        ) from error
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes files private; results are meant to be read like any other file.
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
