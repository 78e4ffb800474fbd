"""Endpoints that are not in the fleet yet: like one that is, on a GPU or with a model of the table.

Speed comes from the bundled latency rows, KV from what the GPU's memory leaves; all else (slots,
batching, order) is taken from the endpoint that serves as the pattern.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import replace

from planner.domain.errors import InvalidInput
from planner.domain.fleet import Endpoint, Fleet, latency_rows
from planner.domain.ids import EndpointId
from planner.domain.latency import LatencyRow
from planner.domain.memory import gpu_memory_gb, kv_blocks_that_fit, model_size

__all__ = ["fresh_id", "known_kind", "on_gpu", "pattern", "with_model"]


def pattern(fleet: Fleet, kind: str) -> Endpoint | None:
    """Return the first endpoint with this id, or else of this GPU; None if there is none."""
    for endpoint in fleet.endpoints:
        if endpoint.id == kind:
            return endpoint
    gpu = _closest(kind, {endpoint.gpu for endpoint in fleet.endpoints})
    return next((one for one in fleet.endpoints if one.gpu == gpu), None)


def known_kind(fleet: Fleet, kind: str) -> Endpoint:
    """Return an endpoint of a kind: like one of the fleet, or its first endpoint on another GPU.

    Raises
    ------
    InvalidInput
        If neither the fleet nor the bundled tables know the kind.
    """
    return pattern(fleet, kind) or on_gpu(fleet.endpoints[0], kind)


def on_gpu(endpoint: Endpoint, gpu: str) -> Endpoint:
    """Return the endpoint on another GPU, without a price.

    Raises
    ------
    InvalidInput
        If the GPU is unknown, or its speed or memory for the model are.
    """
    name = _closest(gpu, gpu_memory_gb())
    if name is None:
        raise InvalidInput(
            f"GPU {gpu!r} is unknown",
            where="change",
            remedy=f"use an endpoint of the fleet or one of {', '.join(gpu_memory_gb())}",
        )
    return _made(endpoint, endpoint.model, name)


def with_model(endpoint: Endpoint, model: str) -> Endpoint:
    """Return the endpoint with another model, on as many of its GPUs as that needs.

    Raises
    ------
    InvalidInput
        If no latency row is known for the model on its GPU.
    """
    made = _made(endpoint, model, endpoint.gpu)
    return replace(made, usd_per_hour=_scaled_price(endpoint, made.tp))


def _scaled_price(endpoint: Endpoint, tp: int) -> float | None:
    return None if endpoint.usd_per_hour is None else endpoint.usd_per_hour * tp / endpoint.tp


def _made(endpoint: Endpoint, model: str, gpu: str) -> Endpoint:
    size = model_size(model, endpoint.dtype)
    if size is None:
        raise InvalidInput(
            f"the size of model {model!r} in {endpoint.dtype} is unknown",
            where="change",
            remedy="use a model of data/models.csv, or put the endpoint into a fleet file",
        )
    memory_gb = gpu_memory_gb().get(_closest(gpu, gpu_memory_gb()) or "")
    if memory_gb is None:
        raise InvalidInput(
            f"the memory of GPU {gpu!r} is unknown",
            where="change",
            remedy="put the endpoint into a fleet file, with its kv_blocks",
        )
    tp, row = _row(model, gpu, endpoint.dtype)
    blocks = kv_blocks_that_fit(
        memory_gb, size, tp=tp, max_num_batched_tokens=endpoint.max_num_batched_tokens,
        block_tokens=endpoint.block_tokens,
    )  # fmt: skip
    if blocks < 2:
        raise InvalidInput(
            f"model {model!r} does not fit on {tp} x {gpu}",
            where="change",
            remedy="use a larger GPU",
        )
    return replace(
        endpoint, model=model, gpu=gpu, tp=tp, latency=row, kv_blocks=blocks, usd_per_hour=None,
        kv_bytes_per_token=size.kv_bytes_per_token,
    )  # fmt: skip


def _row(model: str, gpu: str, dtype: str) -> tuple[int, LatencyRow]:
    """Return the least tensor parallel size with a bundled row, and that row."""
    size = model.rsplit("/", maxsplit=1)[-1].lower().removesuffix("-instruct").rsplit("-", 1)[-1]
    found = {}
    for key, row in latency_rows().items():
        row_size, row_gpu, ranks, row_dtype = key.split("-")
        if (row_size, row_dtype) == (size, dtype) and _plain(gpu).startswith(_plain(row_gpu)):
            found[int(ranks)] = row
    if not found:
        raise InvalidInput(
            f"no latency row for {model} ({dtype}) on {gpu}",
            where="change",
            remedy=f"bundled rows: {', '.join(latency_rows())}; or put it into a fleet file",
        )
    tp = min(found)
    return tp, found[tp]


def fresh_id(kind: Endpoint, taken: Iterable[str]) -> EndpointId:
    """Return an id like that of the pattern's GPU that no endpoint has."""
    stem = _plain(kind.gpu)
    used = set(taken)
    number = next(n for n in range(1, len(used) + 2) if f"{stem}-new{n}" not in used)
    return EndpointId(f"{stem}-new{number}")


def _closest(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that is the same but for case and dashes, or begins so."""
    names = sorted(known)
    same = [one for one in names if _plain(one) == _plain(name)]
    begins = [one for one in names if _plain(one).startswith(_plain(name))]
    return next(iter(same or begins), None)


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
