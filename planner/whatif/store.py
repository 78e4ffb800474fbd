"""Work that is kept: each task is a file named by what its result depends on.

So a sweep that was interrupted goes on where it was, and sweeps with common parts share them.
Without a folder results are kept in memory for as long as the store is.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from joblib import Parallel, delayed

from planner.domain.files import atomic_write, read_json

__all__ = ["SCHEMA", "Store", "Task"]

SCHEMA = 1
"""Raised when a change of the code makes earlier results incomparable."""

Document = Mapping[str, Any]


class Task(Protocol):
    """A piece of work that can be done in another process."""

    @property
    def kind(self) -> str:
        """Folder of its results."""
        ...

    @property
    def key(self) -> str:
        """Name that changes with whatever its result depends on."""
        ...

    def compute(self) -> Document:
        """Return the result, ready for JSON."""
        ...

    def __str__(self) -> str:
        """Return what it is, for progress."""
        ...


@dataclass(slots=True, kw_only=True)
class Store:
    """Results by task.

    Parameters
    ----------
    folder
        Where to keep them; None for memory.
    jobs
        Processes, >= 1.
    progress
        Told of each finished task, with the time that is left.
    """

    folder: Path | None = None
    jobs: int = 1
    progress: Callable[[str], object] = lambda _: None
    _known: dict[str, Document] = field(default_factory=dict, repr=False)

    def results(self, tasks: Sequence[Task]) -> list[Document]:
        """Return the result of each task, in their order; those that are known are not redone."""
        missing = {name: task for task in tasks if self._find(name := _name(task)) is None}
        started = time.monotonic()
        pool = Parallel(
            n_jobs=min(self.jobs, max(1, len(missing))), return_as="generator_unordered"
        )
        done = pool(delayed(_compute)(name, task, self.folder) for name, task in missing.items())
        for number, (name, document) in enumerate(done, start=1):
            self._known[name] = document
            left_s = (time.monotonic() - started) / number * (len(missing) - number)
            self.progress(f"[{number}/{len(missing)}] {missing[name]}; {_span(left_s)} left")
        return [self._known[_name(task)] for task in tasks]

    def _find(self, name: str) -> Document | None:
        found = self._known.get(name)
        if found is None and self.folder is not None:
            file = _file(self.folder, name)
            if file.exists():
                found = self._known[name] = read_json(file, what="what-if result")
        return found


def _name(task: Task) -> str:
    return f"{task.kind}/{task.key}-{SCHEMA}"


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name}.json"


def _compute(name: str, task: Task, folder: Path | None) -> tuple[str, Document]:
    document = task.compute()
    if folder is not None:
        # Written here and not by the parent: what is done survives an interruption at once.
        with atomic_write(_file(folder, name)) as temporary:
            temporary.write_text(json.dumps(document) + "\n", encoding="utf-8")
    return name, document


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
