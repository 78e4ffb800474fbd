"""`almanac train`: fit predictors from traces and freeze them into an estimate table."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from planner.cli.checks import at_least, out_folder

__all__ = ["register", "run"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``train`` command."""
    parser = subparsers.add_parser(
        "train",
        help="fit predictors from traces; write artifacts, model card and estimate table",
        description=(
            "Fit output length, tool delay, next action, endpoint latency and arrivals from "
            "traces of our own (*.jsonl, schema almanac.trace/1) and from public datasets, "
            "recognised by the name of their folder. Each predictor is measured on held-out rows "
            "against a constant; the results go to stdout and into a model card. Traces of our "
            "own also give estimates.json, the table that `almanac plan` and `almanac serve` read."
        ),
    )
    parser.add_argument(
        "--traces",
        type=Path,
        required=True,
        metavar="PATH",
        help="a trace file, a dataset folder, or a folder that holds some of either",
    )
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FOLDER", help="where to write the results"
    )
    parser.add_argument(
        "--workflows",
        type=Path,
        metavar="PATH",
        help="workflow graphs (a folder of *.json or one file): adds declared hints, static "
        "prefixes and unseen branches",
    )
    parser.add_argument(
        "--fleet",
        type=Path,
        metavar="FILE",
        help="fleet file whose latency rows the learned ones are anchored on",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of splits and fits (default: 0)")
    parser.add_argument(
        "--json", action="store_true", help="print the model card as JSON instead of a table"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train, print the results, return 0."""
    from models.training import train  # scikit-learn takes a second to load

    at_least(args, seed=0)
    out_folder(args.out, "--out")

    def progress(line: str) -> None:
        print(f"train: {line}", file=sys.stderr, flush=True)

    report = train(
        args.traces,
        args.out,
        workflows=args.workflows,
        fleet=args.fleet,
        seed=args.seed,
        progress=progress,
    )
    if args.json:
        print(json.dumps(report.card, indent=1))
    else:
        print(report.text())
    for one in report.card["not_fitted"]:
        progress(f"{one['table']}: {one['rows']} rows not used: {one['reason']}")
    print(f"train: wrote {len(report.files)} files to {args.out}", file=sys.stderr)
    return 0
