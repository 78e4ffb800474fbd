"""The engine against real logs and independent simulators; needs the public data for the former."""

import argparse
import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

import pytest

from planner.cli import validate_engine
from planner.domain.errors import InvalidInput
from planner.sim.fidelity import (
    Check,
    dynamo_checks,
    fixed_trace,
    real_log_checks,
    silicon_checks,
)


@pytest.fixture
def public_data() -> Path:
    """Return the folder of the public data, or skip."""
    given = os.environ.get("ALMANAC_PUBLIC_DATA")
    folder = Path(given) if given else Path(__file__).resolve().parents[4] / "shared" / "data"
    if not (folder / "vllm_bench_llmservingsim").is_dir():
        pytest.skip("public data is not here; set ALMANAC_PUBLIC_DATA")
    return folder


def failed(checks: Iterable[Check]) -> list[Check]:
    return [check for check in checks if check.holds is False]


def test_scheduler_equals_dynamo_replay() -> None:
    """With Dynamo's timing formula the fixed traces give the numbers of Dynamo's own replay."""
    checks = dynamo_checks()
    assert len(checks) == 5
    json.dumps([asdict(check) for check in checks])  # plain numbers, no numpy scalars
    assert failed(checks) == []


def test_real_vllm_logs_are_reproduced(public_data: Path) -> None:
    """Per-request latency of the recorded vLLM runs is met within the bars, on both GPUs."""
    checks = real_log_checks(public_data / "vllm_bench_llmservingsim")
    assert sum(check.holds is not None for check in checks) == 4
    assert failed(checks) == []


def test_silicon_averages_are_reproduced(public_data: Path) -> None:
    """TPOT of the H100 closed loops is met within the bar."""
    checks = silicon_checks(public_data / "aic_silicon")
    assert "45 rows" in checks[0].name
    assert failed(checks) == []


def test_a_log_without_the_columns_is_named(public_data: Path, tmp_path: Path) -> None:
    """Damaged data gives one error with the file's name."""
    source = public_data / "vllm_bench_llmservingsim"
    shutil.copy(source / "prompt_blocks.jsonl", tmp_path)
    (tmp_path / "requests.csv").write_text("gpu\n" + "RTX4090\n" * 200)
    with pytest.raises(InvalidInput, match=r"requests\.csv.*queued_rel_s"):
        real_log_checks(tmp_path)
    (tmp_path / "prompt_blocks.jsonl").write_text('{"request_id": "a"}\n')
    with pytest.raises(InvalidInput, match=r"prompt_blocks\.jsonl.*blocks16"):
        real_log_checks(tmp_path)


def test_silicon_without_matching_rows_is_an_error(tmp_path: Path) -> None:
    """A table of other machines proves nothing, and says so."""
    (tmp_path / "e2e.csv").write_text("model_path,system,precision,backend,mode\nm,s,p,b,agg\n")
    with pytest.raises(InvalidInput, match="no rows"):
        silicon_checks(tmp_path)
    (tmp_path / "e2e.csv").write_text("model_path\nmeta-llama/Llama-3.1-70B\n")
    with pytest.raises(InvalidInput, match="system"):
        silicon_checks(tmp_path)


def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    validate_engine.register(parser.add_subparsers())
    args = parser.parse_args(["validate-engine", *arguments])
    return int(args.run(args))


def stub(monkeypatch: pytest.MonkeyPatch, *checks: Check) -> None:
    monkeypatch.setattr(validate_engine, "dynamo_checks", lambda: list(checks))
    monkeypatch.setattr(validate_engine, "real_log_checks", lambda folder: [])
    monkeypatch.setattr(validate_engine, "silicon_checks", lambda folder: [])


def test_command_prints_rows_and_says_whether_the_bars_hold(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """JSON rows go to standard output; one missed bar makes the exit code 1."""
    good = Check.at_most("good", 0.5, "%", 1)
    seen = Check(name="seen", value=3.0, unit="%")
    stub(monkeypatch, good, seen)
    assert command("--data", str(tmp_path), "--json") == 0
    assert json.loads(capsys.readouterr().out) == [
        {"name": "good", "value": 0.5, "unit": "%", "bar": "<= 1", "holds": True},
        {"name": "seen", "value": 3.0, "unit": "%", "bar": None, "holds": None},
    ]
    stub(monkeypatch, good, Check.at_least("slow", 7.0, "1/s", 8000))
    assert command("--data", str(tmp_path)) == 1
    shown = capsys.readouterr()
    assert "FAILS" in shown.out
    assert "vLLM logs" in shown.err


def test_command_measures_speed_on_request(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The speed lines come behind a flag, from the same fleet run at any size."""
    stub(monkeypatch, Check(name="seen", value=3.0, unit="%"))
    monkeypatch.setattr(
        validate_engine,
        "fixed_trace",
        lambda count, gap_s, hashed=False: fixed_trace(count // 200, gap_s, hashed=hashed),
    )
    assert command("--data", str(tmp_path), "--speed", "--json") in (0, 1)
    names = [row["name"] for row in json.loads(capsys.readouterr().out)]
    assert sum(name.startswith(("speed", "time", "peak memory")) for name in names) == 4


def test_command_needs_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a folder, or with one that is not there, the error says what to give."""
    monkeypatch.delenv("ALMANAC_PUBLIC_DATA", raising=False)
    with pytest.raises(InvalidInput, match="--data"):
        command()
    with pytest.raises(InvalidInput, match="missing"):
        command("--data", str(tmp_path / "missing"))
