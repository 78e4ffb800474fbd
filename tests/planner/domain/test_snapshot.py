"""What a plan is made from."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from planner.domain.errors import InvalidInput
from planner.domain.snapshot import Snapshot
from tests.planner.solve.small import case, chain, endpoint, fleet

QUESTION = case(chain("a", "b"), fleet(endpoint("fast"), endpoint("slow", 4.0)), 0.1)
KEY = str(QUESTION.workflow.content_hash)


def snapshot(**changes: Any) -> Snapshot:
    values: dict[str, Any] = {
        "now_s": 12.5,
        "fleet": QUESTION.fleet,
        "up": ("fast", "slow"),
        "workflows": (QUESTION.workflow,),
        "estimates": QUESTION.estimates,
        "rates_rps": {KEY: 0.1},
        "latency": {},
        "active_runs": {KEY: 3},
        "horizon_s": 60.0,
    }
    return Snapshot(**(values | changes))


def test_it_survives_json() -> None:
    """A snapshot read back is equal, and has the version of the one written."""
    labelled = replace(QUESTION.fleet.endpoints[0], labels=(("zone", "a"),))
    slower = QUESTION.fleet.endpoints[1].latency.scaled(2.0)
    one = snapshot(
        fleet=fleet(labelled, QUESTION.fleet.endpoints[1]), latency={"slow": slower}, up=("slow",)
    )
    again = Snapshot.from_json(json.loads(json.dumps(one.to_json())))
    assert again == one
    assert again.version == one.version
    assert again.learned_fleet.endpoints[1].latency == slower
    assert again.learned_fleet.endpoints[0].latency == labelled.latency


def test_the_version_tells_states_apart_and_not_instants() -> None:
    """The same state later has the same version; another rate has another."""
    assert snapshot(now_s=99.0).version == snapshot().version
    assert snapshot(rates_rps={KEY: 0.2}).version != snapshot().version


def test_active_runs_count_as_load() -> None:
    """After a burst the plan carries what finishing it within the horizon asks for."""
    assert snapshot().loads_rps() == {KEY: 0.1}
    assert snapshot(active_runs={KEY: 30}).loads_rps() == {KEY: 0.5}
    assert snapshot(active_runs={}, rates_rps={}).loads_rps() == {}


@pytest.mark.parametrize(
    "wrong",
    [
        {"up": ("fast", "gone")},
        {"rates_rps": {"unknown": 1.0}},
        {"rates_rps": {KEY: float("nan")}},
        {"horizon_s": 0.0},
    ],
)
def test_what_does_not_go_together_is_refused(wrong: dict[str, Any]) -> None:
    """Unknown endpoints and workflows, and impossible numbers, are bad input."""
    with pytest.raises(InvalidInput, match="snapshot"):
        snapshot(**wrong)


def test_garbage_is_bad_input() -> None:
    """Anything that is not a whole snapshot gives one clear error."""
    whole = snapshot().to_json()
    for raw in (None, [], {"schema": "other"}, {**whole, "fleet": {}}, {**whole, "up": 3}):
        with pytest.raises(InvalidInput, match="snapshot"):
            Snapshot.from_json(raw)
