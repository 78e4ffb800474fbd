"""The runner-up of a decision: found afterwards, from what the decision left behind."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest

from planner.dispatch.ranking import Ranking, RunnerUp


@dataclass(frozen=True)
class Place:
    index: int


def ranking(scores, own_s, place, indices=(3, 5, 7)):
    candidates = [Place(index) for index in indices[: len(scores)]]
    return Ranking(candidates, np.array(scores), np.array(own_s), place)


def test_the_second_least_score_is_the_runner_up() -> None:
    """It is named by its place in the fleet, with its seconds beside those of the choice."""
    other = ranking([9.0, 2.0, 4.5], [1.0, 3.0, 2.0], 1).runner_up()
    assert other == RunnerUp(endpoint=7, later_s=-1.0, excess_s=2.5)


def test_the_first_one_wins_ties() -> None:
    """Equal scores are ranked as choices are; the excess is then zero."""
    other = ranking([2.0, 2.0, 2.0], [1.0, 1.5, 1.0], 0).runner_up()
    assert other == RunnerUp(endpoint=5, later_s=0.5, excess_s=0.0)


def test_one_candidate_has_no_runner_up() -> None:
    """Where nothing was to choose, nothing is told."""
    assert ranking([2.0], [1.0], 0).runner_up() is None


def test_asking_changes_nothing() -> None:
    """The scores may be asked again: they are not touched."""
    one = ranking([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 0)
    assert one.runner_up() == one.runner_up()
    assert one.runner_up() == RunnerUp(
        endpoint=5, later_s=pytest.approx(1.0), excess_s=pytest.approx(1.0)
    )
