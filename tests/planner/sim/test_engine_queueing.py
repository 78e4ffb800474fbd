"""The engine where it reduces to queues whose answers are known."""

import math
from collections.abc import Sequence

import numpy as np
import pytest

from planner.domain.latency import LatencyRow
from planner.sim.engine import Engine, EngineConfig, EngineRequest
from planner.sim.fidelity import fixed_trace, replay, run_fleet
from planner.sim.steptime import RowStepTime, standard_normals


def row(**coefficients: float) -> RowStepTime:
    zero = {
        "prefill_base_ms": 0.0,
        "prefill_us_per_token": 0.0,
        "prefill_ns_per_token_sq": 0.0,
        "decode_base_ms": 1e-9,
        "decode_us_per_call": 0.0,
        "decode_ns_per_kv_token": 0.0,
    }
    return RowStepTime(LatencyRow(**(zero | coefficients)))


def poisson_calls(
    rate: float, prompts: Sequence[int], outputs: Sequence[int], seed: int
) -> list[EngineRequest]:
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(1.0 / rate, len(prompts)))
    return [
        EngineRequest(
            request_id=str(i),
            prompt_tokens=int(prompts[i]),
            output_tokens=int(outputs[i]),
            arrival_s=float(arrivals[i]),
        )
        for i in range(len(prompts))
    ]


def mean_waiting_s(calls: list[EngineRequest]) -> float:
    started = np.array([call.first_scheduled_s for call in calls], dtype=float)
    return float((started - np.array([call.arrival_s for call in calls])).mean())


def test_one_slot_with_constant_service_is_m_d_1() -> None:
    """Mean waiting time is rho D / (2 (1 - rho)) (Pollaczek-Khinchine)."""
    service_s, load, count = 0.01, 0.7, 20_000
    calls = poisson_calls(load / service_s, [10] * count, [1] * count, seed=1)
    config = EngineConfig(kv_blocks=11, max_num_seqs=1)
    replay(Engine(config, row(prefill_us_per_token=1000.0)), calls)
    expected = load * service_s / (2 * (1 - load))
    assert mean_waiting_s(calls) == pytest.approx(expected, rel=0.05)


def test_one_slot_with_exponential_service_is_m_m_1() -> None:
    """Mean waiting time is rho S / (1 - rho)."""
    service_s, load, count = 0.5, 0.6, 20_000
    prompts = np.ceil(np.random.default_rng(2).exponential(500.0, count)).astype(int)
    calls = poisson_calls(load / service_s, prompts.tolist(), [1] * count, seed=3)
    config = EngineConfig(kv_blocks=1000, max_num_seqs=1, max_num_batched_tokens=16_000)
    replay(Engine(config, row(prefill_us_per_token=1000.0)), calls)
    assert mean_waiting_s(calls) == pytest.approx(load * service_s / (1 - load), rel=0.08)


def test_slots_without_interference_are_m_m_c() -> None:
    """With step times that ignore the batch, c slots are c servers (Erlang C)."""
    servers, load, count, tokens = 4, 0.8, 20_000, 200
    outputs = np.random.default_rng(4).geometric(1 / tokens, count)
    rate = servers * load / (tokens * 1e-3)
    calls = poisson_calls(rate, [1] * count, outputs.tolist(), seed=5)
    config = EngineConfig(kv_blocks=10_000, max_num_seqs=servers)
    replay(Engine(config, row(decode_base_ms=1.0)), calls)
    offered = servers * load
    tail = offered**servers / math.factorial(servers) / (1 - load)
    wait_share = tail / (sum(offered**k / math.factorial(k) for k in range(servers)) + tail)
    expected = wait_share * tokens * 1e-3 / (servers * (1 - load))
    assert mean_waiting_s(calls) == pytest.approx(expected, rel=0.08)


def test_littles_law() -> None:
    """The gauges, integrated over time, give the sum of all times in the system."""
    step_time = row(prefill_us_per_token=50.0, decode_base_ms=8.0, decode_us_per_call=300.0)
    engine = Engine(EngineConfig(kv_blocks=400, max_num_seqs=12), step_time)
    calls = fixed_trace(300, 0.05)
    inside = last_s = 0.0

    def run_to(until_s: float) -> None:
        nonlocal inside, last_s
        while (now_s := min(engine.next_event_s(), until_s)) < math.inf:
            inside += (now_s - last_s) * (engine.num_running + engine.num_waiting)
            last_s = now_s
            engine.advance(now_s)
            if now_s == until_s:
                break

    for call in calls:
        run_to(call.arrival_s)
        engine.submit(call, call.arrival_s)
    run_to(math.inf)
    assert engine.preemptions_total > 0  # the law holds through preemptions
    assert inside == pytest.approx(sum((call.finish_s or 0.0) - call.arrival_s for call in calls))


def test_tokens_and_blocks_are_conserved() -> None:
    """Under memory pressure every token comes once, and all blocks are free at the end."""
    calls = fixed_trace(300, 0.01, hashed=True)
    engine = Engine(
        EngineConfig(kv_blocks=400, max_num_seqs=12),
        row(prefill_us_per_token=50.0, decode_base_ms=8.0),
    )
    replay(engine, calls)
    assert engine.preemptions_total > 0
    assert engine.generation_tokens_total == sum(call.output_tokens for call in calls)
    assert engine.prompt_tokens_total == sum(call.prompt_tokens for call in calls)
    assert engine.free_blocks == 399
    assert (engine.num_running, engine.num_waiting, engine.queued_prefill_tokens) == (0, 0, 0)
    assert all(call.generated_tokens == call.output_tokens for call in calls)


def test_a_fleet_run_repeats() -> None:
    """The same fleet and trace give the same instants, with noise from the same seed too."""

    def run() -> list[tuple[float | None, float | None]]:
        rng = np.random.default_rng(11)
        step_time = row(prefill_us_per_token=50.0, decode_base_ms=8.0)
        config = EngineConfig(kv_blocks=2000)
        fleet = [
            Engine(config, step_time, normals=standard_normals(child), noise_cv=0.1)
            for child in rng.spawn(3)
        ]
        calls = fixed_trace(200, 0.02)
        run_fleet(fleet, calls, lambda engines: min(range(3), key=lambda i: engines[i].num_running))
        return [(call.first_token_s, call.finish_s) for call in calls]

    assert run() == run()
