"""OpenTelemetry spans, with a tracer that keeps them."""

from __future__ import annotations

import sys

import httpx
import pytest

from planner.domain.errors import InvalidInput
from runtime.tracing import NoTracing, OtelTracing, open_tracing

TRACEPARENT = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"


class Span:
    def __init__(self, name, parent, attributes):
        self.name, self.parent, self.attributes, self.ends = name, parent, dict(attributes), 0

    def set_attribute(self, key, value):
        self.attributes[key] = value

    def end(self):
        self.ends += 1


class Tracer:
    """An in-memory tracer: a context is what it was made of."""

    def __init__(self):
        self.spans = []
        self.closed = False

    def start_span(self, name, *, context=None, attributes):
        self.spans.append(Span(name, context, attributes))
        return self.spans[-1]

    def named(self, name):
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def tracer():
    return Tracer()


@pytest.fixture
def tracing(tracer):
    def close():
        tracer.closed = True

    return OtelTracing(
        tracer,
        context_of=lambda span: span,
        extract=lambda carrier: carrier["traceparent"],
        close=close,
    )


async def test_a_run_its_calls_and_their_attempts(stack, tracer, tracing):
    """Spans nest as run, call, attempt; each ends once, and they hold decisions, never text."""
    async with (
        stack(2, tracing=tracing) as s,
        httpx.AsyncClient(base_url=s.base_url) as http,
    ):
        await s.mock.endpoints[0].go_down(abort=True)
        for stream in (False, True):
            body = {"model": "m", "prompt": "hush", "max_tokens": 3, "stream": stream}
            answer = await http.post("/completions", json=body, headers={"x-session-id": "s"})
            assert answer.status_code == 200
        assert [span.ends for span in tracer.named("run")] == [0]
        await http.post(f"{s.gateway.address}/finish_session", json={"session_id": "s"})
    (run,) = tracer.named("run")
    calls, attempts = tracer.named("call"), tracer.named("attempt")
    assert [call.parent for call in calls] == [run, run]
    assert {attempt.parent for attempt in attempts} <= set(calls)
    assert len(attempts) == 3  # the first one met the dead endpoint
    assert {attempt.attributes["almanac.endpoint"] for attempt in attempts} == {"e0", "e1"}
    assert attempts[-1].attributes["almanac.reason"] == "turn"
    assert run.attributes["almanac.status"] == "ok"
    assert run.attributes["almanac.calls"] == 2
    assert all(span.ends == 1 for span in tracer.spans)
    assert "hush" not in repr([span.attributes for span in tracer.spans])
    assert tracer.closed


async def test_a_client_s_trace_goes_on(stack, tracer, tracing):
    """A call with a traceparent is a span of the client's own trace."""
    async with (
        stack(1, tracing=tracing) as s,
        httpx.AsyncClient(base_url=s.base_url, headers={"traceparent": TRACEPARENT}) as http,
    ):
        await http.post("/completions", json={"model": "m", "prompt": "a", "max_tokens": 2})
    assert [call.parent for call in tracer.named("call")] == [TRACEPARENT]


def test_without_the_library_the_error_says_what_to_install(monkeypatch):
    """Asking for spans without OpenTelemetry is one clear error; not asking imports nothing."""
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", None)
    with pytest.raises(InvalidInput, match=r"telemetry\.otlp.*almanac-scheduler\[otel\]"):
        open_tracing("1")
    span = NoTracing().start("call", {})
    span.set_attribute("a", 1)
    span.end()
