"""The results table: which baseline is best, and that wins and losses are treated alike."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from planner.report.comparison import compare
from planner.report.terminal import align, percent, results_table
from tests.planner.report.samples import results


@pytest.mark.parametrize(
    ("factor", "verdict", "difference"), [(0.9, "win", -0.1), (1.2, "loss", 0.2), (1.0, "tie", 0.0)]
)
def test_verdict_follows_the_interval(factor: float, verdict: str, difference: float) -> None:
    """A steady gain is a win, a steady loss a loss, no difference a tie."""
    table = compare(results(factor))
    assert table.best == ("marginal_cost", "marginal_cost")
    for comparison in table.rows[2].comparisons:
        assert comparison is not None
        assert comparison.verdict == verdict
        assert comparison.difference.mean == pytest.approx(difference, abs=1e-9)


def test_baselines_are_compared_too() -> None:
    """Every policy but the best baseline gets its comparison; Almanac is never the baseline."""
    table = compare(results(0.5))
    assert [row.comparisons[0] is None for row in table.rows] == [False, True, False]
    assert table.best[0] == "marginal_cost"


def test_values_are_spreads_over_seeds() -> None:
    """The mean column holds mean and deviation of the seeds' means: 12, 13 and 14 s."""
    value = compare(results()).rows[0].values[0]
    assert value is not None
    assert value == pytest.approx((13.0, 1.0, 12.0, 14.0))


def test_one_seed_claims_nothing() -> None:
    """With a single seed there is a difference but no win, in the table and as JSON."""
    made = results()
    single = replace(
        made, policies=tuple(replace(one, seeds=one.seeds[:1]) for one in made.policies)
    )
    comparison = compare(single).rows[2].comparisons[0]
    assert comparison is not None
    assert comparison.verdict == "tie"
    assert comparison.to_json()["low"] is None
    assert "-10.0% (one seed)" in results_table(single)


def test_few_seeds_are_owned_up_to() -> None:
    """The table says how often chance alone would give such a verdict: 2 ** (1 - 3) here."""
    assert "same sign 25.0% of the time" in results_table(results())


def test_only_shared_seeds_are_paired() -> None:
    """A seed that one policy lacks is left out of its comparison."""
    made = results()
    short = replace(made.policies[2], seeds=made.policies[2].seeds[1:])
    comparison = compare(replace(made, policies=(*made.policies[:2], short))).rows[2].comparisons[0]
    assert comparison is not None
    assert comparison.pairs == 2


def test_a_policy_without_a_good_run_has_a_row_of_dashes() -> None:
    """Nothing observed is shown as a dash and failed runs are stated."""
    made = results()
    broken = replace(
        made.policies[0],
        seeds=tuple(
            replace(one, metrics=replace(type(one.metrics)(runs=0), failed_runs=5))
            for one in made.policies[0].seeds
        ),
    )
    text = results_table(replace(made, policies=(broken, *made.policies[1:])))
    assert "round_robin 15 failed" in text
    row = next(line for line in text.splitlines() if line.startswith("round_robin"))
    assert set(row.split()[1:]) == {"-"}


def test_terminal_table_states_losses_as_plainly_as_wins() -> None:
    """Verdict, interval and best baseline stand in the table, whoever wins."""
    for factor, word in ((0.9, "-10.0% [-10.0%, -10.0%] win"), (1.2, "loss")):
        text = results_table(results(factor))
        assert word in next(line for line in text.splitlines() if line.startswith("almanac"))
        assert text.count("best baseline") >= 4


def test_json_form_is_json() -> None:
    """The JSON form has a row per policy with all metrics."""
    raw = json.loads(json.dumps(compare(results()).to_json()))
    assert [row["label"] for row in raw["rows"]] == ["round_robin", "marginal_cost", "almanac"]
    assert raw["rows"][0]["metrics"]["p95_s"]["mean"] > 0
    assert raw["best_baseline"] == {"mean_s": "marginal_cost", "p95_s": "marginal_cost"}


def test_align_and_percent() -> None:
    """Columns line up, the first flush left; large differences lose their decimals."""
    assert align([["a", "bb"], ["ccc", "d"]]).splitlines() == ["a    bb", "---  --", "ccc   d"]
    assert (percent(-0.123), percent(5.294)) == ("-12.3%", "+529%")
