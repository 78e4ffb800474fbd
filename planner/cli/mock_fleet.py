"""`almanac mock-fleet`: serve the endpoints of a fleet file as mock vLLM servers."""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from pathlib import Path

from planner.domain.fleet import Fleet, load_fleet

__all__ = ["register", "run"]


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``mock-fleet`` command."""
    parser = subparsers.add_parser(
        "mock-fleet",
        help="serve a fleet's endpoints as mock vLLM servers on their ports",
        description=(
            "Serve every endpoint of a fleet file on its port: OpenAI-compatible, streaming, paced "
            "by the engine simulator (continuous batching, KV blocks, prefix cache). A word counts "
            "as a token. When all ports are open, one line on stderr says so; on SIGTERM or Ctrl-C "
            "the statistics of each endpoint are printed as JSON lines to stdout."
        ),
    )
    parser.add_argument("fleet", type=Path, help="fleet file (YAML) with a url for each worker")
    parser.add_argument(
        "--dilation",
        type=float,
        default=1.0,
        metavar="X",
        help="engine seconds per real second (default: 1)",
    )
    parser.add_argument(
        "--stream-interval",
        type=int,
        default=1,
        metavar="N",
        help="tokens per streamed chunk after the first (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of answers and noise")
    parser.add_argument(
        "--noise-cv",
        type=float,
        default=0.0,
        metavar="CV",
        help="coefficient of variation of step times (default: 0)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="interface to bind (default: 127.0.0.1, loopback only)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; return 0."""
    # Loads the HTTP library, which the other commands do not need.
    from runtime.mock.server import MockConfig, MockFleet

    config = MockConfig(
        dilation=args.dilation,
        stream_interval=args.stream_interval,
        seed=args.seed,
        noise_cv=args.noise_cv,
    )
    fleet = load_fleet(args.fleet)

    async def serve() -> list[dict[str, object]]:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        mock = MockFleet(fleet, config, host=args.host)
        async with mock:
            print(_ready(fleet, args.dilation), file=sys.stderr, flush=True)
            await stop.wait()
            return [endpoint.stats() for endpoint in mock.endpoints]

    for row in asyncio.run(serve()):
        print(json.dumps(row))
    return 0


def _ready(fleet: Fleet, dilation: float) -> str:
    where = ", ".join(f"{one.id} {one.url}" for one in fleet.endpoints)
    return f"ready: {len(fleet.endpoints)} mock endpoints, dilation {dilation:g}: {where}"
