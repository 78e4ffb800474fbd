"""What `almanac bench-runtime` measures with: requests, clients, limits and figures."""

from __future__ import annotations

import random
import resource

import pytest

from planner import __version__
from planner.cli.main import main
from planner.domain.errors import EndpointFailed, InvalidInput
from runtime.bench import soak
from runtime.bench.client import Connection
from runtime.bench.decisions import decision_us
from runtime.bench.figures import Figure, quantile
from runtime.bench.fuzz import Findings, Probe, _judge, fuzz, fuzz_figures, probes
from runtime.bench.gateway import Size, measure_peer
from runtime.bench.instant import BODY, STREAM_BODY, _Instant
from runtime.openapi import openapi


def drawn(seed, count=300):
    return list(probes(openapi(__version__), random.Random(seed), count, admin_key="secret"))


async def test_random_requests_find_nothing(stack, tmp_path, monkeypatch):
    """Hundreds of requests to every route, most of them spoilt: no 500, no hang, usual errors."""
    monkeypatch.chdir(tmp_path)  # requests may name files for traces
    async with stack(2) as s:
        port = int(s.gateway.address.rpartition(":")[2])
        findings = await fuzz(port, iter(drawn(3)))
        assert [str(one) for one in findings.found] == []
        assert findings.statuses.total() == 300
        assert {200, 400, 401, 404} <= set(findings.statuses)


def test_the_same_seed_gives_the_same_requests():
    """A finding can be had again; another seed looks elsewhere."""
    assert drawn(1) == drawn(1) != drawn(2)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [
        (b"HTTP/1.1 500 x\r\n\r\n", "server_error"),
        (b"HTTP/1.1 404 x\r\ncontent-type: text/plain\r\n\r\nno", "form"),
        (b'HTTP/1.1 404 x\r\ncontent-type: application/json\r\n\r\n{"detail": 1}', "form"),
        (b"HTTP/1.1 418 x\r\ncontent-type: application/json\r\n\r\n{}", "undocumented"),
        (b"nonsense", "form"),
    ],
)
def test_wrong_answers_are_found(answer, kind):
    """Errors of the server, errors in another form and statuses nobody announced are told."""
    findings = Findings()
    probe = Probe(
        method="GET", route="/x", path="/x", headers=(), body=b"", known=frozenset({200, 404})
    )
    _judge(probe, answer, findings)
    assert findings.count(kind) == 1
    assert any(figure.holds is False for figure in fuzz_figures(findings))


async def test_the_client_takes_whole_and_streamed_answers():
    """Both kinds of answers of the instant engine are read to their end, again and again."""
    import asyncio

    server = await asyncio.get_running_loop().create_server(_Instant, "127.0.0.1", 0)
    async with server:
        connection = await Connection.open(server.sockets[0].getsockname()[1])
        for body, end in ((BODY, b"}"), (STREAM_BODY, b"0\r\n\r\n"), (BODY, b"}")):
            assert await connection.post(body) > 0
            assert connection.data.endswith(end)
        connection.close()
        with pytest.raises(EndpointFailed):
            await connection.post(BODY)


def test_decisions_are_timed_one_by_one():
    """Each decision of a loaded router has a time of its own, and its counting another."""
    took = decision_us(5, sites=2)
    assert len(took.answer) == len(took.counting) == len(took.both) == 5
    assert min(took.answer) > 0
    assert min(took.counting) > 0


def test_figures_say_whether_their_bar_holds():
    """A bar is an upper or a lower one, and holds at its very value."""
    assert Figure.at_most("a", 2.0, "s", 2.0).holds
    assert not Figure.at_least("a", 1.9, "s", 2.0).holds
    assert Figure.of("a", 1.0, "s").holds is None
    assert quantile([3.0, 1.0, 2.0], 0.5) == 2.0


def test_too_many_runs_for_the_limit_on_files(monkeypatch):
    """A soak that would run out of sockets is refused before anything starts."""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 1024))
    with pytest.raises(InvalidInput, match="2256 open files"):
        soak._allow_files(1000)


def test_memory_is_judged_after_warm_up():
    """Growth in the first quarter is warm-up; growth after it counts."""
    flat = soak.Soaked(memory_mb=[50.0, 80.0, *[100.0] * 14])
    assert flat.growth == pytest.approx(1.0)
    leaking = soak.Soaked(memory_mb=[float(100 + 2 * n) for n in range(100)])
    assert leaking.growth > 1.05


async def test_a_peer_has_to_be_told_where_to_listen(tmp_path):
    """A command without {port} and {urls} is refused with a remedy."""
    with pytest.raises(InvalidInput, match="--peer"):
        await measure_peer(tmp_path, Size(), "router --port 9")


@pytest.mark.parametrize("words", [["--soak", "0"], ["--fuzz", "0"], ["--workers", "0"]])
def test_numbers_out_of_range_are_bad_input(words, capsys):
    """One line names the option; nothing is measured."""
    assert main(["bench-runtime", *words]) == 2
    assert words[0] in capsys.readouterr().err
