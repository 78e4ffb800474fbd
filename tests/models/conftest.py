"""Small traces of our own format, written by a step-by-step engine of a known speed."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from planner.domain.latency import LatencyRow
from planner.domain.trace import (
    BranchRecord,
    CallRecord,
    RunRecord,
    ToolRecord,
    TraceRecord,
    save_trace,
)

HASH = "0123456789abcdef"
TRUE_ROW = LatencyRow(
    prefill_base_ms=9.0,
    prefill_us_per_token=70.0,
    prefill_ns_per_token_sq=2.0,
    decode_base_ms=15.0,
    decode_us_per_call=40.0,
    decode_ns_per_kv_token=100.0,
)
"""What the synthetic endpoint really does."""


@pytest.fixture(scope="session")
def public_data() -> Path:
    """Return the folder of the public datasets, or skip the test where it is absent."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("ALMANAC_PUBLIC_DATA", default))
    if not folder.is_dir():
        pytest.skip("public datasets are not here (ALMANAC_PUBLIC_DATA)")
    return folder


def serve(
    arrivals: list[tuple[float, int, int]], row: LatencyRow
) -> list[tuple[float, float, float, int]]:
    """Run (sent_s, prompt, output) calls on one engine; give (sent, first, finish, in flight)."""
    waiting = sorted(range(len(arrivals)), key=lambda i: arrivals[i][0])
    running: dict[int, int] = {}
    first, finish = [0.0] * len(arrivals), [0.0] * len(arrivals)
    in_flight = [0] * len(arrivals)
    now = 0.0
    while waiting or running:
        if not running:
            now = max(now, arrivals[waiting[0]][0])
        new = [i for i in waiting if arrivals[i][0] <= now]
        waiting = [i for i in waiting if i not in new]
        calls, context = len(running), sum(arrivals[i][1] + done for i, done in running.items())
        work = sum(row.prefill_marginal_s(arrivals[i][1]) for i in new)
        base = row.decode_step_s(calls, context) if calls else row.prefill_base_ms * 1e-3
        now += base + work
        for i in list(running):
            running[i] += 1
            if running[i] >= arrivals[i][2]:
                finish[i] = now
                del running[i]
        for i in new:
            first[i] = now
            if arrivals[i][2] > 1:
                running[i] = 1
            else:
                finish[i] = now
    spans = [(arrivals[i][0], finish[i]) for i in range(len(arrivals))]
    for i, (sent, _, _) in enumerate(arrivals):
        in_flight[i] = sum(a < sent < b for j, (a, b) in enumerate(spans) if j != i)
    return [(arrivals[i][0], first[i], finish[i], in_flight[i]) for i in range(len(arrivals))]


@pytest.fixture
def make_records() -> Callable[..., list[TraceRecord]]:
    """Return a function that makes records of runs of draft -> tool -> review (loops back)."""

    def make(runs: int = 60, seed: int = 0) -> list[TraceRecord]:
        rng = np.random.default_rng(seed)
        calls: list[dict[str, object]] = []
        others: list[TraceRecord] = []
        for number in range(runs):
            run_id = f"r{number}"
            clock = number * 3.0 + float(rng.uniform(0, 1))
            start, visit, prompt, output = clock, 0, int(rng.integers(300, 600)), 0
            while True:
                if visit:
                    prompt += output + int(rng.integers(20, 60))
                output = int(rng.lognormal(4.6, 0.4)) + 2
                calls.append(
                    {"run_id": run_id, "node": "draft", "site": "draft#0", "visit": visit,
                     "sent_s": clock, "prompt_tokens": prompt, "output_tokens": output}
                )  # fmt: skip
                clock += 0.02 * output + 0.3
                delay = float(rng.lognormal(0.0, 0.3))
                others.append(
                    ToolRecord(run_id=run_id, workflow_hash=HASH, node="lookup", start_s=clock,
                               finish_s=clock + delay)
                )  # fmt: skip
                clock += delay
                short = int(rng.integers(8, 14))
                calls.append(
                    {"run_id": run_id, "node": "review", "site": "review#0", "visit": visit,
                     "sent_s": clock, "prompt_tokens": 800, "output_tokens": short}
                )  # fmt: skip
                clock += 0.02 * short + 0.3
                again = bool(rng.random() < (0.6 if visit == 0 else 0.1))
                others.append(
                    BranchRecord(run_id=run_id, workflow_hash=HASH, branch="review?",
                                 outcome="again" if again else "end", time_s=clock, visit=visit)
                )  # fmt: skip
                visit += 1
                if not again:
                    break
            others.append(
                RunRecord(run_id=run_id, workflow="demo", workflow_hash=HASH, arrival_s=start,
                          finish_s=clock, calls=2 * visit)
            )  # fmt: skip
        served = serve(
            [(c["sent_s"], c["prompt_tokens"], c["output_tokens"]) for c in calls], TRUE_ROW
        )
        out: list[TraceRecord] = []
        for position, (call, (sent, first, finish, flying)) in enumerate(
            zip(calls, served, strict=True)
        ):
            out.append(
                CallRecord(
                    call_id=f"c{position}",
                    workflow_hash=HASH,
                    ready_s=sent,
                    endpoint="e1",
                    first_token_s=first,
                    finish_s=finish,
                    in_flight=flying,
                    cached_tokens=0,
                    **call,
                )
            )
        return out + others

    return make


@pytest.fixture
def trace_folder(tmp_path: Path, make_records: Callable[..., list[TraceRecord]]) -> Path:
    """Write a folder with one trace of ours."""
    folder = tmp_path / "traces"
    save_trace(make_records(), folder / "one.jsonl")
    return folder


@pytest.fixture
def true_row() -> LatencyRow:
    """Return the speed of the synthetic endpoint."""
    return TRUE_ROW
