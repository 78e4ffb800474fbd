"""The fleets of the studies, each with ample, tight or scarce KV.

* ``h10``, ``h05``, ``h02``: five endpoints whose time per token, prefill and decode alike, is
  spread geometrically with least / most = 1.0, 0.5 and 0.2 (``h00``, ``h01`` and ``h02`` of the
  heterogeneity axis: none, some, much). The measured row of Llama-3.1-8B on an A100 is the
  middle: the mean speed over the fleet is that row's at every spread, so that capacities compare.
* ``measured``: five GPU generations with measured rows of the same model.
* ``hetero1``, ``hetero2``, ``homogeneous``: pools of prefill and decode endpoints for
  Llama-3.1-70B on eight GPUs each, rows from data sheets.

Engines serve older runs first where a policy asks for it (``scheduling: priority``).

References
----------
HexAGenT (arXiv 2605.16637) for the pools: 8 + 8 with 2 A100, 3 H100 and 3 H200 each; 10 + 10 with
3, 4 and 3; 4 + 4 alike. GPU figures are those of the makers' data sheets.
"""

from __future__ import annotations

from typing import Literal

from planner.domain.errors import InvalidInput
from planner.domain.fleet import Endpoint, Fleet, latency_rows
from planner.domain.ids import EndpointId
from planner.domain.latency import LatencyRow
from planner.domain.memory import gpu_memory_gb, kv_blocks_that_fit, model_size

__all__ = ["FLEETS", "KV", "make_fleet"]

KV = Literal["ample", "tight", "scarce"]

MODEL, BASE_ROW = "llama-3.1-8b", "8b-a100-1-bf16"
SPREADS = {"h00": 1.0, "h01": 0.5, "h02": 0.2}
GENERATIONS = ("h100", "rtxpro6000", "a100", "l40s", "rtx4090")
POOLS = {
    "hetero1": {"A100-80": 2, "H100": 3, "H200": 3},
    "hetero2": {"A100-80": 3, "H100": 4, "H200": 3},
    "homogeneous": {"H200": 4},
}
FLEETS = (*SPREADS, "measured", *POOLS)
"""Names that `make_fleet` knows."""

AMPLE_BLOCKS = 60_000
"""KV blocks (16 tokens each) that no mix of these studies fills."""
SCARCE_BLOCKS = 2_500
"""KV blocks with up to 16 slots, in proportion beyond. At load 0.85 (mix ``agents``, 1,000 runs)
22 to 24 % of all tokens prefilled under marginal cost had been computed on the same endpoint
before, 23 to 33 % under least expected finish; see `planner.study.measure.refilled_tokens`."""
TIGHT_BLOCKS = 8_000
"""The same where long sessions fit once but not twice: a closed loop of 1.2 clients a slot, mix
``tool_heavy``, refills 29 % of its tokens under least expected finish (study ``regimes``)."""
_BLOCKS: dict[KV, int] = {"ample": AMPLE_BLOCKS, "tight": TIGHT_BLOCKS, "scarce": SCARCE_BLOCKS}
POOL_MODEL, POOL_TP = "llama-3.1-70b", 8
_SHEET = {"A100-80": (312.0, 2.0), "H100": (989.0, 3.35), "H200": (989.0, 4.8)}
"""Dense TFLOP/s and TB/s."""


def make_fleet(name: str, *, kv: KV = "ample", slots: int = 16) -> Fleet:
    """Return a fleet of the studies.

    Parameters
    ----------
    name
        One of `FLEETS`.
    kv
        ``ample`` never evicts text that comes back; ``tight`` does, and ``scarce`` much more.
    slots
        Calls each endpoint may run at the same time, >= 1.

    Raises
    ------
    InvalidInput
        If the name or the KV size is unknown.
    """
    if kv not in _BLOCKS:
        raise InvalidInput(f"{kv!r} is unknown", where="kv", remedy="use ample, tight or scarce")
    if name in SPREADS:
        endpoints = _spread(SPREADS[name], kv, slots)
    elif name == "measured":
        endpoints = _generations(kv, slots)
    elif name in POOLS:
        endpoints = _pools(POOLS[name], kv, slots)
    else:
        raise InvalidInput(
            f"{name!r} is unknown", where="fleet", remedy=f"use one of {', '.join(FLEETS)}"
        )
    return Fleet(name=f"{name}-{kv}-{slots}", endpoints=tuple(endpoints))


def _spread(spread: float, kv: KV, slots: int, count: int = 5) -> list[Endpoint]:
    # Time per token grows by the same factor from each endpoint to the next.
    times = [spread ** (-position / (count - 1)) for position in range(count)]
    mean_speed = sum(1.0 / time for time in times) / count
    row = latency_rows()[BASE_ROW]
    return [
        _whole(f"e{position}", "A100-80", row.scaled(time * mean_speed), kv, slots)
        for position, time in enumerate(times)
    ]


def _generations(kv: KV, slots: int) -> list[Endpoint]:
    rows = latency_rows()
    names = {"a100": "A100-80", "h100": "H100", "rtxpro6000": "RTXPRO6000", "l40s": "L40S"}
    return [
        _whole(gpu, names.get(gpu, gpu.upper()), rows[f"8b-{gpu}-1-bf16"], kv, slots)
        for gpu in GENERATIONS
    ]


def _blocks(kv: KV, slots: int) -> int:
    most = _BLOCKS[kv]
    return most if kv == "ample" else most * max(slots, 16) // 16


def _whole(name: str, gpu: str, row: LatencyRow, kv: KV, slots: int) -> Endpoint:
    size = model_size(MODEL, "bf16")
    assert size is not None  # noqa: S101 - it is in the table of models
    return Endpoint(
        id=EndpointId(name),
        model=MODEL,
        gpu=gpu,
        latency=row,
        kv_blocks=_blocks(kv, slots),
        max_num_seqs=slots,
        scheduling="priority",
        kv_bytes_per_token=size.kv_bytes_per_token,
    )


def _pools(counts: dict[str, int], kv: KV, slots: int) -> list[Endpoint]:
    size = model_size(POOL_MODEL, "bf16")
    assert size is not None  # noqa: S101 - it is in the table of models
    endpoints = []
    for role in ("prefill", "decode"):
        for gpu, count in counts.items():
            tflops, tb_s = _SHEET[gpu]
            row = LatencyRow.roofline(
                weight_gb=size.weights_gb,
                parameters_b=70.55,
                kv_kb_per_token=size.kv_bytes_per_token / 1e3,
                bandwidth_gb_s=tb_s * 1e3 * POOL_TP,
                tflops=tflops * POOL_TP,
            )
            fits = kv_blocks_that_fit(gpu_memory_gb()[gpu], size, tp=POOL_TP)
            endpoints += [
                Endpoint(
                    id=EndpointId(f"{role[0]}-{gpu.lower()}-{number}"),
                    model=POOL_MODEL,
                    gpu=gpu,
                    tp=POOL_TP,
                    latency=row,
                    kv_blocks=fits if kv == "ample" else _blocks(kv, slots),
                    max_num_seqs=slots,
                    scheduling="priority",
                    role="prefill" if role == "prefill" else "decode",
                    kv_bytes_per_token=size.kv_bytes_per_token,
                    link_gb_s=50.0,
                )
                for number in range(count)
            ]
    return endpoints
