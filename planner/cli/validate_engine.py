"""``almanac validate-engine``: reprint how faithful and how fast the engine simulator is."""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from planner.domain.errors import InvalidInput
from planner.domain.fleet import latency_rows
from planner.sim.engine import Engine, EngineConfig, EngineRequest
from planner.sim.fidelity import (
    Check,
    dynamo_checks,
    fixed_trace,
    real_log_checks,
    run_fleet,
    silicon_checks,
)
from planner.sim.steptime import RowStepTime

__all__ = ["register", "run"]

_ENV = "ALMANAC_PUBLIC_DATA"


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command to the main parser."""
    parser = subparsers.add_parser(
        "validate-engine",
        help="compare the engine simulator with real vLLM logs",
        description=(
            "Replay public request logs of vLLM, the fixed traces of NVIDIA Dynamo's replay and "
            "silicon averages through the engine simulator, and hold each figure against its "
            "bar. Exit code 0 if all bars hold, 1 if one does not, 2 if the data cannot be read."
        ),
    )
    parser.add_argument(
        "--data",
        type=Path,
        metavar="FOLDER",
        help="public data: holds vllm_bench_llmservingsim/ and aic_silicon/; "
        f"default: the environment variable {_ENV}",
    )
    parser.add_argument(
        "--speed",
        action="store_true",
        help="measure simulated requests per second too (about half a minute)",
    )
    parser.add_argument("--json", action="store_true", help="print a JSON list of rows")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Run the comparison; the exit code says whether every bar holds.

    Raises
    ------
    InvalidInput
        If the data folder is not given or a file in it cannot be read.
    """
    folder = _data_folder(args.data)
    checks: list[Check] = []
    for title, compare in (
        ("Dynamo's replay", dynamo_checks),
        ("vLLM logs", lambda: real_log_checks(folder / "vllm_bench_llmservingsim")),
        ("silicon averages", lambda: silicon_checks(folder / "aic_silicon")),
        *((("speed", _speed_checks),) if args.speed else ()),
    ):
        print(f"{title} ...", file=sys.stderr)
        checks += compare()
    if args.json:
        print(json.dumps([asdict(check) for check in checks], indent=2))
    else:
        _print_table(checks)
    return 1 if any(check.holds is False for check in checks) else 0


def _data_folder(given: Path | None) -> Path:
    folder = given or (Path(os.environ[_ENV]) if os.environ.get(_ENV) else None)
    if folder is None:
        raise InvalidInput(
            "no data folder given",
            where="--data",
            remedy=f"name the folder of the public data, or set {_ENV}",
        )
    if not folder.is_dir():
        raise InvalidInput(
            f"no folder {str(folder)!r}",
            where="--data",
            remedy="name the folder of the public data",
        )
    return folder


def _print_table(checks: Sequence[Check]) -> None:
    width = max(len(check.name) for check in checks)
    for check in checks:
        verdict = {True: "holds", False: "FAILS", None: ""}[check.holds]
        digits = 0 if check.unit in ("count", "1/s") else 3
        line = f"{check.name:<{width}}  {check.value:>10.{digits}f} {check.unit:<5}"
        print(f"{line} {check.bar or '':<16} {verdict}".rstrip())


def _speed_checks() -> list[Check]:
    """Measure the simulator on fixed traces, each arrival looking at the load of every engine."""
    rate = 20_000 / _measure(16, fixed_trace(20_000, 0.2 / 16))
    checks = [Check.at_least("speed, 16 engines, 20,000 requests", rate, "1/s", 8000.0)]
    rate = 20_000 / _measure(16, fixed_trace(20_000, 0.2 / 16, hashed=True))
    checks.append(Check(name="speed, the same with prefix caching", value=rate, unit="1/s"))
    wall_s = _measure(64, fixed_trace(100_000, 0.2 / 64))
    # Peak of the whole process so far, which bounds the simulation's own; Linux counts in KiB.
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    return [
        *checks,
        Check.at_most("time, 64 engines, 100,000 requests", wall_s, "s", 60.0),
        Check.at_most("peak memory, 64 engines, 100,000 requests", peak_gb, "GB", 2.0),
    ]


def _measure(engines: int, trace: Sequence[EngineRequest]) -> float:
    """Return the wall seconds that a trace takes on a fleet of A100s."""
    step_time = RowStepTime(latency_rows()["8b-a100-1-bf16"])
    fleet = [Engine(EngineConfig(kv_blocks=20_001), step_time) for _ in range(engines)]
    started = time.perf_counter()
    run_fleet(fleet, trace, _shortest_queue)
    return time.perf_counter() - started


def _shortest_queue(engines: Sequence[Engine]) -> int:
    loads = [engine.num_running + engine.num_waiting for engine in engines]
    return loads.index(min(loads))
