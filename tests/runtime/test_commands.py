"""`almanac serve` and `almanac mock-fleet` as processes."""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import subprocess
import sys

import httpx
import pytest

from planner.cli import bench_mock, mock_fleet, serve
from planner.domain.errors import InvalidInput

FLEET = """
schema: almanac.fleet/1
name: one
workers:
  - id: e0
    url: "http://127.0.0.1:{port}"
    model: m
    gpu: H100
    latency: 8b-h100-1-bf16
    kv_blocks: 500
    slots: 4
"""

# A busy machine is late at times; nothing is to be said of it, and nobody to be left out for it.
CALM = ("--first-byte-floor-s", 60, "--stall-floor-s", 60, "--health-interval-s", 0)
WAIT_S = 60.0


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def command(name, *words):
    code = (
        "import argparse, sys; from importlib import import_module;"
        f"module = import_module('planner.cli.{name}');"
        "parser = argparse.ArgumentParser(); module.register(parser.add_subparsers());"
        "args = parser.parse_args(sys.argv[1:]); sys.exit(args.run(args))"
    )
    return [sys.executable, "-c", code, name.replace("_", "-"), *map(str, words)]


def start(*parts, **environment):
    """Start a command and wait for its ready line."""
    process = subprocess.Popen(  # noqa: S603
        command(*parts),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    )
    assert process.stderr is not None
    line = process.stderr.readline()
    return process, line


def stop(process):
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=WAIT_S)
    return process.returncode, out, err


@pytest.fixture
def fleet_file(tmp_path):
    path = tmp_path / "fleet.yaml"
    path.write_text(FLEET.format(port=free_port()))
    return path


def args_for(module, *words):
    parser = argparse.ArgumentParser()
    module.register(parser.add_subparsers())
    return parser.parse_args([module.__name__.rsplit(".", 1)[1].replace("_", "-"), *words])


def test_both_serve_and_end_cleanly(fleet_file, tmp_path):
    """Each prints one ready line, they serve a call together, and SIGTERM ends them with 0."""
    mock, line = start("mock_fleet", fleet_file, "--dilation", 50, "--noise-cv", 0.02)
    assert line.startswith("ready: 1 mock endpoints, dilation 50: e0 http://127.0.0.1:")
    trace = tmp_path / "t.jsonl"
    gateway, line = start(
        "serve", fleet_file, "--port", 0, "--dilation", 50, "--trace", trace, *CALM,
        "--policy", "least_load", "--admin-key-env", "THE_KEY", THE_KEY="secret",
    )  # fmt: skip
    assert line.startswith("ready: http://127.0.0.1:")
    url = line.split()[1].rstrip(",")
    body = {"model": "m", "prompt": "a b", "max_tokens": 3}
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=WAIT_S)
    assert answer.json()["usage"]["completion_tokens"] == 3
    key = {"authorization": "Bearer secret"}
    facts = httpx.get(f"{url}/almanac/v1/diagnostics", headers=key, timeout=WAIT_S).json()
    assert facts["policy"] == "least_load"
    assert stop(gateway) == (0, "", "")
    code, out, err = stop(mock)
    assert (code, err) == (0, "")
    assert json.loads(out)["tokens_handed_out"] == 3
    assert [json.loads(line).get("type") for line in trace.read_text().splitlines()] == [
        None, "call", "run",
    ]  # fmt: skip


def test_a_reload_and_a_restart_of_the_process(fleet_file, tmp_path):
    """SIGHUP takes a file up or leaves it, and a restart finds what was learned and loaded."""
    mock, _ = start("mock_fleet", fleet_file, "--dilation", 50)
    state = tmp_path / "state.json"
    words = ("--port", 0, "--dilation", 50, "--policy", "least_load", "--state", state, *CALM)
    key = {"authorization": "Bearer secret"}

    def serve_it():
        gateway, line = start("serve", fleet_file, *words, ALMANAC_SERVER_ADMIN_KEY="secret")
        return gateway, line.split()[1].rstrip(",")

    def facts(url):
        return httpx.get(f"{url}/almanac/v1/diagnostics", headers=key, timeout=WAIT_S).json()

    gateway, url = serve_it()
    text = fleet_file.read_text()
    for wrong in ("faults: {retries: -1}", "faults: {"):
        fleet_file.write_text(f"{text}\n{wrong}\n")
        gateway.send_signal(signal.SIGHUP)
        line = gateway.stderr.readline()
        assert "ERROR reload refused, the running configuration stays" in line
        assert "fleet.yaml" in line
    fleet_file.write_text(f"{text}\nserver: {{seed: 3}}\n")
    gateway.send_signal(signal.SIGHUP)
    assert "read at the start only: server.seed" in gateway.stderr.readline()
    assert "configuration reloaded" in gateway.stderr.readline()
    body = {"model": "m", "prompt": "words " * 100, "max_tokens": 20}
    headers = {"x-session-id": "s"}
    answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers, timeout=WAIT_S)
    assert answer.status_code == 200
    (before,) = facts(url)["endpoints"]
    assert stop(gateway) == (0, "", "")
    assert json.loads(state.read_text())["runs"][0]["run_id"] == "s"
    gateway, url = serve_it()
    (after,) = facts(url)["endpoints"]
    assert after["latency"]["row"] == before["latency"]["row"]
    assert after["prefix_tokens"] == before["prefix_tokens"] > 0
    assert facts(url)["runs_active"] == 1
    assert stop(gateway)[0] == 0
    assert stop(mock)[0] == 0


def test_require_ready_fails_with_one_message(fleet_file):
    """With `--require-ready` a silent endpoint ends the command with 1 and names it."""
    done = subprocess.run(  # noqa: S603
        command("serve", fleet_file, "--port", 0, "--require-ready"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "not ready: no answer from e0" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--policy", "nope"], "'nope' is unknown"),
        (["--policy", "almanac:x=1"], "no parameter 'x'"),
        (["--table", "missing.json"], r"missing\.json: no such dispatch table"),
        (["--estimates", "missing.json"], r"missing\.json: no such estimate table"),
        (["--workflow", "missing.json"], r"missing\.json: no such workflow file"),
        (["--dilation", "-2"], "dilation"),
        (["--port", "70000"], "--port"),
        (["--admin-key-env", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE"),
    ],
)
def test_bad_options_of_serve_are_input_errors(fleet_file, words, match):
    """Whatever is wrong with an option is told before anything starts."""
    with pytest.raises(InvalidInput, match=match):
        serve.run(args_for(serve, str(fleet_file), *words))


def test_a_missing_fleet_file_is_an_input_error(tmp_path):
    """A missing file is named."""
    for module in (serve, mock_fleet):
        with pytest.raises(InvalidInput, match=r"nofleet\.yaml"):
            module.run(args_for(module, str(tmp_path / "nofleet.yaml")))


def test_a_port_in_use_names_worker_and_port(fleet_file):
    """A taken port is one error with worker, port and remedy."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        fleet_file.write_text(FLEET.format(port=port))
        with pytest.raises(InvalidInput, match=rf"'e0'.*port {port} .*already in use"):
            mock_fleet.run(args_for(mock_fleet, str(fleet_file)))


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["--api-key-env", "NOT_SET_ANYWHERE"], "NOT_SET_ANYWHERE"),
        (["--max-queued", "-1"], "max_queued"),
        (["--stream-interval", "0"], "stream_interval"),
        (["--lora", ""], "lora"),
    ],
)
def test_bad_options_of_mock_fleet_are_input_errors(fleet_file, words, match):
    """Whatever is wrong with an option is told before anything starts."""
    with pytest.raises(InvalidInput, match=match):
        mock_fleet.run(args_for(mock_fleet, str(fleet_file), *words))


def test_a_wrong_fault_is_told_before_anything_starts(fleet_file):
    """A fault that cannot be read names file, worker and field."""
    fleet_file.write_text(FLEET.format(port=9) + "    faults: [{kind: flood}]\n")
    with pytest.raises(InvalidInput, match=r"fleet\.yaml: workers\[0\]\.faults\[0\]\.kind"):
        mock_fleet.run(args_for(mock_fleet, str(fleet_file)))


def test_workers_on_one_port_are_told_before_anything_starts(fleet_file):
    """Two hosts with the same port cannot be mocked on one machine."""
    one = FLEET.format(port=9)
    other = one[one.index("  - id") :].replace("e0", "e1").replace("127.0.0.1", "10.0.0.1")
    fleet_file.write_text(one + other)
    with pytest.raises(InvalidInput, match="'e1'.*port 9 is already that of 'e0'"):
        mock_fleet.run(args_for(mock_fleet, str(fleet_file)))


def test_the_mock_s_speed_is_measured(capsys):
    """`bench-mock --json` prints rows with name, value, unit, bar and verdict."""
    words = ["--endpoints", "1", "--streams", "2", "--tokens", "10", "--json"]
    assert bench_mock.run(args_for(bench_mock, *words)) in (0, 1)
    rows = json.loads(capsys.readouterr().out)
    assert [set(row) for row in rows] == [{"name", "value", "unit", "bar", "holds"}] * 5
    assert rows[0]["bar"] == ">= 8000"
    assert all(row["value"] >= 0 for row in rows)
