"""Latency rows come back from what a trace shows, anchored on the row known before."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from models.endpoint_latency import LatencyPredictor, call_design, fit_row, row_seconds
from models.evaluation import median_relative_error
from models.importers.own import read_own_traces
from models.snapshot import fit_endpoints
from planner.domain.fleet import Endpoint
from planner.domain.trace import save_trace


def _endpoint(row, slots=64):
    return Endpoint(
        id="e1", model="m", gpu="g", latency=row, kv_blocks=5000, max_num_seqs=slots,
        max_num_batched_tokens=100_000,
    )  # fmt: skip


def _calls(tmp_path, records):
    save_trace(records, tmp_path / "t.jsonl")
    return read_own_traces([tmp_path / "t.jsonl"]).calls


def test_the_design_explains_the_times_of_a_known_engine(tmp_path, make_records, true_row):
    """With the true coefficients the rebuilt state gives nearly the observed times."""
    design, seconds = call_design(_calls(tmp_path, make_records()), 100_000)
    used = seconds > 0
    predicted = design[used] @ row_seconds(true_row)
    assert median_relative_error(seconds[used], predicted) < 0.03


def test_a_wrong_prior_is_corrected_by_the_trace(tmp_path, make_records, true_row):
    """An endpoint twice as slow as its fleet file says is learned within a few percent."""
    prior = true_row.scaled(0.5)
    fits, skipped = fit_endpoints(_calls(tmp_path, make_records()), {"e1": _endpoint(prior)})
    fit = fits["e1"]
    assert not skipped
    assert median_relative_error(fit.observed_s, fit.prior_s) > 0.4
    assert median_relative_error(fit.observed_s, fit.predicted_s) < 0.05
    assert fit.row.scale == 1.0
    assert fit.row.decode_base_ms == pytest.approx(true_row.decode_base_ms, rel=0.1)
    assert fit.row.prefill_us_per_token == pytest.approx(true_row.prefill_us_per_token, rel=0.2)


def test_calls_that_waited_for_a_slot_are_not_fitted(tmp_path, make_records, true_row):
    """Calls sent to a full endpoint are counted as skipped."""
    calls = _calls(tmp_path, make_records())
    full = int((calls["in_flight"] >= 1).sum())
    assert full > 0
    _, skipped = fit_endpoints(calls, {"e1": _endpoint(true_row, slots=1)})
    assert skipped["sent while all slots of the endpoint were taken"] == full


def test_few_calls_keep_the_fleet_row(tmp_path, make_records, true_row):
    """An endpoint with a handful of calls gets no learned row, and the report says so."""
    fits, skipped = fit_endpoints(_calls(tmp_path, make_records(3)), {"e1": _endpoint(true_row)})
    assert not fits
    assert sum(skipped.values()) > 0


def test_no_observation_gives_the_prior(true_row):
    """Without a usable row the prior itself comes back."""
    prior = replace(true_row, scale=1.2)
    assert fit_row(np.zeros((2, 6)), np.zeros(2), prior) is prior


def test_predictor_recovers_a_linear_service():
    """Prefill and decode of requests under load come back, and the total follows from them."""
    rng = np.random.default_rng(0)
    rows = pd.DataFrame(
        {
            "prompt_tokens": rng.integers(10, 2000, 500).astype(float),
            "calls": rng.integers(1, 20, 500).astype(float),
            "output_tokens": rng.integers(1, 300, 500).astype(float),
        }
    )
    rows["kv_tokens"] = rows["prompt_tokens"] + 800 * (rows["calls"] - 1)
    rows["ttft_s"] = 0.01 + 1e-4 * rows["prompt_tokens"] + 0.004 * (rows["calls"] - 1)
    rows["decode_s"] = (rows["output_tokens"] - 1) * (0.02 + 0.001 * rows["calls"])
    model = LatencyPredictor.fit(rows)
    total = (rows["ttft_s"] + rows["decode_s"]).to_numpy()
    assert median_relative_error(total, model.total_s(rows)) < 0.02


def test_predictor_without_decode_rows_still_gives_first_tokens():
    """Requests of one output token fit the prefill and leave the step at zero."""
    rows = pd.DataFrame(
        {
            "prompt_tokens": [100.0, 200.0, 400.0], "calls": 1.0, "kv_tokens": [100.0, 200, 400],
            "output_tokens": 1.0, "ttft_s": [0.1, 0.2, 0.4], "decode_s": 0.0,
        }
    )  # fmt: skip
    model = LatencyPredictor.fit(rows)
    assert model.decode == (0.0, 0.0, 0.0)
    assert model.total_s(rows) == pytest.approx([0.1, 0.2, 0.4], rel=0.01)
