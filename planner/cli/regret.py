"""`almanac regret`: where the excess of recorded runs comes from, in hindsight."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from planner.cli.checks import at_least
from planner.cli.compare import progress
from planner.domain.estimates import load_estimates
from planner.domain.fleet import load_fleet
from planner.domain.trace import load_trace
from planner.domain.workflow import load_workflow

__all__ = ["register", "run"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``regret`` command."""
    parser = subparsers.add_parser(
        "regret",
        help="split recorded runs' excess over hindsight into its causes",
        description="Simulate the runs of a trace again with their realised lengths and delays, "
        "each time with one shortcoming less: without waiting in the router (admission), with "
        "engines serving in a better order, with better placements from the same forecasts, with "
        "exact lengths (forecast error), and with all that was to come known (information). The "
        "differences are printed by workflow beside a bound that no policy could beat.",
    )
    parser.add_argument("trace", type=Path, metavar="TRACE", help="trace (.jsonl)")
    parser.add_argument(
        "--fleet", type=Path, required=True, metavar="FILE", help="the fleet it was recorded on"
    )
    parser.add_argument(
        "--workflow", type=Path, action="append", default=[], metavar="FILE",
        help="workflow graph (JSON) of its runs; several may be given",
    )  # fmt: skip
    parser.add_argument(
        "--estimates", type=Path, metavar="FILE",
        help="the forecasts there were (default: priors, which makes forecast error large)",
    )  # fmt: skip
    parser.add_argument(
        "--last", type=int, default=80, help="keep the latest runs only (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=int, default=60,
        help="moves of the search with all known, a simulation each (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="seed of the search")
    parser.add_argument("--json", action="store_true", help="print the result as JSON, run by run")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the regret and return 0."""
    from planner.whatif.regret import hindsight

    at_least(args, last=1, steps=0, seed=0)
    found = hindsight(
        load_trace(args.trace),
        load_fleet(args.fleet),
        [load_workflow(path) for path in args.workflow],
        None if args.estimates is None else load_estimates(args.estimates),
        last=args.last,
        steps=args.steps,
        seed=args.seed,
        progress=progress,
    )
    print(json.dumps(found.to_json()) if args.json else found.text())
    return 0
