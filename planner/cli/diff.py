"""`almanac diff`: two plans, dispatch tables or fleets, row by row."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

__all__ = ["register", "run"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``diff`` command."""
    parser = subparsers.add_parser(
        "diff",
        help="compare two plans, dispatch tables or fleets row by row",
        description="Print every row and field that differs between two plans, two dispatch "
        "tables (JSON) or two fleet files (YAML). The output is the same wherever and whenever it "
        "is made: times, versions and differences below a part in a million are left out. With "
        "--fail-on-change it is a gate for reviews: exit code 1 if anything differs.",
    )
    parser.add_argument("before", type=Path, metavar="A", help="plan, table or fleet file")
    parser.add_argument("after", type=Path, metavar="B", help="another of the same kind")
    parser.add_argument(
        "--fail-on-change", action="store_true", help="exit with 1 if there is a difference"
    )
    parser.add_argument("--json", action="store_true", help="print the differences as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the differences; return 0, or 1 where they are to fail."""
    from planner.whatif.diff import compare_files

    found = compare_files(args.before, args.after)
    print(json.dumps(found.to_json(), indent=1) if args.json else found.text())
    return 1 if args.fail_on_change and found.changes else 0
