"""Latency of an endpoint, learned while it serves: recursive, non-negative, forgetting.

For the runtime: numpy only, a few microseconds an observation, no estimator. An observation is a
row of six *counts* and the seconds they took, ``seconds = counts @ (a, b, c, d, e, f)`` with the
coefficients of `planner.domain.latency.LatencyRow` in seconds. Three sources make such rows:
`prefill_counts` and `decode_counts` from a request's own times, `scrape_counts` from two scrapes
of ``/metrics`` and nothing else.

How it learns
-------------
Unknowns are the six ratios to the prior row and their common scale s. Each observation adds its
squared relative error, and earlier ones fade by ``forgetting``; each ratio is pulled to s with the
weight of `ANCHOR` observations, and s to one with the weight of one. So a handful of requests
corrects the speed as a whole (a wrong row, a roofline, a straggler) and hundreds correct the
coefficients they speak of, while a coefficient that nothing speaks of follows the others.

References
----------
Forgetting and the drift alarm (ratio above 1.15 for 30 s): reference notes on fitting from
telemetry, section 2.2; recursive least squares: Haykin, Adaptive Filter Theory, chapter 10.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.domain.latency import LatencyRow

__all__ = [
    "LatencyBook",
    "OnlineLatency",
    "Scrape",
    "decode_counts",
    "non_negative",
    "prefill_counts",
    "scrape_counts",
]

Floats = npt.NDArray[np.float64]

FORGETTING = 0.99
ANCHOR = 3.0
HUBER = 0.3
"""Relative error beyond which an observation counts less."""
LEVERAGE = 4.0
"""Times the observed seconds from which those expected are what an error is relative to."""
ALARM_RATIO, ALARM_S = 1.15, 30.0
LEARNING = 50
"""Observations after which the row in use becomes what drift is measured against."""
RENEWAL = 8
"""Observations from one row in use to the next, after those."""
_EWMA = 0.1
_EXCHANGES = 3
"""Exchanges of all unknowns on the wrong side that may not make them fewer."""
_STEPS = 100
_TOLERANCE = 1e-9
_UNITS = np.array([1e-3, 1e-6, 1e-9, 1e-3, 1e-6, 1e-9])
"""Seconds per unit of the fields of a row: ms, us, ns, ms, us, ns."""


def _pull() -> Floats:
    """Return the quadratic that pulls six ratios to their scale, and that to one."""
    matrix = ANCHOR * np.eye(7)
    matrix[:6, 6] = matrix[6, :6] = -ANCHOR
    matrix[6, 6] = 6 * ANCHOR + 1.0
    return matrix


_PULL = _pull()


def _coefficients(row: LatencyRow) -> Floats:
    fields = (
        row.prefill_base_ms, row.prefill_us_per_token, row.prefill_ns_per_token_sq,
        row.decode_base_ms, row.decode_us_per_call, row.decode_ns_per_kv_token,
    )  # fmt: skip
    return np.asarray(np.array(fields) * _UNITS * row.scale)


def _row(coefficients: Floats, unit: Floats) -> LatencyRow:
    values = coefficients / _UNITS
    return LatencyRow(
        prefill_base_ms=float(values[0]),
        prefill_us_per_token=float(values[1]),
        prefill_ns_per_token_sq=float(values[2]),
        # A step that reads the weights for nothing is not physics, however the fit came out.
        decode_base_ms=max(float(values[3]), 0.02 * unit[3] / _UNITS[3]),
        decode_us_per_call=float(values[4]),
        decode_ns_per_kv_token=float(values[5]),
    )


def prefill_counts(
    tokens: float,
    *,
    depth: float = 0.0,
    calls: float = 0.0,
    kv_tokens: float = 0.0,
    ahead_tokens: float = 0.0,
    step_tokens: float = 2048.0,
) -> Floats:
    """Return the counts of a time to first token, waiting in the engine's queue left out.

    Parameters
    ----------
    tokens, depth
        Uncached prompt tokens, and cached ones before them.
    calls, kv_tokens
        Calls that decode when it is sent, and their context; without any the engine is idle.
    ahead_tokens
        Uncached prompt tokens of others still to be computed before it.
    step_tokens
        The engine's token budget of a step.
    """
    work = tokens + ahead_tokens
    square = tokens * (tokens + 2.0 * depth) + ahead_tokens * ahead_tokens
    if calls <= 0:
        return np.array([1.0, work, square, 0.0, 0.0, 0.0])
    # It joins half a step late on average, and its own steps serve the others too.
    passes = 0.5 + math.ceil(max(work, 1.0) / step_tokens)
    return np.array([0.0, work, square, passes, passes * calls, passes * kv_tokens])


def decode_counts(
    steps: float,
    *,
    calls: float,
    kv_tokens: float,
    prefilled_tokens: float = 0.0,
    prefilled_square: float = 0.0,
) -> Floats:
    """Return the counts of a decode: from a call's first token to its last.

    Parameters
    ----------
    steps
        Output tokens less one.
    calls, kv_tokens
        Calls that decoded meanwhile, itself included, and their context; averages over its span.
    prefilled_tokens, prefilled_square
        Uncached prompt tokens of calls whose first token fell into the span, and the sum of
        n (n + 2 depth) over them.
    """
    return np.array(
        [0.0, prefilled_tokens, prefilled_square, steps, steps * calls, steps * kv_tokens]
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Scrape:
    """What one scrape of an engine's ``/metrics`` says; counters are totals since its start.

    Parameters
    ----------
    time_s
        When.
    steps
        ``iteration_tokens_total_count``.
    generation_tokens, prompt_tokens, cached_tokens
        ``generation_tokens_total``, ``prompt_tokens_total``, ``prefix_cache_hits_total``.
    prompts
        Requests whose prompt is counted: ``request_prompt_tokens_count`` or finished requests.
    running, kv_tokens
        Gauges: ``num_requests_running``, and ``kv_cache_usage_perc`` times the pool's tokens.
    gap_s, gaps
        Sum and count of ``inter_token_latency_seconds``; zeros if it is not exposed.
    """

    time_s: float
    steps: float
    generation_tokens: float
    prompt_tokens: float
    cached_tokens: float
    prompts: float
    running: float
    kv_tokens: float
    gap_s: float = 0.0
    gaps: float = 0.0


def scrape_counts(before: Scrape, after: Scrape) -> tuple[Floats, float] | None:
    """Return counts and seconds of the mean step between two scrapes, or None if they say nothing.

    Notes
    -----
    ``dt = d dN + e dG + f dN KV + b dP + c dP^2 / prompts`` while the engine never idles, per
    step. With inter-token gaps the mean gap stands for ``dt / dN``, idle times do not matter, and
    intervals of a mostly idle engine count too; prefills then stall only steps that had others.
    Without them only intervals with calls at both ends are used. ``prompt_tokens_total`` jumps at
    the first token, so chunks of long prompts are booked late; over many intervals it evens out.
    """
    steps = after.steps - before.steps
    generated = after.generation_tokens - before.generation_tokens
    seconds = after.time_s - before.time_s
    gaps = after.gaps - before.gaps
    busy = min(before.running, after.running) >= 1
    restarted = min(steps, generated, gaps, seconds) < 0
    if restarted or steps < 1 or generated < 1 or not (busy or gaps >= 1):
        return None
    calls = generated / steps
    fresh = max(
        0.0,
        (after.prompt_tokens - before.prompt_tokens) - (after.cached_tokens - before.cached_tokens),
    )
    prompts = max(after.prompts - before.prompts, 1.0 if fresh > 0 else 0.0)
    # A prefill on an idle engine is in no gap between tokens.
    stalled = 1.0 if busy or gaps < 1 else max(0.0, 1.0 - 1.0 / calls)
    square = fresh * fresh / prompts if prompts else 0.0
    kv_tokens = (before.kv_tokens + after.kv_tokens) / 2 if busy else after.kv_tokens
    mean_s = (after.gap_s - before.gap_s) / gaps if gaps >= 1 and not busy else seconds / steps
    if not mean_s > 0.0:
        return None
    counts = np.array(
        [0.0, stalled * fresh / steps, stalled * square / steps, 1.0, calls, kv_tokens]
    )
    return counts, mean_s


class OnlineLatency:
    """The latency row of one endpoint, corrected by what it is seen to do.

    Parameters
    ----------
    prior
        The row before anything was seen: of the fleet file, of ``data/latency_rows.csv``, or
        `LatencyRow.roofline`.
    forgetting
        Weight that an observation keeps at each later one, in (0, 1].
    """

    def __init__(self, prior: LatencyRow, *, forgetting: float = FORGETTING) -> None:
        self.prior = prior
        self.forgetting = forgetting
        self.observations = 0
        self.ratio = 1.0
        """Smoothed observed over expected seconds; expected by the row learned at first."""
        # A zero in the prior is a small number unsure of itself, not a prohibition.
        self._unit = np.maximum(_coefficients(prior), 0.1 * _UNITS)
        self._unknowns = np.ones(7)
        # Of the quadratic: its matrix, and its vector as the last row.
        self._sums = np.zeros((7, 6))
        self._seen = np.zeros(7)  # counts in units, and seconds, of the present observation
        self._reference = _coefficients(prior)
        self._usual: LatencyRow | None = None
        self._above_since: float | None = None
        self._last_s = 0.0
        self._solved = True
        self._told = 0

    @property
    def row(self) -> LatencyRow:
        """The row as learned so far, scale 1; the prior itself before the first observation."""
        if not self.observations:
            return self.prior
        return _row(self._now(), self._unit)

    def news(self) -> LatencyRow | None:
        """Return the row as learned so far if it is worth taking up anew, else None.

        At first it is after each observation, later on after every few: solving for it takes
        longer than all else that an observation does, and a single one of many moves it little.
        """
        fresh = self.observations - self._told
        if fresh < (RENEWAL if self.observations > LEARNING else 1):
            return None
        self._told = self.observations
        return self.row

    @property
    def usual(self) -> LatencyRow | None:
        """The row that drift is measured against, None until enough was seen to know it."""
        if self.observations < LEARNING:
            return None
        if self._usual is None:
            self._usual = _row(self._reference, self._unit)
        return self._usual

    @property
    def drifting(self) -> bool:
        """Whether the endpoint has been slower than it was by 15 % for 30 s."""
        since = self._above_since
        return since is not None and self._last_s - since >= ALARM_S

    def seconds(self, counts: Floats) -> float:
        """Return the seconds that counts are expected to take."""
        return float(counts @ self._now())

    def observe(self, counts: Floats, seconds: float, now_s: float, *, watch: bool = True) -> None:
        """Learn from counts and the seconds they took; what is not finite or not > 0 is ignored.

        ``now_s`` never goes back. ``watch`` is False for observations that say little of drift,
        such as times to first token, whose waits vary by more than an endpoint does.
        """
        expected = float(counts @ self._reference)
        # Counts that are not finite make no finite sum, since what they are weighted with is >= 0.
        if not (0.0 < seconds < math.inf and 0.0 < expected < math.inf):
            return
        # An answer that was buffered on its way comes at once; relative to next to nothing it would
        # outweigh all others.
        seen = self._seen
        scaled = np.multiply(counts, self._unit, out=seen[:6])
        seen[6] = seconds
        now = float(scaled @ self._unknowns[:6])
        whole = max(seconds, now / LEVERAGE)
        error = abs(now - seconds) / whole
        weight = min(1.0, HUBER / max(error, 1e-12)) if self.observations >= 10 else 1.0
        self._sums *= self.forgetting
        self._sums += seen[:, None] * (scaled * (weight / (whole * whole)))
        self._solved = False
        self.observations += 1
        if watch:
            self._watch(seconds / expected, now_s)
        if self.observations == LEARNING:
            self.accept()

    def accept(self) -> None:
        """Take the present speed as the normal one: drift is measured against it from now on."""
        self._reference = self._now().copy()
        self._usual = None
        self.ratio = 1.0
        self._above_since = None

    def _watch(self, ratio: float, now_s: float) -> None:
        self._last_s = now_s
        if self.observations < LEARNING:
            return
        self.ratio += _EWMA * (ratio - self.ratio)
        if self.ratio <= ALARM_RATIO:
            self._above_since = None
        elif self._above_since is None:
            self._above_since = now_s

    def _now(self) -> Floats:
        if not self._solved:
            self._solve()
        return np.asarray(self._unknowns[:6] * self._unit)

    def _solve(self) -> None:
        """Minimise the quadratic over unknowns >= 0."""
        matrix = _PULL.copy()
        matrix[:6, :6] += self._sums[:6]
        vector = np.append(self._sums[6], 1.0)
        self._unknowns = non_negative(matrix, vector, self._unknowns > 0.0)
        self._solved = True


def non_negative(matrix: Floats, vector: Floats, free: npt.NDArray[np.bool_]) -> Floats:
    """Return x >= 0 with the least x A x / 2 - b x, for a positive definite A.

    Parameters
    ----------
    matrix, vector
        A and b.
    free
        Guess of the unknowns that are not 0; usually those of the last time, and then right.

    Notes
    -----
    Unknowns on the wrong side are exchanged all at once, and only the last of them once that no
    longer makes them fewer (Kim and Park 2011, SIAM J. Scientific Computing 33, "block principal
    pivoting"). That ends, but for rounding, hence the limit; the last solution is good enough then.
    """
    fewest, patience = len(vector) + 1, _EXCHANGES
    found = vector
    for _ in range(_STEPS):
        if free.all():
            found = np.asarray(np.linalg.solve(matrix, vector), dtype=np.float64)
            wrong = found < -_TOLERANCE
        else:
            found = np.zeros(len(vector))
            found[free] = np.linalg.solve(matrix[np.ix_(free, free)], vector[free])
            # Of those that are free the value, of the others the slope, may not be below 0.
            slope = (matrix @ found - vector) / matrix.diagonal()
            wrong = np.where(free, found, slope) < -_TOLERANCE
        count = int(np.count_nonzero(wrong))
        if not count:
            break
        if count < fewest:
            fewest, patience = count, _EXCHANGES
        elif patience:
            patience -= 1
        else:
            wrong[: int(np.flatnonzero(wrong)[-1])] = False
        free = free ^ wrong
    return np.maximum(found, 0.0)


class LatencyBook:
    """The rows of many endpoints in one array, to forecast a call on all of them at once.

    Parameters
    ----------
    rows
        One per endpoint.
    """

    def __init__(self, rows: Sequence[LatencyRow]) -> None:
        self._coefficients = np.array([_coefficients(row) for row in rows]).reshape(-1, 6)

    def __len__(self) -> int:
        return len(self._coefficients)

    def forecast(
        self,
        uncached_tokens: Floats | float,
        output_tokens: float,
        calls: Floats,
        kv_tokens: Floats,
        *,
        depth: Floats | float = 0.0,
        ahead_tokens: Floats | float = 0.0,
    ) -> tuple[Floats, Floats, Floats]:
        """Return TTFT, TPOT and end-to-end seconds per endpoint, no waiting for a slot.

        Parameters
        ----------
        uncached_tokens, depth
            Prompt tokens to compute, and cached ones, per endpoint or the same for all.
        output_tokens
            Expected length of the answer, >= 1.
        calls, kv_tokens
            Calls decoding on each endpoint now and their context, shape (endpoints,).
        ahead_tokens
            Prompt tokens still to be computed before it.
        """
        a, b, c, d, e, f = self._coefficients.T
        own = uncached_tokens * (uncached_tokens + 2.0 * depth)
        work = b * (uncached_tokens + ahead_tokens) + c * (own + ahead_tokens * ahead_tokens)
        step = d + e * calls + f * kv_tokens
        ttft = work + np.where(calls > 0, 1.5 * step, a)
        context = uncached_tokens + depth + output_tokens / 2
        tpot = d + e * (calls + 1) + f * (kv_tokens + context)
        return ttft, tpot, ttft + max(output_tokens - 1.0, 0.0) * tpot
