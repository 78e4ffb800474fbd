"""OpenTelemetry spans of runs, calls and attempts, where the library is installed and asked for.

``run`` > ``call`` > ``attempt``. A call's span continues the client's trace (``traceparent``), so a
gateway shows up in the application's own trace; a run's span is linked from its calls. Spans hold
sizes, times, ids and decisions, never text and never keys.

Nothing is imported unless `open_tracing` is called. `NoTracing` costs a method call.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any, Protocol

from planner.domain.errors import InvalidInput

__all__ = ["NoTracing", "OtelTracing", "SpanLike", "Tracing", "open_tracing"]

Value = str | int | float | bool


class SpanLike(Protocol):
    """The part of a span that is used."""

    def set_attribute(self, key: str, value: Value) -> Any:
        """Set one fact."""
        ...

    def end(self) -> Any:
        """End it."""
        ...


class Tracing(Protocol):
    """Makes spans."""

    def start(
        self,
        name: str,
        facts: Mapping[str, Value],
        *,
        parent: SpanLike | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> SpanLike:
        """Start a span below ``parent``, or below the trace that ``headers`` continue."""
        ...

    def close(self) -> None:
        """Send what is left."""
        ...


class _NoSpan:
    __slots__ = ()

    def set_attribute(self, _key: str, _value: Value) -> None:
        """Do nothing."""

    def end(self) -> None:
        """Do nothing."""


_NO_SPAN = _NoSpan()


class NoTracing:
    """Makes no spans."""

    __slots__ = ()

    def start(
        self,
        name: str,  # noqa: ARG002 - the protocol
        facts: Mapping[str, Value],  # noqa: ARG002 - the protocol
        *,
        parent: SpanLike | None = None,  # noqa: ARG002 - the protocol
        headers: Mapping[str, str] | None = None,  # noqa: ARG002 - the protocol
    ) -> SpanLike:
        """Return a span that does nothing."""
        return _NO_SPAN

    def close(self) -> None:
        """Do nothing."""


class OtelTracing:
    """Makes spans with an OpenTelemetry tracer.

    Parameters
    ----------
    tracer
        ``start_span(name, context=..., attributes=...)``.
    context_of
        Context below a span: ``opentelemetry.trace.set_span_in_context``.
    extract
        Context of request headers, W3C format.
    close
        Flushes and stops the exporter.
    """

    __slots__ = ("_close", "_context_of", "_extract", "_tracer")

    def __init__(self, tracer: Any, *, context_of: Any, extract: Any, close: Any) -> None:
        self._tracer = tracer
        self._context_of = context_of
        self._extract = extract
        self._close = close

    def start(
        self,
        name: str,
        facts: Mapping[str, Value],
        *,
        parent: SpanLike | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> SpanLike:
        """Start a span; see `Tracing.start`."""
        context = None
        if parent is not None:
            context = self._context_of(parent)
        elif headers is not None:
            context = self._extract({"traceparent": headers.get("traceparent", "")})
        span: SpanLike = self._tracer.start_span(
            name,
            context=context,
            attributes={f"almanac.{key}": value for key, value in facts.items()},
        )
        return span

    def close(self) -> None:
        """Send what is left."""
        self._close()


def open_tracing(version: str) -> Tracing:
    """Return tracing that exports by OTLP over HTTP, as the ``OTEL_*`` variables say.

    Parameters
    ----------
    version
        Of the gateway.

    Raises
    ------
    InvalidInput
        If OpenTelemetry is not installed.
    """
    try:
        # By name, so that nothing about it has to be installed to check types either.
        trace = import_module("opentelemetry.trace")
        sdk = import_module("opentelemetry.sdk.trace")
        export = import_module("opentelemetry.sdk.trace.export")
        resources = import_module("opentelemetry.sdk.resources")
        otlp = import_module("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        w3c = import_module("opentelemetry.trace.propagation.tracecontext")
    except ImportError as error:
        raise InvalidInput(
            f"OpenTelemetry is not installed ({error.name})",
            where="telemetry.otlp",
            remedy="pip install 'almanac-scheduler[otel]'",
        ) from error
    resource = resources.Resource.create({"service.name": "almanac", "service.version": version})
    provider = sdk.TracerProvider(resource=resource)
    provider.add_span_processor(export.BatchSpanProcessor(otlp.OTLPSpanExporter()))
    return OtelTracing(
        provider.get_tracer("almanac", version),
        context_of=trace.set_span_in_context,
        extract=w3c.TraceContextTextMapPropagator().extract,
        close=provider.shutdown,
    )
