"""The `almanac` command: exit codes, one clear error each, and only what is needed is loaded."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from planner import __version__
from planner.cli import main as cli
from planner.domain.errors import Infeasible, InvalidInput


class Probe(ModuleType):
    """A command that does what its only argument says."""

    def register(self, subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
        """Add the command."""
        parser = subparsers.add_parser("plan", help="probe")
        parser.add_argument("deed")

    def run(self, args: argparse.Namespace) -> int:
        """Raise or return."""
        deeds: dict[str, BaseException] = {
            "input": InvalidInput("no such file", where="fleet.yaml", remedy="check the path"),
            "failure": Infeasible("too many runs"),
            "interrupt": KeyboardInterrupt(),
            "bug": ZeroDivisionError("a bug"),
        }
        if args.deed in deeds:
            raise deeds[args.deed]
        if args.deed.startswith("SIG"):
            signal.raise_signal(signal.Signals[args.deed])
        sys.stdout.write("done\n")
        return 0 if args.deed == "well" else 1


@pytest.fixture(autouse=True)
def probe(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Put the probe in the place of `almanac plan`."""
    monkeypatch.setitem(sys.modules, "planner.cli.plan", Probe("planner.cli.plan"))
    return


@pytest.mark.parametrize(
    ("deed", "code", "told"),
    [
        ("well", 0, ""),
        ("ill", 1, ""),
        ("failure", 1, "error: too many runs\n"),
        ("input", 2, "error: fleet.yaml: no such file; check the path\n"),
        ("interrupt", 130, "interrupted\n"),
    ],
)
def test_exit_codes(capsys: pytest.CaptureFixture[str], deed: str, code: int, told: str) -> None:
    """0 success, 1 failure, 2 bad input, 130 interrupted; errors are one line on stderr."""
    assert cli.main(["plan", deed]) == code
    out, err = capsys.readouterr()
    assert err == told
    assert out == ("done\n" if code < 2 and not told else "")


@pytest.mark.parametrize("words", [["--debug", "plan", "input"], ["plan", "input", "--debug"]])
def test_debug_shows_the_traceback(words: list[str]) -> None:
    """With --debug, before or after the command, the error itself comes through."""
    with pytest.raises(InvalidInput):
        cli.main(words)


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_unwind_the_program(name: str, code: int) -> None:
    """A plain end by signal leaves through every clean-up, so nothing started is left behind."""
    number = signal.Signals[name]
    before = signal.signal(number, signal.SIG_DFL)
    try:
        assert cli.main(["plan", name]) == code
    finally:
        signal.signal(number, before)


def test_a_bug_is_not_dressed_up() -> None:
    """An error nobody raised on purpose keeps its traceback."""
    with pytest.raises(ZeroDivisionError):
        cli.main(["plan", "bug"])


@pytest.mark.parametrize("words", [[], ["plam"], ["plan"], ["plan", "well", "--no-such"], ["--no"]])
def test_wrong_usage_is_bad_input(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    """A missing or unknown command, argument or option exits with 2 and says how to use it."""
    assert cli.main(words) == 2
    assert "usage: almanac" in capsys.readouterr().err


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Each command has a line; the version is the package's."""
    assert cli.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for command, line in cli.COMMANDS.items():
        assert f"\n    {command}" in shown
        assert line.split()[0] in shown
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"almanac {__version__}\n"


@pytest.mark.parametrize("command", [name for name in cli.COMMANDS if name != "plan"])
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], command: str) -> None:
    """`almanac COMMAND --help` describes the command and each of its options."""
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: almanac {command} ")
    assert len(shown.split("\n\n")[1]) > 60


def test_a_reader_that_goes_away_is_no_error(tmp_path: Path) -> None:
    """`almanac ... | head` ends quietly, as SIGPIPE ends other tools."""
    script = (
        "import os, sys; from planner.cli import main as cli\n"
        "reader, writer = os.pipe(); os.close(reader); os.dup2(writer, 1)\n"
        "sys.exit(cli.main(['data', 'list']))"
    )
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", script], check=False, capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stderr) == (141, "")
