"""Sums of chains in terms of a model's variables, CP-SAT's or linear: one formula for both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from planner.solve.arrays import Bools
from planner.solve.timing import Mixed

__all__ = ["Terms"]


class Terms:
    """The variables of one placement: which mode each site takes, and what is kept there.

    Parameters
    ----------
    keys, uses
        (site, option, level) and variable of each mode, sites in increasing order.
    warm, keep
        Variables by (site, option) that are one where prefix and sessions are kept; elsewhere
        these are kept in any case.
    starts
        Variables of the starts of joins.
    shape
        Numbers of sites and options.
    """

    def __init__(
        self,
        keys: Sequence[tuple[int, int, int]],
        uses: Sequence[Any],
        *,
        warm: Mapping[tuple[int, int], Any],
        keep: Mapping[tuple[int, int], Any],
        starts: Sequence[Any],
        shape: tuple[int, int],
    ) -> None:
        table = np.array(keys, dtype=np.int64).reshape(-1, 3)
        self._option, self._level = table[:, 1], table[:, 2]
        self._stops = np.searchsorted(table[:, 0], np.arange(shape[0] + 1)).tolist()
        self._uses = uses
        self._saved = ((warm, _asked(warm, shape)), (keep, _asked(keep, shape)))
        self._starts = starts

    def of(self, mixed: Mixed) -> tuple[list[Any], list[int]]:
        """Return variables and weights whose sum, plus the fixed ticks, is that of the chains."""
        variables: list[Any] = []
        weights: list[int] = []
        for n, k in enumerate(mixed.sites.tolist()):
            begin, end = self._stops[k], self._stops[k + 1]
            option = self._option[begin:end]
            values = mixed.ticks[n, option, self._level[begin:end]]
            for (saved, asked), extras in zip(self._saved, (mixed.cold, mixed.lost), strict=True):
                extra = extras[n] * asked[k]
                # What is not kept takes longer: add it to every mode, and take it back if kept.
                values = values + extra[option]
                for m in np.flatnonzero(extra).tolist():
                    variables.append(saved[k, m])
                    weights.append(-int(extra[m]))
            for position in np.flatnonzero(values).tolist():
                variables.append(self._uses[begin + position])
                weights.append(int(values[position]))
        for join, factor in mixed.starts:
            variables.append(self._starts[join])
            weights.append(factor)
        return variables, weights


def _asked(saved: Mapping[tuple[int, int], Any], shape: tuple[int, int]) -> Bools:
    asked = np.zeros(shape, dtype=bool)
    for key in saved:
        asked[key] = True
    return asked
