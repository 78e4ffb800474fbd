"""What a router learns while it serves: rows of its endpoints, lengths of its call sites.

Fed by the router with its own events, so nothing is polled and the same events teach the same.
Constant time an event: each endpoint keeps integrals over time of its decoding calls and their
context, and a call's averages are differences of them.

What is seen of a call
----------------------
* Streamed: time to first token and decode, one observation each.
* Answered as a whole: sending to finish, one observation of both parts.
* Calls that met a full endpoint teach their decode only: how long they waited in the engine's
  queue is not a matter of the row.

A client that reads slowly makes its endpoint look slow; observations count less the further off
they are, so that a few such clients change little.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from planner.dispatch.events import Call, CallFinished
from planner.dispatch.forecast import Forecast, Forecaster, with_length
from planner.dispatch.online import OnlineLatency, decode_counts, prefill_counts
from planner.dispatch.view import EndpointState
from planner.domain.calibration import QuantileTracker
from planner.domain.latency import LatencyRow

__all__ = ["CorrectedForecaster", "FleetLearner", "Kept"]

FORGETTING = 0.98
"""Weight that a length keeps at each later one of its site: a memory of 50 calls."""
PRIOR_CALLS = 20.0
"""Calls that a site's forecast counts for, beside those seen."""
SITES = 4096
"""Call sites kept in mind; clients name them, so their number is bounded."""


@dataclass(slots=True)
class Kept:
    """A promised quantile, its online correction, and how often each was kept.

    Parameters
    ----------
    tracker
        The correction.
    promised, corrected
        How often the quantile as forecast, and as corrected by what came before, was kept.
    """

    tracker: QuantileTracker
    promised: int = 0
    corrected: int = 0

    def update(self, quantile: float, observed: float) -> None:
        """Count and learn; ``quantile`` is the forecast before correction."""
        self.promised += observed <= quantile
        self.corrected += observed <= self.tracker.correct(quantile)
        self.tracker.update(quantile, observed)

    def to_json(self) -> dict[str, float | int | None]:
        """Return level, count, and the shares kept."""
        seen = self.tracker.seen
        return {
            "level": self.tracker.level,
            "seen": seen,
            "coverage": self.promised / seen if seen else None,
            "coverage_corrected": self.corrected / seen if seen else None,
        }


class _Ratio:
    """Observed over expected tokens of one site; ``value`` is their ratio, pulled to one."""

    __slots__ = ("calls", "expected", "observed", "promised", "value")

    def __init__(
        self,
        promised: Sequence[float],
        observed: float = 0.0,
        expected: float = 0.0,
        calls: float = 0.0,
    ) -> None:
        self.promised = promised  # the quantiles of the estimate table that are checked
        self.observed, self.expected, self.calls = observed, expected, calls
        self.value = 1.0
        self._weigh()

    def update(self, expected: float, observed: float) -> None:
        self.observed = FORGETTING * self.observed + observed
        self.expected = FORGETTING * self.expected + expected
        self.calls = FORGETTING * self.calls + 1.0
        self._weigh()

    def _weigh(self) -> None:
        if self.calls:
            anchor = PRIOR_CALLS * self.expected / self.calls
            self.value = (anchor + self.observed) / (anchor + self.expected)


class CorrectedForecaster(Forecaster):
    """Forecasts whose lengths follow what the call sites turn out to write.

    Parameters
    ----------
    base
        The forecasts to correct; shared, and left as it is.
    """

    def __init__(self, base: Forecaster) -> None:
        super().__init__(base.estimates)
        self.workflows = base.workflows
        self._base = base
        self._ratios: OrderedDict[tuple[str, str], _Ratio] = OrderedDict()
        self._asked: Call | None = None
        self._answer: Forecast
        self.kept = [Kept(QuantileTracker(level=level)) for level in (0.5, 0.9)]
        """Coverage of the estimate table's length quantiles, over all sites."""

    def of(self, call: Call) -> Forecast:
        """Return the corrected forecast of a call; a declared ``max_tokens`` caps it."""
        if call is not self._asked:  # a decision asks several times
            self._asked, self._answer = call, self._correct(call)
        return self._answer

    def _correct(self, call: Call) -> Forecast:
        forecast = self._base.of(call)
        ratio = self._ratios.get((call.workflow_hash, call.site))
        if ratio is None or call.hinted_tokens is not None:
            return forecast
        tokens = max(1.0, forecast.output_tokens * ratio.value)
        return with_length(forecast, tokens, call.max_tokens)

    def observe(self, call: Call, output_tokens: int) -> None:
        """Learn from the length of a finished call; one with a hint says little of the others."""
        self._asked = None
        if call.hinted_tokens is not None:
            return
        key = (call.workflow_hash, call.site)
        ratio = self._ratios.get(key)
        if ratio is None:
            ratio = self._ratios[key] = _Ratio(self._promised(*key))
            if len(self._ratios) > SITES:
                self._ratios.popitem(last=False)
        else:
            self._ratios.move_to_end(key)
        ratio.update(self._base.of(call).output_tokens, output_tokens)
        for kept, promised in zip(self.kept, ratio.promised, strict=True):
            kept.update(promised, output_tokens)

    def _promised(self, workflow_hash: str, site: str) -> tuple[float, ...]:
        quantiles = self.estimates.site(workflow_hash, site).output_tokens
        return tuple(quantiles.at(kept.tracker.level) for kept in self.kept)

    def to_json(self) -> list[list[Any]]:
        """Return the corrections by call site, JSON-ready."""
        return [
            [*key, ratio.observed, ratio.expected, ratio.calls]
            for key, ratio in self._ratios.items()
        ]

    def restore(self, rows: Iterable[Sequence[Any]]) -> None:
        """Take up corrections that `to_json` returned.

        Raises
        ------
        ValueError, TypeError
            If they are something else.
        """
        self._asked = None
        for workflow_hash, site, *numbers in rows:
            observed, expected, calls = (float(number) for number in numbers)
            key = str(workflow_hash), str(site)
            self._ratios[key] = _Ratio(self._promised(*key), observed, expected, calls)


@dataclass(slots=True)
class _Meter:
    """Integrals over the time of one endpoint."""

    calls: int = 0
    context: float = 0.0
    calls_s: float = 0.0
    context_s: float = 0.0
    prefilled: float = 0.0
    prefilled_square: float = 0.0
    last_s: float = 0.0

    def advance(self, now_s: float) -> None:
        span = now_s - self.last_s
        if span > 0:
            self.calls_s += span * self.calls
            self.context_s += span * self.context
            self.last_s = now_s

    def mark(self) -> tuple[float, float, float, float]:
        return self.calls_s, self.context_s, self.prefilled, self.prefilled_square


@dataclass(slots=True)
class _Under:
    """A call under way, and the state it was sent into."""

    endpoint: int
    sent_s: float
    prompt_tokens: int
    cached_tokens: int
    context: float
    calls: int
    context_before: float
    ahead_tokens: float
    waited: bool
    first_s: float | None = None
    seen: bool = False
    mark: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)


class FleetLearner:
    """The rows of all endpoints, corrected by the calls that finish on them.

    Parameters
    ----------
    states
        Of the router; their ``latency`` is replaced by the learned row at finished calls, see
        `OnlineLatency.news`.

    Attributes
    ----------
    rows
        The learners, in fleet order.
    """

    def __init__(self, states: Sequence[EndpointState]) -> None:
        self._states = tuple(states)
        self.rows = tuple(OnlineLatency(state.latency) for state in states)
        self._meters = tuple(_Meter() for _ in states)
        self._under: dict[str, _Under] = {}

    def restore(self, index: int, row: LatencyRow) -> None:
        """Go on from a row that was learned before."""
        rows = list(self.rows)
        rows[index] = OnlineLatency(row)
        self.rows = tuple(rows)
        self._states[index].latency = row

    def refit(self, states: Sequence[EndpointState], anew: Container[int]) -> None:
        """Take up changed states: those at the places ``anew`` are learned from the start."""
        old = dict(enumerate(zip(self.rows, self._meters, strict=True)))
        both = [
            old[place]
            if place in old and place not in anew
            else (OnlineLatency(state.latency), old[place][1] if place in old else _Meter())
            for place, state in enumerate(states)
        ]
        self._states = tuple(states)
        self.rows = tuple(row for row, _ in both)
        self._meters = tuple(meter for _, meter in both)

    def sent(
        self,
        call: Call,
        state: EndpointState,
        cached_tokens: int,
        output_tokens: float,
        now_s: float,
    ) -> None:
        """Note a call just counted on an endpoint, with what is believed of it."""
        meter = self._meters[state.index]
        uncached = call.prompt_tokens - cached_tokens
        self._under[call.call_id] = _Under(
            endpoint=state.index,
            sent_s=now_s,
            prompt_tokens=call.prompt_tokens,
            cached_tokens=cached_tokens,
            context=call.prompt_tokens + output_tokens / 2,
            calls=meter.calls,
            context_before=meter.context,
            ahead_tokens=max(0.0, state.prefill_tokens - uncached),
            waited=state.in_flight > state.endpoint.max_num_seqs,
        )

    def first_token(self, call_id: str, now_s: float, *, seen: bool) -> None:
        """Note a first token; ``seen`` is False where it was only due."""
        under = self._under.get(call_id)
        if under is None or under.first_s is not None:
            return
        meter = self._meters[under.endpoint]
        meter.advance(now_s)
        fresh = under.prompt_tokens - under.cached_tokens
        meter.prefilled += fresh
        meter.prefilled_square += fresh * (fresh + 2.0 * under.cached_tokens)
        meter.calls += 1
        meter.context += under.context
        under.first_s, under.seen, under.mark = now_s, seen, meter.mark()

    def gone(self, call_id: str, now_s: float) -> None:
        """Stop counting a call that failed or was cancelled; unknown ones are ignored."""
        under = self._under.pop(call_id, None)
        if under is not None:
            self._leave(under, now_s)

    def finished(self, event: CallFinished) -> None:
        """Learn from a call that ended well; unknown ones are ignored."""
        under = self._under.pop(event.call_id, None)
        if under is None:
            return
        self._leave(under, event.now_s)
        if event.prompt_tokens is not None:
            under.prompt_tokens = event.prompt_tokens
        if event.cached_tokens is not None:
            under.cached_tokens = event.cached_tokens
        under.cached_tokens = min(under.cached_tokens, max(under.prompt_tokens - 1, 0))
        self._learn(under, event.output_tokens, event.now_s)
        row = self.rows[under.endpoint].news()
        if row is not None:
            self._states[under.endpoint].latency = row

    def _leave(self, under: _Under, now_s: float) -> None:
        meter = self._meters[under.endpoint]
        meter.advance(now_s)
        if under.first_s is not None:
            meter.calls -= 1
            meter.context -= under.context
            if not meter.calls:
                meter.context = 0.0  # sums of floats in another order; an idle endpoint is exact

    def _learn(self, under: _Under, output_tokens: int, now_s: float) -> None:
        row, meter = self.rows[under.endpoint], self._meters[under.endpoint]
        own = under.prompt_tokens + output_tokens / 2
        if under.first_s is not None and now_s > under.first_s:
            span = now_s - under.first_s
            calls_s, context_s, prefilled, square = (
                after - before for after, before in zip(meter.mark(), under.mark, strict=True)
            )
            decode = decode_counts(
                max(output_tokens - 1, 0),
                calls=calls_s / span,
                kv_tokens=max(own, context_s / span - under.context + own),
                prefilled_tokens=prefilled,
                prefilled_square=square,
            )
        else:
            decode = decode_counts(
                max(output_tokens - 1, 0),
                calls=under.calls + 1,
                kv_tokens=under.context_before + own,
            )
        prefill = prefill_counts(
            under.prompt_tokens - under.cached_tokens,
            depth=under.cached_tokens,
            calls=under.calls,
            kv_tokens=under.context_before,
            ahead_tokens=under.ahead_tokens,
            step_tokens=self._states[under.endpoint].endpoint.max_num_batched_tokens,
        )
        if not under.seen or under.first_s is None:
            if not under.waited:
                row.observe(prefill + decode, now_s - under.sent_s, now_s)
            return
        if not under.waited:
            row.observe(prefill, under.first_s - under.sent_s, now_s, watch=False)
        if output_tokens > 1:
            row.observe(decode, now_s - under.first_s, now_s)
