"""Counters, gauges and histograms in the Prometheus text format, without a client library.

Label values are positional, in the order the metric names them; callers keep them bounded.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence, Sized
from operator import add
from typing import Any

__all__ = ["CONTENT_TYPE", "Counter", "Gauge", "Histogram", "Registry"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_LABEL_LIMIT = 1000

Labels = tuple[str, ...]


class _Metric:
    kind = "untyped"
    __slots__ = ("help", "label_limit", "labels", "name")

    def __init__(self, name: str, help_: str, labels: Sequence[str] = ()) -> None:
        self.name = name
        self.help = help_
        self.labels = tuple(labels)
        self.label_limit = _LABEL_LIMIT

    def _capped(self, labels: Labels, known: Sized) -> Labels:
        """Return the labels to use for a combination that is new."""
        return labels if len(known) < self.label_limit else ("other",) * len(labels)

    def render(self) -> Iterable[str]:
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} {self.kind}"
        yield from self.samples()

    def samples(self) -> Iterable[str]:
        raise NotImplementedError


class Gauge(_Metric):
    """A value that may go up and down."""

    kind = "gauge"
    __slots__ = ("_values",)

    def __init__(self, name: str, help_: str, labels: Sequence[str] = ()) -> None:
        super().__init__(name, help_, labels)
        self._values: dict[Labels, float] = {}

    def set(self, value: float, *labels: str) -> None:
        """Set the value of one label combination."""
        if labels not in self._values:
            labels = self._capped(labels, self._values)
        self._values[labels] = value

    def clear(self) -> None:
        """Forget all label combinations."""
        self._values.clear()

    def get(self, *labels: str) -> float:
        """Return a value; 0 if it was never set."""
        return self._values.get(labels, 0.0)

    def samples(self) -> Iterable[str]:
        """Yield one line per label combination."""
        for labels, value in self._values.items():
            yield f"{self.name}{_braces(self.labels, labels)} {value:.12g}"


class Counter(Gauge):
    """A value that only grows; its name ends in ``_total`` by convention."""

    kind = "counter"
    __slots__ = ()

    def inc(self, *labels: str, by: float = 1.0) -> None:
        """Add to the value of one label combination."""
        if labels not in self._values:
            labels = self._capped(labels, self._values)
        self._values[labels] = self._values.get(labels, 0.0) + by

    def drain(self) -> dict[Labels, float]:
        """Return what was counted since the last drain."""
        counted, self._values = self._values, {}
        return counted

    def merge(self, counted: Mapping[Labels, float]) -> None:
        """Count what another process has counted."""
        for labels, value in counted.items():
            self.inc(*labels, by=value)


class Histogram(_Metric):
    """Counts of observations by upper bound, with their sum.

    Parameters
    ----------
    buckets
        Upper bounds, increasing; the one at infinity is added.
    """

    kind = "histogram"
    __slots__ = ("_rows", "buckets")

    def __init__(
        self, name: str, help_: str, buckets: Sequence[float], labels: Sequence[str] = ()
    ) -> None:
        super().__init__(name, help_, labels)
        self.buckets = tuple(buckets)
        self._rows: dict[Labels, list[float]] = {}

    def observe(self, value: float, *labels: str, count: int = 1) -> None:
        """Count ``count`` equal observations."""
        row = self._rows.get(labels) or self._row(labels)
        row[bisect_left(self.buckets, value)] += count
        row[-1] += value * count

    def _row(self, labels: Labels) -> list[float]:
        if labels not in self._rows:
            labels = self._capped(labels, self._rows)
        return self._rows.setdefault(labels, [0.0] * (len(self.buckets) + 2))

    def drain(self) -> dict[Labels, list[float]]:
        """Return what was observed since the last drain."""
        counted, self._rows = self._rows, {}
        return counted

    def merge(self, counted: Mapping[Labels, Sequence[float]]) -> None:
        """Count what another process has observed, in the same buckets."""
        for labels, row in counted.items():
            own = self._row(labels)
            own[:] = map(add, own, row)

    def samples(self) -> Iterable[str]:
        """Yield the cumulative buckets, the sum and the count of each label combination."""
        names = (*self.labels, "le")
        for labels, row in self._rows.items():
            total = 0.0
            for bound, count in zip((*self.buckets, "+Inf"), row[:-1], strict=True):
                total += count
                text = bound if isinstance(bound, str) else f"{bound:.10g}"
                yield f"{self.name}_bucket{_braces(names, (*labels, text))} {total:.10g}"
            yield f"{self.name}_sum{_braces(self.labels, labels)} {row[-1]:.10g}"
            yield f"{self.name}_count{_braces(self.labels, labels)} {total:.10g}"


class Registry:
    """The metrics of one scrape, in the order given.

    Parameters
    ----------
    label_limit
        Label combinations of one metric, so that no client can make it grow without end; further
        ones are counted together with every label ``other``.
    """

    __slots__ = ("_counting", "_metrics")

    def __init__(self, metrics: Iterable[_Metric], *, label_limit: int = _LABEL_LIMIT) -> None:
        self._metrics = tuple(metrics)
        self._counting = [m for m in self._metrics if isinstance(m, (Counter, Histogram))]
        for metric in self._metrics:
            metric.label_limit = label_limit

    def drain(self) -> list[Any]:
        """Return what counters and histograms have counted since the last drain."""
        return [metric.drain() for metric in self._counting]

    def merge(self, counted: Iterable[Any]) -> None:
        """Count what the same registry of another process has counted."""
        for metric, values in zip(self._counting, counted, strict=True):
            metric.merge(values)

    def render(self) -> str:
        """Return the exposition text."""
        return "\n".join(line for metric in self._metrics for line in metric.render()) + "\n"


def _braces(names: Sequence[str], values: Sequence[str]) -> str:
    if not names:
        return ""
    pairs = ",".join(
        f'{name}="{_escape(value)}"' for name, value in zip(names, values, strict=True)
    )
    return f"{{{pairs}}}"


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
