"""`almanac explain RUN --gateway URL`, with a gateway of the test's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from planner.cli.main import main
from planner.domain.trace import CallRecord, RunRecord, record_to_json

RUN = RunRecord(
    run_id="a/b", workflow="flow", workflow_hash="h", arrival_s=10.0, finish_s=16.0,
    status="running", predicted_s=5.0, calls=2,
)  # fmt: skip
DONE = CallRecord(
    run_id="a/b", call_id="c1", workflow_hash="h", node="x", site="x#0", ready_s=10.0,
    sent_s=10.5, endpoint="fast", prompt_tokens=10, output_tokens=20, first_token_s=11.0,
    finish_s=13.0, reason="plan", predicted_finish_s=12.0, runner_up="slow",
    runner_up_finish_s=14.0, runner_up_excess_s=2.5,
)  # fmt: skip
GOING = CallRecord(
    run_id="a/b", call_id="c2", workflow_hash="h", node="y", site="y#0", ready_s=13.0,
    sent_s=13.0, endpoint="slow", prompt_tokens=10, output_tokens=0, status="running",
    reason="plan", predicted_finish_s=19.0, runner_up="fast", runner_up_finish_s=18.0,
    runner_up_excess_s=0.5,
)  # fmt: skip
TOLD = {
    "schema": "almanac.run/1",
    "now_s": 16.0,
    "records": [record_to_json(one) for one in (RUN, GOING, DONE)],
    "predicted_finish_s": 20.0,
    "why": {"x#0": "fast takes 75%", "y#0": "slow takes 60%"},
}


@pytest.fixture
def gateway(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[str, list[Any]]]]:
    """Return a maker of servers that give one answer and keep what they were asked."""
    monkeypatch.setenv("ALMANAC_SERVER_ADMIN_KEY", "secret")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    servers: list[tuple[HTTPServer, threading.Thread]] = []

    def start(status: int = 200, body: bytes | None = None) -> tuple[str, list[Any]]:
        asked: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked.append((self.path, self.headers["authorization"]))
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(TOLD).encode() if body is None else body)

            def log_message(self, *_details: object) -> None:
                pass

        server = HTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        servers.append((server, thread))
        return f"http://127.0.0.1:{server.server_port}", asked

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_live_run_is_explained(gateway, capsys: pytest.CaptureFixture[str]) -> None:
    """Choice, cost there and elsewhere, what decided, forecast and outcome, and the table's why."""
    url, asked = gateway()
    assert main(["explain", "a/b", "--gateway", f"{url}/v1", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert asked == [("/almanac/v1/runs/a%2Fb", "Bearer secret")]
    assert facts["facts"]["status"] == "running"
    assert facts["facts"]["predicted_s"] == 5.0
    assert facts["facts"]["predicted_now_s"] == 10.0
    done, going = facts["rows"]
    assert (done["endpoint"], done["predicted_finish_s"], done["finish_s"]) == ("fast", 2.0, 3.0)
    assert (done["runner_up"], done["runner_up_finish_s"]) == ("slow", 4.0)
    assert (done["decided_by"], going["decided_by"]) == ("own finish", "cost to others")
    assert (going["finish_s"], going["status"]) == (None, "running")
    assert facts["why"]["x#0"] == "fast takes 75%"


def test_the_text_says_the_same(gateway, capsys: pytest.CaptureFixture[str]) -> None:
    """People get two tables, choice and outcome, and a line per site of the table."""
    url, _ = gateway()
    assert main(["explain", "a/b", "--gateway", url, "--site", "x#0"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("run: a/b\n")
    for words in ("runner_up_finish_s", "own finish", "decode_s", "table on x#0: fast takes 75%"):
        assert words in shown
    assert "y#0" not in shown


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, "wrong admin key"),
        (403, "the admin routes are off"),
        (404, "no run 'a/b'"),
        (500, "status 500 and no run in the answer"),
    ],
)
def test_refusals_say_what_to_do(
    gateway, capsys: pytest.CaptureFixture[str], status: int, message: str
) -> None:
    """Each refusal of a gateway is one line and exit code 2."""
    url, _ = gateway(status, b"{}")
    assert main(["explain", "a/b", "--gateway", url]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert "secret" not in err


@pytest.mark.parametrize("body", [b"", b"<html>", b"[]", b'{"records": []}', b'{"records": [1]}'])
def test_what_is_no_gateway_is_told_so(
    gateway, capsys: pytest.CaptureFixture[str], body: bytes
) -> None:
    """An answer that is not a run's is bad input, never a traceback."""
    url, _ = gateway(200, body)
    assert main(["explain", "a/b", "--gateway", url]) == 2
    assert "error: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--gateway", "file:///etc"), "is no address"),
        (("--gateway", "http://127.0.0.1:1"), "cannot be asked"),
        (("--gateway", "http://127.0.0.1:1", "--key-env", "NOT_SET_HERE"), "'NOT_SET_HERE' is not"),
        (("--gateway", "http://127.0.0.1:1", "--run", "r"), "named already"),
    ],
)
def test_bad_input(
    gateway, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    """Wrong addresses and keys are named with a remedy."""
    assert main(["explain", "a/b", *words]) == 2
    assert message in capsys.readouterr().err
