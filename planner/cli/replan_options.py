"""Options of re-planning, shared by the gateway, which starts the worker, and the worker.

Light to import: the gateway loads neither solver nor simulator.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from planner.cli.checks import at_least, out_file
from planner.dispatch.policies import Planned, parse_policy
from planner.domain.errors import InvalidInput

if TYPE_CHECKING:
    from planner.cli.rolling import RollingStep
    from runtime.replanning import ReplanConfig

__all__ = [
    "add_replan_arguments",
    "add_step_arguments",
    "replan_options",
    "step_from",
    "worker_command",
]

DEFAULT_PERIOD_S = 300.0
_STEP_OPTIONS = ("plan_limit", "tolerance", "replay_runs", "plan_seed")
_STEP_SWITCHES = ("deterministic", "keep_weights")


def add_replan_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `almanac serve --replan`."""
    group = parser.add_argument_group(
        "re-planning",
        "a process of its own plans again and again; a table goes live if a replay of recent runs "
        "says it is not worse than the one in use",
    )
    group.add_argument(
        "--replan",
        nargs="?",
        type=float,
        const=DEFAULT_PERIOD_S,
        metavar="PERIOD",
        help="plan every PERIOD engine seconds, and when load, speed or fleet change "
        f"(default: off; {DEFAULT_PERIOD_S:g} without a number)",
    )
    group.add_argument(
        "--replan-deadline",
        type=float,
        default=60.0,
        metavar="S",
        help="wall seconds after which an answer is dropped and the table kept (default: 60)",
    )
    group.add_argument(
        "--replan-log",
        type=Path,
        metavar="FILE",
        help="append each verdict with its differences (JSON Lines; see `almanac explain`)",
    )
    add_step_arguments(group)


def add_step_arguments(parser: argparse._ActionsContainer) -> None:
    """Add the options of a `planner.cli.rolling.RollingStep`."""
    parser.add_argument(
        "--plan-limit",
        type=float,
        default=10.0,
        metavar="S",
        help="search time of a plan; deterministic time with --deterministic (default: 10)",
    )
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="one worker and a deterministic limit: the same snapshot gives the same table",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="excess of mean and P95 in the replay at which a table still goes live "
        "(default: 0.01)",
    )
    parser.add_argument(
        "--replay-runs",
        type=int,
        default=60,
        metavar="N",
        help="latest runs that tables are compared on (default: 60)",
    )
    parser.add_argument(
        "--plan-seed", type=int, default=0, metavar="N", help="seed of plans and replays"
    )
    parser.add_argument(
        "--keep-weights",
        action="store_true",
        help="keep the weights of the table in use instead of tuning them by simulation",
    )


def replan_options(args: argparse.Namespace, policy: str) -> tuple[list[str], ReplanConfig] | None:
    """Return the worker's command line and the settings of re-planning, or None if it is off.

    Raises
    ------
    InvalidInput
        If a number is out of range, the log cannot be written or the policy uses no table. The
        worker itself could only fail again and again.
    """
    from runtime.plan_process import ProcessLimits
    from runtime.replanning import ReplanConfig

    if args.replan is None:
        return None
    if parse_policy(policy)[0] != Planned.name:
        raise InvalidInput(
            f"policy {policy!r} uses no dispatch table",
            where="--replan",
            remedy=f"use --policy {Planned.name}, or leave it out",
        )
    at_least(args, replan=1e-9, replan_deadline=1e-9)
    out_file(args.replan_log, "--replan-log")
    config = ReplanConfig(
        period_s=args.replan,
        limits=ProcessLimits(deadline_s=args.replan_deadline),
        log=args.replan_log,
    )
    return worker_command(args), config


def worker_command(args: argparse.Namespace) -> list[str]:
    """Return the command line of a worker with the same options, or raise `InvalidInput`."""
    _check(args)
    words = [sys.executable, "-m", "planner.cli.main", "plan-worker"]
    for name in _STEP_OPTIONS:
        words += [_option(name), str(getattr(args, name))]
    return words + [_option(name) for name in _STEP_SWITCHES if getattr(args, name)]


def step_from(args: argparse.Namespace) -> RollingStep:
    """Return the step that the options describe, or raise `InvalidInput`."""
    from planner.cli.rolling import RollingStep
    from planner.solve.budget import Budget

    _check(args)
    if args.deterministic:
        budget = Budget.reproducible(args.plan_limit, 0.02)
    else:
        budget = Budget(wall_s=args.plan_limit, relative_gap=0.02)
    return RollingStep(
        budget=budget,
        seed=args.plan_seed,
        tolerance=args.tolerance,
        runs=args.replay_runs,
        tuned=not args.keep_weights,
    )


def _check(args: argparse.Namespace) -> None:
    at_least(args, plan_limit=1e-9, tolerance=0, replay_runs=1, plan_seed=0)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
