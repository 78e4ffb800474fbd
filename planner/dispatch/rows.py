"""The rows of a dispatch table, kept by column.

A table for hundreds of workflows has millions of numbers. They lie in arrays of 32-bit floats,
endpoints in the table's order, and a `Row` is made when somebody asks for one. A column that holds
numbers which 32 bits do not give back to the last decimal is kept in 64 bits, so what is read is
always what was put in.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from planner.domain.errors import InvalidInput

__all__ = ["Ranked", "Row", "Rows"]

Numbers = npt.NDArray[np.floating[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranked:
    """One endpoint in a row.

    Parameters
    ----------
    cost_s
        Seconds of service at the planned load level, waiting not included.
    share
        Planned share of the site's traffic, [0, 1]; a row's shares sum to one.
    price
        Expected seconds of run latency that a slot second there costs other runs, >= 0.
    """

    endpoint: str
    cost_s: float
    share: float
    price: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What to do with the calls of one site in one load bucket.

    ``valid_from`` and ``valid_to`` bound the occupancy (calls in flight per slot); ``priority``
    is ``age`` (older runs first) or ``arrival`` (the engine's own order).
    """

    workflow_hash: str
    site: str
    bucket: int
    valid_from: float
    valid_to: float
    ranked: tuple[Ranked, ...]
    priority: str = "age"
    retain_kv: bool = False
    reason: str = ""


class _Column:
    """Numbers by row and endpoint; equal rows are kept once.

    The sites of a load bucket share their prices, and many share how they are divided.
    """

    __slots__ = ("_decimals", "_places", "_values")

    def __init__(self, numbers: array[float], places: array[int], size: int) -> None:
        exact = np.frombuffer(numbers.tobytes()).reshape(-1, size)
        short = exact.astype(np.float32)
        self._places = places
        self._values: Numbers = short
        for decimals in (4, 5, 6):
            if np.array_equal(np.round(short.astype(np.float64), decimals), exact):
                self._decimals: int | None = decimals
                return
        self._values, self._decimals = exact, None

    @property
    def dtype(self) -> np.dtype[Any]:
        """How the numbers are kept."""
        return self._values.dtype

    def __getitem__(self, number: int) -> Numbers:
        """Return a row's numbers, not to be written to."""
        found: Numbers = self._values[self._places[number]]
        return found

    def given(self, number: int) -> list[float]:
        """Return a row's numbers as they were put in."""
        values = self[number].astype(np.float64)
        found: list[float] = (
            values if self._decimals is None else np.round(values, self._decimals)
        ).tolist()
        return found


class _Gathered:
    """A column while its rows come in."""

    def __init__(self) -> None:
        self._seen: dict[bytes, int] = {}
        self._numbers = array("d")
        self._places = array("L")

    def add(self, values: Numbers) -> None:
        """Add a row."""
        content = values.tobytes()
        place = self._seen.setdefault(content, len(self._seen))
        if place * len(values) == len(self._numbers):
            self._numbers.frombytes(content)
        self._places.append(place)

    def column(self, size: int) -> _Column:
        """Return what came in, ``size`` numbers a row."""
        return _Column(self._numbers, self._places, size)


class Rows(Sequence[Row]):
    """Rows of a table for the same endpoints.

    Parameters
    ----------
    rows
        Each ranks every endpoint once; read once, so a generator will do.
    endpoints
        Ids, in the order of the arrays.

    Attributes
    ----------
    keys
        (workflow hash, call site) of each row.
    buckets
        Load bucket of each row.
    cost_s, share, price
        By row, arrays of shape (endpoints,), as in `Ranked`.
    priorities
        Of each row.

    Raises
    ------
    InvalidInput
        If a row leaves out an endpoint, names one twice, or names another.
    """

    def __init__(self, rows: Iterable[Row], endpoints: Sequence[str]) -> None:
        self.endpoints = tuple(endpoints)
        place = {endpoint: index for index, endpoint in enumerate(self.endpoints)}
        size = len(self.endpoints)
        self.keys: list[tuple[str, str]] = []
        self.buckets = array("l")
        self.priorities: list[str] = []
        self._valid = array("d")
        self._retain = bytearray()
        self._reasons: list[tuple[str, bool]] = []
        once: dict[Any, Any] = {}  # equal strings and keys are kept once
        gathered = _Gathered(), _Gathered(), _Gathered()
        order = array("B" if size <= 1 << 8 else "L")
        for row in rows:
            columns = np.zeros((3, size))
            ranks = [place.get(one.endpoint, -1) for one in row.ranked]
            if sorted(ranks) != list(range(size)):
                raise InvalidInput(
                    f"row ranks {[one.endpoint for one in row.ranked]}",
                    where=f"table row {row.site}/{row.bucket}",
                    remedy="rank each endpoint of the table once",
                )
            columns[:, ranks] = np.array([(o.cost_s, o.share, o.price) for o in row.ranked]).T
            for column, values in zip(gathered, columns, strict=True):
                column.add(values)
            order.extend(ranks)
            key = row.workflow_hash, row.site
            self.keys.append(once.setdefault(key, key))
            self.buckets.append(row.bucket)
            self.priorities.append(once.setdefault(row.priority, row.priority))
            self._valid.extend((row.valid_from, row.valid_to))
            self._retain.append(row.retain_kv)
            ending = _ending(row.ranked)
            told = bool(ending) and row.reason.endswith(ending)
            reason = (row.reason.removesuffix(ending) if told else row.reason), told
            self._reasons.append(once.setdefault(reason, reason))
        self.cost_s, self.share, self.price = (column.column(size) for column in gathered)
        self._order = np.frombuffer(order.tobytes(), order.typecode).reshape(len(self.keys), size)

    def __len__(self) -> int:
        return len(self.keys)

    @overload
    def __getitem__(self, number: int) -> Row: ...

    @overload
    def __getitem__(self, number: slice) -> tuple[Row, ...]: ...

    def __getitem__(self, number: int | slice) -> Row | tuple[Row, ...]:
        if isinstance(number, slice):
            return tuple(self[one] for one in range(*number.indices(len(self))))
        number = range(len(self))[number]
        cost_s, share, price = (
            column.given(number) for column in (self.cost_s, self.share, self.price)
        )
        ranked = tuple(
            Ranked(
                endpoint=self.endpoints[one], cost_s=cost_s[one], share=share[one], price=price[one]
            )
            for one in self._order[number].tolist()
        )
        reason, told = self._reasons[number]
        return Row(
            workflow_hash=self.keys[number][0],
            site=self.keys[number][1],
            bucket=self.buckets[number],
            valid_from=self._valid[2 * number],
            valid_to=self._valid[2 * number + 1],
            ranked=ranked,
            priority=self.priorities[number],
            retain_kv=bool(self._retain[number]),
            reason=reason + _ending(ranked) if told else reason,
        )

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    def __hash__(self) -> int:
        return hash((self.endpoints, tuple(self.keys)))

    def __repr__(self) -> str:
        return f"<{len(self)} rows for {len(self.endpoints)} endpoints>"


def _ending(ranked: Sequence[Ranked]) -> str:
    """Return how the reasons of `compile_table` end: it need not be kept for each row."""
    return f"; {ranked[0].endpoint} takes {ranked[0].share:.0%}" if ranked else ""
