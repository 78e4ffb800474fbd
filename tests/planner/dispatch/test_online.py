"""Rows learned while serving, and from scrapes alone."""

import numpy as np
import pytest

from planner.cli.self_check import lookup_seconds, scrape_errors, scraped_row
from planner.dispatch.online import (
    LatencyBook,
    OnlineLatency,
    Scrape,
    decode_counts,
    non_negative,
    prefill_counts,
    scrape_counts,
)
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import latency_rows
from planner.domain.latency import LatencyRow

ROWS = latency_rows()
TRUE = ROWS["8b-a100-1-bf16"]


def _feed(learner, row, count, seed=0, begin_s=0.0):
    """Show a learner prefills and decodes of an engine with a row."""
    rng = np.random.default_rng(seed)
    engine = OnlineLatency(row)
    for number in range(count):
        calls, tokens = float(rng.integers(1, 32)), float(rng.integers(100, 3000))
        kv_tokens = calls * float(rng.integers(300, 2000))
        if rng.random() < 0.5:
            counts = prefill_counts(tokens, calls=calls - 1, kv_tokens=kv_tokens)
        else:
            counts = decode_counts(tokens / 10, calls=calls, kv_tokens=kv_tokens)
        seconds = engine.seconds(counts) * float(rng.lognormal(0.0, 0.05))
        learner.observe(counts, seconds, begin_s + number)


def _end_to_end(row):
    found = LatencyBook([row]).forecast(900.0, 150.0, np.array([8.0]), np.array([9000.0]))
    return float(found[2][0])


@pytest.mark.parametrize(
    "prior",
    [
        TRUE.scaled(3.0),
        ROWS["8b-l4-1-bf16"],
        LatencyRow.roofline(
            weight_gb=16, parameters_b=8, kv_kb_per_token=131, bandwidth_gb_s=2039, tflops=312
        ),
    ],
    ids=["three times too slow", "another GPU", "roofline"],
)
def test_a_wrong_row_is_corrected_within_tens_of_requests(prior):
    """Thirty observations bring a wrong prior within 10 %."""
    learner = OnlineLatency(prior)
    assert abs(_end_to_end(prior) / _end_to_end(TRUE) - 1) > 0.15
    _feed(learner, TRUE, 30)
    assert _end_to_end(learner.row) == pytest.approx(_end_to_end(TRUE), rel=0.1)


def test_coefficients_never_become_negative():
    """Contradictory observations give a usable row."""
    learner = OnlineLatency(TRUE)
    for number in range(200):
        few = number % 2 == 0
        counts = decode_counts(100, calls=1 if few else 30, kv_tokens=1e3 if few else 5e4)
        learner.observe(counts, 9.0 if few else 1.0, number)
    row = learner.row
    assert min(row.decode_us_per_call, row.decode_ns_per_kv_token, row.prefill_base_ms) >= 0
    assert row.decode_base_ms > 0


@pytest.mark.parametrize("seconds", [1e-3, 1e-5, 1e-7])
def test_an_answer_that_comes_at_once_does_not_outweigh_all_others(seconds):
    """Tokens that were buffered on their way say nothing of the engine; the row stays usable."""
    learner = OnlineLatency(TRUE)
    _feed(learner, TRUE, 100)
    learner.observe(decode_counts(50, calls=8, kv_tokens=8000), seconds, 100.0)
    assert _end_to_end(learner.row) == pytest.approx(_end_to_end(TRUE), rel=0.05)


def test_it_forgets():
    """After a change of speed the old observations fade."""
    learner = OnlineLatency(TRUE)
    _feed(learner, TRUE, 300)
    _feed(learner, TRUE.scaled(1.5), 400, seed=1, begin_s=300)
    assert _end_to_end(learner.row) == pytest.approx(1.5 * _end_to_end(TRUE), rel=0.05)


def test_drift_is_told_after_half_a_minute():
    """A straggler raises the alarm once it has been slow for 30 s; accepting it ends the alarm."""
    learner = OnlineLatency(TRUE)
    _feed(learner, TRUE, 200)
    assert not learner.drifting
    _feed(learner, TRUE.scaled(1.4), 20, seed=1, begin_s=200)
    assert not learner.drifting
    _feed(learner, TRUE.scaled(1.4), 40, seed=2, begin_s=220)
    assert learner.drifting
    learner.accept()
    assert not learner.drifting


def test_nonsense_is_ignored():
    """Times that are no times leave the prior in place."""
    learner = OnlineLatency(TRUE)
    for seconds in (float("nan"), float("inf"), 0.0, -1.0):
        learner.observe(decode_counts(10, calls=1, kv_tokens=10), seconds, 0.0)
    learner.observe(np.full(6, np.nan), 1.0, 0.0)
    learner.observe(np.zeros(6), 1.0, 0.0)
    assert learner.observations == 0
    assert learner.row is TRUE


def test_scrapes_alone_are_enough():
    """On simulated engines, whatever the prior and the load, the median error is below 15 %."""
    assert np.median(scrape_errors()) < 0.15


def test_an_idle_engine_teaches_nothing_wrong():
    """At one call in ten seconds the row learned from scrapes stays near the truth."""
    learner, used = scraped_row(TRUE, TRUE, 0.1, seed=0, seconds=300)
    assert used > 5
    assert _end_to_end(learner.row) == pytest.approx(_end_to_end(TRUE), rel=0.15)


def _scrape(time_s, steps, **more):
    base = dict.fromkeys(
        ("generation_tokens", "prompt_tokens", "cached_tokens", "prompts", "running", "kv_tokens"),
        0.0,
    )
    return Scrape(time_s=time_s, steps=steps, **{**base, **more})


def test_scrapes_that_say_nothing():
    """A restart, an idle interval or no step gives no observation."""
    busy = {"generation_tokens": 50.0, "running": 2.0}
    assert scrape_counts(_scrape(0, 9, **busy), _scrape(1, 3, **busy)) is None
    assert scrape_counts(_scrape(0, 3, **busy), _scrape(1, 3, **busy)) is None
    done = {"generation_tokens": 90.0, "running": 0.0}
    assert scrape_counts(_scrape(0, 3, **busy), _scrape(1, 23, **done)) is None
    # With the gaps between tokens the same interval says how long a step took.
    gaps = scrape_counts(
        _scrape(0, 3, gap_s=0.0, gaps=0.0, **busy), _scrape(1, 23, gap_s=0.8, gaps=40.0, **done)
    )
    assert gaps is not None
    assert gaps[1] == pytest.approx(0.02)


def test_many_endpoints_at_once_as_one_by_one():
    """The batched forecast is the forecast of each."""
    rows = [ROWS[key] for key in sorted(ROWS)]
    calls, kv_tokens = np.arange(len(rows)) % 5.0, np.arange(len(rows)) * 700.0
    together = LatencyBook(rows).forecast(800.0, 100.0, calls, kv_tokens)
    assert len(LatencyBook(rows)) == len(rows)
    for place, row in enumerate(rows):
        alone = LatencyBook([row]).forecast(
            800.0, 100.0, calls[place : place + 1], kv_tokens[place : place + 1]
        )
        assert [one[0] for one in alone] == [one[place] for one in together]


def test_lookups_are_measured():
    """The two look-up figures are positive numbers of seconds."""
    ticks = iter(range(10_000))
    assert min(lookup_seconds(EstimateTable(), clock=lambda: float(next(ticks)))) > 0


def test_news_are_told_after_each_observation_at_first_and_later_after_every_few():
    """A learner tells of its row as often as one more observation matters."""
    learner = OnlineLatency(TRUE)
    counts = decode_counts(100, calls=4, kv_tokens=4000)
    told = []
    for number in range(80):
        learner.observe(counts, learner.seconds(counts), now_s=float(number))
        if (row := learner.news()) is not None:
            assert row == learner.row
            told.append(number + 1)
    assert learner.news() is None
    assert told == [*range(1, 51), 58, 66, 74]


def test_coefficients_that_would_be_negative_are_zero_and_the_others_fit_best():
    """Where the best fit is negative somewhere, no slope points to a better one without it."""
    rng = np.random.default_rng(5)
    for _ in range(200):
        basis = rng.normal(size=(7, 3)) * rng.uniform(0.0, 3.0, size=(7, 1))
        matrix = basis @ basis.T + np.diag(rng.uniform(0.01, 2.0, 7))
        vector = 3.0 * rng.normal(size=7)
        found = non_negative(matrix, vector, rng.random(7) < 0.5)
        slope = matrix @ found - vector
        assert found.min() >= 0.0
        assert abs(slope[found > 0.0]).max(initial=0.0) < 1e-9
        assert slope[found == 0.0].min(initial=0.0) > -1e-9
