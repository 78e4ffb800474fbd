"""Endpoints and fleets: what can serve a call, how fast, and how much it can hold."""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, cast
from urllib.parse import urlsplit

from planner.domain.check import closed_mapping, integer, items, mapping, number, one_of, text
from planner.domain.errors import FleetError, InvalidInput
from planner.domain.files import data_dir, read_text, read_yaml
from planner.domain.ids import EndpointId
from planner.domain.latency import LatencyRow
from planner.domain.memory import (
    GB,
    ModelSize,
    gpu_memory_gb,
    kv_blocks_that_fit,
    model_size,
)
from planner.domain.show import html_table

__all__ = [
    "FLEET_SCHEMA",
    "SECTIONS",
    "Endpoint",
    "Fleet",
    "latency_rows",
    "load_fleet",
    "parse_fleet",
    "read_endpoint",
]

FLEET_SCHEMA = "almanac.fleet/1"
SECTIONS = (
    "faults", "hints", "identity", "limits", "policy", "server", "telemetry", "tenants", "tls",
)  # fmt: skip
"""Sections a fleet file may hold for the gateway; nobody else reads them."""

_COEFFICIENTS = {
    "a": "prefill_base_ms",
    "b": "prefill_us_per_token",
    "c": "prefill_ns_per_token_sq",
    "d": "decode_base_ms",
    "e": "decode_us_per_call",
    "f": "decode_ns_per_kv_token",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """One address that serves one model.

    Parameters
    ----------
    id
        Unique within the fleet.
    model
        Name in the ``model`` field of requests.
    gpu, tp, dtype
        What it runs on: GPU type, tensor parallel size (>= 1), number format.
    latency
        Latency coefficients.
    kv_blocks
        KV cache size in blocks of ``block_tokens`` tokens, >= 1.
    max_num_seqs
        Slots: calls that may run at the same time, >= 1.
    max_num_batched_tokens
        Token budget of one engine step, >= 1.
    max_model_len
        Longest prompt plus output, tokens.
    scheduling
        Queue order inside the engine: ``fcfs``, or ``priority`` (smaller first).
    url
        Base address, without ``/v1``; None for a fleet that exists only on paper.
    usd_per_hour
        Price, or None if unknown.
    role
        ``prefill`` computes prompts and hands their KV over, ``decode`` takes it and goes on,
        ``both`` serves calls whole.
    kv_bytes_per_token
        KV cache of a token, bytes; None if unknown. Pools and offloading need it.
    link_gb_s
        Bandwidth to other endpoints in each direction, GB/s, > 0; 10 is 100 Gbit Ethernet.
    pcie_gb_s
        Bandwidth between GPU and host memory, GB/s, > 0; 24 is PCIe 4.0 x16.
    """

    id: EndpointId
    model: str
    gpu: str
    latency: LatencyRow
    kv_blocks: int
    max_num_seqs: int
    tp: int = 1
    dtype: str = "bf16"
    block_tokens: int = 16
    max_num_batched_tokens: int = 2048
    max_model_len: int = 131072
    scheduling: Literal["fcfs", "priority"] = "fcfs"
    url: str | None = None
    usd_per_hour: float | None = None
    labels: tuple[tuple[str, str], ...] = ()
    role: Literal["both", "prefill", "decode"] = "both"
    kv_bytes_per_token: int | None = None
    link_gb_s: float = 10.0
    pcie_gb_s: float = 24.0

    @property
    def kv_tokens(self) -> int:
        """KV cache size in tokens."""
        return self.kv_blocks * self.block_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Fleet:
    """All endpoints, in the order of the file; positions in it are the endpoint indices.

    Raises
    ------
    FleetError
        If there is no endpoint, an id repeats or two endpoints share an address.
    """

    name: str
    endpoints: tuple[Endpoint, ...]
    _index: dict[EndpointId, int] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise FleetError("no endpoint", where="workers", remedy="list at least one")
        index: dict[EndpointId, int] = {}
        seen: dict[tuple[str | None, int | None], str] = {}
        for position, endpoint in enumerate(self.endpoints):
            if endpoint.id in index:
                raise FleetError(
                    f"id {endpoint.id!r} is used twice",
                    where=f"workers[{position}].id",
                    remedy="give each worker its own id",
                )
            index[endpoint.id] = position
            if endpoint.url is not None:
                parts = urlsplit(endpoint.url)
                address = (parts.hostname, parts.port)
                if address in seen:
                    raise FleetError(
                        f"{endpoint.url!r} is already the address of {seen[address]!r}",
                        where=f"workers[{position}].url",
                        remedy="give each worker its own port",
                    )
                seen[address] = endpoint.id
        self._check_pools()
        object.__setattr__(self, "_index", index)

    def _repr_html_(self) -> str:
        """Return the endpoints for a notebook."""
        return html_table(
            [
                {
                    "endpoint": one.id,
                    "model": one.model,
                    "GPU": one.gpu if one.tp == 1 else f"{one.tp} x {one.gpu}",
                    "slots": one.max_num_seqs,
                    "KV tokens": one.kv_tokens,
                    "role": one.role,
                    "$/h": one.usd_per_hour,
                }
                for one in self.endpoints
            ],
            f"fleet {self.name}",
        )

    def _check_pools(self) -> None:
        for position, endpoint in enumerate(self.endpoints):
            where = f"workers[{position}]"
            if endpoint.role == "both":
                continue
            if endpoint.kv_bytes_per_token is None:
                raise FleetError(
                    f"the KV size of model {endpoint.model!r} is unknown, so {endpoint.id!r} "
                    "cannot hand it over",
                    where=f"{where}.kv_bytes_per_token",
                    remedy="give it: 2 x layers x KV heads x head size x bytes",
                )
            wanted = "decode" if endpoint.role == "prefill" else "prefill"
            if not any(
                other.role == wanted
                and (other.model, other.kv_bytes_per_token, other.block_tokens)
                == (endpoint.model, endpoint.kv_bytes_per_token, endpoint.block_tokens)
                for other in self.endpoints
            ):
                raise FleetError(
                    f"{endpoint.id!r} has role {endpoint.role}, but no worker with the same model "
                    f"and KV size has role {wanted}",
                    where=f"{where}.role",
                    remedy=f"add a {wanted} worker, or use role both",
                )

    def index_of(self, endpoint_id: EndpointId) -> int:
        """Return the position of an endpoint.

        Raises
        ------
        FleetError
            If the fleet has no such endpoint.
        """
        try:
            return self._index[endpoint_id]
        except KeyError:
            raise FleetError(
                f"no endpoint {endpoint_id!r}",
                where=f"fleet {self.name!r}",
                remedy=f"known: {', '.join(self._index)}",
            ) from None

    def content_hash(self) -> str:
        """Return 16 hex digits that change when anything that matters to plans changes."""
        rows = []
        for endpoint in self.endpoints:
            row = asdict(endpoint)
            del row["url"], row["labels"]
            # Left out where they change nothing, so that older plans keep their fleet.
            if endpoint.role == "both":
                for name in ("role", "link_gb_s"):
                    del row[name]
            del row["kv_bytes_per_token"], row["pcie_gb_s"]
            rows.append(row)
        payload = json.dumps(rows, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(payload.encode()).hexdigest()[:16]


@lru_cache(maxsize=1)
def latency_rows() -> Mapping[str, LatencyRow]:
    """Return the bundled latency rows by key, from ``data/latency_rows.csv``."""
    path = data_dir() / "latency_rows.csv"
    rows: dict[str, LatencyRow] = {}
    for record in csv.DictReader(read_text(path, what="latency table").splitlines()):
        rows[record["key"]] = LatencyRow(
            **{name: float(record[short]) for short, name in _COEFFICIENTS.items()}
        )
    return rows


def _latency(value: Any, where: str) -> LatencyRow:
    if isinstance(value, str):
        try:
            return latency_rows()[value]
        except KeyError:
            raise FleetError(
                f"no latency row {value!r}",
                where=where,
                remedy=f"known rows: {', '.join(latency_rows())}; or write a to f inline",
            ) from None
    raw = closed_mapping(value, where, {*_COEFFICIENTS, "scale"}, FleetError)
    missing = [short for short in _COEFFICIENTS if short not in raw]
    if missing:
        raise FleetError(
            f"coefficients {', '.join(missing)} are missing", where=where, remedy="give a to f"
        )
    values = {
        name: number(raw[short], f"{where}.{short}", least=0, kind=FleetError)
        for short, name in _COEFFICIENTS.items()
    }
    scale = number(raw.get("scale", 1.0), f"{where}.scale", least=1e-6, kind=FleetError)
    try:
        return LatencyRow(**values, scale=scale)
    except InvalidInput as error:
        raise FleetError(error.what, where=f"{where}.{error.where}", remedy=error.remedy) from error


_WORKER_FIELDS = {
    "id", "url", "model", "gpu", "tp", "dtype", "latency", "scale", "prefill_scale",
    "decode_scale", "kv_blocks", "slots", "max_num_batched_tokens", "max_model_len", "scheduling",
    "usd_per_hour", "labels", "role", "gpu_memory_gb", "gpu_memory_utilization", "weights_gb",
    "kv_bytes_per_token", "link_gb_s", "pcie_gb_s",
    "faults",  # read by planner.domain.faults; planning does not see them
}  # fmt: skip


def _kv_blocks(raw: Mapping[str, Any], where: str, size: ModelSize | None) -> int:
    """Return the KV blocks given or computed, checked against the memory where it is known."""
    tp = integer(raw.get("tp", 1), f"{where}.tp", least=1, kind=FleetError)
    memory_gb = gpu_memory_gb().get(str(raw["gpu"]))
    if "gpu_memory_gb" in raw:
        memory_gb = number(raw["gpu_memory_gb"], f"{where}.gpu_memory_gb", least=1, kind=FleetError)
    given = raw.get("kv_blocks")
    if given is not None:
        blocks = integer(given, f"{where}.kv_blocks", least=1, kind=FleetError)
        if memory_gb is not None and size is not None:
            needed_gb = size.weights_gb + blocks * 16 * size.kv_bytes_per_token / GB
            if needed_gb > tp * memory_gb:
                raise FleetError(
                    f"{blocks} blocks and the weights of {raw['model']!r} need {needed_gb:.1f} GB, "
                    f"{tp} x {raw['gpu']} has {tp * memory_gb:.1f} GB",
                    where=f"{where}.kv_blocks",
                    remedy="give fewer, or leave it out to have it computed",
                )
        return blocks
    if memory_gb is None:
        raise FleetError(
            f"field 'kv_blocks' is missing, and the memory of GPU {raw['gpu']!r} is unknown",
            where=f"{where}.gpu",
            remedy=f"give kv_blocks or gpu_memory_gb, or use one of {', '.join(gpu_memory_gb())}",
        )
    if size is None:
        raise FleetError(
            f"field 'kv_blocks' is missing, and the size of model {raw['model']!r} in "
            f"{raw.get('dtype', 'bf16')} is unknown",
            where=f"{where}.model",
            remedy="give kv_blocks, or weights_gb and kv_bytes_per_token",
        )
    utilisation = number(
        raw.get("gpu_memory_utilization", 0.92), f"{where}.gpu_memory_utilization",
        least=0.01, most=1, kind=FleetError,
    )  # fmt: skip
    blocks = kv_blocks_that_fit(
        memory_gb,
        size,
        tp=tp,
        utilisation=utilisation,
        max_num_batched_tokens=integer(
            raw.get("max_num_batched_tokens", 2048), f"{where}.max_num_batched_tokens", least=1,
            kind=FleetError,
        ),
    )  # fmt: skip
    if blocks < 2:
        raise FleetError(
            f"model {raw['model']!r} ({size.weights_gb:g} GB) does not fit on {tp} x {raw['gpu']} "
            f"({memory_gb:g} GB each, {utilisation:.0%} used)",
            where=f"{where}.gpu",
            remedy="use a larger tp, a smaller dtype or another GPU",
        )
    return blocks


def _size(raw: Mapping[str, Any], where: str) -> ModelSize | None:
    """Return the model's size from the table, changed by what is written inline."""
    known = model_size(str(raw["model"]), str(raw.get("dtype", "bf16")))
    weights = raw.get("weights_gb", known.weights_gb if known else None)
    kv_bytes = raw.get("kv_bytes_per_token", known.kv_bytes_per_token if known else None)
    if weights is None or kv_bytes is None:
        return None
    return ModelSize(
        weights_gb=number(weights, f"{where}.weights_gb", least=1e-3, kind=FleetError),
        kv_bytes_per_token=integer(
            kv_bytes, f"{where}.kv_bytes_per_token", least=1, kind=FleetError
        ),
    )


def read_endpoint(value: Any, where: str) -> Endpoint:
    """Return an endpoint from its mapping, as `load_fleet` reads those under ``workers``.

    Raises
    ------
    FleetError
        Naming ``where``, field, value and remedy.
    """
    raw = closed_mapping(value, where, _WORKER_FIELDS, FleetError)
    for name in ("id", "model", "gpu", "latency", "slots"):
        if name not in raw:
            raise FleetError(f"field {name!r} is missing", where=where, remedy="add it")
    url = raw.get("url")
    if url is not None:
        parts = urlsplit(text(url, f"{where}.url", FleetError))
        try:
            port_ok = parts.port is not None
        except ValueError:
            port_ok = False
        if parts.scheme not in ("http", "https") or not parts.hostname or not port_ok:
            raise FleetError(
                f"{url!r} is not an address", where=f"{where}.url", remedy="use http://host:port"
            )
    latency = _latency(raw["latency"], f"{where}.latency")

    def positive(name: str, default: float) -> float:
        return number(raw.get(name, default), f"{where}.{name}", least=1e-6, kind=FleetError)

    latency = latency.scaled(
        positive("scale", 1.0),
        prefill=positive("prefill_scale", 1.0),
        decode=positive("decode_scale", 1.0),
    )
    size = _size(raw, where)
    kv_bytes = raw.get("kv_bytes_per_token", size.kv_bytes_per_token if size else None)
    role = one_of(
        raw.get("role", "both"), f"{where}.role", ("both", "prefill", "decode"), FleetError
    )
    usd = raw.get("usd_per_hour")
    scheduling = one_of(
        raw.get("scheduling", "fcfs"), f"{where}.scheduling", ("fcfs", "priority"), FleetError
    )
    labels = mapping(raw.get("labels", {}), f"{where}.labels", FleetError)

    def whole(name: str, default: int) -> int:
        return integer(raw.get(name, default), f"{where}.{name}", least=1, kind=FleetError)

    return Endpoint(
        id=EndpointId(text(raw["id"], f"{where}.id", FleetError)),
        model=text(raw["model"], f"{where}.model", FleetError),
        gpu=text(raw["gpu"], f"{where}.gpu", FleetError),
        tp=whole("tp", 1),
        dtype=text(raw.get("dtype", "bf16"), f"{where}.dtype", FleetError),
        latency=latency,
        kv_blocks=_kv_blocks(raw, where, size),
        max_num_seqs=whole("slots", 0),
        max_num_batched_tokens=whole("max_num_batched_tokens", 2048),
        max_model_len=whole("max_model_len", 131072),
        scheduling=cast("Literal['fcfs', 'priority']", scheduling),
        url=url.rstrip("/") if url else None,
        usd_per_hour=None
        if usd is None
        else number(usd, f"{where}.usd_per_hour", least=0, kind=FleetError),
        labels=tuple(sorted((key, str(label)) for key, label in labels.items())),
        role=cast("Literal['both', 'prefill', 'decode']", role),
        kv_bytes_per_token=None
        if kv_bytes is None
        else integer(kv_bytes, f"{where}.kv_bytes_per_token", least=1, kind=FleetError),
        link_gb_s=positive("link_gb_s", 10.0),
        pcie_gb_s=positive("pcie_gb_s", 24.0),
    )


def load_fleet(path: Path) -> Fleet:
    """Read a fleet file (YAML, schema ``almanac.fleet/1``).

    Raises
    ------
    FleetError, InvalidInput
        Naming file, field, value and remedy.
    """
    return parse_fleet(read_yaml(path, what="fleet file"), str(path), default_name=path.stem)


def parse_fleet(document: Any, file: str, *, default_name: str) -> Fleet:
    """Return the fleet of a parsed fleet file; see `load_fleet`.

    Parameters
    ----------
    file
        For errors.
    default_name
        Of a fleet without a name.
    """
    try:
        raw = closed_mapping(document, "", {"schema", "name", "workers", *SECTIONS}, FleetError)
        if raw.get("schema") != FLEET_SCHEMA:
            raise FleetError(
                f"{raw.get('schema')!r} is not a schema this version reads",
                where="schema",
                remedy=f"write schema: {FLEET_SCHEMA}",
            )
        workers = items(raw.get("workers"), "workers", FleetError)
        return Fleet(
            name=text(raw.get("name", default_name), "name", FleetError),
            endpoints=tuple(
                read_endpoint(worker, f"workers[{position}]")
                for position, worker in enumerate(workers)
            ),
        )
    except InvalidInput as error:
        where = f"{file}: {error.where}" if error.where else file
        raise FleetError(error.what, where=where, remedy=error.remedy) from error
