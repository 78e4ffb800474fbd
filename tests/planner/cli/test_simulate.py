"""`almanac simulate`, small: what it writes, and one clear error for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from planner.cli import simulate as module
from planner.cli.main import main
from planner.domain.errors import InvalidInput
from planner.domain.files import data_dir
from planner.domain.fleet import load_fleet

DATA = Path(__file__).resolve().parents[3] / "data"
WORK = (
    "--workflow", str(DATA / "demo/research.json"), "--truth", str(DATA / "demo/truth.json"),
    "--rate", "1", "--runs", "3", "--seeds", "1", "--jobs", "1",
)  # fmt: skip


def simulate(fleet: Path | str, *words: str) -> int:
    """Run the command without tuning."""
    return main(["simulate", "--fleet", str(fleet), "--no-tune", *words])


def test_results_and_inputs_are_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--json prints what is saved; the fleet is kept beside it, and can be used from there."""
    words = (*WORK, "--policies", "random,least_load", "--out", str(tmp_path), "--json")
    assert simulate(DATA / "fleets/demo.yaml", *words) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads((tmp_path / "results.json").read_text())
    assert [one["policy"] for one in printed["policies"]] == ["random", "least_load"]
    kept = tmp_path / "fleet.yaml"
    assert kept.read_text() == (DATA / "fleets/demo.yaml").read_text()
    assert simulate(kept, *words) == 0


def test_bound(capsys: pytest.CaptureFixture[str]) -> None:
    """What no policy can be below is printed, kept with the settings, and holds."""
    words = (*WORK, "--policies", "random,least_expected_finish", "--noise-cv", "0", "--bound")
    assert simulate(DATA / "fleets/demo.yaml", *words) == 0
    assert "no policy can be below: mean " in capsys.readouterr().out
    assert simulate(DATA / "fleets/demo.yaml", *words, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    for policy in printed["policies"]:
        (seed,) = policy["seeds"]
        assert seed["metrics"]["mean_s"] >= printed["settings"]["bound_mean_s"] > 0
        assert seed["metrics"]["p95_s"] >= printed["settings"]["bound_p95_s"] > 0


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--rate", "inf"), "--rate: inf is out of range"),
        (("--rate", "nan"), "--rate: nan is out of range"),
        (("--runs", "0"), "--runs: 0 is out of range"),
        (("--noise-cv", "-1"), "--noise-cv: -1.0 is out of range"),
        (("--dispatch-ms", "nan"), "--dispatch-ms: nan is out of range"),
        (("--max-calls", "0"), "--max-calls: 0 is out of range"),
        (("--policies", "random:seed=5"), "'random' has no parameter 'seed'; known: none"),
        (("--policies", "almanac:table=1"), "'almanac' has no parameter 'table'; known: none"),
        (("--policies", "marginal_cost:theta=nan"), "'theta=nan' is out of range"),
        (("--policies", "best"), "'best' is unknown; use one of round_robin"),
        (("--policies", "random,random"), "'random' is named twice"),
        (("--policies", "almanac"), "needs a dispatch table; give --table"),
        (("--agents", "miniswe"), "give either --workflow or --agents"),
        (("--arrivals", "azure_conv"), "need --traces"),
        (("--table", "/none.json"), "/none.json: no such dispatch table"),
        (("--estimates", "/none.json"), "/none.json: no such estimate table"),
        (("--truth", str(DATA / "demo/research.json")), "research.json: schema is"),
        (("--workflow", str(DATA / "demo")), "the workflow file is a folder"),
        (("--bound", "--patience-s", "9"), "--bound: a closed loop, or clients who give up"),
    ],
)
def test_mistakes_are_named(
    words: tuple[str, ...], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line that names option, value and remedy."""
    assert simulate(DATA / "fleets/demo.yaml", *WORK, *words) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert len(errors) == 1
    assert told in errors[0]


def test_what_agents_do_not_use_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """An option that would be ignored is an error."""
    words = ("--agents", "miniswe", "--traces", "/none", "--rate", "1", "--table", "t.json")
    assert simulate(DATA / "fleets/demo.yaml", *words) == 2
    assert "--table goes with --workflow" in capsys.readouterr().err


def test_an_impossible_folder_is_refused_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """--out inside a file is told before anything is simulated."""
    (tmp_path / "file").write_text("")
    words = (*WORK, "--policies", "random", "--out", str(tmp_path / "file/x"), "--keep-traces")
    assert simulate(DATA / "fleets/demo.yaml", *words) == 2
    assert capsys.readouterr().err.strip().endswith("is not a folder; choose another path")


def test_retention_and_disturbances_are_read() -> None:
    """Each form is understood, and the crash of a worker shows in the results' settings."""
    fleet = load_fleet(data_dir() / "fleets" / "demo.yaml")
    assert module._retention("leave") is None
    assert module._retention("pin:20").fate.ttl_s == 20.0  # type: ignore[union-attr]
    assert module._retention("drop").fate.action == "drop"  # type: ignore[union-attr]
    (crash, slow) = module._disturbances(["crash:h100:5:9", "slow:l4:0:60:2.5"], fleet)
    assert (crash.endpoint, crash.from_s, crash.to_s) == ("h100", 5.0, 9.0)
    assert slow.factor == 2.5


@pytest.mark.parametrize("text", ["crash", "crash:h100:a:9", "crash:h100:9:5", "melt:h100:1:2",
                                  "slow:nobody:1:2", "slow:h100:1:2:3:4"])  # fmt: skip
def test_bad_disturbances_are_bad_input(text: str) -> None:
    """A disturbance that cannot be is refused with a remedy."""
    fleet = load_fleet(data_dir() / "fleets" / "demo.yaml")
    with pytest.raises(InvalidInput):
        module._disturbances([text], fleet)


@pytest.mark.parametrize("text", ["keep", "pin:soon", "pin:-1", "drop:3"])
def test_bad_retention_is_bad_input(text: str) -> None:
    """An unknown fate is refused with the known ones."""
    with pytest.raises(InvalidInput):
        module._retention(text)
