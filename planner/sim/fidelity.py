"""How close the engine is to real ones: replays of public logs, each against a stated bar.

Three witnesses, none of which shares code with the engine
- request logs of vLLM 0.19 on two GPUs (LLMServingSim): every request's own latency;
- the offline replay of NVIDIA Dynamo's mocker: the scheduler's logic, with its timing formula;
- silicon averages of AIConfigurator: large closed loops on H100, with rows fitted elsewhere.

The functions are pure: they take the folder of the public data and return `Check` rows.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from planner.domain.errors import InvalidInput
from planner.domain.files import read_jsonl, read_text
from planner.domain.fleet import latency_rows
from planner.sim.engine import Engine, EngineConfig, EngineRequest, Finished
from planner.sim.steptime import DynamoStepTime, RowStepTime, StepTime, TableStepTime

__all__ = [
    "Check",
    "dynamo_checks",
    "fixed_trace",
    "real_log_checks",
    "replay",
    "run_fleet",
    "silicon_checks",
]

Array = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One figure and the bar it is held against.

    Parameters
    ----------
    name
        What was measured.
    value, unit
        The figure.
    bar
        Such as ``<= 1``, or None for a figure that is only reported.
    holds
        Whether the bar is met; None without a bar.
    """

    name: str
    value: float
    unit: str
    bar: str | None = None
    holds: bool | None = None

    @classmethod
    def at_most(cls, name: str, value: float, unit: str, limit: float) -> Check:
        """Return a check that holds if ``value`` <= ``limit``."""
        return cls(name=name, value=value, unit=unit, bar=f"<= {limit:g}", holds=value <= limit)

    @classmethod
    def at_least(cls, name: str, value: float, unit: str, limit: float) -> Check:
        """Return a check that holds if ``value`` >= ``limit``."""
        return cls(name=name, value=value, unit=unit, bar=f">= {limit:g}", holds=value >= limit)


# -- drivers ---------------------------------------------------------------------------------


def replay(engine: Engine, requests: Iterable[EngineRequest]) -> None:
    """Submit requests (in the order of ``arrival_s``) to one engine, and run it dry."""
    for request in requests:
        engine.advance(request.arrival_s)
        engine.submit(request, request.arrival_s)
    engine.advance(math.inf)


def run_fleet(
    engines: Sequence[Engine],
    requests: Iterable[EngineRequest],
    choose: Callable[[Sequence[Engine]], int],
) -> None:
    """Submit requests (in the order of ``arrival_s``) where ``choose`` says, and run all dry.

    ``choose`` gets the engines as they are at the arrival and returns an index.
    """
    due: list[tuple[float, int]] = []  # heap; an engine's newest entry is the valid one
    newest = [math.inf] * len(engines)

    def run_to(until_s: float) -> None:
        while due and due[0][0] <= until_s:
            time_s, index = heappop(due)
            if time_s == newest[index]:
                engines[index].advance(time_s)
                note(index)

    def note(index: int) -> None:
        newest[index] = engines[index].next_event_s()
        if newest[index] < math.inf:
            heappush(due, (newest[index], index))

    for request in requests:
        run_to(request.arrival_s)
        index = choose(engines)
        engines[index].submit(request, request.arrival_s)
        note(index)
    run_to(math.inf)


def fixed_trace(count: int, gap_s: float, *, hashed: bool = False) -> list[EngineRequest]:
    """Return the fixed trace of the Dynamo comparison.

    No prefix is shared; with ``hashed`` the blocks have hashes nevertheless, so that the cache is
    looked up, filled and evicted.
    """
    requests = []
    for i in range(count):
        prompt, output = 128 + 977 * i % 1920, 32 + 131 * i % 225
        chain = range(i << 20, (i << 20) + (prompt + output) // 16) if hashed else ()
        requests.append(
            EngineRequest(
                request_id=f"r{i}",
                prompt_tokens=prompt,
                output_tokens=output,
                arrival_s=i * gap_s,
                block_hashes=tuple(chain),
            )
        )
    return requests


# -- Dynamo ----------------------------------------------------------------------------------

_DYNAMO_SPOTS = {  # request -> (TTFT, E2E) ms in Dynamo 1.4.2's offline replay of 200 requests
    0: (24.213, 202.947),
    1: (39.722, 1134.598),
    2: (28.162, 474.564),
    10: (32.020, 1574.896),
    100: (59.278, 688.338),
    199: (37.165, 1415.304),
}


def dynamo_checks() -> list[Check]:
    """Replay the fixed traces with Dynamo's timing formula and compare with its own replay."""
    ttft_ms, e2e_ms = _dynamo_trace(200, 0.25)
    spot = max(
        max(abs(float(ttft_ms[i]) - ttft), abs(float(e2e_ms[i]) - e2e))
        for i, (ttft, e2e) in _DYNAMO_SPOTS.items()
    )
    checks = [
        _near("dynamo T200 mean TTFT", float(ttft_ms.mean()), 42.763),
        _near("dynamo T200 mean E2E", float(e2e_ms.mean()), 1118.713),
        Check.at_most("dynamo T200 largest spot difference", spot, "ms", 0.01),
    ]
    ttft_ms, e2e_ms = _dynamo_trace(5000, 0.15)
    return [
        *checks,
        _near("dynamo T5k mean TTFT", float(ttft_ms.mean()), 45.21),
        _near("dynamo T5k mean E2E", float(e2e_ms.mean()), 1433.78),
    ]


def _dynamo_trace(count: int, gap_s: float) -> tuple[Array, Array]:
    blocks = 20000
    requests = fixed_trace(count, gap_s)
    # One block more than Dynamo has, because vLLM keeps one for itself.
    replay(Engine(EngineConfig(kv_blocks=blocks + 1), DynamoStepTime(blocks)), requests)
    ttft, _tpot, e2e = _latencies(requests)
    return ttft * 1e3, e2e * 1e3


def _near(name: str, value: float, target: float) -> Check:
    return Check(
        name=name,
        value=value,
        unit="ms",
        bar=f"{target} +- 0.01",
        holds=abs(value - target) <= 0.01,
    )


# -- request logs of vLLM ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class _Setup:
    """A recorded run: its engine, the row of its GPU, and the bar with measured tables."""

    gpu: str
    config: EngineConfig
    row: str
    overhead_s: float
    table_bar: float


_SETUPS = (
    _Setup(
        gpu="RTX4090",
        config=EngineConfig(kv_blocks=2588, max_num_seqs=256),
        row="8b-rtx4090-1-bf16",
        overhead_s=0.0,
        table_bar=1.0,
    ),
    _Setup(
        gpu="RTXPRO6000",
        config=EngineConfig(kv_blocks=100_000, max_num_seqs=128),  # memory does not bind there
        row="8b-rtxpro6000-1-bf16",
        overhead_s=1e-3,
        table_bar=4.0,
    ),
)
_FITTED_ON = 100  # first requests
_ROW_BAR = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Log:
    """A recorded run in the order of arrival: one entry per request in each field."""

    ids: tuple[str, ...]
    arrival_s: tuple[float, ...]
    prompt_tokens: tuple[int, ...]
    output_tokens: tuple[int, ...]
    hashes: tuple[tuple[int, ...], ...]
    ttft_s: Array
    tpot_s: Array
    e2e_s: Array

    def requests(self) -> list[EngineRequest]:
        """Return fresh requests of the run."""
        return [
            EngineRequest(
                request_id=self.ids[i],
                prompt_tokens=self.prompt_tokens[i],
                output_tokens=self.output_tokens[i],
                arrival_s=self.arrival_s[i],
                block_hashes=self.hashes[i],
            )
            for i in range(len(self.ids))
        ]


def real_log_checks(folder: Path) -> list[Check]:
    """Replay the recorded vLLM runs of Llama-3.1-8B, with tables and with the six-parameter row.

    Errors are means over requests: of |simulated - real| / real for E2E and TPOT, and for TTFT,
    which can be close to zero, of |simulated - real| over the mean real TTFT.

    The row's one scale makes the E2E of the first 100 requests right on the whole; the error
    counts on the others. All arrivals are simulated in the fit, since later ones slow the first
    100 down, but only the first 100 latencies are looked at.

    Parameters
    ----------
    folder
        ``vllm_bench_llmservingsim`` of the public data.

    Raises
    ------
    InvalidInput
        If a file is missing or a field of it cannot be read.
    """
    checks: list[Check] = []
    for setup in _SETUPS:
        log = _read_log(folder, setup.gpu)
        table = TableStepTime.from_profiles(
            folder,
            setup.gpu,
            max_tokens=setup.config.max_num_batched_tokens,
            max_calls=setup.config.max_num_seqs,
            overhead_s=setup.overhead_s,
        )
        engine, simulated = _replayed(setup, log, table)
        every = slice(None)
        name = f"vllm log {setup.gpu}, tables"
        checks += _errors(name, log, simulated, every, setup.table_bar)
        checks += [
            Check(name=f"{name}: preemptions", value=float(engine.preemptions_total), unit="count"),
            Check(
                name=f"{name}: prefix hit rate",
                value=100.0 * engine.prefix_hits_total / engine.prefix_queries_total,
                unit="%",
            ),
        ]
        scale = _fit_scale(setup, log)
        _engine, simulated = _replayed(setup, log, _row_time(setup, scale))
        name = f"vllm log {setup.gpu}, row fitted on {_FITTED_ON}, held-out rest"
        checks += _errors(name, log, simulated, slice(_FITTED_ON, None), _ROW_BAR)
        checks.append(Check(name=f"{name}: fitted scale", value=scale, unit="1"))
    return checks


def _row_time(setup: _Setup, scale: float) -> StepTime:
    return RowStepTime(latency_rows()[setup.row].scaled(scale))


def _replayed(
    setup: _Setup, log: _Log, step_time: StepTime
) -> tuple[Engine, tuple[Array, Array, Array]]:
    engine = Engine(setup.config, step_time)
    requests = log.requests()
    replay(engine, requests)
    return engine, _latencies(requests)


def _fit_scale(setup: _Setup, log: _Log) -> float:
    """Return the scale that makes the total E2E of the first requests right, by bisection."""
    target = float(log.e2e_s[:_FITTED_ON].sum())
    low, high = 0.5, 2.0
    for _ in range(14):
        scale = math.sqrt(low * high)
        _engine, (_ttft, _tpot, e2e) = _replayed(setup, log, _row_time(setup, scale))
        if float(e2e[:_FITTED_ON].sum()) > target:
            high = scale
        else:
            low = scale
    return math.sqrt(low * high)


def _errors(
    name: str, log: _Log, simulated: tuple[Array, Array, Array], part: slice, bar: float
) -> list[Check]:
    ttft, tpot, e2e = (values[part] for values in simulated)
    real_ttft, real_tpot, real_e2e = log.ttft_s[part], log.tpot_s[part], log.e2e_s[part]
    several = np.array(log.output_tokens[part]) > 1
    ttft_error = 100.0 * float(np.abs(ttft - real_ttft).mean() / real_ttft.mean())
    tpot_error = np.abs(tpot - real_tpot)[several] / real_tpot[several]
    return [
        Check.at_most(
            f"{name}: E2E error",
            100.0 * float((np.abs(e2e - real_e2e) / real_e2e).mean()),
            "%",
            bar,
        ),
        Check(name=f"{name}: TTFT error", value=ttft_error, unit="%"),
        Check(name=f"{name}: TPOT error", value=100.0 * float(tpot_error.mean()), unit="%"),
        Check(name=f"{name}: TTFT bias", value=_bias(ttft, real_ttft), unit="%"),
        Check(name=f"{name}: TPOT bias", value=_bias(tpot[several], real_tpot[several]), unit="%"),
        Check(name=f"{name}: E2E bias", value=_bias(e2e, real_e2e), unit="%"),
    ]


def _bias(simulated: Array, real: Array) -> float:
    return 100.0 * float(simulated.mean() / real.mean() - 1.0)


def _latencies(requests: Sequence[EngineRequest]) -> tuple[Array, Array, Array]:
    """Return TTFT, TPOT (nan for a single token) and E2E in seconds, in the given order."""
    arrival = np.array([request.arrival_s for request in requests])
    ttft = np.array([request.first_token_s for request in requests], dtype=float) - arrival
    e2e = np.array([request.finish_s for request in requests], dtype=float) - arrival
    gaps = np.array([request.output_tokens - 1 for request in requests], dtype=float)
    tpot = np.full_like(gaps, np.nan)
    np.divide(e2e - ttft, gaps, out=tpot, where=gaps > 0)
    return ttft, tpot, e2e


def _read_log(folder: Path, gpu: str) -> _Log:
    chains = _read_chains(folder / "prompt_blocks.jsonl")
    path = folder / "requests.csv"
    size = _SETUPS[0].config.block_tokens
    rows = [row for row in _csv(path) if row.get("gpu") == gpu]
    if len(rows) <= _FITTED_ON:
        raise InvalidInput(
            f"{len(rows)} requests of {gpu}", where=str(path), remedy="fetch the data set again"
        )
    try:
        rows.sort(key=lambda row: float(row["queued_rel_s"]))
        prompts = tuple(int(row["in_tokens"]) for row in rows)
        outputs = tuple(int(row["out_tokens"]) for row in rows)
        hashes = []
        for i, row in enumerate(rows):
            chain = chains[row["request_id"]]
            # Output text is unknown, so its blocks are the request's own (negative numbers are
            # not among the chains); they are reused when it resumes after a preemption.
            own = range(len(chain), (prompts[i] + outputs[i]) // size)
            hashes.append((*chain, *(-1 - (i << 20) - block for block in own)))
        return _Log(
            ids=tuple(row["request_id"] for row in rows),
            arrival_s=tuple(float(row["queued_rel_s"]) for row in rows),
            prompt_tokens=prompts,
            output_tokens=outputs,
            hashes=tuple(hashes),
            ttft_s=np.array([float(row["ttft_s"]) for row in rows]),
            tpot_s=np.array([float(row["tpot_s"]) for row in rows]),
            e2e_s=np.array([float(row["e2e_s"]) for row in rows]),
        )
    except (KeyError, ValueError) as error:
        raise InvalidInput(
            f"not a request log ({error!r})", where=str(path), remedy="fetch the data set again"
        ) from error


def _read_chains(path: Path) -> dict[str, tuple[int, ...]]:
    try:
        return {
            row["request_id"]: tuple(int(block, 16) for block in row["blocks16"])
            for _line, row in read_jsonl(path, what="prompt blocks")
        }
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"not a list of request_id and blocks16 ({error!r})",
            where=str(path),
            remedy="fetch the data set again",
        ) from error


def _csv(path: Path) -> csv.DictReader[str]:
    return csv.DictReader(read_text(path, what="table").splitlines())


# -- silicon averages ----------------------------------------------------------------------------

_SILICON_ROWS = {
    "model_path": "meta-llama/Llama-3.1-70B",
    "system": "h100_sxm",
    "precision": "fp8",
    "backend": "vllm",
    "mode": "agg",
}
_SILICON_SCALE = 1.06  # default calibration of the H100 and H200 rows
_SILICON_BAR = 8.0
_REQUESTS_PER_SLOT = 5


def silicon_checks(folder: Path) -> list[Check]:
    """Simulate the closed loops of Llama-3.1-70B fp8 on H100 (vLLM, one pool) and compare TPOT.

    A row keeps ``concurrency`` requests of fixed length going, five times over. Only TPOT is
    compared: the recorded TTFT comes from a start that was not a burst.

    Parameters
    ----------
    folder
        ``aic_silicon`` of the public data.

    Raises
    ------
    InvalidInput
        If the file is missing, a field cannot be read, or no row fits.
    """
    path = folder / "e2e.csv"
    errors: dict[tuple[int, int], list[float]] = {}
    try:
        for row in _csv(path):
            if any(row[field] != value for field, value in _SILICON_ROWS.items()):
                continue
            tp = int(float(row["tp_size"]))
            shape = (int(row["isl"]), int(row["osl"]))
            real_ms = float(row["silicon_tpot_ms"])
            concurrency = int(float(row["concurrency"]))
            simulated_ms = 1e3 * _closed_loop_tpot(tp, concurrency, *shape)
            errors.setdefault(shape, []).append(100.0 * (simulated_ms / real_ms - 1.0))
    except (KeyError, ValueError) as error:
        raise InvalidInput(
            f"not a table of silicon runs ({error!r})",
            where=str(path),
            remedy="fetch the data set again",
        ) from error
    if not errors:
        raise InvalidInput(
            f"no rows of {', '.join(_SILICON_ROWS.values())}",
            where=str(path),
            remedy="fetch the data set again",
        )
    every = np.concatenate([np.array(values) for values in errors.values()])
    name = f"silicon Llama-3.1-70B fp8 H100 vLLM ({len(every)} rows)"
    checks = [
        Check.at_most(f"{name}: TPOT error", float(np.abs(every).mean()), "%", _SILICON_BAR),
        Check(name=f"{name}: TPOT bias", value=float(every.mean()), unit="%"),
    ]
    for (isl, osl), values in sorted(errors.items()):
        shape_error = float(np.abs(values).mean())
        shape_name = f"{name}: TPOT error, {isl} in {osl} out"
        checks.append(Check(name=shape_name, value=shape_error, unit="%"))
    return checks


def _closed_loop_tpot(tp: int, concurrency: int, isl: int, osl: int) -> float:
    row = latency_rows()[f"70b-h100-{tp}-fp8"].scaled(_SILICON_SCALE)
    config = EngineConfig(
        kv_blocks=_h100_blocks(tp), max_num_seqs=1024, max_num_batched_tokens=8192
    )
    engine = Engine(config, RowStepTime(row))
    requests = [
        EngineRequest(request_id=str(i), prompt_tokens=isl, output_tokens=osl)
        for i in range(concurrency * _REQUESTS_PER_SLOT)
    ]
    coming = iter(requests)
    for first in islice(coming, concurrency):
        engine.submit(first, 0.0)
    while (now_s := engine.next_event_s()) < math.inf:
        for event in engine.advance(now_s):
            if isinstance(event, Finished):
                for following in islice(coming, 1):
                    engine.submit(following, now_s)
    _ttft, tpot, _e2e = _latencies(requests)
    return float(tpot.mean())


def _h100_blocks(tp: int) -> int:
    """Return the KV blocks of Llama-3.1-70B, fp8 weights and bf16 cache, on ``tp`` H100 cards.

    vLLM's default share of the memory, less the weights and 3 GB per card for activations and
    graphs; 327,680 bytes per token in all cards together.
    """
    free_bytes = tp * (0.92 * 80 * 2**30 - 3e9) - 70.6e9
    return int(free_bytes / (16 * 327_680))
