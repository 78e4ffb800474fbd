"""When to stop sending to an endpoint, and how it earns its way back.

=========  =========================================================  ==============================
state      takes                                                      leaves by
=========  =========================================================  ==============================
closed     every call                                                 failures, silence, being an
                                                                      outlier -> open
open       nothing until a pause is over and ``/health`` is well      a good probe -> half-open
half-open  one trial call in ``1 / trial_share``; every call if no    trials that go well -> closed;
           endpoint of its model is closed                            a bad one -> open, longer
=========  =========================================================  ==============================

House rules
-----------
* A failed connect opens at once; broken or silent answers and 5xx do after several in a row, or
  when they are a large share of late and the endpoint's peers do better. So an endpoint that fails
  fast does not attract load.
* Answers of 4xx are the client's fault and count for nothing.
* An outlier is judged against the median of the other endpoints of its model, and never more than
  ``max_ejected`` of them are out for that reason: what is slow everywhere is load, not a fault.
* An endpoint that drains takes no new call, whatever its state, and finishes what it has.
* Times are wall seconds of a monotonic clock and passed in.

References
----------
States: Nygard, Release It!, "Circuit Breaker"; outlier ejection against peers with a cap on the
share ejected: Envoy's outlier detection.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import Any

__all__ = ["Breaker", "FleetHealth", "HealthRules", "State"]

_OUTCOMES = 64
"""Outcomes kept of an endpoint."""
_RATIOS = 7
"""Latency ratios whose median is an endpoint's slowness."""
_DOUBLINGS = 5


class State(Enum):
    """What an endpoint may be sent."""

    CLOSED = "closed"
    HALF_OPEN = "half_open"
    OPEN = "open"


@dataclass(frozen=True, slots=True, kw_only=True)
class HealthRules:
    """When an endpoint is taken out, and how it comes back.

    Parameters
    ----------
    failures
        Failures in a row that open it, >= 1.
    pause_s
        Least time open, > 0; doubles with each opening that follows soon, up to 32 times.
    trials
        Calls that must go well before it is closed again, >= 1.
    trial_share
        Share of its model's calls that may be trials, in (0, 1].
    window_s
        Age beyond which an outcome says nothing, > 0.
    min_calls
        Outcomes below which nobody is an outlier, >= 1.
    error_share
        Share of failures from which an endpoint is one, if its peers' median is below half of its.
    slow_ratio
        Times its peers' median slowness from which it is one, > 1.
    max_ejected
        Largest share of a model's endpoints that may be out as outliers, [0, 1).
    misses
        Health checks in a row without a good answer that open it, >= 1.
    """

    failures: int = 3
    pause_s: float = 1.0
    trials: int = 2
    trial_share: float = 0.01
    window_s: float = 30.0
    min_calls: int = 5
    error_share: float = 0.5
    slow_ratio: float = 4.0
    max_ejected: float = 0.5
    misses: int = 2


class Breaker:
    """The state of one endpoint.

    Parameters
    ----------
    rules
        See `HealthRules`.

    Attributes
    ----------
    state, why
        Where it is, and what opened it last.
    draining
        Whether it takes no new calls by an operator's will.
    cold
        Whether it was out of reach while open, so its cache is probably lost.
    """

    __slots__ = (
        "_closed_at_s", "_credit", "_failures", "_good", "_misses", "_pause_s", "_retry_at_s",
        "_rules", "_times_open", "_trial_out", "cold", "draining", "state", "why",
    )  # fmt: skip

    def __init__(self, rules: HealthRules) -> None:
        self._rules = rules
        self._failures = 0
        self._misses = 0
        self._good = 0
        self._times_open = 0
        self._pause_s = 0.0
        self._retry_at_s = 0.0
        self._closed_at_s = 0.0
        self._credit = 0.0
        self._trial_out = False
        self.state = State.CLOSED
        self.why = ""
        self.draining = False
        self.cold = False

    @property
    def down(self) -> bool:
        """Whether it is open."""
        return self.state is State.OPEN

    @property
    def takes_calls(self) -> bool:
        """Whether anything may be sent, if only as a trial."""
        return not self.draining and self.state is not State.OPEN

    def success(self, now_s: float) -> bool:
        """Note a good answer; return whether it closes the endpoint just now."""
        self._failures = self._misses = 0
        if self.state is State.HALF_OPEN:
            self._good += 1
            self._credit = 1.0  # a good trial earns the next one
            if self._good >= self._rules.trials:
                self.state = State.CLOSED
                self._closed_at_s = now_s
                return True
        elif self.state is State.CLOSED and now_s - self._closed_at_s >= self._pause_s:
            # Well for as long as it was out: the next pause is a short one again.
            self._times_open = 0
        return False

    def failure(self, now_s: float, why: str = "", *, unreachable: bool = False) -> bool:
        """Note a failure; return whether it opens the endpoint just now."""
        if self.state is State.OPEN:
            self.cold |= unreachable
            return False
        self._failures += 1
        if unreachable or self.state is State.HALF_OPEN or self._failures >= self._rules.failures:
            self.open(now_s, why, unreachable=unreachable)
            return True
        return False

    def open(self, now_s: float, why: str, *, unreachable: bool = False) -> None:
        """Let nothing pass until the pause is over and a probe is good."""
        self.state = State.OPEN
        self.why = why
        self.cold = unreachable
        self._pause_s = self._rules.pause_s * 2 ** min(self._times_open, _DOUBLINGS)
        self._retry_at_s = now_s + self._pause_s
        self._times_open += 1
        self._failures = self._misses = 0

    def probed(self, now_s: float, *, well: bool) -> bool:
        """Note what a health check said; return whether the state changes.

        Of an endpoint that is open it counts once the pause is over.
        """
        if self.state is State.OPEN:
            self.cold |= not well
            return well and now_s >= self._retry_at_s and self.recovered()
        self._misses = 0 if well else self._misses + 1
        if self._misses < self._rules.misses:
            return False
        self.open(now_s, "health", unreachable=True)
        return True

    def recovered(self) -> bool:
        """Let trials begin if it is open; return whether it was."""
        if self.state is not State.OPEN:
            return False
        self.state = State.HALF_OPEN
        self._good = 0
        self._trial_out = False
        # Out of reach before, well now: that says something, so it is tried at once. Where
        # ``/health`` was well all along it says nothing.
        self._credit = 1.0 if self.cold else 0.0
        return True

    def may_probe(self, now_s: float) -> bool:
        """Return whether an endpoint that is open may be probed now."""
        return self.state is State.OPEN and now_s >= self._retry_at_s

    def pause_left_s(self, now_s: float) -> float:
        """Return how long it is until it may be probed, >= 0."""
        return max(0.0, self._retry_at_s - now_s) if self.state is State.OPEN else 0.0

    def earn(self) -> bool:
        """Count a call that goes elsewhere; return whether a trial is due instead."""
        self._credit = min(2.0, self._credit + self._rules.trial_share)
        return self._credit >= 1.0 and not self._trial_out

    def begin_trial(self) -> None:
        """Note that a call goes there on trial."""
        self._credit -= 1.0
        self._trial_out = True

    def end_trial(self) -> None:
        """Note that a call there has ended, however it did."""
        self._trial_out = False

    def to_json(self, now_s: float) -> dict[str, Any]:
        """Return the state, JSON-ready."""
        return {
            "state": self.state.value,
            "why": self.why if self.state is not State.CLOSED else "",
            "draining": self.draining,
            "cold": self.cold,
            "times_open": self._times_open,
            "pause_left_s": round(self.pause_left_s(now_s), 3),
        }


class _Window:
    """What an endpoint did of late."""

    __slots__ = ("_outcomes", "_ratios", "_rules", "failed", "slowness")

    def __init__(self, rules: HealthRules) -> None:
        self._rules = rules
        self.clear()

    def clear(self) -> None:
        self._outcomes: deque[tuple[float, bool]] = deque(maxlen=_OUTCOMES)
        self._ratios: deque[tuple[float, float]] = deque(maxlen=_RATIOS)
        self.failed = 0
        self.slowness: float | None = None
        """Median ratio of observed to expected seconds, None below the least number of calls."""

    def add(self, now_s: float, *, failed: bool, ratio: float | None = None) -> None:
        if len(self._outcomes) == _OUTCOMES:
            self.failed -= self._outcomes[0][1]
        self._outcomes.append((now_s, failed))
        self.failed += failed
        if ratio is not None:
            self._ratios.append((now_s, ratio))
            self._weigh()

    def forget(self, now_s: float) -> None:
        """Leave out what is too old."""
        since_s = now_s - self._rules.window_s
        while self._outcomes and self._outcomes[0][0] < since_s:
            self.failed -= self._outcomes.popleft()[1]
        if self._ratios and self._ratios[0][0] < since_s:
            while self._ratios and self._ratios[0][0] < since_s:
                self._ratios.popleft()
            self._weigh()

    def _weigh(self) -> None:
        """Find the slowness anew; it is read far more often than it changes."""
        ratios = sorted([ratio for _, ratio in self._ratios])
        enough = len(ratios) >= min(_RATIOS, self._rules.min_calls)
        middle = len(ratios) // 2
        self.slowness = 0.5 * (ratios[middle] + ratios[~middle]) if enough else None

    @property
    def error_share(self) -> float | None:
        """Share of failures, None below the least number of calls."""
        calls = len(self._outcomes)
        return self.failed / calls if calls >= self._rules.min_calls else None


class FleetHealth:
    """The breakers of a fleet, and the comparison between its endpoints.

    Parameters
    ----------
    models
        Model of each endpoint, in fleet order.
    rules
        See `HealthRules`.

    Attributes
    ----------
    breakers
        In fleet order.
    """

    def __init__(self, models: Sequence[str], rules: HealthRules) -> None:
        self._models = tuple(models)
        self._rules = rules
        self.breakers = [Breaker(rules) for _ in models]
        self._windows = [_Window(rules) for _ in models]
        self._outliers: set[int] = set()

    def succeeded(self, index: int, now_s: float, ratio: float | None = None) -> bool:
        """Note a good answer; return whether the endpoint's state changes.

        ``ratio`` is observed over expected seconds, None where nothing can be said.
        """
        breaker, window = self.breakers[index], self._windows[index]
        breaker.end_trial()
        window.add(now_s, failed=False, ratio=ratio)
        if breaker.state is State.HALF_OPEN and ratio is not None and self._slow(index, ratio):
            breaker.open(now_s, "slow")
            return True
        if breaker.success(now_s):
            self._outliers.discard(index)
            window.clear()
            return True
        return self._judge(index, now_s)

    def failed(self, index: int, now_s: float, why: str, *, unreachable: bool = False) -> bool:
        """Note a failure; return whether it opens the endpoint just now."""
        breaker = self.breakers[index]
        breaker.end_trial()
        self._windows[index].add(now_s, failed=True)
        return breaker.failure(now_s, why, unreachable=unreachable) or self._judge(index, now_s)

    def refused(self, index: int, now_s: float) -> bool:
        """Note that it was too busy to take a call; return whether that opens it just now.

        Being full is no failure, but an endpoint that refuses most calls while its peers take
        theirs looks idle and would attract every one.
        """
        self.breakers[index].end_trial()
        self._windows[index].add(now_s, failed=True)
        return self._judge(index, now_s)

    def ended(self, index: int) -> None:
        """Note that a call there ended without saying anything of it."""
        self.breakers[index].end_trial()

    def spared(self, model: str | None) -> frozenset[int]:
        """Return the endpoints that the next call of a model should not go to.

        They are half-open, while another endpoint of the model is closed. `trial` says when one
        of them is due a call all the same.
        """
        trying = State.HALF_OPEN
        half = [
            index
            for index, breaker in enumerate(self.breakers)
            if breaker.state is trying and (model is None or self._models[index] == model)
        ]
        if not half or not self._any_closed(model):
            return frozenset()
        return frozenset(half)

    def trial(self, spared: frozenset[int]) -> int | None:
        """Count a call; return the spared endpoint that it should try, or None."""
        due = None
        for index in sorted(spared):
            if self.breakers[index].earn() and not self.breakers[index].draining and due is None:
                due = index
        return due

    def refit(self, models: Sequence[str]) -> None:
        """Go on with these models: those of the endpoints known so far, and of new ones."""
        new = len(models) - len(self._models)
        self._models = tuple(models)
        self.breakers += [Breaker(self._rules) for _ in range(new)]
        self._windows += [_Window(self._rules) for _ in range(new)]

    def to_json(self, index: int, now_s: float) -> dict[str, Any]:
        """Return what is known of an endpoint, JSON-ready."""
        window = self._windows[index]
        window.forget(now_s)
        return {
            **self.breakers[index].to_json(now_s),
            "outlier": index in self._outliers,
            "error_share": window.error_share,
            "slowness": window.slowness,
        }

    def _of(self, model: str | None) -> list[int]:
        return [i for i, one in enumerate(self._models) if model is None or one == model]

    def _any_closed(self, model: str | None) -> bool:
        return any(
            self.breakers[i].state is State.CLOSED and not self.breakers[i].draining
            for i in self._of(model)
        )

    def _peers(self, index: int) -> list[_Window]:
        """Return what the other endpoints of its model that take calls did."""
        return [
            self._windows[i]
            for i in self._of(self._models[index])
            if i != index and self.breakers[i].state is State.CLOSED
        ]

    def _judge(self, index: int, now_s: float) -> bool:
        """Open a closed endpoint if it is an outlier; return whether it is."""
        breaker, own = self.breakers[index], self._windows[index]
        if breaker.state is not State.CLOSED:
            return False
        own.forget(now_s)
        why = self._fault(index)
        if not why or not self._may_eject(index):
            return False
        breaker.open(now_s, why)
        self._outliers.add(index)
        own.clear()
        return True

    def _fault(self, index: int) -> str:
        own = self._windows[index]
        share = own.error_share
        if share is not None and share >= self._rules.error_share:
            others = [one.error_share for one in self._peers(index)]
            known = [other for other in others if other is not None]
            if known and median(known) < share / 2:
                return "errors"
        slowness = own.slowness
        return "slow" if slowness is not None and self._slow(index, slowness) else ""

    def _slow(self, index: int, ratio: float) -> bool:
        others = [one.slowness for one in self._peers(index)]
        known = [other for other in others if other is not None]
        return bool(known) and ratio >= self._rules.slow_ratio * median(known)

    def _may_eject(self, index: int) -> bool:
        peers = self._of(self._models[index])
        out = sum(i in self._outliers for i in peers if i != index)
        return out + 1 <= self._rules.max_ejected * len(peers)
