"""`almanac serve`: the gateway in front of a fleet."""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import signal
import sys
from pathlib import Path

from planner.cli.checks import addresses, at_least
from planner.dispatch.policies import POLICIES
from planner.dispatch.table import load_table
from planner.domain.errors import InvalidInput
from planner.domain.estimates import load_estimates
from planner.domain.fleet import load_fleet
from planner.domain.workflow import load_workflow

__all__ = ["register", "run"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``serve`` command."""
    parser = subparsers.add_parser(
        "serve",
        help="run the gateway in front of a fleet of vLLM endpoints",
        description=(
            "Serve an OpenAI-compatible gateway that sends each call to one endpoint of the fleet "
            "by a policy. When it listens, one line on stderr says so. SIGTERM or Ctrl-C lets "
            "calls in flight end, then closes."
        ),
    )
    parser.add_argument("fleet", type=Path, help="fleet file (YAML) with a url for each worker")
    parser.add_argument(
        "--policy",
        default="almanac",
        metavar="NAME[:KEY=VALUE,...]",
        help=f"one of {', '.join(POLICIES)} (default: almanac)",
    )
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="dispatch table (JSON) made by `almanac plan`"
    )
    parser.add_argument(
        "--estimates",
        type=Path,
        metavar="FILE",
        help="estimate table (JSON) made by `almanac train`",
    )
    parser.add_argument(
        "--workflow",
        type=Path,
        action="append",
        default=[],
        metavar="FILE",
        help="workflow graph (JSON) known from the start; may be repeated",
    )
    parser.add_argument("--host", default="127.0.0.1", help="interface (default: 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port (default: 8000)")
    parser.add_argument(
        "--dilation",
        type=float,
        default=1.0,
        metavar="X",
        help="engine seconds per real second; that of the mock fleet (default: 1)",
    )
    parser.add_argument(
        "--trace", type=Path, metavar="FILE", help="append what happens to this trace (JSON Lines)"
    )
    parser.add_argument(
        "--admin-key-env",
        metavar="NAME",
        help="environment variable that holds the key of the admin routes (off without)",
    )
    parser.add_argument(
        "--require-ready",
        action="store_true",
        help="exit with 1 if an endpoint does not answer at the start, instead of waiting for it",
    )
    parser.add_argument(
        "--online",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="let latency, lengths and finish forecasts follow the calls that finish (default: on)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of policies that draw at random")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; return 0, or 1 if the fleet is not ready and has to be."""
    # Loads the HTTP library, which the other commands do not need.
    from runtime.config import GatewayConfig
    from runtime.control import Control
    from runtime.gateway import Gateway

    at_least(args, seed=0)
    if not 0 <= args.port <= 65535:
        raise InvalidInput(f"{args.port}", where="--port", remedy="use a number from 0 to 65535")
    fleet = load_fleet(args.fleet)
    addresses(fleet, args.fleet)
    table = load_table(args.table) if args.table else None
    if table is not None:
        table.check_fleet(fleet, str(args.table))
    control = Control(
        fleet,
        estimates=load_estimates(args.estimates) if args.estimates else None,
        workflows=[load_workflow(path) for path in args.workflow],
        policy=args.policy,
        table=table,
        config=GatewayConfig(
            dilation=args.dilation,
            seed=args.seed,
            online=args.online,
            admin_key=_admin_key(args.admin_key_env),
        ),
    )
    if args.trace is not None:
        control.set_trace(args.trace)
    _log_to_stderr()

    async def serve() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        gateway = Gateway(control, host=args.host, port=args.port)
        missing = await gateway.start()
        try:
            if missing:
                silent = ", ".join(missing)
                if args.require_ready:
                    _say(f"not ready: no answer from {silent}; start them or check their urls")
                    return 1
                _say(f"warning: no answer from {silent}; looking again until they come up")
            _say(f"ready: {gateway.address}, policy {args.policy}")
            await stop.wait()
        finally:
            await gateway.aclose()
        return 0

    return asyncio.run(serve())


def _admin_key(name: str | None) -> str | None:
    if name is None:
        return None
    key = os.environ.get(name)
    if not key:
        raise InvalidInput(
            f"the environment variable {name!r} is not set or empty",
            where="--admin-key-env",
            remedy=f"export {name}=<secret>",
        )
    return key


class _Facts(logging.Formatter):
    """Level, message, and the facts given in ``extra``."""

    _own = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{k}={v}" for k, v in record.__dict__.items() if k not in self._own)
        return f"{super().format(record)} {facts}".rstrip()


def _log_to_stderr() -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Facts("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
