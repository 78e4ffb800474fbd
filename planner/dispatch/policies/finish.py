"""Rules that predict: least expected finish, and marginal cost."""

from __future__ import annotations

from planner.dispatch.policies.base import Choice, Ready, age_priority, costs_of, least
from planner.dispatch.ranking import Ranking

__all__ = ["LeastExpectedFinish", "MarginalCost"]


class LeastExpectedFinish:
    """Where the call itself is expected to finish first: prefix, queue and speed in seconds."""

    name = "least_expected_finish"

    def choose(self, ready: Ready) -> Choice:
        """Return the candidate with the least expected finish."""
        costs = costs_of(ready, imposed=False)
        scores = costs.own_s
        position = least(scores)
        return Choice(
            ready.candidates[position].index,
            "finish",
            cost=costs[position],
            ranking=Ranking(ready.candidates, scores, scores, position),
        )


class MarginalCost:
    """Own finish plus the delay imposed on others, both weighted by criticality; oldest run first.

    Parameters
    ----------
    theta
        Weight of the imposed delay, >= 0; 1 to 2 is best in studies.
    age_order
        Whether engines serve older runs first.
    """

    name = "marginal_cost"

    def __init__(self, *, theta: float = 1.0, age_order: bool = True) -> None:
        self.theta = theta
        self.age_order = age_order

    def choose(self, ready: Ready) -> Choice:
        """Return the candidate that costs all runs together least."""
        weight = ready.forecaster.of(ready.call).criticality
        costs = costs_of(ready)
        scores = costs.weighted(weight, self.theta)
        position = least(scores)
        return Choice(
            ready.candidates[position].index,
            "cost",
            priority=age_priority(ready.call) if self.age_order else 0,
            cost=costs[position],
            ranking=Ranking(ready.candidates, scores, costs.own_s, position),
        )
