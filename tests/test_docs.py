"""The documentation is true: help is reproduced, commands parse, files exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from planner.cli.main import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # noqa: S603
        [sys.executable, "-m", "planner.cli.main", *arguments],
        check=False,
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"COLUMNS": "80", "PATH": "", "PYTHONPATH": str(ROOT)},
    )


def test_readme_shows_the_help_as_it_is() -> None:
    """The block under "Commands" is what `almanac --help` prints."""
    assert run("--help").stdout.strip() in README


def test_every_command_has_help_and_is_in_the_readme() -> None:
    """Each command explains itself and is named in the README."""
    for command in COMMANDS:
        done = run(command, "--help")
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) > 300, command
        assert command in README


def shell_lines() -> list[str]:
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    text = "\n".join(blocks).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip().startswith("almanac ")]


@pytest.mark.parametrize("line", shell_lines())
def test_readme_commands_have_only_known_options(line: str) -> None:
    """Each option of each command in the README exists in that command's help."""
    words = line.split()
    known = run(words[1], "--help").stdout
    for word in words[2:]:
        if word.startswith("--"):
            assert re.search(rf"{re.escape(word)}\b", known), f"{word} in {line!r}"


def test_readme_links_and_pictures_exist() -> None:
    """Every relative link leads somewhere."""
    for target in re.findall(r"\]\((?!http|#)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_unknown_commands_are_bad_input(capsys: pytest.CaptureFixture[str]) -> None:
    """A mistyped command exits with 2 and names the known ones."""
    assert main(["sumulate"]) == 2
    assert "simulate" in capsys.readouterr().err


def test_bad_input_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Missing files, unknown policies and impossible numbers: one error, no traceback."""
    fleet = ROOT / "data" / "fleets" / "demo.yaml"
    demo = ROOT / "data" / "demo"
    work = ["--workflow", str(demo / "research.json"), "--truth", str(demo / "truth.json")]
    simulate = ["simulate", "--fleet", str(fleet), *work]
    cases = [
        [
            "plan",
            "--workflow",
            "absent.json",
            "--fleet",
            str(fleet),
            "--estimates",
            "x",
            "--rate",
            "1",
        ],
        ["simulate", "--fleet", "absent.yaml", *work, "--rate", "1"],
        [*simulate, "--rate", "1", "--policies", "best"],
        [*simulate, "--rate", "1", "--policies", "almanac"],
        [*simulate, "--rate", "-1"],
        [*simulate, "--rate", "1", "--arrivals", "azure_conv"],
        [*simulate, "--rate", "1", "--agents", "miniswe"],
        ["simulate", "--fleet", str(fleet), "--rate", "1", "--agents", "me", "--traces", "."],
        ["serve", str(fleet), "--policy", "best"],
        ["report", str(tmp_path)],
        ["train", "--traces", str(tmp_path), "--out", str(tmp_path / "m")],
        ["explain", "absent.json"],
        ["ir", "no_such_module:app"],
        ["data", "get", "no_such_set"],
    ]
    for case in cases:
        assert main(case) == 2, case
        said = capsys.readouterr().err.strip()
        assert "error: " in said, case
        assert "Traceback" not in said
    assert list(tmp_path.iterdir()) == []
