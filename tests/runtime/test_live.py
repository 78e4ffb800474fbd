"""The live comparison: nobody else's server is taken for ours."""

from __future__ import annotations

import asyncio
import os
import socket
from pathlib import Path

import pytest

from planner.domain.errors import InvalidInput
from planner.domain.run import RunSpec
from runtime.live import app_environment, check_ports, drive

FILE = Path("fleet.yaml")


def free_ports(count: int) -> list[int]:
    """Return ports nobody uses."""
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def fleet_at(fleet_of, urls_of, *urls):
    return urls_of(fleet_of(len(urls)), list(urls))


def test_free_ports_are_accepted_and_left_free(fleet_of, urls_of):
    """A check leaves nothing behind: it can be made again."""
    first, second = free_ports(2)
    fleet = fleet_at(fleet_of, urls_of, f"http://127.0.0.1:{first}")
    check_ports(fleet, FILE, second)
    check_ports(fleet, FILE, second)


def test_a_port_in_use_is_named(fleet_of, urls_of):
    """The worker or option is told, whether the port is taken or named twice."""
    free, other = free_ports(2)
    fleet = fleet_at(fleet_of, urls_of, f"http://127.0.0.1:{free}")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InvalidInput, match=f"^--port: port {port} cannot be used"):
            check_ports(fleet, FILE, port)
        busy = fleet_at(fleet_of, urls_of, f"http://127.0.0.1:{port}")
        with pytest.raises(InvalidInput, match=f"^fleet.yaml: worker 'e0': url: port {port} "):
            check_ports(busy, FILE, other)
    with pytest.raises(InvalidInput, match=f"^--port: port {free} cannot be used"):
        check_ports(fleet, FILE, free)
    with pytest.raises(InvalidInput, match="at most 65535"):
        check_ports(fleet, FILE, 70000)


def test_only_this_machine_gets_mock_endpoints(fleet_of, urls_of):
    """An address elsewhere may be a real server; it is not touched."""
    fleet = fleet_at(fleet_of, urls_of, "http://10.0.0.5:8000")
    with pytest.raises(InvalidInput, match="'e0': url: http://10.0.0.5:8000 is not on this mach"):
        check_ports(fleet, FILE, free_ports(1)[0])


async def test_failed_and_hanging_runs_are_counted_and_the_first_reason_kept():
    """A run that raises or never ends is a failed one; the others are not touched by it."""
    ended = []

    async def launch(run):
        if run.run_id == "bad":
            raise ConnectionError("refused")
        if run.run_id == "hangs":
            await asyncio.Event().wait()
        ended.append(run.run_id)

    runs = [
        RunSpec(run_id=name, workflow="w", workflow_hash="h", arrival_s=0.0, tasks=())
        for name in ("good", "bad", "hangs")
    ]
    driven = await drive(launch, runs, dilation=1.0, limit_s=0.2)
    assert ended == ["good"]
    assert (driven.failed, driven.error) == (2, "ConnectionError: refused")
    driven = await drive(launch, runs[:1], dilation=1.0, limit_s=5.0)
    assert (driven.failed, driven.error) == (0, "")


def test_no_proxy_stands_before_this_machine(monkeypatch):
    """Whatever the proxy settings are, loopback is exempt while an app runs, and only then."""
    monkeypatch.setenv("NO_PROXY", "example.org")
    for name in ("no_proxy", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    with app_environment():
        assert os.environ["NO_PROXY"] == "example.org,127.0.0.1,localhost"
        assert os.environ["no_proxy"] == "127.0.0.1,localhost"
        assert os.environ["LANGSMITH_TRACING"] == "false"
    assert os.environ["NO_PROXY"] == "example.org"
    assert "no_proxy" not in os.environ
    monkeypatch.delenv("HTTP_PROXY")
    with app_environment():
        assert os.environ["NO_PROXY"] == "example.org"
