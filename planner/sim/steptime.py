"""How long one engine step takes: the six-coefficient row, measured tables, Dynamo's polynomial.

The engine asks for the time of a batch. If the time of a decode-only step is a straight line in
the context tokens (`StepTime.decode_line`), it runs many such steps at once; otherwise one by one.
"""

from __future__ import annotations

import csv
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from planner.domain.errors import InvalidInput
from planner.domain.files import read_text
from planner.domain.latency import LatencyRow

__all__ = [
    "Batch",
    "DynamoStepTime",
    "RowStepTime",
    "StepTime",
    "TableStepTime",
    "standard_normals",
]

_AT_ONCE = 256
"""Normals that are drawn together."""


@dataclass(slots=True, kw_only=True)
class Batch:
    """What one step computes. Not frozen: one is made for every step with a prefill.

    Parameters
    ----------
    decodes
        Calls that decode one token.
    context_tokens
        Sum of their contexts, each with the token being decoded.
    chunks
        (tokens, depth) of each prefill chunk: ``tokens`` computed after ``depth`` that exist.
    yields
        Calls that get a token from this step: decodes and chunks that end their prefill.
    used_blocks
        KV blocks in use while the step runs.
    """

    decodes: int
    context_tokens: int
    chunks: Sequence[tuple[int, int]]
    yields: int
    used_blocks: int


class StepTime(Protocol):
    """Seconds of engine steps."""

    def seconds(self, batch: Batch) -> float:
        """Return the time of one step, > 0."""

    def decode_line(self, decodes: int) -> tuple[float, float] | None:
        """Return (s, s per context token) of a decode-only step, or None if it is no line."""


class RowStepTime:
    """The "sum" form of `planner.domain.latency.LatencyRow`, scale included.

    Parameters
    ----------
    row
        The coefficients.
    overhead_s
        Added to each step (host work that the row does not contain), >= 0.
    """

    __slots__ = ("_a", "_b", "_c", "_d", "_e", "_f")

    def __init__(self, row: LatencyRow, *, overhead_s: float = 0.0) -> None:
        scale = row.scale
        self._a = scale * max(row.prefill_base_ms, row.decode_base_ms) * 1e-3 + overhead_s
        self._b = scale * row.prefill_us_per_token * 1e-6
        self._c = scale * row.prefill_ns_per_token_sq * 1e-9
        self._d = scale * row.decode_base_ms * 1e-3 + overhead_s
        self._e = scale * row.decode_us_per_call * 1e-6
        self._f = scale * row.decode_ns_per_kv_token * 1e-9

    def seconds(self, batch: Batch) -> float:
        """Return the time of one step."""
        if batch.decodes:
            time_s = self._d + self._e * batch.decodes + self._f * batch.context_tokens
        else:
            time_s = self._a
        for tokens, depth in batch.chunks:
            time_s += tokens * (self._b + self._c * (tokens + 2 * depth))
        return time_s

    def decode_line(self, decodes: int) -> tuple[float, float]:
        """Return (s, s per context token) of a decode-only step."""
        return self._d + self._e * decodes, self._f


class DynamoStepTime:
    """The timing formula of NVIDIA Dynamo's mocker, to compare schedulers with its replay.

    A step takes prefill(n) + decode(u), n prefill tokens of the step (no prefill term if n = 0),
    u the share of KV blocks in use.

    Parameters
    ----------
    capacity_blocks
        KV blocks of the engine, >= 1.

    References
    ----------
    ai-dynamo/dynamo 1.4.2, lib/mocker performance model.
    """

    __slots__ = ("_capacity",)

    def __init__(self, capacity_blocks: int) -> None:
        self._capacity = capacity_blocks

    def seconds(self, batch: Batch) -> float:
        """Return the time of one step."""
        used = batch.used_blocks / self._capacity
        time_ms = (-25.74 * used + 54.01) * used + 5.74
        tokens = sum(chunk for chunk, _depth in batch.chunks)
        if tokens:
            time_ms += (4.209989e-7 * tokens + 1.518344e-2) * tokens + 16.50142
        return time_ms * 1e-3

    def decode_line(self, decodes: int) -> None:  # noqa: ARG002 - the protocol's signature
        """Return None: the time is a parabola in the blocks in use."""
        return


_ONCE = frozenset({"embedding", "final_layernorm"})
_LAYERS = 32  # of Llama-3.1-8B; two layernorms in each


class TableStepTime:
    """A step composed of measured operator times, after LLMServingSim's profiles.

    With T batch tokens, S calls that yield a token, one merged prefill chunk and n decodes:
    dense layers at T (embedding and final norm once, layernorm 64 times, others 32 times), plus
    head and sampler at S, plus 32 attention calls, linear between the measured points.

    Several chunks of one step are merged into one: their tokens add up, and the depth is chosen
    so that the number of (query, key) pairs stays the same.

    Parameters
    ----------
    dense_s
        Seconds of all dense layers by batch tokens, index 0 to the largest batch.
    per_call_s
        Seconds of head and sampler by yielding calls, index 0 to the most calls.
    attention
        The attention table of one layer.
    overhead_s
        Host work added to each step, >= 0.
    """

    __slots__ = ("_attention", "_dense", "_overhead", "_per_call")

    def __init__(
        self,
        *,
        dense_s: Sequence[float],
        per_call_s: Sequence[float],
        attention: Callable[[float, float, float, float], float],
        overhead_s: float = 0.0,
    ) -> None:
        self._dense = dense_s
        self._per_call = per_call_s
        self._attention = attention
        self._overhead = overhead_s

    def seconds(self, batch: Batch) -> float:
        """Return the time of one step."""
        decodes = batch.decodes
        tokens = pairs = 0
        for chunk, depth in batch.chunks:
            tokens += chunk
            pairs += chunk * (chunk + 2 * depth)
        mean_depth = (pairs / tokens - tokens) / 2 if tokens else 0.0
        return (
            self._overhead
            + self._dense[tokens + decodes]
            + self._per_call[batch.yields]
            + _LAYERS
            * self._attention(
                tokens,
                max(mean_depth, 0.0),
                decodes,
                batch.context_tokens / decodes if decodes else 0.0,
            )
        )

    def decode_line(self, decodes: int) -> None:  # noqa: ARG002 - the protocol's signature
        """Return None: the table is only piecewise linear."""
        return

    @classmethod
    def from_profiles(
        cls,
        folder: Path,
        gpu: str,
        *,
        max_tokens: int = 2048,
        max_calls: int = 256,
        overhead_s: float = 0.0,
    ) -> TableStepTime:
        """Read ``op_dense.csv``, ``op_per_sequence.csv`` and ``op_attention_full_<gpu>.csv``.

        Parameters
        ----------
        folder
            The folder of the public data set ``vllm_bench_llmservingsim``.
        gpu
            As in its ``gpu`` column; the rows of tensor parallel size 1 are used.
        max_tokens, max_calls
            Largest batch that will be asked for.

        Raises
        ------
        InvalidInput
            If a file or the GPU's rows are missing, or a value is not a number.
        """
        dense = np.zeros(max_tokens + 1)
        for layer, curve in _curves(folder / "op_dense.csv", gpu, "tokens").items():
            count = 1 if layer in _ONCE else 2 * _LAYERS if layer == "layernorm" else _LAYERS
            dense += count * _interpolated(curve, max_tokens)
        per_call = np.zeros(max_calls + 1)
        for curve in _curves(folder / "op_per_sequence.csv", gpu, "sequences").values():
            per_call += _interpolated(curve, max_calls)
        dense[0] = per_call[0] = 0.0
        return cls(
            dense_s=dense.tolist(),
            per_call_s=per_call.tolist(),
            attention=_attention(folder / f"op_attention_full_{gpu}.csv"),
            overhead_s=overhead_s,
        )


_Curve = tuple[list[float], list[float]]


def _rows(path: Path) -> csv.DictReader[str]:
    return csv.DictReader(read_text(path, what="operator profile").splitlines())


def _curves(path: Path, gpu: str, axis: str) -> Mapping[str, _Curve]:
    """Return layer -> (sizes, seconds) of one GPU at tensor parallel size 1."""
    points: dict[str, dict[float, float]] = {}
    try:
        for row in _rows(path):
            if row["gpu"] == gpu and row["tp"] == "1":
                points.setdefault(row["layer"], {})[float(row[axis])] = float(row["time_us"]) * 1e-6
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"not a table of gpu, tp, layer, {axis}, time_us ({error!r})",
            where=str(path),
            remedy="fetch the data set again",
        ) from error
    if not points:
        raise InvalidInput(f"no rows of {gpu!r}", where=str(path), remedy="check the GPU's name")
    return {
        layer: (sorted(curve), [curve[size] for size in sorted(curve)])
        for layer, curve in points.items()
    }


def _interpolated(curve: _Curve, most: int) -> NDArray[np.float64]:
    """Return the curve at 0..most; beyond the last point it goes on with the last slope."""
    sizes, seconds = curve
    at = np.arange(most + 1, dtype=np.float64)
    values = np.interp(at, sizes, seconds)
    if len(sizes) > 1 and most > sizes[-1]:
        slope = (seconds[-1] - seconds[-2]) / (sizes[-1] - sizes[-2])
        beyond = at > sizes[-1]
        values[beyond] = seconds[-1] + slope * (at[beyond] - sizes[-1])
    return np.asarray(values, dtype=np.float64)


def _attention(path: Path) -> Callable[[float, float, float, float], float]:
    """Return (chunk, depth, decodes, mean context) -> seconds of one layer's attention."""
    names = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
    table: dict[tuple[float, ...], float] = {}
    try:
        for row in _rows(path):
            table[tuple(float(row[name]) for name in names)] = float(row["time_us"]) * 1e-6
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"not a table of {', '.join(names)}, time_us ({error!r})",
            where=str(path),
            remedy="fetch the data set again",
        ) from error
    tree = _Tree.grow(sorted(table.items()))
    least_context = min((point[3] for point in table if point[3] > 0.0), default=0.0)

    def seconds(chunk: float, depth: float, decodes: float, context: float) -> float:
        if decodes:
            context = max(context, least_context)
        value = tree.at((chunk, depth, decodes, context))
        if value is None:
            raise InvalidInput(
                f"no point near chunk {chunk:g} at depth {depth:g} with {decodes:g} decodes",
                where=str(path),
                remedy="fetch the data set again",
            )
        return value

    return seconds


class _Tree:
    """Measured points by one coordinate, then the next; the points need not form a full grid.

    Interpolation is linear in one coordinate after the other, between the neighbours that were
    measured for the coordinates before it. Above the largest value the largest counts; below the
    smallest there is nothing.
    """

    __slots__ = ("axis", "branches")

    def __init__(self, axis: list[float], branches: list[_Tree] | list[float]) -> None:
        self.axis = axis
        self.branches = branches

    @classmethod
    def grow(cls, points: Sequence[tuple[tuple[float, ...], float]]) -> _Tree:
        """Build the tree of (coordinates, value) pairs sorted by coordinates."""
        if not points or len(points[0][0]) == 1:
            return cls([point[0] for point, _value in points], [value for _point, value in points])
        groups: dict[float, list[tuple[tuple[float, ...], float]]] = {}
        for point, value in points:
            groups.setdefault(point[0], []).append((point[1:], value))
        return cls(list(groups), [cls.grow(group) for group in groups.values()])

    def at(self, point: tuple[float, ...]) -> float | None:
        """Return the interpolated value, or None where nothing was measured nearby."""
        axis = self.axis
        upper = bisect_right(axis, point[0])
        if upper == 0:
            return None
        low = self._branch(upper - 1, point)
        if upper == len(axis) or axis[upper - 1] == point[0]:
            return low
        high = self._branch(upper, point)
        if low is None or high is None:
            return high if low is None else low
        return low + (high - low) * (point[0] - axis[upper - 1]) / (axis[upper] - axis[upper - 1])

    def _branch(self, index: int, point: tuple[float, ...]) -> float | None:
        branch = self.branches[index]
        return branch.at(point[1:]) if isinstance(branch, _Tree) else branch


def standard_normals(rng: np.random.Generator) -> Iterator[float]:
    """Yield standard normal numbers without end: those that ``rng`` would draw one by one.

    They make the noise of step times. Many are drawn at once, which takes a tenth of the time;
    nothing else should draw from ``rng``.
    """
    while True:
        yield from rng.standard_normal(_AT_ONCE).tolist()
