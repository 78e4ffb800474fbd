"""What commands check before they start, so that a mistake costs no waiting."""

from __future__ import annotations

import argparse
import math
import os
import shutil
from pathlib import Path

from planner.domain.errors import InvalidInput
from planner.domain.files import atomic_write
from planner.domain.fleet import Fleet

__all__ = ["addresses", "at_least", "keep_copy", "out_file", "out_folder"]


def at_least(args: argparse.Namespace, **least: float) -> None:
    """Check numeric options by name; one that was not given (None) passes.

    A bound below 1e-6 stands for "above 0".

    Raises
    ------
    InvalidInput
        If a value is below its bound, or not finite.
    """
    for name, bound in least.items():
        value = getattr(args, name)
        if value is not None and not bound <= value < math.inf:
            raise InvalidInput(
                f"{value!r} is out of range",
                where=f"--{name.replace('_', '-')}",
                remedy="use a finite number "
                + ("above 0" if 0 < bound < 1e-6 else f"of at least {bound:g}"),
            )


def addresses(fleet: Fleet, file: Path) -> None:
    """Check that each endpoint of a fleet file has an address.

    Raises
    ------
    InvalidInput
        If one has none; only planning and simulation can do without.
    """
    for position, endpoint in enumerate(fleet.endpoints):
        if endpoint.url is None:
            raise InvalidInput(
                f"worker {endpoint.id!r} has no address",
                where=f"{file}: workers[{position}].url",
                remedy="add url: http://host:port",
            )


def out_file(path: Path | None, option: str) -> None:
    """Check that a file can be written at ``path``; nothing is made yet.

    Raises
    ------
    InvalidInput
        If it is a folder, or its folder is none or cannot be written to.
    """
    if path is None:
        return
    if path.is_dir():
        raise InvalidInput(
            f"{path} is a folder", where=option, remedy="name a file inside it or beside it"
        )
    _writable(path.absolute().parent, option)


def out_folder(path: Path | None, option: str) -> None:
    """Check that files can be written into the folder ``path``; nothing is made yet.

    Raises
    ------
    InvalidInput
        If it, or what should hold it, is no folder or cannot be written to.
    """
    if path is not None:
        _writable(path.absolute(), option)


def _writable(folder: Path, option: str) -> None:
    there = next(one for one in (folder, *folder.parents) if one.exists())
    if not there.is_dir():
        raise InvalidInput(f"{there} is not a folder", where=option, remedy="choose another path")
    if not os.access(there, os.W_OK | os.X_OK):
        raise InvalidInput(
            f"no permission to write to {there}", where=option, remedy="choose another path"
        )


def keep_copy(source: Path, target: Path) -> None:
    """Copy a file beside the results; a file that is there already may be its own copy."""
    if source.resolve() != target.resolve():
        with atomic_write(target) as temporary:
            shutil.copyfile(source, temporary)
