"""Claims, bars, pooled tails, and that the named studies are well formed."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from planner.domain.errors import InvalidInput
from planner.domain.trace import CallRecord, RunRecord
from planner.metrics import PairedDifference, RunMetrics
from planner.report.study_page import write_study_page
from planner.sim.experiment import PolicySetup
from planner.study.bars import bars_of, bars_text
from planner.study.claims import Claim, Side
from planner.study.clairvoyant import Clairvoyant
from planner.study.contenders import contenders
from planner.study.entries import parse_entry
from planner.study.figures import Figures
from planner.study.fleets import make_fleet
from planner.study.grid import Outcome
from planner.study.measure import CellResult, endpoint_use
from planner.study.outcome import document, study_table
from planner.study.pooled import pooled_difference, pooled_quantile, resampled_quantiles
from planner.study.settings import Setting
from planner.study.studies import STUDIES, Study

HERE, THERE = Setting(load=0.5), Setting(load=0.8)


def result(latencies: list[float], seed: int) -> CellResult:
    values = tuple(sorted(one + 0.01 * seed for one in latencies))
    metrics = RunMetrics(
        runs=len(values), mean_s=float(np.mean(values)), p50_s=float(np.median(values)),
        p95_s=values[-1], p99_s=values[-1], throughput_rps=1.0, latencies_s=values,
    )  # fmt: skip
    return CellResult(
        metrics=metrics, stretch_p95=values[-1], stretch_p99=values[-1], stretches=values,
        all_mean_s=metrics.mean_s,
        tenants={"light": {"within_deadline": 0.5}, "heavy": {"mean_s": 2.0}},
    )  # fmt: skip


def outcome(setting: Setting, policy: str, latencies: list[float]) -> Outcome:
    entry = parse_entry(policy)
    return Outcome(
        setting=setting,
        entry=entry,
        setup=PolicySetup(policy=entry.policy),
        results={seed: result(latencies, seed) for seed in range(3)},
    )


OUTCOMES = [
    outcome(HERE, "las", [2.0, 4.0, 6.0]),
    outcome(HERE, "plas", [2.0, 2.0, 8.0]),
    outcome(HERE, "almanac", [1.0, 2.0, 3.0]),
    outcome(THERE, "las", [2.0, 4.0, 6.0]),
    outcome(THERE, "almanac", [4.0, 6.0, 8.0]),
]
CLAIM = Claim(
    name="ours", metric="mean_s", of=Side(setting=HERE, policy="almanac"),
    against=(Side(setting=HERE, policy="las"), Side(setting=HERE, policy="plas")), high=-0.4,
    source="a paper",
)  # fmt: skip
STUDY = Study(
    name="tiny",
    question="?",
    settings=(HERE, THERE),
    policies=("las", "plas", "almanac"),
    claims=(
        CLAIM,
        replace(CLAIM, name="elsewhere", against=(Side(setting=THERE, policy="almanac"),)),
        replace(CLAIM, name="alone", against=(), measured="value", high=1.0),
        replace(CLAIM, name="share", metric="tenants.light.within_deadline",
                measured="difference", high=0.0),
        replace(CLAIM, name="absent", of=Side(setting=Setting(), policy="almanac")),
    ),
    baseline="las",
)  # fmt: skip


def test_claims_are_judged() -> None:
    """Each is held against the best it names; what was not simulated is left out."""
    bars = {bar.name.partition(" (")[0]: bar for bar in bars_of(STUDY, Figures(OUTCOMES), {})}
    # Means are 2.01 against 4.01 (both others have it; the first by name) and 6.01.
    assert bars["ours"].value == pytest.approx(100 * (2.01 / 4.01 - 1), abs=0.1)
    assert bars["ours"].holds
    assert bars["elsewhere"].value == pytest.approx(100 * (2.01 / 6.01 - 1), abs=0.1)
    assert (bars["alone"].value, bars["alone"].holds) == (pytest.approx(2.01), False)
    assert (bars["share"].value, bars["share"].unit) == (0.0, "")
    assert "absent" not in bars


def test_held_against_the_best() -> None:
    """Wins are counted over settings, and the worst setting shows."""
    bars = bars_of(STUDY, Figures(OUTCOMES), {})
    mean_wins, mean_worst, p95_wins, p95_worst = bars[:4]
    assert (mean_wins.value, mean_wins.holds) == (50.0, True)
    assert mean_worst.value == pytest.approx(100 * (6.01 / 4.01 - 1), abs=0.1)
    assert not mean_worst.holds
    assert p95_wins.value == 50.0
    assert p95_worst.value == pytest.approx(100 * (8.02 / 6.02 - 1), abs=0.1)


def test_held_against_the_baseline() -> None:
    """The worst setting shows, and how much of a large clairvoyant gap is closed; small ones not.

    Ours is 2.01 against 4.01 here and 6.01 against 4.01 there.
    """
    study = replace(STUDY, claims=(), most_loss=0.01)
    wide = Clairvoyant(learned_s=10.0, exact_s=4.0, found_s=4.0, bound_s=1.0)
    none = replace(wide, found_s=10.0)
    bars = bars_of(study, Figures(OUTCOMES), {HERE: [wide, none], THERE: [none, none]})
    mean, p95, left_open, closed = bars[4:]
    assert mean.value == pytest.approx(100 * (6.01 / 4.01 - 1), abs=0.1)
    assert (mean.high, mean.holds) == (1.0, False)
    assert THERE.name in mean.name
    assert p95.value == pytest.approx(100 * (8.02 / 6.02 - 1), abs=0.1)
    # Half of the runs' time is saved, of a gap of 30 %.
    assert closed.value == pytest.approx(50.0 / 0.3, abs=1.0)
    assert closed.holds
    assert HERE.name in closed.name
    assert (left_open.value, left_open.holds) == (0.0, True)
    bars = bars_of(study, Figures(OUTCOMES), {THERE: [wide]})
    assert [bar.holds for bar in bars[6:]] == [False, False]
    assert bars[6].value == 1.0


def _grown(one: Outcome, latencies: list[float]) -> Outcome:
    """Return an outcome with two more seeds."""
    more = {seed: result(latencies, seed) for seed in (3, 4)}
    return replace(one, results={**one.results, **more})


def test_contenders() -> None:
    """Ours, the baseline, and who comes close in mean or P95 of a setting; none without need."""
    study = replace(STUDY, baseline="plas", more_seeds=2)
    far = outcome(HERE, "atlas", [5.0, 6.0, 7.0])
    close = outcome(HERE, "saga", [2.9, 2.9, 3.01])  # P95 3.03 against 3.02
    found = contenders(study, [*OUTCOMES, far, close])
    names = [(one.setting.load, one.policy) for one in found]
    assert names == [
        (0.5, "plas"), (0.5, "almanac"), (0.5, "saga"), (0.8, "las"), (0.8, "almanac"),
    ]  # fmt: skip
    alike = [outcome(HERE, name, [1.0, 2.0, 3.0]) for name in ("saga", "plas", "las", "atlas")]
    few = contenders(replace(study, baseline="llmsched"), [*alike, OUTCOMES[2]])
    assert [one.policy for one in few] == ["plas", "las", "atlas", "almanac"]
    assert contenders(STUDY, OUTCOMES) == []


def test_the_best_rival_is_a_contender_however_far_behind() -> None:
    """Almanac halves the mean of all others; saga is best of these, and only astraea is close.

    The tail variant is run too. A variant that is worse than the others is not.
    """
    study = replace(STUDY, baseline="plas", more_seeds=2)
    means = {
        "almanac": 1.0, "almanac-tail": 1.1, "almanac-speed": 2.3, "saga": 2.0, "astraea": 2.03,
        "las": 2.1, "plas": 3.0,
    }  # fmt: skip
    group = [outcome(HERE, name, [mean]) for name, mean in means.items()]
    found = [one.policy for one in contenders(study, group)]
    assert found == ["almanac", "almanac-tail", "saga", "astraea", "plas"]


def test_more_seeds_of_some() -> None:
    """Figures are of the seeds that all have, differences of those that both sides have."""
    las, plas, ours = OUTCOMES[:3]
    ours, las = _grown(ours, [1.0, 2.0, 13.0]), _grown(las, [10.0, 10.0, 10.0])
    figures = Figures([las, plas, ours])
    assert figures.value(ours, "mean_s") == pytest.approx(2.01)
    assert figures.value(ours, "p95_s") == pytest.approx(3.02)
    assert figures.common(ours).keys() == {0, 1, 2}
    difference = figures.difference(las, ours, "mean_s")
    assert difference is not None
    assert difference.mean == pytest.approx((3 * 0.501 + 2 * 0.535) / 5 - 1, abs=1e-3)
    tail = figures.difference(las, ours, "p95_s")
    assert tail is not None
    assert tail.mean == pytest.approx(13.04 / 10.04 - 1)
    few = figures.difference(plas, ours, "p95_s")
    assert few is not None
    assert few.mean == pytest.approx(3.02 / 8.02 - 1)
    # One that was not run again may be the best all the same.
    assert figures.least([plas, ours], "mean_s") is ours
    better = outcome(HERE, "atlas", [1.0, 1.0, 1.0])
    assert Figures([las, plas, ours, better]).least([las, plas, better], "mean_s") is better
    # las is ahead by name on the common seeds; plas has no others.
    assert figures.least([las, plas], "mean_s") is las
    page = document(replace(STUDY, settings=(HERE,), claims=()), [las, plas, ours], {})
    pairs = {
        policy["policy"]: [one["pairs"] for one in policy["against_best"][:1]]
        for policy in page["settings"][0]["policies"]
    }
    assert pairs == {"las": [5], "plas": [3], "almanac": [5]}


def test_variants_are_no_competitors() -> None:
    """The best other is another policy; where all are variants of one, any of them."""
    ours, tail = outcome(HERE, "almanac", [1.0, 2.0]), outcome(HERE, "almanac-tail", [1.0, 1.0])
    las = outcome(HERE, "las", [3.0, 3.0])
    figures = Figures([ours, tail, las])
    assert figures.others(ours) == figures.others(tail) == [las]
    assert figures.others(las) == [ours, tail]
    assert Figures([ours, tail]).others(ours) == [tail]


def test_bars_as_json() -> None:
    """Bars print as benchmarks do: name, value, unit, bar, holds; JSON knows no infinity."""
    rows = json.loads(
        json.dumps(
            [bar.to_json() for bar in bars_of(STUDY, Figures(OUTCOMES), {})], allow_nan=False
        )
    )
    assert all({"name", "value", "unit", "bar", "holds"} <= set(row) for row in rows)
    assert "5 of 8 hold" in bars_text(rows)
    both = replace(CLAIM, low=-0.5).judged(PairedDifference(-0.45, -0.5, -0.4))
    assert (both.to_json()["bar"], both.to_json()["interval"]) == ([-50.0, -40.0], [-50.0, -40.0])
    one_seed = CLAIM.judged(PairedDifference(-0.1, -math.inf, math.inf))
    assert (one_seed.to_json()["interval"], one_seed.holds) == (None, False)


def test_bad_claims() -> None:
    """A claim compares with someone or looks at a value, and its range is one."""
    with pytest.raises(InvalidInput, match="compare with"):
        replace(CLAIM, against=())
    with pytest.raises(InvalidInput, match="give a range"):
        replace(CLAIM, low=1.0, high=0.0)


def test_document_and_page(tmp_path: Path) -> None:
    """Bars, losses beside wins, attainment and regret reach document, table and page."""
    found = document(STUDY, OUTCOMES, {}, {HERE: {0: 1.0}})
    first = found["settings"][0]["policies"]
    assert first[2]["regret"] == pytest.approx(1.0)
    assert first[0]["attainment"][0] == (1.0, 0.0)
    assert first[0]["attainment"][-1] == (30.0, 1.0)
    assert found["settings"][1]["policies"][0]["regret"] is None
    verdicts = {one["metric"]: one["verdict"] for one in first[2]["against_best"]}
    assert verdicts["p95_s"] == "win"
    page = write_study_page(found, tmp_path / "page.html").read_text()
    assert "almanac against the best other policy" in page
    assert 'class="loss"' in page
    assert 'class="win"' in page
    assert "a paper" in page
    assert "light: in time %" in page
    assert "elsewhere" in study_table(found)


def test_samples_of_whole_seeds_have_the_quantile_of_their_runs() -> None:
    """As if the drawn seeds' runs were put side by side; seeds differ in their number of runs."""
    rng = np.random.default_rng(2)
    samples = [rng.lognormal(size=size).round(1).tolist() for size in (0, 3, 40, 1, 17)]
    for level in (0.01, 0.5, 0.95, 1.0):
        drawn = resampled_quantiles(samples, level, seed=4, draws=50)
        picks = np.random.default_rng(4).integers(5, size=(50, 5))
        for value, pick in zip(drawn, picks, strict=True):
            if any(samples[one] for one in pick):
                assert value == pooled_quantile([samples[one] for one in pick], level)


def test_pooled_tail() -> None:
    """The tail is that of all runs together, its interval that of drawing whole seeds."""
    samples = [[1.0] * 99 + [50.0], [1.0] * 99 + [60.0], [1.0] * 97 + [70.0] * 3]
    assert pooled_quantile(samples, 0.99) == 60.0
    drawn = resampled_quantiles(samples, 0.99, seed=0, draws=200)
    assert drawn.shape == (200,)
    assert set(drawn) <= {1.0, 50.0, 60.0, 70.0}
    assert np.array_equal(drawn, resampled_quantiles(samples, 0.99, seed=0, draws=200))
    twice = [[2 * value for value in one] for one in samples]
    difference = pooled_difference(
        (60.0, drawn),
        (120.0, resampled_quantiles(twice, 0.99, seed=0, draws=200)),
        seeds=3,
    )
    assert difference == (1.0, 1.0, 1.0)
    assert math.isinf(pooled_difference((1.0, drawn), (2.0, drawn), seeds=1).high)


def test_endpoint_use_by_hand() -> None:
    """Two calls of 5 s and 2 s in 10 s: KV from the first token, slots from the sending."""
    fleet = make_fleet("h00")
    room, slots = fleet.endpoints[0].kv_tokens, fleet.endpoints[0].max_num_seqs

    def call(number: int, endpoint: str, sent_s: float, finish_s: float) -> CallRecord:
        return CallRecord(
            run_id="r", call_id=f"r/{number}", workflow_hash="h", node="n", site="n#0",
            ready_s=sent_s, sent_s=sent_s, endpoint=endpoint, prompt_tokens=900,
            output_tokens=200, first_token_s=sent_s + 1.0, finish_s=finish_s,
        )  # fmt: skip

    run = RunRecord(run_id="r", workflow="w", workflow_hash="h", arrival_s=0.0, finish_s=10.0)
    usage, spread = endpoint_use([call(0, "e0", 0.0, 5.0), call(1, "e1", 8.0, 10.0), run], fleet)
    assert usage == pytest.approx(1000 * (4.0 + 1.0) / (5 * 10 * room))
    assert spread == pytest.approx(5.0 / (10 * slots))
    assert endpoint_use([], fleet) == (None, None)


@pytest.mark.parametrize("name", STUDIES)
def test_studies_are_well_formed(name: str) -> None:
    """Every policy parses, no label stands for two entries, enough runs stand behind a P99."""
    study = STUDIES[name]
    assert len({setting.name for setting in study.settings}) == len(study.settings)
    for setting in study.settings:
        texts = study.policies_in(setting)
        assert len({parse_entry(text).label for text in texts}) == len(texts) > 0
    for claim in study.claims:
        assert {side.setting for side in claim.sides} <= set(study.settings)
    if name not in ("smoke", "regimes"):
        assert study.seeds >= 10
        assert study.seeds * study.runs * 0.85 >= 1000
