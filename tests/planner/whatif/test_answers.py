"""Questions, answers and effects on cases whose answer is known."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from planner.domain.errors import InvalidInput
from planner.whatif.asking import ask
from planner.whatif.capacity import capacity_rps
from planner.whatif.effects import effect
from planner.whatif.effort import Effort
from planner.whatif.notation import parse_scenario
from planner.whatif.question import Question, Stream, Target, workload
from planner.whatif.sample import Sample, counted_only
from planner.whatif.scenarios import what_if
from planner.whatif.store import Store

from .small import ALONE_S, DISPATCH_S, chain, endpoint, forecasts, question

EFFORT = Effort(seeds=2, runs=20)


def asked(*questions: Question, effort: Effort = EFFORT) -> list:
    return ask([(str(n), one) for n, one in enumerate(questions)], effort, store=Store())


def test_an_idle_fleet_takes_what_a_run_takes_alone() -> None:
    """Rare runs of constant length: every figure and every bound is the time of one run."""
    (answer,) = asked(question(deadline_s=1.5))
    for metric in ("mean_s", "p50_s", "p95_s", "p99_s"):
        assert answer.figures[metric].value == pytest.approx(ALONE_S + DISPATCH_S, abs=1e-3)
    assert answer.figures["attainment"].value == 1.0
    for metric in ("mean_s", "p95_s"):
        assert answer.bounds[metric] <= answer.figures[metric].value
        assert answer.bounds[metric] == pytest.approx(ALONE_S, rel=0.02)


def test_proofs_say_what_is_true() -> None:
    """A target below the bound is impossible for any policy, one above the figure is met."""
    (answer,) = asked(question())
    low, high = Target.parse("p95=1"), Target.parse("p95=2")
    assert answer.impossible(low)
    assert "no policy can reach p95=1 s on this fleet at this load" in answer.verdict(low)
    assert not answer.impossible(high)
    assert answer.verdict(high).startswith("p95=2: met")
    assert ": missed" in answer.verdict(Target.parse("p95=1.1992"))


def test_bounds_hold_for_every_policy() -> None:
    """Whoever decides, on whatever load: no figure is below its bound."""
    fleet = (endpoint("a", slots=2), endpoint("b", scale=2.0, slots=2))
    base = question(*fleet, rate=1.5)
    names = ("marginal_cost", "round_robin", "least_load", "power_of_two")
    effort = Effort(seeds=2, runs=30, bounds=("mean_s", "p50_s", "p95_s", "p99_s"))
    for answer in asked(*(replace(base, policy=one) for one in names), effort=effort):
        for metric, bound in answer.bounds.items():
            assert answer.figures[metric].value >= bound - 1e-9


def test_text_left_by_skipped_runs_is_free() -> None:
    """What earlier runs may have left cached is taken out of the prompts that are bounded."""
    runs = workload(question(), 0, 6)
    shared = runs[0].tasks[0].prompt[0]
    later = replace(
        runs[3],
        tasks=(replace(runs[3].tasks[0], prompt=(shared, *runs[3].tasks[0].prompt)),),
    )
    kept = counted_only((*runs[:3], later), 3)
    assert kept[0].tasks[0].prompt == runs[3].tasks[0].prompt
    only = replace(runs[3], tasks=(replace(runs[3].tasks[0], prompt=(shared,)),))
    (bare,) = counted_only((*runs[:3], only), 3)
    assert bare.tasks[0].prompt_tokens == 1


def test_changes_see_the_same_runs() -> None:
    """Fleet, policy and load leave the runs as they are; the load alone scales their arrivals."""
    base = question(endpoint("a"), endpoint("b"), rate=1.0, tenants=2)
    runs = workload(base, 3, 12)
    for text in ("-b", "policy random", "retention off"):
        assert workload(parse_scenario(text).apply(base), 3, 12) == runs
    faster = workload(parse_scenario("load 2").apply(base), 3, 12)
    assert [one.tasks for one in faster] == [one.tasks for one in runs]
    assert [2 * one.arrival_s for one in faster] == pytest.approx([one.arrival_s for one in runs])
    assert len({one.run_id for one in runs}) == 12
    assert {one.tenant for one in runs} == {"t0", "t1"}


def test_twice_as_slow_takes_twice_as_long() -> None:
    """The paired effect of an endpoint at half the speed is +100 %, with hardly an error."""
    before, after = asked(question(), question(endpoint("a", scale=2.0)))
    change = effect(before, after).changes["mean_s"]
    assert change.value == pytest.approx(1.0, abs=2e-3)
    assert change.high - change.low < 1e-3


def test_capacity_by_hand() -> None:
    """Four slots at four calls side by side: 0.2 s + 100 x (13 ms + 3 x 0.2 s / 100) is 2.1 s."""
    assert capacity_rps(question()) == pytest.approx(4 / 2.1, rel=0.02)


def test_saturation_is_said() -> None:
    """Beyond capacity the answer says that its figures grow with the number of runs."""
    (answer,) = asked(question(rate=10.0), effort=Effort(seeds=2, runs=20, bounds=()))
    assert answer.load > 1
    assert any("queues" in note for note in answer.notes)


def test_a_fleet_that_cannot_serve_is_an_answer() -> None:
    """A model that nobody serves gives no figures, and the reason."""
    base = question()
    asking = replace(
        base, fleet=replace(base.fleet, endpoints=(replace(endpoint("a"), model="x"),))
    )
    (answer,) = asked(asking)
    assert answer.figures == {}
    assert answer.load == math.inf
    assert "n0#0" in answer.notes[0]
    assert "no figure" in answer.verdict(Target.parse("p95=1"))


def test_cost_per_run() -> None:
    """Two endpoints at 1 and 2 $ an hour and 0.5 runs a second: 3 $ for 1,800 runs."""
    priced = question(endpoint("a"), endpoint("b", usd=2.0), rate=0.5)
    assert priced.usd_per_run == pytest.approx(3 / 1800)
    assert question(endpoint("a", usd=None)).usd_per_run is None


def test_the_planned_policy_gets_a_plan() -> None:
    """Policy almanac is simulated with a table planned for the question."""
    (answer,) = asked(question(endpoint("a"), rate=0.2), effort=Effort(seeds=2, runs=20, bounds=()))
    (planned,) = asked(
        replace(question(endpoint("a"), rate=0.2), policy="almanac"),
        effort=Effort(seeds=2, runs=20, bounds=()),
    )
    assert planned.notes == ()
    assert planned.figures["mean_s"].value == pytest.approx(answer.figures["mean_s"].value, rel=0.2)


def test_what_if_as_text_json_and_frame() -> None:
    """The record shows scenarios, effects and verdicts, in each form."""
    found = what_if(
        question(deadline_s=1.0),
        [parse_scenario("deadline +1")],
        target=Target.parse("attainment=0.9"),
        effort=EFFORT,
    )
    text = found.text()
    assert "deadline +1: attainment=0.9: met" in text
    assert "as it is: attainment=0.9: missed" in text
    document = found.to_json()
    assert document["effects"][0]["changes"]["attainment"]["value"] == pytest.approx(1.0)
    assert list(found.to_frame()["scenario"]) == ["as it is", "deadline +1"]
    assert "<table" in found._repr_html_()


def test_results_are_kept(tmp_path: Path) -> None:
    """A second asking simulates nothing; a changed question does."""
    said: list[str] = []
    for base in (question(), question(), question(rate=2e-6)):
        said.append("|")
        ask([("x", base)], EFFORT, store=Store(folder=tmp_path, progress=said.append))
    first, second, third = "".join(said).split("|")[1:]
    assert (first.count("seed"), second, third.count("seed")) == (4, "", 4)


@pytest.mark.parametrize("text", ["p95", "p95=-1", "p93=1", "attainment=2", "mean=x", ""])
def test_unreadable_targets(text: str) -> None:
    """A target is a known figure and a number in its range."""
    with pytest.raises(InvalidInput, match="target"):
        Target.parse(text)


def test_bad_questions_are_refused() -> None:
    """Rates, deadlines, policies, seeds and shares out of range are one clear error each."""
    graph = chain("one")
    for make in (
        lambda: Stream(workflow=graph, rate_rps=-1.0),
        lambda: Stream(workflow=graph, rate_rps=1.0, deadline_s=0.0),
        lambda: question(rate=0.0),
        lambda: replace(question(), policy="best"),
        lambda: replace(question(), retention="pin:x"),
        lambda: Effort(seeds=1),
        lambda: Effort(level=1.0),
        lambda: what_if(question(), target=Target.parse("attainment=0.9")),
    ):
        with pytest.raises(InvalidInput):
            make()


def test_samples_count_lost_runs_as_late() -> None:
    """A run that never ended is infinitely late: it spoils the P99, misses its deadline."""
    sample = Sample(
        latency_s=(1.0, 2.0, math.inf), tenant=("a", "a", "b"), deadline_s=(1.5, None, 9.0)
    )
    assert sample.value("p50_s") == 2.0
    assert sample.value("p99_s") == math.inf
    assert sample.value("attainment") == 0.5
    assert sample.value("mean_s", "a") == 1.5
    assert sample.value("mean_s", "nobody") is None
    assert Sample.from_json(sample.to_json()) == sample


def test_forecasts_may_be_wrong() -> None:
    """Runs come from the truth, policies believe the estimates."""
    graph = question().workflows[0]
    wrong = replace(question(), truth=forecasts(graph, output=200.0))
    (answer,) = asked(wrong)
    assert answer.figures["mean_s"].value == pytest.approx(ALONE_S + 1.0 + DISPATCH_S, abs=1e-3)
