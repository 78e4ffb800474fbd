"""Entries of studies, and what variants take away."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from planner.dispatch.events import Call
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import Choice, make_policy
from planner.dispatch.policies.base import Ready, Wait
from planner.dispatch.view import EndpointState, FleetView
from planner.domain.errors import InvalidInput
from planner.domain.estimates import PRIOR_TOOL
from planner.sim.experiment import PolicySetup
from planner.study import grid
from planner.study.ablation import SIGNALS, VARIANTS, VariedSetup
from planner.study.entries import parse_entry
from planner.study.fleets import make_fleet
from planner.study.forecasts import oracle
from planner.study.graphs import TEMPLATES
from planner.study.grid import run_study
from planner.study.mixes import make_mix
from planner.study.settings import Setting
from planner.study.studies import Study


def test_forms() -> None:
    """Label, variant and parameters may each be there or not."""
    plain = parse_entry("prefix_affinity")
    assert (plain.label, plain.policy, plain.variant) == ("prefix_affinity",) * 2 + (None,)
    assert plain.grid
    ray = parse_entry("ray=prefix_affinity:imbalanced_threshold=inf")
    assert (ray.label, ray.policy, ray.grid) == ("ray", "prefix_affinity", ())
    blind = parse_entry("almanac-prefix")
    assert (blind.label, blind.policy, blind.variant) == ("almanac-prefix", "almanac", "prefix")


@pytest.mark.parametrize("text", ["nobody", "almanac-x", "las-drop", "=las", "las:x=1", ""])
def test_bad_forms(text: str) -> None:
    """An unknown policy, variant or parameter is one clear error."""
    with pytest.raises(InvalidInput):
        parse_entry(text)


def test_fixed_parameters_are_not_tuned() -> None:
    """A variant is tuned over the policy's grid less what it fixes, or over its own."""
    names = {signal: [name for name, _ in parse_entry(f"almanac-{signal}").grid]
             for signal in SIGNALS}  # fmt: skip
    assert not {"theta", "price_scale"} & set(names["externality"])
    assert names["plan"] == ["theta"]
    assert {"theta", "price_scale"} <= set(names["speed"])


def forecaster() -> Forecaster:
    mix = make_mix("react")
    return Forecaster(oracle(mix), mix.workflows)


def test_forecast_variants() -> None:
    """Each takes its own signal away, says so in the version, and leaves the others."""
    known, fleet = forecaster(), make_fleet("h02")
    graph = TEMPLATES["react"].workflow
    key = graph.content_hash

    def of(signal: str) -> Forecaster:
        change = VARIANTS["almanac"][signal].forecasts
        assert change is not None
        return change(known, fleet)

    rows = set(of("speed").estimates.endpoints.values())
    assert len(rows) == 1
    assert len(of("speed").estimates.endpoints) == len(fleet.endpoints)
    times = [one.latency.decode_step_s(4, 8e3) for one in fleet.endpoints]
    assert rows.pop().decode_step_s(4, 8e3) == pytest.approx(sum(times) / len(times))
    assert of("tool").estimates.tool(key, "code") == PRIOR_TOOL != known.estimates.tool(key, "code")
    chances = of("branch").estimates.workflows[key].branches["agent:next"]
    assert set(chances.values()) == {(0.25,)}
    assert of("branch").estimates.workflows[key].sites == known.estimates.workflows[key].sites
    versions = {of(name).estimates.version for name in ("speed", "length", "branch", "tool")}
    assert len(versions | {known.estimates.version}) == 5
    call = Call(call_id="c", run_id="r", workflow_hash=key, site="agent#0", prompt_tokens=100)
    assert known.of(call).remaining_s > 0
    assert (of("structure").of(call).criticality, of("structure").of(call).remaining_s) == (1, 0)


def test_one_length() -> None:
    """Without lengths, all call sites are believed to answer alike."""
    mix = make_mix("agents")
    change = VARIANTS["almanac"]["length"].forecasts
    assert change is not None
    known = Forecaster(oracle(mix), mix.workflows)
    table = change(known, make_fleet("h00")).estimates
    means = {s.output_tokens.mean for one in table.workflows.values() for s in one.sites.values()}
    assert len(means) == 1


def offered(signal: str) -> tuple[Ready, Choice | Wait]:
    """Return what a policy without a signal sees of a call, and what comes out of it."""
    fleet, known = make_fleet("h00"), forecaster()
    policy = make_policy("marginal_cost")
    seen: list[Ready] = []
    inner = policy.choose

    def look(ready: Ready) -> Choice | Wait:
        seen.append(ready)
        return inner(ready)

    policy.choose = look  # type: ignore[method-assign]
    change = VARIANTS["almanac"][signal].change
    assert change is not None
    view = FleetView(
        EndpointState(index, one, one.latency) for index, one in enumerate(fleet.endpoints)
    )
    call = Call(call_id="c", run_id="r", prompt_tokens=64, prefix=(1, 2), run_arrival_s=5.0)
    answer = change(policy).choose(Ready(call, view.states, view, known, 6.0))
    return seen[0], answer


def test_blind_and_unordered() -> None:
    """One variant never sees a prefix, the other never gives a priority."""
    ready, answer = offered("prefix")
    assert ready.call.prefix == ()
    assert isinstance(answer, Choice)
    assert answer.priority == 5000
    ready, answer = offered("order")
    assert ready.call.prefix == (1, 2)
    assert isinstance(answer, Choice)
    assert answer.priority == 0


def test_variants_run_and_are_told_apart(tmp_path: Path) -> None:
    """Two labels of one policy and a variant are three results; idle KV may be dropped."""
    setting = Setting(fleet="h00", kv="scarce", mix="react", load=0.9, forecasts="oracle")
    study = Study(
        name="tiny",
        question="?",
        settings=(setting,),
        policies=("astraea:adaptive_kv=0", "static=astraea:adaptive_kv=0",
                  "astraea-drop:adaptive_kv=0", "hexagent-queue"),
        runs=40,
        seeds=1,
        tuned=False,
    )  # fmt: skip
    found = {one.policy: one.results[0] for one in run_study(study, tmp_path, jobs=1)}
    assert len(found) == 4
    assert len(list((tmp_path / "cells").iterdir())) == 3
    kept, dropped = found["static"], found["astraea-drop:adaptive_kv=0"]
    assert dropped.metrics.prefix_hit_ratio < kept.metrics.prefix_hit_ratio  # type: ignore[operator]
    assert kept.belady_ratio is not None
    assert kept.belady_ratio >= 1.0
    assert 0 < (kept.kv_usage or 0) < 1


def test_key_knows_variants(tmp_path: Path) -> None:
    """A variant's cells are its own."""
    job = grid._Job(setting=Setting(), setup=PolicySetup(policy="hexagent"), seed=0, runs=10,
                    folder=tmp_path, data=None)  # fmt: skip
    other = replace(job, setup=VariedSetup(policy="hexagent", variant="queue"))
    assert job.key != other.key
    assert replace(job, setup=other.setup.with_parameters({})).key == other.key
