"""`almanac models`: what is in a folder of saved predictors, without loading any of them."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from planner.domain.errors import InvalidInput

__all__ = ["register", "run"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``models`` command."""
    parser = subparsers.add_parser(
        "models",
        help="show saved predictors",
        description=(
            "Read the headers of saved predictors: kind, training data and its window and hash, "
            "feature schema, library versions, metrics on held-out rows, and whether this "
            "installation can load them. Nothing is unpickled."
        ),
    )
    actions = parser.add_subparsers(metavar="ACTION", dest="action", required=True)
    show = actions.add_parser("show", help="list the predictors of a folder")
    show.add_argument("folder", type=Path, metavar="FOLDER", help="made by `almanac train`")
    show.add_argument("--json", action="store_true", help="print JSON instead of a text")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print what the artifacts say of themselves; 1 if one of them cannot be used here."""
    from models.artifacts import read_info, unusable  # scikit-learn takes a second to load

    folder = args.folder
    if not folder.is_dir():
        raise InvalidInput(
            "no such folder", where=str(folder), remedy="make it with `almanac train`"
        )
    rows: list[dict[str, Any]] = []
    for path in sorted(folder.glob("*.joblib")):
        try:
            info = read_info(path)
        except InvalidInput as error:
            rows.append({"file": path.name, "problem": str(error)})
        else:
            rows.append({"file": path.name, **asdict(info), "problem": unusable(info)})
    if not rows:
        raise InvalidInput(
            "holds no saved predictor (*.joblib)",
            where=str(folder),
            remedy="make some with `almanac train`",
        )
    print(json.dumps(rows, indent=1) if args.json else "\n".join(map(_text, rows)))
    broken = sum(row["problem"] is not None for row in rows)
    if broken:
        print(f"models: {broken} of {len(rows)} cannot be used here", file=sys.stderr)
    return 1 if broken else 0


def _text(row: dict[str, Any]) -> str:
    lines = [row["file"]]
    if "kind" in row:
        libraries = ", ".join(f"{name} {have}" for name, have in sorted(row["libraries"].items()))
        lines += [
            f"  {row['kind']} from {row['dataset']} ({row['window']}, hash {row['data_hash']})",
            f"  features {row['features']}; {libraries}",
            *(f"  {name}: {value:.4g}" for name, value in row["metrics"].items()),
        ]
    if row["problem"]:
        lines.append(f"  CANNOT BE USED: {row['problem']}")
    return "\n".join(lines)
