"""GPU memory: what a model leaves for its KV cache.

vLLM gives the KV cache what a share of the memory leaves after weights and activations:

    blocks = floor((utilisation x memory - weights / tp - overhead) / (block bytes / tp))

The overhead (activations, CUDA graphs) was 1.24 GB in a real run with 2048 batched tokens; 1.3 GB
there and 3 GB with 8192 are taken, a line between and beyond.

References
----------
``data/gpus.csv`` and ``data/models.csv`` name their sources row by row.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

from planner.domain.files import data_dir, read_text

__all__ = ["GB", "ModelSize", "gpu_memory_gb", "kv_blocks_that_fit", "model_size"]

GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSize:
    """Memory that a model needs.

    Parameters
    ----------
    weights_gb
        All weights, GB (1e9 bytes), > 0.
    kv_bytes_per_token
        KV cache of one token over all layers and ranks, bytes, >= 1.
    """

    weights_gb: float
    kv_bytes_per_token: int


@lru_cache(maxsize=1)
def gpu_memory_gb() -> Mapping[str, float]:
    """Return the memory of each known GPU in GB, from ``data/gpus.csv``."""
    path = data_dir() / "gpus.csv"
    table = csv.DictReader(read_text(path, what="GPU table").splitlines())
    return {row["gpu"]: float(row["memory_gb"]) for row in table}


@lru_cache(maxsize=1)
def _model_sizes() -> Mapping[tuple[str, str], ModelSize]:
    path = data_dir() / "models.csv"
    table = csv.DictReader(read_text(path, what="model table").splitlines())
    return {
        (row["model"], row["dtype"]): ModelSize(
            weights_gb=float(row["weights_gb"]), kv_bytes_per_token=int(row["kv_bytes_per_token"])
        )
        for row in table
    }


def model_size(model: str, dtype: str) -> ModelSize | None:
    """Return the size of a model, or None if ``data/models.csv`` does not have it.

    Organisation, case and an ``-Instruct`` at the end do not count: ``meta-llama/Llama-3.1-8B``
    is ``llama-3.1-8b``.
    """
    name = model.rsplit("/", maxsplit=1)[-1].lower().removesuffix("-instruct")
    return _model_sizes().get((name, dtype))


def kv_blocks_that_fit(
    memory_gb: float,
    size: ModelSize,
    *,
    tp: int = 1,
    utilisation: float = 0.92,
    max_num_batched_tokens: int = 2048,
    block_tokens: int = 16,
) -> int:
    """Return the KV blocks that vLLM would report; 0 or less if the model does not fit.

    Parameters
    ----------
    memory_gb
        Of one GPU, GB, > 0.
    tp
        GPUs that share the model, >= 1.
    utilisation
        vLLM's ``gpu_memory_utilization``, (0, 1].
    """
    overhead_gb = 1.3 + 1.7 * max(0, max_num_batched_tokens - 2048) / (8192 - 2048)
    room_gb = utilisation * memory_gb - size.weights_gb / tp - overhead_gb
    return int(room_gb * GB * tp // (block_tokens * size.kv_bytes_per_token))
