"""Re-planning inside a simulation: a plan is in use only after the planner's time has passed."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

import pytest

from planner.dispatch.forecast import Forecaster
from planner.dispatch.table import DispatchTable, Ranked, Row, Tuning
from planner.domain.errors import InvalidInput
from planner.domain.trace import CallRecord
from planner.sim.disturbance import Disturbance
from planner.sim.experiment import Cell, PolicySetup, World, run_cell
from planner.sim.horizon import Replan, ReplanLog, Replanned, Seen
from planner.sim.workload import sampled_workload
from tests.planner.solve.small import case, chain, endpoint, fleet

QUESTION = case(chain("a"), fleet(endpoint("fast"), endpoint("slow", 4.0)), 0.1)
HASH = QUESTION.workflow.content_hash


def table(home: str) -> DispatchTable:
    """Return a table that sends everything to one endpoint."""
    ranked = tuple(
        Ranked(endpoint=e, cost_s=1.0, share=float(e == home), price=0.0) for e in ("fast", "slow")
    )
    row = Row(
        workflow_hash=HASH, site="a#0", bucket=0, valid_from=0.0, valid_to=math.inf, ranked=ranked
    )
    return DispatchTable(
        fleet_hash=QUESTION.fleet.content_hash(),
        endpoints=("fast", "slow"),
        bounds=(math.inf,),
        tuning=Tuning(theta=0.0, plan_pull=100.0),
        rows=(row,),
    )


@dataclass
class Fake:
    """A planner that always answers the same and keeps what it was shown."""

    answer: Replanned
    seen: list[Seen] = field(default_factory=list)

    def __call__(self, _seed: int) -> Fake:
        return self

    def plan(self, seen: Seen) -> Replanned:
        self.seen.append(replace(seen, records=tuple(seen.records)))
        return self.answer


def simulated(
    fake: Fake, *faults: Disturbance, planner_s: float | None = None, count: int = 40
) -> tuple[list[CallRecord], ReplanLog]:
    truth = QUESTION.estimates.workflows[HASH]
    world = World(
        fleet=QUESTION.fleet,
        forecaster=Forecaster(QUESTION.estimates, [QUESTION.workflow]),
        disturbances=faults,
        replan=Replan(period_s=60.0, planner=fake, planner_s=planner_s),
    )
    runs = sampled_workload(QUESTION.workflow, truth, [5.0 * n for n in range(count)], seed=1)
    log = ReplanLog()
    setup = PolicySetup(policy="almanac", table=table("slow"))
    records = run_cell(Cell(setup=setup, seed=0, runs=runs, world=world), None, log)
    return [one for one in records if isinstance(one, CallRecord)], log


@pytest.mark.parametrize("charged", [None, 12.0])
def test_the_planners_seconds_delay_the_swap(charged: float | None) -> None:
    """A plan goes live its own seconds after it was asked for, modelled or as measured."""
    fake = Fake(Replanned(table=table("fast"), seconds=12.0 if charged is None else 0.0))
    calls, log = simulated(fake, planner_s=charged)
    asked_s = fake.seen[0].now_s
    first = min(call.sent_s for call in calls if call.endpoint == "fast")
    assert asked_s + 12.0 <= first < asked_s + 12.0 + 5.0
    assert {call.endpoint for call in calls if call.sent_s < asked_s + 12.0} == {"slow"}
    assert {call.endpoint for call in calls if call.sent_s > first} == {"fast"}
    assert log.adopted == log.made == len(fake.seen)
    assert log.planner_s == pytest.approx(12.0 * log.made)


def test_an_answer_without_a_table_keeps_the_old_one() -> None:
    """Nothing is adopted, the old table decides, and its age grows with time."""
    fake = Fake(Replanned(table=None, seconds=1.0))
    calls, log = simulated(fake)
    assert {call.endpoint for call in calls} == {"slow"}
    assert (log.made, log.adopted) == (3, 0)
    assert log.reasons == {"start": 1, "period": 2}
    assert log.mean_age_s == pytest.approx(97.5, abs=1.0)  # calls come every 5 s up to 195 s


def test_only_revealed_facts_are_shown() -> None:
    """The planner sees ended calls, runs in progress and rates so far, and nothing to come."""
    fake = Fake(Replanned(table=None, seconds=0.0))
    simulated(fake)
    for seen in fake.seen:
        ends = [one.finish_s for one in seen.records if isinstance(one, CallRecord)]
        assert all(end is not None and end <= seen.now_s for end in ends)
        arrived = math.floor(seen.now_s / 5.0) + 1
        done = sum(not isinstance(one, CallRecord) for one in seen.records)
        assert sum(seen.active_runs.values()) == arrived - done
    assert fake.seen[-1].rates_rps[HASH] == pytest.approx(0.2, rel=0.2)


def test_a_crash_asks_for_a_plan() -> None:
    """An endpoint that is gone is a reason of its own, and is not among those that are up."""
    fake = Fake(Replanned(table=None, seconds=0.0))
    _, log = simulated(fake, Disturbance(endpoint="fast", kind="crash", from_s=40.0, to_s=60.0))
    assert log.reasons["fleet"] == 2
    assert [seen.up for seen in fake.seen][:3] == [("fast", "slow"), ("slow",), ("fast", "slow")]


def test_the_same_seed_gives_the_same_records() -> None:
    """With a modelled planner time the simulation stays reproducible."""
    fake = Fake(Replanned(table=table("fast"), seconds=7.7))
    assert simulated(fake, planner_s=3.0)[0] == simulated(fake, planner_s=3.0)[0]


def test_numbers_out_of_range_are_refused() -> None:
    """A negative planner time or no period is bad input."""
    fake = Fake(Replanned(table=None, seconds=0.0))
    with pytest.raises(InvalidInput, match="planner time"):
        Replan(period_s=60.0, planner=fake, planner_s=-1.0)
    with pytest.raises(InvalidInput, match="period"):
        Replan(period_s=0.0, planner=fake)
