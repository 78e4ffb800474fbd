"""`almanac evaluate`: measure every bar of the predictors on rows they have not seen."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path

from planner.domain.errors import InvalidInput

__all__ = ["register", "run"]

DATA_VARIABLE = "ALMANAC_PUBLIC_DATA"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``evaluate`` command."""
    parser = subparsers.add_parser(
        "evaluate",
        help="measure the predictors on held-out rows, bar by bar",
        description=(
            "Fit the predictors on one part of each dataset and measure them on the other (later "
            "rows, or other families), each figure beside the bar it has to meet. With "
            "--artifacts nothing is fitted: saved predictors are judged on all rows of --traces."
        ),
    )
    parser.add_argument(
        "--traces",
        type=Path,
        metavar="PATH",
        help="a trace file, a dataset folder, or a folder that holds some of either "
        f"(default: the folder named by {DATA_VARIABLE})",
    )
    parser.add_argument(
        "--artifacts", type=Path, metavar="FOLDER", help="judge the predictors saved here"
    )
    parser.add_argument(
        "--out", type=Path, metavar="FOLDER", help="also write report.html, bars.json and pictures"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of splits and fits (default: 0)")
    parser.add_argument("--json", action="store_true", help="print the bars as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print the bars, return 0 (a missed bar is a result, not a failure)."""
    traces = args.traces
    if traces is None and os.environ.get(DATA_VARIABLE):
        traces = Path(os.environ[DATA_VARIABLE])
    if traces is None:
        raise InvalidInput(
            "no data named",
            where="--traces",
            remedy=f"give a folder, or name one in {DATA_VARIABLE}",
        )
    if args.artifacts is not None and not args.artifacts.is_dir():
        raise InvalidInput(
            "no such folder", where=str(args.artifacts), remedy="make it with `almanac train`"
        )
    from models.evaluate import evaluate  # scikit-learn takes a second to load

    def progress(line: str) -> None:
        print(f"evaluate: {line}", file=sys.stderr, flush=True)

    found = evaluate(traces, artifacts=args.artifacts, seed=args.seed, progress=progress)
    print(json.dumps(found.to_json(), indent=1) if args.json else found.text())
    return 0
