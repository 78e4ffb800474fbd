"""`almanac mock-fleet`: serve the endpoints of a fleet file as mock vLLM servers."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
from pathlib import Path

from planner.cli.checks import addresses, at_least
from planner.domain.errors import InvalidInput
from planner.domain.faults import load_faults
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
            "as a token. Faults listed in the file happen at their time, and POST /mock/faults "
            "begins others. When all ports are open, one line on stderr says so; on SIGTERM or "
            "Ctrl-C the statistics of each endpoint are printed as JSON lines to stdout."
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
    vllm = parser.add_argument_group("as vllm serve has them")
    vllm.add_argument(
        "--enable-prompt-tokens-details",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="tell cached tokens in usage (default: on)",
    )
    vllm.add_argument(
        "--enable-request-id-headers", action="store_true", help="echo X-Request-Id in answers"
    )
    vllm.add_argument(
        "--enable-server-load-tracking", action="store_true", help="count requests in /load"
    )
    vllm.add_argument(
        "--dev-mode",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="serve cache reset, sleep and server info (default: on)",
    )
    vllm.add_argument(
        "--api-key-env",
        metavar="NAME",
        help="environment variable with the key that /v1 routes ask for; several by commas",
    )
    vllm.add_argument(
        "--lora", action="append", default=[], metavar="NAME", help="serve an adapter, repeatable"
    )
    vllm.add_argument(
        "--max-queued", type=int, metavar="N", help="waiting requests above which new ones get 503"
    )
    vllm.add_argument(
        "--kv-load-failure-policy",
        choices=("fail", "recompute"),
        default="fail",
        help="what happens to a request whose KV does not arrive (default: fail)",
    )
    vllm.add_argument(
        "--old-metrics", action="store_true", help="expose the metric names of 0.10.2, too"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; return 0.

    Raises
    ------
    InvalidInput
        If an option, the fleet file or a port is wrong; nothing is served then.
    """
    # Loads the HTTP library, which the other commands do not need.
    from runtime.mock.server import MockConfig, MockFleet

    at_least(args, seed=0)
    config = MockConfig(
        dilation=args.dilation,
        stream_interval=args.stream_interval,
        seed=args.seed,
        noise_cv=args.noise_cv,
        prompt_tokens_details=args.enable_prompt_tokens_details,
        request_id_headers=args.enable_request_id_headers,
        api_keys=_keys(args.api_key_env),
        dev_mode=args.dev_mode,
        old_metrics=args.old_metrics,
        track_load=args.enable_server_load_tracking,
        max_queued=args.max_queued,
        lora=tuple(args.lora),
        kv_load_failure_policy=args.kv_load_failure_policy,
    )
    fleet = load_fleet(args.fleet)
    addresses(fleet, args.fleet)
    mock = MockFleet(fleet, config, faults=load_faults(args.fleet), host=args.host)

    async def serve() -> list[dict[str, object]]:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        async with mock:
            print(_ready(fleet, args.dilation), file=sys.stderr, flush=True)
            await stop.wait()
            return [endpoint.stats() for endpoint in mock.endpoints]

    for row in asyncio.run(serve()):
        print(json.dumps(row))
    return 0


def _keys(variable: str | None) -> tuple[str, ...]:
    if variable is None:
        return ()
    keys = tuple(filter(None, os.environ.get(variable, "").split(",")))
    if not keys:
        raise InvalidInput(
            f"the environment variable {variable!r} is not set or empty",
            where="--api-key-env",
            remedy="set it, or leave the option out",
        )
    return keys


def _ready(fleet: Fleet, dilation: float) -> str:
    where = ", ".join(f"{one.id} {one.url}" for one in fleet.endpoints)
    return f"ready: {len(fleet.endpoints)} mock endpoints, dilation {dilation:g}: {where}"
