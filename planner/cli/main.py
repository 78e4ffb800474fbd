"""`almanac`: finds the command, loads its module alone, and turns errors into exit codes.

Exit codes: 0 success; 1 failure; 2 bad input (also a wrong option); 130 interrupted; 141 the
reader of the output went away, 129 hung up, 143 terminated (128 + the signal, as other tools).
Results go to stdout, progress and errors to stderr.

Each command lives in ``planner.cli.<name>`` and has ``register(subparsers)``, which adds its
parser, and ``run(args) -> int``. Only the module of the command in use is imported, so help is
quick.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from types import ModuleType

from planner import __version__
from planner.domain.errors import InvalidInput, PlannerError

__all__ = ["COMMANDS", "main"]

COMMANDS: Mapping[str, str] = {
    "train": "fit predictors from traces into an estimate table",
    "evaluate": "measure the predictors on held-out rows, bar by bar",
    "models": "show saved predictors",
    "plan": "place calls on a fleet and write the dispatch table",
    "plan-worker": "plan for a gateway, snapshot by snapshot",
    "simulate": "compare policies on a simulated fleet",
    "study": "run a named study of policies over many settings",
    "whatif": "say what to expect of a fleet, and of the same after changes",
    "regret": "split recorded runs' excess over hindsight into its causes",
    "diff": "compare two plans, dispatch tables or fleets row by row",
    "serve": "run the gateway in front of a fleet",
    "check-config": "check the gateway's configuration",
    "mock-fleet": "run mock vLLM endpoints on this machine",
    "run": "run the demo application live under several policies",
    "report": "make one HTML file of a results folder",
    "data": "list and download public datasets",
    "explain": "say why: a plan, a table row, or the calls of a run",
    "ir": "print, check, compare and draw a workflow graph",
    "bench-mock": "measure mock endpoints beside a client on this machine",
    "bench-planner": "measure the planner against its bars",
    "bench-runtime": "measure the gateway against its bars",
    "validate-engine": "compare the engine model with recorded vLLM runs",
}
"""Command -> one line of help, in the order of use."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command and return its exit code.

    Parameters
    ----------
    argv
        Arguments without the program's name; those of the process if None.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    debug = False
    try:
        _end_in_order()
        command = _command(words)
        module = None if command is None else _module(command)
        parser = _parser(command, module)
        args = parser.parse_args(words)
        debug = args.debug
        if module is None:
            parser.error("name a command")
        code = int(module.run(args))
        # Output still buffered may find its reader gone; that must be noticed here.
        sys.stdout.flush()
    except SystemExit as stop:
        return _exit_code(stop)
    except BrokenPipeError:
        # What is left in the buffer must not raise again when Python exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except PlannerError as error:
        if debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InvalidInput) else 1
    return code


def _end_in_order() -> None:
    """Let SIGTERM and SIGHUP unwind the program, so that the processes it has started end, too."""
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # not under nohup, nor where a host has one
            signal.signal(number, lambda number, _: sys.exit(128 + number))


def _command(words: Sequence[str]) -> str | None:
    # No option before the command takes a value, so the first word without a dash is the command.
    first = next((word for word in words if not word.startswith("-")), None)
    return first if first in COMMANDS else None


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"planner.cli.{command.replace('-', '_')}")


def _parser(command: str | None, module: ModuleType | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="almanac",
        description="Schedule the LLM calls of agent workflows over a fleet of vLLM servers.",
        epilog="`almanac COMMAND --help` says more about a command.",
    )
    parser.add_argument("--version", action="version", version=f"almanac {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = parser.add_subparsers(
        metavar="COMMAND", dest="command", required=True, title="commands"
    )
    for name, line in COMMANDS.items():
        if name == command and module is not None:
            module.register(subparsers)
            # Accepted after the command, too; without a default it leaves an earlier one alone.
            subparsers.choices[name].add_argument(
                "--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS
            )
        else:
            subparsers.add_parser(name, help=line)
    return parser


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None or isinstance(stop.code, int):
        return stop.code or 0
    print(stop.code, file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
