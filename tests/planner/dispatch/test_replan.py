"""When the next plan is due."""

from __future__ import annotations

import numpy as np
import pytest

from planner.dispatch.replan import PlanBasis, RateMeter, ReplanTrigger
from planner.domain.errors import InvalidInput


def basis(
    rate: float = 1.0, up: str = "ab", speed: float = 1.0, uncovered: float = 0.0
) -> PlanBasis:
    """Return a state with one workflow and endpoints named by letters."""
    return PlanBasis(
        up=frozenset(up),
        rates_rps={"w": rate},
        speeds_s=dict.fromkeys(up, speed),
        uncovered=uncovered,
    )


def trigger(**changes: float) -> ReplanTrigger:
    values = {"period_s": 300.0, "settle_s": 20.0, "least_gap_s": 10.0, "window_s": 60.0}
    return ReplanTrigger(**(values | changes))


@pytest.mark.parametrize(
    ("at_s", "state", "reason"),
    [
        (299.0, basis(), None),
        (300.0, basis(), "period"),
        (11.0, basis(up="a"), "fleet"),
        (11.0, basis(up="abc"), "fleet"),
        (9.0, basis(up="a"), None),
        (11.0, basis(uncovered=0.06), "range"),
        (11.0, basis(uncovered=0.04), None),
        (900.0, basis(rate=0.0), None),
        (900.0, basis(up=""), None),
    ],
)
def test_each_cause_has_its_reason(at_s: float, state: PlanBasis, reason: str | None) -> None:
    """Period, fleet and range fire as stated, never within the least gap or without any load."""
    one = trigger()
    one.attempted(0.0, basis())
    assert one.due(at_s, state) == reason


def test_the_first_plan_waits_for_the_first_arrival() -> None:
    """Nothing is due without arrivals; with them the first plan is, once a rate can be told."""
    one = trigger()
    assert one.due(50.0, PlanBasis(up=frozenset("a"))) is None
    assert one.due(60.0, basis()) is None
    assert one.due(80.0, basis()) == "start"


@pytest.mark.parametrize("drifted", [basis(rate=2.0), basis(rate=0.4), basis(speed=1.6)])
def test_drift_has_to_last(drifted: PlanBasis) -> None:
    """Load twice or under half the planned one, or slower endpoints, count after settling."""
    one = trigger()
    one.attempted(0.0, basis())
    assert one.due(30.0, drifted) is None
    assert one.due(49.0, drifted) is None
    assert one.due(50.0, drifted) == "drift"
    one.attempted(50.0, drifted)
    assert one.due(80.0, drifted) is None
    assert one.due(120.0, drifted) is None


def test_an_attempt_without_a_verdict_is_repeated() -> None:
    """After a failure the same state is asked for again, each time later, at most a period."""
    one = trigger()
    one.attempted(0.0, basis())
    gaps = []
    now_s = 5.0
    for _ in range(7):
        one.answered(now_s, verdict=False)
        began_s = now_s
        while one.due(now_s, basis()) is None:
            now_s += 1.0
        assert one.due(now_s, basis()) in ("retry", "period")
        gaps.append(now_s - began_s)
        one.attempted(now_s, basis())
    assert gaps == [10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0]
    one.answered(now_s, verdict=True)
    assert one.due(now_s + 299.0, basis()) is None
    one.answered(now_s, verdict=False)
    assert one.due(now_s + 10.0, basis()) == "retry"


def test_drift_has_hysteresis() -> None:
    """A value between the root of the band and the band keeps an alarm, and starts none."""
    one = trigger(band=1.5)
    one.attempted(0.0, basis())
    assert one.due(30.0, basis(speed=1.3)) is None
    assert one.due(100.0, basis(speed=1.3)) is None  # never beyond the band
    assert one.due(110.0, basis(speed=1.6)) is None
    assert one.due(120.0, basis(speed=1.3)) is None
    assert one.due(130.0, basis(speed=1.3)) == "drift"
    one.attempted(130.0, basis())
    assert one.due(150.0, basis(speed=1.6)) is None
    assert one.due(160.0, basis(speed=1.1)) is None  # back inside: the alarm is off
    assert one.due(171.0, basis(speed=1.6)) is None


def test_chance_is_no_drift() -> None:
    """A rate of a few arrivals a minute may double by chance: that fires nothing."""
    one = trigger()
    one.attempted(0.0, basis(rate=0.02))
    assert one.due(30.0, basis(rate=0.04)) is None
    assert one.due(60.0, basis(rate=0.04)) is None
    assert one.due(90.0, basis(rate=0.5)) is None
    assert one.due(110.0, basis(rate=0.5)) == "drift"


def test_a_workflow_that_appears_is_drift() -> None:
    """Arrivals of a workflow that the plan does not know are drift, not nothing."""
    one = trigger()
    one.attempted(0.0, basis())
    both = PlanBasis(up=frozenset("ab"), rates_rps={"w": 1.0, "new": 0.5})
    assert one.due(30.0, both) is None
    assert one.due(51.0, both) == "drift"


def test_rates_are_unbiased_from_the_start_on() -> None:
    """The meter reads a steady rate right early and late, and forgets what is long past."""
    rng = np.random.default_rng(3)
    arrivals = np.cumsum(rng.exponential(0.5, size=4000))
    early, late = [], []
    for start in range(0, 4000, 100):
        meter = RateMeter(60.0, arrivals[start])
        for time_s in arrivals[start + 1 : start + 41]:
            meter.observe("w", time_s)
        early.append(meter.rates_rps(arrivals[start + 40])["w"])
    meter = RateMeter(60.0)
    for time_s in arrivals:
        meter.observe("w", time_s)
        late.append(meter.rates_rps(time_s)["w"])
    assert np.mean(early) == pytest.approx(2.0, rel=0.1)
    assert np.mean(late[500:]) == pytest.approx(2.0, rel=0.1)
    assert meter.rates_rps(arrivals[-1] + 600.0)["w"] < 1e-3
    assert RateMeter(60.0, 5.0).rates_rps(5.0) == {}


@pytest.mark.parametrize(
    "wrong",
    [{"period_s": 0.0}, {"band": 1.0}, {"settle_s": -1.0}, {"window_s": float("nan")}],
)
def test_numbers_out_of_range_are_refused(wrong: dict[str, float]) -> None:
    """A trigger that could never or always fire is bad input."""
    with pytest.raises(InvalidInput, match="replanning"):
        trigger(**wrong)
