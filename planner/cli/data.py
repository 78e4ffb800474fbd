"""`almanac data`: list the public datasets and download them from their home."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from runtime.download import (
    BASE_URL_VARIABLE,
    Bases,
    Fetched,
    Recipe,
    fetch,
    find_recipe,
    load_recipes,
)

__all__ = ["register", "run"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``data`` command with ``list`` and ``get``."""
    parser = subparsers.add_parser(
        "data",
        help="list and download public datasets",
        description="List the public datasets Almanac knows, or download one from its home "
        "repository at a pinned commit. Every file is checked against the commit's hashes; a "
        "download that was cut off goes on where it stopped.",
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    listing = actions.add_parser("list", help="list the datasets with licence and form")
    listing.add_argument("--json", action="store_true", help="print the recipes as JSON")
    get = actions.add_parser("get", help="download a dataset")
    get.add_argument("name", metavar="NAME", help="name of the dataset (see `almanac data list`)")
    get.add_argument(
        "--out",
        type=Path,
        default=Path("datasets"),
        metavar="FOLDER",
        help="where datasets are kept (default: %(default)s); a ready one goes to FOLDER/NAME, so "
        "that `almanac train --traces FOLDER` finds it, a raw one to FOLDER/raw/NAME",
    )
    get.add_argument(
        "--base-url",
        metavar="URL",
        help=f"mirror to ask in place of GitHub (default: ${BASE_URL_VARIABLE} if set)",
    )
    get.add_argument("--json", action="store_true", help="print the files as JSON")


def run(args: argparse.Namespace) -> int:
    """List the recipes or fetch one; return 0."""
    recipes = load_recipes()
    if args.action == "list":
        print(_listing(recipes, as_json=args.json))
        return 0
    recipe = find_recipe(args.name, recipes)
    bases = Bases.at(args.base_url)
    print(f"data: {recipe.title}\ndata: {recipe.licence}; {recipe.credit}", file=sys.stderr)
    meter = _Meter()
    try:
        files = fetch(recipe, args.out, bases=bases, progress=meter)
    finally:
        meter.close()
    print(_fetched(recipe, files, as_json=args.json))
    return 0


def _listing(recipes: Mapping[str, Recipe], *, as_json: bool) -> str:
    if as_json:
        return json.dumps([asdict(recipe) for recipe in recipes.values()], indent=1)
    rows = [("name", "form", "licence", "title")]
    rows += [(one.name, one.form, one.licence, one.title) for one in recipes.values()]
    name, form, licence = (max(len(row[column]) for row in rows) for column in range(3))
    lines = [f"{a:<{name}}  {b:<{form}}  {c:<{licence}}  {d}" for a, b, c, d in rows]
    notes = (
        "ready: `almanac train` and `almanac simulate` read the files as they are; "
        "raw: as published, to be converted first"
    )
    return "\n".join([*lines, "", notes])


def _fetched(recipe: Recipe, files: list[Fetched], *, as_json: bool) -> str:
    if as_json:
        rows = [{**asdict(one), "path": str(one.path)} for one in files]
        return json.dumps({"name": recipe.name, "form": recipe.form, "files": rows}, indent=1)
    fresh = sum(one.fresh for one in files)
    lines = [str(one.path) for one in files]
    lines.append(
        f"{recipe.name}: {len(files)} files, {sum(one.size for one in files) / 1e6:.1f} MB, "
        f"{fresh} downloaded, {len(files) - fresh} already there; all hashes right"
    )
    if recipe.form == "raw":
        lines.append("raw: as published; `almanac train` does not read this form")
    if recipe.note:
        lines.append(f"note: {recipe.note}")
    return "\n".join(lines)


class _Meter:
    """Progress on stderr: one line that is rewritten on a terminal, else one line per file."""

    def __init__(self) -> None:
        self._live = sys.stderr.isatty()
        self._open = False

    def __call__(self, name: str, done: int, total: int) -> None:
        if self._live:
            share = done / total if total else 1.0
            print(f"\r\033[Kdata: {share:4.0%} of {total / 1e6:.1f} MB  {name[-60:]}",
                  end="", file=sys.stderr, flush=True)  # fmt: skip
            self._open = True
        elif done >= total:
            print(f"data: {name} {total / 1e6:.1f} MB", file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._open:
            print(file=sys.stderr)
