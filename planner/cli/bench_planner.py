"""`almanac bench-planner`: measure the planner against its own bars, on this machine."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from planner.cli.bench_figures import Bar, note
from planner.cli.bench_graphs import critical_paths, task_graphs
from planner.cli.bench_shops import shop_bars
from planner.cli.bench_speed import fleet_plans, growth, table_bars, windows
from planner.domain.errors import InvalidInput

__all__ = ["register", "run"]

_GRAPHS = "dag_sets/dagbench.jsonl"
_PLANS = "dag_sets/asynchow_plans.jsonl"
_PUBLISHED = {
    "critical-paths": _PLANS,
    "task-graphs": _GRAPHS,
    "fjsp": "shop_scheduling/fjsp.jsonl",
    "hfsp": "shop_scheduling/hfsp.jsonl",
}
"""Parts that need published instances, and the file of each."""
_PARTS = (
    "critical-paths",
    "task-graphs",
    "windows",
    "fleet-plans",
    "growth",
    "table",
    "fjsp",
    "hfsp",
)
"""All parts, the longest last."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``bench-planner`` command."""
    parser = subparsers.add_parser(
        "bench-planner",
        help="measure the planner against its bars",
        description=(
            "Solve published scheduling instances and random questions of stated size, check "
            "every schedule independently, and print each figure beside the bar it has to keep. "
            "Run it on an idle machine; times are of this machine. Exit code 0 whether or not "
            "the bars hold."
        ),
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="folder with shop_scheduling/ and dag_sets/; without it they are left out",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few instances and short limits; a bar stated for a longer limit is then not judged",
    )
    parser.add_argument(
        "--time-limit",
        type=float,
        metavar="S",
        help="seconds for each shop instance (default: 60, with --quick 5)",
    )
    parser.add_argument(
        "--instances",
        type=int,
        metavar="N",
        help="shop instances of each kind, spread over all sizes (default: all, with --quick 3)",
    )
    parser.add_argument(
        "--peer-python",
        type=Path,
        metavar="FILE",
        help="Python interpreter with PyJobShop, to solve the same shop instances as long",
    )
    parser.add_argument(
        "--only",
        metavar="NAME,..",
        help=f"parts to run, of {', '.join(_PARTS)} (default: all)",
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure, print, return 0."""
    rows: list[Bar] = []
    for row in _measured(args):
        note(_line(row))
        rows.append(row)
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print("\n".join(map(_line, rows)))
    return 0


def _measured(args: argparse.Namespace) -> Iterator[Bar]:
    wanted = _wanted(args.only)
    if args.data is None:
        left_out = [part for part in wanted if part in _PUBLISHED]
        if args.only and left_out:
            raise InvalidInput(
                f"{', '.join(left_out)} without --data",
                where="--only",
                remedy="give the folder with published instances",
            )
        if left_out:
            note("no --data: published instances are left out")
        wanted = [part for part in wanted if part not in _PUBLISHED]
    for name in [_PUBLISHED[part] for part in wanted if part in _PUBLISHED]:
        if not (args.data / name).is_file():
            raise InvalidInput(
                f"no file {name}", where=str(args.data), remedy="give the folder that holds it"
            )
    for part in wanted:
        yield from _part(part, args)


def _wanted(only: str | None) -> Sequence[str]:
    """Return the parts to run, in the order in which they always run."""
    if only is None:
        return _PARTS
    names = [name.strip() for name in only.split(",")]
    unknown = [name for name in names if name not in _PARTS]
    if unknown:
        raise InvalidInput(
            f"part {unknown[0]!r}", where="--only", remedy=f"name some of {', '.join(_PARTS)}"
        )
    return [part for part in _PARTS if part in names]


def _part(part: str, args: argparse.Namespace) -> Iterator[Bar]:
    match part:
        case "critical-paths":
            yield critical_paths(args.data / _PLANS)
        case "task-graphs":
            yield from task_graphs(args.data / _GRAPHS, 0.5 if args.quick else 5.0)
        case "windows":
            yield from windows(8 if args.quick else 40)
        case "fleet-plans":
            yield from fleet_plans(3 if args.quick else 10)
        case "growth":
            yield from growth(quick=args.quick)
        case "table":
            yield from table_bars(10 if args.quick else 50)
        case _:
            yield from shop_bars(args.data / _PUBLISHED[part], args)


def _line(row: Bar) -> str:
    verdict = {True: "holds", False: "MISSED", None: ""}[row.holds]
    bar = "" if row.bar is None else f"bar {row.bar:g}"
    return f"{row.name:<42} {row.value:>10.3f} {row.unit:<9} {bar:<9} {verdict}".rstrip()
