"""Flow shops decoded in batches: from orders of the chains to schedules, hundreds at once.

The machines of a stage are alike, so only the instants matter at which they become free. Kept
sorted, the next chain takes the first of them, and its end is merged in by minima and maxima of
whole rows: a few numpy calls on rows of a batch for each chain, stage and machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "Flow", "decode"]

Array = npt.NDArray[np.signedinteger[Any]]


@dataclass(frozen=True, slots=True)
class Flow:
    """A flow shop: chains that visit the same stages in the same order.

    Parameters
    ----------
    ticks
        Duration of each stage of each chain; shape (S, J).
    machines
        Machines of each stage, >= 1.
    """

    ticks: Array
    machines: tuple[int, ...]

    @property
    def mirrored(self) -> Flow:
        """The same question with time running backwards."""
        return Flow(self.ticks[::-1], self.machines[::-1])

    @property
    def steps(self) -> int:
        """Numpy calls that decoding a batch takes, about."""
        return len(self.ticks[0]) * (sum(self.machines) + 2 * len(self.machines))

    def of(self, chains: Array) -> Flow:
        """Return the flow shop of some of the chains."""
        return Flow(self.ticks[:, chains], self.machines)


def decode(flow: Flow, keys: Array) -> Array:
    """Return the end of each stage of each chain for a batch of keys; shape (S, n, J).

    Parameters
    ----------
    keys
        Chains go by increasing key, ties by position: for each stage, shape (S, n, J), or for the
        first alone, shape (n, J), and at each later one in the order in which they arrive.
    """
    stages, chains = flow.ticks.shape
    size = keys.shape[-2]
    bits = (chains - 1).bit_length()
    numbers = np.arange(chains, dtype=keys.dtype)
    rows = np.arange(size)[:, np.newaxis] * chains
    ends = np.empty((stages, size, chains), dtype=keys.dtype)
    ready = np.zeros((size, chains), dtype=keys.dtype)
    for s, machines in enumerate(flow.machines):
        key = keys[s] if keys.ndim == 3 else ready if s else keys
        # Key and chain in one number: plain sorting is several times as fast as finding an order.
        order = (key << bits) | numbers
        order.sort(axis=1)
        order &= (1 << bits) - 1
        places = order + rows
        ticks = np.ascontiguousarray(flow.ticks[s].take(order).T)
        at = np.ascontiguousarray(ready.ravel().take(places).T)
        _pass(machines, at, ticks)
        ready = ends[s]
        ready.reshape(-1)[places] = at.T
    return ends


def _pass(machines: int, at: Array, ticks: Array) -> None:
    """Turn arrivals (J, n), in the order in which chains are taken, into ends, in place."""
    free = [np.zeros_like(at[0]) for _ in range(machines)]
    larger = np.empty_like(at[0])
    for end, took in zip(at, ticks, strict=True):
        np.maximum(end, free[0], out=end)
        end += took
        last = end
        for k in range(1, machines):
            np.minimum(free[k], last, out=free[k - 1])
            if k + 1 < machines:
                last = np.maximum(free[k], last, out=larger)
            else:
                np.maximum(free[k], last, out=free[k])
        if machines == 1:
            free[0] = end
