"""`almanac bench-mock`: how fast, and how late, mock endpoints hand out tokens here."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict

from planner.domain.check import integer
from planner.sim.fidelity import Check

__all__ = ["register", "run"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``bench-mock`` command."""
    parser = subparsers.add_parser(
        "bench-mock",
        help="measure mock endpoints beside a client on this machine",
        description=(
            "Start a mock fleet of H100s in real time, stream from it with one token a chunk, and "
            "print tokens per second and their lateness. Exit code 0 if the bar holds, 1 if not."
        ),
    )
    parser.add_argument(
        "--endpoints", type=int, default=5, metavar="N", help="mock endpoints (default: 5)"
    )
    parser.add_argument(
        "--streams", type=int, default=13, metavar="N", help="streams at each (default: 13)"
    )
    parser.add_argument(
        "--tokens", type=int, default=1200, metavar="N", help="tokens per answer (default: 1200)"
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Measure and print; the exit code says whether the bar holds.

    Raises
    ------
    InvalidInput
        If a number is out of its range.
    """
    import asyncio

    from runtime.mock.bench import measure

    speed = asyncio.run(
        measure(
            endpoints=integer(args.endpoints, "--endpoints", least=1, most=64),
            streams=integer(args.streams, "--streams", least=1, most=256),
            tokens=integer(args.tokens, "--tokens", least=2, most=100_000),
        )
    )
    checks = [
        Check.at_least("mock, paced tokens in total", speed.tokens_per_s, "1/s", 8000.0),
        Check(name="mock, tokens in a chunk of their own", value=speed.own_chunk_ratio, unit="1"),
        Check(name="mock, lateness of tokens, p50", value=speed.late_p50_ms, unit="ms"),
        Check(name="mock, lateness of tokens, p99", value=speed.late_p99_ms, unit="ms"),
        Check(name="mock, wall time over the engines' own", value=speed.stretch, unit="1"),
    ]
    if args.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        for check in checks:
            verdict = {True: "holds", False: "FAILS", None: ""}[check.holds]
            print(
                f"{check.name:<40} {check.value:>10.3f} {check.unit:<4} "
                f"{check.bar or '':<9} {verdict}".rstrip()
            )
    return 1 if any(check.holds is False for check in checks) else 0
