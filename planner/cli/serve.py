"""`almanac serve`: the gateway in front of a fleet."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from planner import __version__
from planner.cli.check_config import check_files
from planner.cli.gateway_options import add_options, config_of
from planner.cli.replan_options import add_replan_arguments, replan_options
from planner.dispatch.table import load_table
from planner.domain.errors import PlannerError
from planner.domain.estimates import load_estimates
from planner.domain.workflow import load_workflow
from runtime.config import ServeConfig, all_settings
from runtime.memory import small_reads, steady_heap
from runtime.settings import unknown_variables

if TYPE_CHECKING:
    from runtime.gateway import Gateway

__all__ = ["Reload", "register", "run"]

_log = logging.getLogger(__name__)


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the ``serve`` command."""
    parser = subparsers.add_parser(
        "serve",
        help="run the gateway in front of a fleet of vLLM endpoints",
        description=(
            "Serve an OpenAI-compatible gateway that sends each call to one endpoint of the fleet "
            "by a policy. When it listens, one line on stderr says so. SIGTERM or Ctrl-C lets "
            "calls in flight end, then closes. SIGHUP reads the file again; one that is wrong is "
            "told in one line and changes nothing. Each option is also a key of the file "
            "(section: {key: value}) and a variable ALMANAC_<SECTION>_<KEY>; the option wins over "
            "the variable, and that over the file. `almanac check-config` checks them."
        ),
    )
    add_options(parser)
    add_replan_arguments(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; return 0, or 1 if the fleet is not ready and has to be."""
    # Loads the HTTP library, which the other commands do not need.
    from runtime.control import Control
    from runtime.discovery import ask_fleet
    from runtime.gateway import Gateway, tls_context
    from runtime.keys import KeyedTenancy
    from runtime.processes.crew import Crew
    from runtime.replanning import Replanner
    from runtime.state import StateFile
    from runtime.tracing import open_tracing

    config = config_of(args)
    path = args.file or args.config
    check_files(config, path)
    launch = config.launch
    replan = replan_options(args, launch.policy)
    tls = tls_context(launch.cert, launch.key) if launch.cert and launch.key else None
    fleet = config.fleet or asyncio.run(ask_fleet(args.worker_urls))
    control = Control(
        fleet,
        estimates=load_estimates(Path(launch.estimates)) if launch.estimates else None,
        workflows=[load_workflow(Path(name)) for name in launch.workflows],
        policy=launch.policy,
        table=load_table(Path(launch.table)) if launch.table else None,
        config=config.gateway,
        tenancy=KeyedTenancy(config.tenants),
        tracing=open_tracing(__version__) if launch.otlp else None,
    )
    table_made_s = Path(launch.table).stat().st_mtime if launch.table else None
    if launch.trace is not None:
        control.set_trace(Path(launch.trace))
    _log_to_stderr(launch.log_level)
    for line in unknown_variables(all_settings(), os.environ):
        _log.warning(line)

    async def serve() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        gateway = Gateway(
            control,
            host=launch.host,
            port=launch.port,
            tls=tls,
            state=StateFile(Path(launch.state), control) if launch.state else None,
            state_interval_s=launch.state_interval_s,
            table_made_s=table_made_s,
        )
        server: Gateway | Crew = gateway
        if launch.processes > 1:
            server = Crew(
                gateway,
                host=launch.host,
                port=launch.port,
                workers=launch.processes,
                certificate=launch.cert,
                key=launch.key,
            )
        missing = await server.start()
        loop.add_signal_handler(signal.SIGHUP, Reload(args, gateway, config))
        try:
            if missing:
                silent = ", ".join(missing)
                if launch.require_ready:
                    _say(f"not ready: no answer from {silent}; start them or check their urls")
                    return 1
                _say(f"warning: no answer from {silent}; looking again until they come up")
            if config.gateway.dashboard:
                _say(f"live view: {server.address}/dashboard")
            small_reads()
            steady_heap()
            # What is here by now stays: collections while serving need not look at it again.
            gc.collect()
            gc.freeze()
            _say(f"ready: {server.address}, policy {launch.policy}")
            async with contextlib.AsyncExitStack() as beside:
                if replan is not None:
                    await beside.enter_async_context(Replanner(control, *replan))
                await stop.wait()
        finally:
            loop.remove_signal_handler(signal.SIGHUP)
            await server.aclose()
        return 0

    return asyncio.run(serve())


class Reload:
    """Reads the configuration again and applies what may change while serving.

    Parameters
    ----------
    args
        The command line, whose options go on winning over the file.
    gateway
        Running.
    config
        What it was started with.
    """

    def __init__(self, args: argparse.Namespace, gateway: Gateway, config: ServeConfig) -> None:
        self._args = args
        self._gateway = gateway
        self._config = config

    def __call__(self) -> bool:
        """Return whether the new configuration is in use; if not, one log line says why."""
        try:
            fresh = config_of(self._args)
            check_files(fresh, self._args.file or self._args.config)
            self._apply(fresh)
        except PlannerError as error:
            _log.error("reload refused, the running configuration stays: %s", error)
            return False
        old, self._config = self._config, fresh
        waiting = [
            one.path
            for one in all_settings()
            if not one.live and fresh.sources[one.path].value != old.sources[one.path].value
        ]
        if waiting:
            _log.warning("changed, but read at the start only: %s", ", ".join(waiting))
        _log.warning("configuration reloaded")
        return True

    def _apply(self, fresh: ServeConfig) -> None:
        """Everything that can fail comes before everything that changes."""
        from runtime.keys import KeyedTenancy

        launch, old = fresh.launch, self._config.launch
        control = self._gateway.control
        table = load_table(Path(launch.table)) if launch.table else None
        workflows = [load_workflow(Path(name)) for name in launch.workflows]
        if fresh.fleet is not None:
            self._gateway.set_fleet(fresh.fleet)
        if launch.policy != old.policy:
            control.set_policy(launch.policy)
        if table is not None:
            control.set_table(table)
        for workflow in workflows:
            control.add_workflow(workflow)
        control.reconfigure(fresh.gateway)
        control.set_tenancy(KeyedTenancy(fresh.tenants))
        logging.getLogger().setLevel(launch.log_level.upper())


class _Facts(logging.Formatter):
    """Level, message, and the facts given in ``extra``."""

    _own = frozenset(logging.makeLogRecord({}).__dict__) | {"message", "asctime"}

    def format(self, record: logging.LogRecord) -> str:
        facts = " ".join(f"{k}={v}" for k, v in record.__dict__.items() if k not in self._own)
        return f"{super().format(record)} {facts}".rstrip()


def _log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Facts("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
