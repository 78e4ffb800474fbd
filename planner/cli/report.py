"""`almanac report`: one self-contained HTML file of a results folder."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from planner.cli.checks import out_file
from planner.report.comparison import compare
from planner.report.results import load_results
from planner.report.terminal import results_table

__all__ = ["register", "run"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``report`` command."""
    parser = subparsers.add_parser(
        "report",
        help="make one HTML file of a results folder",
        description="Read the results folder of `almanac run` or `almanac simulate`, print its "
        "table, and write one HTML file that needs nothing else: table with wins and losses, "
        "pictures, workflow, plan, predictors, settings and notes.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder with results.json")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="HTML file (default: FOLDER/report.html)"
    )
    parser.add_argument(
        "--json", action="store_true", help="print the comparison as JSON instead of the table"
    )


def run(args: argparse.Namespace) -> int:
    """Write the report, print the table, return 0."""
    from planner.report.html import write_report  # matplotlib takes half a second to load

    out_file(args.out, "--out")
    results = load_results(args.folder)
    print(f"report: drawing {len(results.policies)} policies", file=sys.stderr, flush=True)
    out = write_report(args.folder, args.out or args.folder / "report.html")
    if args.json:
        document = {
            "title": results.title,
            "mode": results.mode,
            "report": str(out),
            **compare(results).to_json(),
        }
        print(json.dumps(document, indent=1))
    else:
        print(results_table(results))
    print(f"report: wrote {out}", file=sys.stderr)
    return 0
