"""`almanac evaluate`: measure every bar of the predictors on rows they have not seen."""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
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
        f"(default: the folder named by {DATA_VARIABLE}; without either, only what needs no data)",
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
    if args.artifacts is not None and not args.artifacts.is_dir():
        raise InvalidInput(
            "no such folder", where=str(args.artifacts), remedy="make it with `almanac train`"
        )
    # scikit-learn takes a second to load.
    from models.evaluate import Evaluation, evaluate
    from planner.cli.self_check import self_bars

    def progress(line: str) -> None:
        print(f"evaluate: {line}", file=sys.stderr, flush=True)

    found = Evaluation(bars=())
    if traces is None:
        progress(f"no data named (--traces or {DATA_VARIABLE}): only what needs none")
    else:
        found = evaluate(traces, artifacts=args.artifacts, seed=args.seed, progress=progress)
    if args.artifacts is None:
        found = replace(found, bars=(*found.bars, *self_bars(args.seed, progress)))
    if args.out is not None:
        from planner.report.model_page import write_model_page

        for path in write_model_page(found.to_json(), found.curves_json(), args.out):
            progress(f"wrote {path}")
    print(json.dumps(found.to_json(), indent=1) if args.json else found.text())
    return 0
