"""`almanac bench-runtime`: measure the gateway against its own bars, on this machine."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from planner.domain.check import integer, number

if TYPE_CHECKING:
    from runtime.bench.figures import Figure

__all__ = ["register", "run"]

_BUSY = 0.3
"""Load per processor from which other work distorts times."""


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``bench-runtime`` command."""
    parser = subparsers.add_parser(
        "bench-runtime",
        help="measure the gateway against its bars",
        description=(
            "Time decisions in process, and what the gateway adds to engines that answer at once, "
            "beside the same requests sent to them directly; print each figure with the bar it has "
            "to keep. Everything is started by the command, on free ports of loopback, and ended "
            "with it. Run it on an idle machine. Exit code 0 whether or not the bars hold."
        ),
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=2,
        metavar="N",
        help="measure a gateway of N worker processes as well; 1 leaves that out (default: 2)",
    )
    parser.add_argument("--quick", action="store_true", help="fewer requests and rounds")
    parser.add_argument(
        "--faults",
        action="store_true",
        help="also let one of three endpoints go bad, scenario by scenario (a minute)",
    )
    parser.add_argument(
        "--fuzz",
        type=int,
        nargs="?",
        const=5000,
        metavar="N",
        help="also send N random requests to every route of its OpenAPI description "
        "(5000 if N is left out)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random requests (default: 0)")
    parser.add_argument(
        "--soak",
        type=float,
        metavar="S",
        help="also keep many streaming runs under way for S seconds; 600 is the stated time",
    )
    parser.add_argument(
        "--soak-runs", type=int, default=1000, metavar="N", help="so many runs (default: 1000)"
    )
    parser.add_argument(
        "--peer",
        action="append",
        default=[],
        metavar="COMMAND",
        help="measure another router in the same place, too; {port} in its command stands for the "
        "port, {urls} for the engines' addresses; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of figures")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print; return 0.

    Raises
    ------
    InvalidInput
        If a number is out of its range, or the limit on open files is too low for the soak.
    EndpointFailed
        If a process does not start or an answer is wrong.
    """
    integer(args.workers, "--workers", least=1, most=64)
    integer(args.soak_runs, "--soak-runs", least=1, most=100_000)
    if args.fuzz is not None:
        integer(args.fuzz, "--fuzz", least=1, most=10_000_000)
    if args.soak is not None:
        number(args.soak, "--soak", least=1.0)
    busy = os.getloadavg()[0] / (os.cpu_count() or 1)
    if busy > _BUSY:
        print(
            f"bench-runtime: warning: the machine is busy (load {busy:.1f} per processor); times "
            "will be too long",
            file=sys.stderr,
        )
    figures = asyncio.run(_collect(args))
    if args.json:
        print(json.dumps([asdict(figure) for figure in figures], indent=2))
    return 0


async def _collect(args: argparse.Namespace) -> list[Figure]:
    """Return all figures; without ``--json`` each is printed when it is there."""
    figures = []
    with tempfile.TemporaryDirectory(prefix="almanac-bench-") as folder:
        async for figure in _figures(args, Path(folder)):
            figures.append(figure)
            if not args.json:
                print(_line(figure), flush=True)
    return figures


async def _figures(args: argparse.Namespace, folder: Path) -> AsyncIterator[Figure]:
    from runtime.bench.decisions import decision_figures
    from runtime.bench.figures import Figure
    from runtime.bench.gateway import Size, added_figures, measure_almanac, measure_peer

    yield Figure.of("load_average_at_start", os.getloadavg()[0], "")
    for figure in decision_figures(500 if args.quick else 2000):
        yield figure
    size = Size(rounds=2, requests=300, streams=50) if args.quick else Size()
    for workers in sorted({1, args.workers}):
        who = "gateway" if workers == 1 else f"gateway_{workers}_workers"
        _note(f"{who} ...")
        added = await measure_almanac(folder, size, workers=workers)
        # The bars are stated for one worker process.
        for figure in added_figures(who, added, judged=workers == 1):
            yield figure
    for place, command in enumerate(args.peer, 1):
        _note(f"peer_{place} is {command}")
        for figure in added_figures(
            f"peer_{place}", await measure_peer(folder, size, command), judged=False
        ):
            yield figure
    if args.faults:
        from runtime.bench.faults import fault_figures

        _note("faults ...")
        async for figure in fault_figures(folder):
            yield figure
    if args.fuzz is not None:
        from runtime.bench.fuzz import fuzz_figures, fuzz_gateway

        _note(f"{args.fuzz} random requests, seed {args.seed} ...")
        findings = await fuzz_gateway(folder, args.fuzz, args.seed)
        for finding in findings.found[:20]:
            _note(str(finding))
        for figure in fuzz_figures(findings):
            yield figure
    if args.soak is not None:
        from runtime.bench.soak import soak, soak_figures

        _note(f"{args.soak_runs} runs for {args.soak:g} s ...")
        soaked = await soak(folder, seconds=args.soak, runs=args.soak_runs)
        if soaked.first_error:
            _note(f"first error: {soaked.first_error}")
        for figure in soak_figures(soaked, args.soak_runs, args.soak):
            yield figure


def _line(row: Figure) -> str:
    verdict = {True: "holds", False: "MISSED", None: ""}[row.holds]
    bar = "" if row.bar is None else f"bar {row.bar:g}"
    return f"{row.name:<46} {row.value:>12.3f} {row.unit:<6} {bar:<9} {verdict}".rstrip()


def _note(line: str) -> None:
    print(f"bench-runtime: {line}", file=sys.stderr, flush=True)
