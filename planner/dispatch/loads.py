"""The load of all endpoints as arrays in fleet order, so that a decision costs them in one pass.

What a call would take on an endpoint is linear in a few features of the call (prompt, square of
the prompt, output, output x context, context), with coefficients that only change when the
endpoint does. So the coefficients are kept, one column an endpoint, and a decision multiplies
them with the features; `planner.dispatch.cost` has the formulas.

The delay a call imposes on residents is not linear in its output: it needs
F(x) = sum_j w_j min(x, left_j), with w the residents' criticalities and left_j what remains of
their outputs. F is concave and piecewise linear; it is kept at x = sqrt(2)^k and interpolated,
which understates a resident's share by 8.6% at worst and by nothing where left_j is in another
interval than x. Most policies never ask for it, so it is kept from when it is first asked for.

``left_j`` falls while a resident decodes. It is brought up to date for all residents together, at
the first token of a call that comes `SWEEP_S` seconds after the last time, or in a decision when
none has come for twice as long; in between it stands still. Lengths are heavy-tailed, so overdue
calls go on: a quarter of its forecast is always left of a call.

With prefill and decode pools, a decode endpoint is taken for the finish there alone, so the wait
for its slots has to be right. There a slot is taken to be kept for at least as long as overdue
calls of its site do on average. In other fleets that is no gain: waits come closer to what they
turn out to be, but rules that also count the delay imposed on others do better with the short ones.

Writers are scalar and go through `array.array` (a tenth of the time of writing a numpy element);
readers see the same memory as numpy arrays.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from functools import lru_cache
from struct import Struct
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from planner.domain.latency import LatencyRow

if TYPE_CHECKING:
    from planner.dispatch.view import EndpointState, Resident

__all__ = ["LEAST_LEFT", "Loads", "Pass"]

Floats = npt.NDArray[np.float64]

SWEEP_S = 0.1
LEAST_LEFT = 0.25
"""Share of its forecast that a call has always left."""
_GRID = np.sqrt(2.0) ** np.arange(44)
"""Lengths at which F is kept, tokens: 1 to 2.9 million."""
_KNOTS = len(_GRID)
_LAST = _KNOTS - 4
"""The last interval that is interpolated in."""
_LOWS = tuple(2.0 ** (0.5 * place) for place in range(_KNOTS))
_WIDTH = 8
"""Places for residents that an endpoint begins with."""
_OWN_ROWS = 5
FEATURES = 6
UNIT, TOKENS, SQUARE_TOKENS, OUTPUT, OUTPUT_CONTEXT, CONTEXT_TOKENS = range(FEATURES)
"""Features of a call: 1, prompt, square of the prompt, output, output x context, context."""
pack_features = Struct(f"{FEATURES}d").pack_into
"""Writes them in this order, at a place in bytes."""
RESULTS = 4
WAIT, IMPOSED, SERVICE, DRAG = range(RESULTS)
"""What a pass gives: wait for a slot, what prefill and keeping a slot impose, service time, and by
how much the call slows a step."""
ROWS = FEATURES * RESULTS
"""Rows of the coefficients: each feature in each result; most are zero."""
TURN_STEP = UNIT * RESULTS + WAIT
TURN_CONTEXT = CONTEXT_TOKENS * RESULTS + WAIT
BASE = UNIT * RESULTS + SERVICE
PREFILL = TOKENS * RESULTS + SERVICE
SQUARE = SQUARE_TOKENS * RESULTS + SERVICE
STEP = OUTPUT * RESULTS + SERVICE
CONTEXT = OUTPUT_CONTEXT * RESULTS + SERVICE
IMPOSED_PREFILL = TOKENS * RESULTS + IMPOSED
IMPOSED_SQUARE = SQUARE_TOKENS * RESULTS + IMPOSED
IMPOSED_STEP = OUTPUT * RESULTS + IMPOSED
IMPOSED_CONTEXT = OUTPUT_CONTEXT * RESULTS + IMPOSED
SLOPE = UNIT * RESULTS + DRAG
SLOPE_CONTEXT = CONTEXT_TOKENS * RESULTS + DRAG


def knot(tokens: float) -> tuple[int, float]:
    """Return the interval of the grid that a length lies in, and how far into it, [0, 1)."""
    if tokens <= 1.0:
        return 0, 0.0
    place = int(2.0 * math.log2(tokens))
    if place > _LAST:
        place = _LAST
    return place, (tokens / _LOWS[place] - 1.0) / 0.41421356237309515


@lru_cache(maxsize=1024)
def _share(tokens: float, weight: float) -> Floats:
    """Return one resident's part of F; forecasts of a call site repeat themselves."""
    share: Floats = weight * np.minimum(_GRID, tokens)
    return share


class _Seconds:
    """A latency row in seconds; ``base`` is what a prefill takes beyond a step when idle."""

    __slots__ = ("base", "fixed", "per_kv", "per_square", "per_token", "row", "slope")

    def __init__(self, row: LatencyRow) -> None:
        self.row = row
        self.per_token = row.scale * row.prefill_us_per_token * 1e-6
        self.per_square = row.scale * row.prefill_ns_per_token_sq * 1e-9
        self.fixed = row.scale * row.decode_base_ms * 1e-3
        self.slope = row.scale * row.decode_us_per_call * 1e-6
        self.per_kv = row.scale * row.decode_ns_per_kv_token * 1e-9
        self.base = max(0.0, row.scale * row.prefill_base_ms * 1e-3 - self.fixed)


class Pass:
    """Where the costs of a call are reckoned: arrays made once, and views of them.

    Parameters
    ----------
    size
        Endpoints; also an attribute.

    Attributes
    ----------
    cells, call
        The features of the call: written with `pack_features`, and read.
    results
        Their product with the coefficients, (results x endpoints,).
    wait, imposed, service, drag
        Its parts, (endpoints,).
    cell, knots
        Weights of two knots: written, and read.
    """

    __slots__ = (
        "call", "cell", "cells", "drag", "imposed", "knots", "results", "service", "size", "wait",
    )  # fmt: skip

    def __init__(self, size: int) -> None:
        self.size = size
        self.cells = bytearray(8 * FEATURES)
        self.call: Floats = np.frombuffer(self.cells)
        self.results: Floats = np.empty(RESULTS * size)
        self.wait, self.imposed, self.service, self.drag = self.results.reshape(RESULTS, size)
        self.cell = array("d", (1.0, 0.0))
        self.knots: Floats = np.frombuffer(self.cell)


class Loads:
    """Struct of arrays over endpoints and their residents.

    Parameters
    ----------
    states
        In fleet order, with ``index`` their place in it; residents they have are counted.
    pooled
        Whether there are prefill and decode pools.

    Attributes
    ----------
    coefficients
        (rows, endpoints), see the names above; per unit of the feature.
    by_feature
        The same as (features, results x endpoints), to be multiplied with features.
    per_token_s, per_square_s
        Those of prefill: by prompt token, and by its square.
    queue_s
        Prefill queue of each endpoint, s.
    weight
        Residents' criticality, with what waits for a slot: what a second of prefill costs others.
    room_tokens
        Prompt plus output that a call may have without the KV pool limiting the calls at once.
    least_room_tokens
        The least of them, or less.
    workspace
        Where a decision reckons with all this.
    in_flight, total
        Calls of each endpoint, and of all.
    """

    def __init__(self, states: Sequence[EndpointState], *, pooled: bool = False) -> None:
        size = len(states)
        self._pooled = pooled
        self._states = tuple(states)
        self._cells = array("d", bytes(8 * ROWS * size))
        self._queue, self._room, self._pace, self._weights = (
            array("d", bytes(8 * size)) for _ in range(4)
        )
        self._calls = array("q", bytes(8 * size))
        self.coefficients: Floats = np.frombuffer(self._cells).reshape(ROWS, size)
        self.by_feature: Floats = self.coefficients.reshape(FEATURES, RESULTS * size)
        self.per_token_s: Floats = self.coefficients[PREFILL]
        self.per_square_s: Floats = self.coefficients[SQUARE]
        self.weight: Floats = np.frombuffer(self._weights)
        self.queue_s: Floats = np.frombuffer(self._queue)
        self.room_tokens: Floats = np.frombuffer(self._room)
        self.in_flight: npt.NDArray[np.int64] = np.frombuffer(self._calls, dtype=np.int64)
        self.least_room_tokens = math.inf
        self.workspace = Pass(size)
        self.total = 0
        self._seconds: list[_Seconds | None] = [None] * size
        self._own = array("d", bytes(8 * _OWN_ROWS * size))
        self._alone: Floats = np.frombuffer(self._own).reshape(_OWN_ROWS, size)
        self._kept = False  # whether F is
        self._delay: Floats = np.zeros((size, _KNOTS))
        self._imposed: Floats = np.zeros((_KNOTS, size))
        self._tokens_per_s: Floats = np.frombuffer(self._pace)
        self._first_knots = (np.arange(size) * _KNOTS)[:, None]
        self._slots = np.array([state.endpoint.max_num_seqs for state in states])
        # Residents by (endpoint, place); empty places hold zeros.
        self._residents: list[list[Resident]] = [[] for _ in states]
        self._columns: tuple[Floats, ...] = ()
        self._make_room(_WIDTH)
        self._due_s = -math.inf
        self._asked = False
        for state in states:
            for resident in state.residents.values():
                self.add(state, resident)
            self.update(state)

    def add(self, state: EndpointState, resident: Resident) -> None:
        """Count a resident; `update` comes after it."""
        index, there = state.index, self._residents[state.index]
        place = len(there)
        if place == self._left.shape[1]:
            self._make_room(2 * place)
        there.append(resident)
        resident.place = place
        first_s = resident.first_token_s
        self._output[index, place] = self._left[index, place] = resident.output_tokens
        self._since[index, place] = math.inf if first_s is None else first_s
        self._weight[index, place] = resident.criticality
        if self._pooled:
            self._stay[index, place] = resident.output_tokens
            self._least[index, place] = resident.least_left * resident.output_tokens
        if self._kept and resident.criticality:
            self._delay[index] += _share(resident.output_tokens, resident.criticality)

    def first_token(self, state: EndpointState, resident: Resident, now_s: float) -> None:
        """Note that a resident decodes from now on."""
        self._since[state.index, resident.place] = now_s
        if self._asked and now_s >= self._due_s:
            self._sweep(now_s)  # better now than in a decision, which a call waits for

    def remove(self, state: EndpointState, resident: Resident) -> None:
        """Stop counting a resident; `update` comes after it."""
        index, there, place = state.index, self._residents[state.index], resident.place
        if not self._kept:
            pass
        elif len(there) == 1:
            self._delay[index] = 0.0  # floats summed in another order; an idle endpoint is exact
        elif resident.criticality:
            self._delay[index] -= _share(self._left.item(index, place), resident.criticality)
        last = there.pop()
        end = len(there)
        if last is not resident:
            there[place] = last
            last.place = place
            for values in self._columns:
                values[index, place] = values[index, end]
        for values in self._columns:
            values[index, end] = 0.0

    def _make_room(self, places: int) -> None:
        """Keep so many residents of each endpoint."""
        known = self._columns
        columns = tuple(np.zeros((6 if self._pooled else 4, len(self._states), places)))
        for column, values in zip(columns, known, strict=False):
            column[:, : values.shape[1]] = values
        self._columns = columns
        self._output, self._since, self._weight, self._left = columns[:4]
        # How long a slot is kept: without pools what is left.
        self._stay, self._least = columns[4:] or (self._left, self._left)

    def update(self, state: EndpointState) -> None:
        """Derive an endpoint's coefficients from its counters and its latency row."""
        index, calls = state.index, state.in_flight
        row, endpoint, context = state.latency, state.endpoint, state.context_tokens
        slots, seconds = endpoint.max_num_seqs, self._seconds[index]
        if seconds is None or seconds.row is not row:
            seconds = self._learn(index, row)
        per_token, per_square, per_kv = seconds.per_token, seconds.per_square, seconds.per_kv
        fixed, slope = seconds.fixed, seconds.slope
        base = later = turn = 0.0
        if calls < slots:
            step = fixed + slope * (calls + 1) + per_kv * context
            room = state.kv_tokens - context
            if not calls:
                base = seconds.base
                room = math.inf
            if self._kept:
                self._imposed[:, index] = self._delay[index]
        else:
            step = fixed + slope * slots + per_kv * (slots - 1) * context / calls
            room = state.kv_tokens * (calls + 1) / slots - context
            later = (calls + 1 - slots) / slots
            turn = self.turn_tokens(state, slots)
            if self._kept:
                self._imposed[:-2, index] = 0.5 * self._delay[index, 2:]
        weight = state.criticality + later
        queued = state.prefill_tokens
        cells, size = self._cells, len(self._states)
        cells[BASE * size + index] = base
        cells[IMPOSED_PREFILL * size + index] = weight * per_token
        cells[IMPOSED_SQUARE * size + index] = weight * per_square
        cells[STEP * size + index] = step
        cells[IMPOSED_STEP * size + index] = later * step
        cells[IMPOSED_CONTEXT * size + index] = later * per_kv
        cells[TURN_STEP * size + index] = turn * step
        cells[TURN_CONTEXT * size + index] = turn * per_kv
        self._queue[index] = queued * (per_token + per_square * queued) if queued > 0 else 0.0
        self._room[index] = room
        self.least_room_tokens = min(room, self.least_room_tokens)
        self.total += calls - self._calls[index]
        self._calls[index] = calls
        self._weights[index] = weight
        self._pace[index] = 1.0 / (step + per_kv * context / max(calls, 1))

    def _learn(self, index: int, row: LatencyRow) -> _Seconds:
        """Take up the row of an endpoint, which changes far less often than its load."""
        seconds = self._seconds[index] = _Seconds(row)
        size = len(self._states)
        for place, value in (
            (PREFILL, seconds.per_token),
            (SQUARE, seconds.per_square),
            (CONTEXT, seconds.per_kv),
            (SLOPE, seconds.slope),
            (SLOPE_CONTEXT, seconds.per_kv),
        ):
            self._cells[place * size + index] = value
        for place, value in enumerate(
            (
                row.scale * row.prefill_base_ms * 1e-3,
                seconds.per_token,
                seconds.per_square,
                seconds.fixed + seconds.slope,
                seconds.per_kv,
            )
        ):
            self._own[place * size + index] = value
        return seconds

    def alone_s(self, prompt_tokens: float, output_tokens: float) -> Floats:
        """Return the seconds of a call alone on each endpoint, nothing cached; (endpoints,)."""
        context = prompt_tokens + output_tokens / 2
        features = (1.0, prompt_tokens, prompt_tokens**2, output_tokens, output_tokens * context)
        seconds: Floats = np.array(features) @ self._alone
        return seconds

    def turn_tokens(self, state: EndpointState, slots: int) -> float:
        """Return the steps until a call would get a slot of ``slots``, all of them taken.

        It gets the one that frees after in flight - ``slots`` + 1 others have finished; beyond one
        full turn of the slots, each further turn costs a mean remainder.
        """
        calls = state.in_flight
        stay = self._stay[state.index, :calls]
        turns, place = divmod(calls - slots, slots)
        ordered: list[float] = sorted(stay.tolist())
        steps = ordered[place]
        return steps + turns * float(np.add.reduce(stay)) / calls if turns else steps

    @property
    def imposed(self) -> Floats:
        """F of each endpoint at the knots; shape (knots, endpoints).

        Of those with no free slot F(2x) / 2, since a call that waits for a slot meets half of what
        remains of the others.
        """
        if not self._kept:
            self._keep()
        return self._imposed

    def delay_tokens(self, state: EndpointState, tokens: float) -> float:
        """Return F(``tokens``) of one endpoint: steps shared with its residents, weighted."""
        if not self._kept:
            self._keep()
        place, part = knot(tokens)
        low, high = self._delay[state.index, place : place + 2].tolist()
        return float(low + part * (high - low))

    def advance(self, now_s: float) -> None:
        """Bring what remains of the residents up to date, if no first token has done so lately."""
        self._asked = True
        if now_s >= self._due_s + SWEEP_S:
            self._sweep(now_s)

    def _sweep(self, now_s: float) -> None:
        self._due_s, self._asked = now_s + SWEEP_S, False
        self.least_room_tokens = float(np.minimum.reduce(self.room_tokens))
        width = int(np.maximum.reduce(self.in_flight))
        if not width:
            return
        output = self._output[:, :width]
        left = now_s - self._since[:, :width]
        np.maximum(left, 0.0, out=left)
        left *= self._tokens_per_s[:, None]
        np.subtract(output, left, out=left)
        if self._pooled:
            np.maximum(left, self._least[:, :width], out=self._stay[:, :width])
        np.maximum(left, LEAST_LEFT * output, out=left)
        self._left[:, :width] = left
        full = (self.in_flight >= self._slots).nonzero()[0]
        if self._kept:
            self._resum(left, self._weight[:, :width], full)
        if full.size:
            self._returns(full, self._stay[:, :width])

    def _keep(self) -> None:
        """Keep F from now on."""
        self._kept = True
        self._resum(self._left, self._weight, (self.in_flight >= self._slots).nonzero()[0])

    def _resum(self, left: Floats, weight: Floats, full: npt.NDArray[np.intp]) -> None:
        """Make F anew: those shorter than x count with their length, the others with x.

        ``full`` has the endpoints with no free slot.
        """
        size = len(self._states)
        places = np.log2(np.maximum(left, 1.0))
        places *= 2.0
        cells = np.minimum(places.astype(np.intp), _LAST)
        cells += self._first_knots
        flat, shape = cells.ravel(), (size, _KNOTS)
        above = np.bincount(flat, weight.ravel(), size * _KNOTS).reshape(shape)
        below = np.bincount(flat, (weight * left).ravel(), size * _KNOTS).reshape(shape)
        # Sums over the intervals from each knot up, and over those under it.
        longer = above[:, ::-1].cumsum(axis=1)[:, ::-1]
        shorter = below.cumsum(axis=1) - below
        self._delay = shorter + _GRID * longer
        self._imposed[:] = self._delay.T
        if full.size:
            self._imposed[:-2, full] = 0.5 * self._delay[full, 2:].T

    def _returns(self, full: npt.NDArray[np.intp], stay: Floats) -> None:
        """Make anew when the slots of endpoints with no free one come back."""
        calls, slots = self.in_flight[full], self._slots[full]
        turns, places = np.divmod(calls - slots, slots)
        # Empty places are zeros and sort to the front.
        ordered = stay[full]  # a copy
        ordered.sort(axis=1)
        steps = ordered[np.arange(full.size), places + stay.shape[1] - calls]
        steps += turns * ordered.sum(axis=1) / calls
        table = self.coefficients
        table[TURN_STEP, full] = steps * table[STEP, full]
        table[TURN_CONTEXT, full] = steps * table[CONTEXT, full]
