"""How a policy ranked the candidates of one decision, kept for explanations.

A decision has no time to look for its runner-up, so it only keeps the arrays it has made anyway.
The runner-up is found when somebody asks, which is when the call has ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

__all__ = ["Ranking", "RunnerUp"]

Floats = npt.NDArray[np.float64]


class _Placed(Protocol):
    @property
    def index(self) -> int: ...


@dataclass(frozen=True, slots=True)
class RunnerUp:
    """The best other endpoint of a decision.

    Parameters
    ----------
    endpoint
        Index in the fleet.
    later_s
        Predicted finish there less that of the choice; below 0 where the call itself was expected
        to end earlier there, but to cost others, or what is planned, more.
    excess_s
        Its score less that of the choice, in the seconds the policy scores with, >= 0.
    """

    endpoint: int
    later_s: float
    excess_s: float


class Ranking:
    """The scores of one decision.

    Parameters
    ----------
    candidates
        Endpoints that could take the call.
    scores
        What the policy took the least of, by candidate, seconds; changed by nobody later.
    own_s
        Predicted seconds to the call's finish, by candidate; as above.
    place
        Candidate chosen.
    """

    __slots__ = ("_candidates", "_own_s", "_place", "_scores")

    def __init__(
        self, candidates: Sequence[_Placed], scores: Floats, own_s: Floats, place: int
    ) -> None:
        self._candidates, self._scores = candidates, scores
        self._own_s, self._place = own_s, place

    def runner_up(self) -> RunnerUp | None:
        """Return the candidate of the second least score; the first one wins ties, as in choices.

        None where there was no other.
        """
        if len(self._candidates) < 2:
            return None
        place = self._place
        scores = self._scores.copy()
        scores[place] = np.inf
        other = int(scores.argmin())
        return RunnerUp(
            endpoint=self._candidates[other].index,
            later_s=float(self._own_s[other] - self._own_s[place]),
            excess_s=float(self._scores[other] - self._scores[place]),
        )
