"""Fleets, mixes, loads and forecasts of the studies."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable
from planner.graph.shape import all_sites
from planner.study import forecasts
from planner.study.fleets import FLEETS, make_fleet
from planner.study.forecasts import estimates_of, oracle
from planner.study.graphs import TEMPLATES
from planner.study.lengths import lognormal, mixture, plain
from planner.study.loads import arrival_times, capacity_rps, closed_loop
from planner.study.mixes import MIXES, joined, make_mix
from planner.study.settings import Setting, make_world, workload

SPREAD = {"h00": 1.0, "h01": 0.5, "h02": 0.2}


@pytest.mark.parametrize(("name", "spread"), SPREAD.items())
def test_spread_fleets(name: str, spread: float) -> None:
    """Prefill and decode time per token are both spread by the ratio, the mean speed stays."""
    alike = make_fleet("h00").endpoints[0].latency
    rows = [endpoint.latency for endpoint in make_fleet(name).endpoints]
    prefill = [row.prefill_marginal_s(1000) / alike.prefill_marginal_s(1000) for row in rows]
    decode = [row.decode_step_s(8, 8e3) / alike.decode_step_s(8, 8e3) for row in rows]
    for times in (prefill, decode):
        assert min(times) / max(times) == pytest.approx(spread)
        assert np.mean([1 / time for time in times]) == pytest.approx(1.0)


@pytest.mark.parametrize("name", FLEETS)
def test_fleets_differ_in_kv_only(name: str) -> None:
    """Scarce KV is less KV and nothing else; engines order by priority."""
    ample, scarce = make_fleet(name, kv="ample"), make_fleet(name, kv="scarce")
    for rich, poor in zip(ample.endpoints, scarce.endpoints, strict=True):
        assert poor.kv_blocks < rich.kv_blocks
        assert replace(poor, kv_blocks=rich.kv_blocks) == rich
        assert rich.scheduling == "priority"


def test_pools() -> None:
    """Pool fleets have the numbers of prefill and decode endpoints of the published study."""
    roles = {name: [e.role for e in make_fleet(name).endpoints] for name in FLEETS}
    for name, count in (("hetero1", 8), ("hetero2", 10), ("homogeneous", 4)):
        assert roles[name].count("prefill") == roles[name].count("decode") == count


@pytest.mark.parametrize(
    "fields", [{"fleet": "h09"}, {"mix": "x"}, {"kv": "some"}, {"forecasts": "x"},
               {"load": 0.0}, {"load": 1.3}, {"arrivals": "x"}, {"arrivals": "azure_code"}],
)  # fmt: skip
def test_unknown_names(fields: dict[str, object]) -> None:
    """A setting that names nothing known says so."""

    def use() -> None:
        setting = Setting(**{"forecasts": "oracle", **fields})  # type: ignore[arg-type]
        setting.world()
        workload(setting, 0, 5)

    with pytest.raises(InvalidInput):
        use()


def test_lognormal_tail() -> None:
    """Samples have the promised mean and reach beyond the outermost quantile."""
    truth = lognormal(100.0, 1.0)
    draws = [truth.sample((n + 0.5) / 20000) for n in range(20000)]
    assert np.mean(draws) == pytest.approx(truth.mean, rel=2e-3)
    assert max(draws) > 3 * truth.values[-1]
    assert np.quantile(draws, 0.9) == pytest.approx(truth.at(0.9), rel=1e-2)
    assert plain(truth).sample(0.9999) == truth.values[-1]


def test_mixture() -> None:
    """A mixture has the mean and the quantiles of its parts, shares counted."""
    both = mixture((0.25, 0.75), (lognormal(10.0, 0.0), lognormal(50.0, 0.0)))
    draws = [both.sample((n + 0.5) / 1000) for n in range(1000)]
    assert np.mean(draws) == pytest.approx(both.mean) == pytest.approx(40.0)
    assert both.values[0] == pytest.approx(10.0)
    assert both.values[-1] == pytest.approx(50.0)


@pytest.mark.parametrize("name", MIXES)
def test_runs_of_a_mix(name: str) -> None:
    """Runs fit a scarce KV cache, and run n depends on the seed and n only."""
    mix = make_mix(name)
    runs = mix.runs(np.arange(60.0), seed=3)
    room = make_fleet("h02", kv="scarce").endpoints[0].kv_tokens
    assert max(t.prompt_tokens + t.output_tokens for run in runs for t in run.tasks) < room
    again = mix.runs(np.arange(20.0) * 7, seed=3)
    assert [run.tasks for run in again] == [run.tasks for run in runs[:20]]
    assert sum(part.share for part in mix.parts) == pytest.approx(1.0)


def test_shares_and_tenants() -> None:
    """Workflows come in their shares, with their tenants and deadlines."""
    mix = make_mix("multi_tenant")
    runs = mix.runs(np.zeros(2000), seed=0)
    for part in mix.parts:
        mine = [run for run in runs if run.workflow == part.template]
        assert len(mine) / len(runs) == pytest.approx(part.share, abs=0.035)
        assert {(run.tenant, run.deadline_s) for run in mine} == {(part.tenant, part.deadline_s)}


def test_fan_out_joins() -> None:
    """A map-reduce run has 4 to 12 parallel calls, and its last call waits for all of them."""
    widths = set()
    for run in make_mix("mapreduce").runs(np.zeros(60), seed=0):
        maps = [task.index for task in run.tasks if task.node.startswith("map")]
        widths.add(len(maps))
        assert run.tasks[-1].node == "reduce"
        assert set(run.tasks[-1].preds) == set(maps)
    assert widths == {4, 6, 8, 12}


def test_correlated_stages() -> None:
    """Lengths of a run's stages go together in `staged`, and do not once shuffled."""

    def correlation(name: str) -> float:
        runs = make_mix(name).runs(np.zeros(400), seed=0)
        logs = np.log([[task.output_tokens for task in run.tasks] for run in runs])
        return float(np.corrcoef(logs[:, 0], logs[:, 2])[0, 1])

    assert correlation("staged") > 0.5
    assert abs(correlation("staged_shuffled")) < 0.2


def test_joined_mix() -> None:
    """A mix is one graph with all call sites."""
    mix = make_mix("agents")
    workflow, estimates = joined(mix, oracle(mix))
    assert set(all_sites(workflow)) == set(estimates.workflows[workflow.content_hash].sites)
    assert len(all_sites(workflow)) == sum(len(all_sites(one)) for one in mix.workflows)


def test_capacity() -> None:
    """Capacity follows the sum of speeds: it is the same at every spread."""
    mix = make_mix("agents")
    found = [capacity_rps(make_fleet(name), mix) for name in SPREAD]
    assert found == pytest.approx([found[0]] * 3, rel=1e-6)
    setting = Setting(load=0.5, forecasts="oracle")
    assert make_world(load=0.5, forecasts="oracle")[1] == pytest.approx(found[0] / 2)
    runs = workload(setting, 0, 2000)
    assert runs[-1].arrival_s == pytest.approx(2000 / setting.rate_rps, rel=0.1)


def test_arrival_laws() -> None:
    """Bursts and closed loops start at once; clients grow with load."""
    rng = np.random.default_rng(0)
    assert not arrival_times("burst", 1.0, 5, rng).any()
    assert arrival_times("gamma", 2.0, 4000, rng, cv=2.0)[-1] == pytest.approx(2000, rel=0.2)
    fleet = make_fleet("h00")
    assert closed_loop(fleet, 0.5).clients == 40
    world, _ = make_world(arrivals="closed", load=1.0, forecasts="oracle")
    assert world.clients is not None
    assert world.clients.clients == 80


def test_learned_forecasts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forecasts are learned once and kept; the worse ones are made from them as they say."""
    monkeypatch.setattr(forecasts, "_TRAINING_RUNS", 60)
    monkeypatch.setattr(forecasts, "_TRAINING_TRACES", 1)
    mix, fleet = make_mix("staged"), make_fleet("h00")
    learned = estimates_of("learned", mix, fleet, tmp_path)
    assert estimates_of("learned", mix, fleet, tmp_path) == learned

    def means(table: EstimateTable) -> list[float]:
        (one,) = table.workflows.values()
        return [site.output_tokens.mean for site in one.sites.values()]

    truth = dict(zip(sorted(TEMPLATES["staged"].truth.sites), means(learned), strict=True))
    assert max(truth, key=lambda site: truth[site]) == "write#0"
    worse = {name: means(estimates_of(name, mix, fleet, tmp_path))
             for name in ("noise30", "type_mean", "wrong")}  # fmt: skip
    assert sorted(worse["wrong"]) == sorted(means(learned)) != worse["wrong"]
    assert len(set(worse["type_mean"])) == 1
    ratio = np.array(worse["noise30"]) / np.array(means(learned))
    assert 0.3 < ratio.min() < ratio.max() < 3
    assert estimates_of("noise30", mix, fleet, tmp_path) == estimates_of(
        "noise30", mix, fleet, tmp_path
    )
