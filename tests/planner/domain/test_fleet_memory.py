"""KV size from GPU memory, roles and separate speeds in the fleet file."""

from pathlib import Path

import pytest

from planner.domain.errors import FleetError
from planner.domain.fleet import Fleet, load_fleet
from planner.domain.memory import gpu_memory_gb, kv_blocks_that_fit, model_size

WORKER = "id: a, model: llama-3.1-8b, gpu: L4, latency: 8b-l4-1-bf16, slots: 8"


def fleet(folder: Path, *workers: str) -> Fleet:
    path = folder / "fleet.yaml"
    lines = "".join(f"  - {{{worker}}}\n" for worker in workers)
    path.write_text(f"schema: almanac.fleet/1\nworkers:\n{lines}", encoding="utf-8")
    return load_fleet(path)


@pytest.mark.parametrize(
    ("model", "gpu", "tp", "tokens", "published"),
    [
        ("llama-3.1-8b", "L4", 1, 2048, 2300),
        ("llama-3.1-8b", "L40S", 1, 2048, 12_900),
        ("llama-3.1-8b", "A100-80", 1, 2048, 29_000),
        ("llama-3.1-8b", "H100", 1, 8192, 28_000),
        ("llama-3.1-8b", "H200", 1, 8192, 57_000),
        ("llama-3.1-70b", "H100", 4, 8192, 29_700),
        ("llama-3.1-70b", "H200", 2, 8192, 24_500),
    ],
)
def test_computed_kv_is_near_the_published_sizes(
    model: str, gpu: str, tp: int, tokens: int, published: int
) -> None:
    """The formula is within 5 % of the reference's figures."""
    size = model_size(model, "bf16")
    assert size is not None
    blocks = kv_blocks_that_fit(gpu_memory_gb()[gpu], size, tp=tp, max_num_batched_tokens=tokens)
    assert blocks == pytest.approx(published, rel=0.05)


def test_computed_kv_is_near_the_measured_size() -> None:
    """A real vLLM run on an RTX 4090 at utilisation 0.9 had 2588 blocks; within 2 %."""
    size = model_size("meta-llama/Llama-3.1-8B-Instruct", "bf16")
    assert size is not None
    blocks = kv_blocks_that_fit(gpu_memory_gb()["RTX4090"], size, utilisation=0.9)
    assert blocks == pytest.approx(2588, rel=0.02)


def test_kv_is_computed_where_it_is_left_out(tmp_path: Path) -> None:
    """By hand: (0.5 x 40 - 10 - 1.3) GB in blocks of 16 x 1000 bytes."""
    inline = (
        "id: a, model: mine, gpu: other, gpu_memory_gb: 40, gpu_memory_utilization: 0.5, "
        "weights_gb: 10, kv_bytes_per_token: 1000, latency: 8b-l4-1-bf16, slots: 8"
    )
    known, unknown = fleet(tmp_path, WORKER, inline.replace("id: a", "id: b")).endpoints
    assert known.kv_blocks == 2316
    assert known.kv_bytes_per_token == 131072
    assert unknown.kv_blocks == 543_750


def test_prefill_and_decode_have_their_own_speed(tmp_path: Path) -> None:
    """``prefill_scale`` changes a to c, ``decode_scale`` d to f, ``scale`` everything."""
    plain, changed = fleet(
        tmp_path, WORKER,
        WORKER.replace("id: a", "id: b") + ", prefill_scale: 2, decode_scale: 3, scale: 5",
    ).endpoints  # fmt: skip
    assert changed.latency.prefill_s(100, 50) == pytest.approx(
        10 * plain.latency.prefill_s(100, 50)
    )
    assert changed.latency.decode_step_s(4, 999) == pytest.approx(
        15 * plain.latency.decode_step_s(4, 999)
    )


@pytest.mark.parametrize(
    ("worker", "message"),
    [
        (WORKER.replace("gpu: L4", "gpu: B7"), r"workers\[0\]\.gpu: .*'kv_blocks'.*'B7'.*A100-80"),
        (WORKER.replace("llama-3.1-8b,", "qwen,"), r"workers\[0\]\.model: .*'qwen'.*weights_gb"),
        (
            WORKER.replace("llama-3.1-8b,", "llama-3.1-70b,"),
            r"workers\[0\]\.gpu: model 'llama-3.1-70b' \(141.11 GB\) does not fit on 1 x L4",
        ),
        (WORKER + ", kv_blocks: 9000", r"kv_blocks: 9000 blocks.*34.9 GB.*24.1 GB.*fewer"),
        (WORKER + ", kv_blocks: 0", r"kv_blocks: 0 is not an integer >= 1"),
        (WORKER + ", gpu_memory_gb: -3", r"gpu_memory_gb: -3"),
        (WORKER + ", gpu_memory_utilization: 1.5", r"gpu_memory_utilization: 1.5"),
        (WORKER + ", role: other", r"role: 'other' is unknown.*prefill"),
        (WORKER + ", role: prefill", r"role: 'a' has role prefill.*add a decode worker"),
        (WORKER + ", link_gb_s: 0", r"link_gb_s: 0"),
        (
            WORKER.replace("llama-3.1-8b,", "m,") + ", role: prefill, kv_blocks: 9",
            r"kv_bytes_per_token: the KV size of model 'm' is unknown",
        ),
    ],
)
def test_impossible_workers_are_refused(tmp_path: Path, worker: str, message: str) -> None:
    """The error names worker, field, value and remedy, before anything starts."""
    with pytest.raises(FleetError, match=message):
        fleet(tmp_path, worker)


def test_pools_are_read(tmp_path: Path) -> None:
    """A prefill and a decode worker of one model make pools, and change the fleet's hash."""
    pooled = fleet(
        tmp_path, WORKER + ", role: prefill, link_gb_s: 40",
        WORKER.replace("id: a", "id: b") + ", role: decode",
    )  # fmt: skip
    plain = fleet(tmp_path, WORKER, WORKER.replace("id: a", "id: b"))
    assert [(one.role, one.link_gb_s) for one in pooled.endpoints] == [
        ("prefill", 40.0), ("decode", 10.0),
    ]  # fmt: skip
    assert pooled.content_hash() != plain.content_hash()
