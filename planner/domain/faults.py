"""Faults of mock endpoints: what may go wrong, with which settings, and how they are read.

A worker of a fleet file may list some under ``faults``; planning does not see them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from planner.domain.check import closed_mapping, items, mapping, number, one_of, text
from planner.domain.errors import FleetError, InvalidInput
from planner.domain.files import read_yaml
from planner.domain.ids import EndpointId

__all__ = ["FAULT_KINDS", "Fault", "load_faults", "read_fault", "read_faults"]

_Setting = tuple[float, float, float]  # default, least, most
_SHARE: _Setting = (1.0, 0.0, 1.0)
_EVER = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    meaning: str
    for_s: float
    settings: Mapping[str, _Setting]
    outage: bool = False  # the endpoint cannot be reached; such faults must not overlap


FAULT_KINDS: Mapping[str, _Kind] = {
    "crash": _Kind(
        meaning="connections are reset and the port is closed; a cold process after for_s",
        for_s=60.0,
        settings={},
        outage=True,
    ),
    "engine_dead": _Kind(
        meaning="running streams get an error, new requests 500, /health 503; a crash after "
        "linger_s, a cold process after for_s",
        for_s=60.0,
        settings={"linger_s": (5.0, 0.0, _EVER)},
        outage=True,
    ),
    "cold_restart": _Kind(
        meaning="a clean stop that aborts what runs, and a cold process after for_s",
        for_s=1.0,
        settings={},
        outage=True,
    ),
    "drain": _Kind(
        meaning="no new requests; what runs may end for grace_s; a cold process after for_s",
        for_s=60.0,
        settings={"grace_s": (30.0, 0.0, _EVER)},
        outage=True,
    ),
    "network_cut": _Kind(
        meaning="connections are reset and refused; the engine goes on",
        for_s=30.0,
        settings={},
        outage=True,
    ),
    "blackhole": _Kind(
        meaning="requests and answers are swallowed until it ends", for_s=30.0, settings={}
    ),
    "network_delay": _Kind(
        meaning="every answer comes delay_s later",
        for_s=_EVER,
        settings={"delay_s": (0.05, 0.0, 60.0)},
    ),
    "hang": _Kind(
        meaning="no step is run; /health stays 200 and gauges stand still", for_s=30.0, settings={}
    ),
    "straggler": _Kind(
        meaning="steps take factor times as long",
        for_s=_EVER,
        settings={"factor": (2.0, 0.01, 1000.0)},
    ),
    "drift": _Kind(
        meaning="step times grow to factor over ramp_s and stay there",
        for_s=_EVER,
        settings={"factor": (1.3, 0.01, 1000.0), "ramp_s": (600.0, 0.0, _EVER)},
    ),
    "http_500": _Kind(
        meaning="a share of inference requests gets 500 at once; /health stays 200",
        for_s=_EVER,
        settings={"share": _SHARE},
    ),
    "http_503": _Kind(
        meaning="a share of inference requests gets 503", for_s=_EVER, settings={"share": _SHARE}
    ),
    "http_429": _Kind(
        meaning="a share of inference requests gets 429 with Retry-After, as gateways send it",
        for_s=_EVER,
        settings={"share": _SHARE, "retry_after_s": (1.0, 0.0, 3600.0)},
    ),
    "kv_transfer_failure": _Kind(
        meaning="a share of KV pulls fails", for_s=_EVER, settings={"share": _SHARE}
    ),
    "preemption_storm": _Kind(
        meaning="only a share of the KV blocks is left",
        for_s=60.0,
        settings={"left": (0.1, 0.0, 1.0)},
    ),
    "stale_metrics": _Kind(
        meaning="/metrics is renewed every every_s only, 0 for never",
        for_s=_EVER,
        settings={"every_s": (0.0, 0.0, _EVER)},
    ),
    "missing_metrics": _Kind(meaning="/metrics answers 500", for_s=_EVER, settings={}),
}
"""Kind -> meaning, duration unless given, and settings with default and range."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault of one endpoint.

    Parameters
    ----------
    kind
        A key of `FAULT_KINDS`.
    at_s
        When it begins, engine seconds after the start of the fleet, >= 0.
    for_s
        How long it lasts, engine seconds, > 0; infinite for one that stays.
    settings
        The kind's own, all of them.
    """

    kind: str
    at_s: float
    for_s: float
    settings: Mapping[str, float]

    @property
    def end_s(self) -> float:
        """When it is over."""
        return self.at_s + self.for_s

    def moved(self, by_s: float) -> Fault:
        """Return the same fault, beginning ``by_s`` later."""
        return replace(self, at_s=self.at_s + by_s)

    def to_json(self) -> dict[str, Any]:
        """Return it as it is written in files; null for a duration without end."""
        values = {"at_s": self.at_s, "for_s": self.for_s, **self.settings}
        finite = {name: None if math.isinf(one) else one for name, one in values.items()}
        return {"kind": self.kind, **finite}


def read_fault(value: Any, where: str, kind_of_error: type[InvalidInput] = InvalidInput) -> Fault:
    """Return a fault from its mapping ``{kind, at_s, for_s, ...}``.

    Raises
    ------
    InvalidInput
        Or the given subclass, naming place, value and remedy.
    """
    raw = mapping(value, where, kind_of_error)
    name = raw.get("kind")
    if not isinstance(name, str):
        raise kind_of_error(
            f"expected a kind of fault, got {name!r:.80}",
            where=f"{where}.kind",
            remedy=f"use one of {', '.join(sorted(FAULT_KINDS))}",
        )
    kind = FAULT_KINDS[one_of(name, f"{where}.kind", FAULT_KINDS, kind_of_error)]
    closed_mapping(raw, where, {"kind", "at_s", "for_s", *kind.settings}, kind_of_error)
    for_s = raw.get("for_s", kind.for_s)
    return Fault(
        kind=name,
        at_s=number(raw.get("at_s", 0.0), f"{where}.at_s", least=0, kind=kind_of_error),
        for_s=math.inf
        if for_s is None or for_s == math.inf
        else number(for_s, f"{where}.for_s", least=1e-3, kind=kind_of_error),
        settings={
            setting: default
            if setting not in raw
            else number(
                raw[setting], f"{where}.{setting}", least=least, most=most, kind=kind_of_error
            )
            for setting, (default, least, most) in kind.settings.items()
        },
    )


def read_faults(value: Any, where: str) -> tuple[Fault, ...]:
    """Return the faults of one worker in order of their begin.

    Raises
    ------
    FleetError
        If one is wrong, or two that take the endpoint off the network overlap.
    """
    faults = [
        read_fault(one, f"{where}[{position}]", FleetError)
        for position, one in enumerate(items(value, where, FleetError))
    ]
    faults.sort(key=lambda fault: fault.at_s)
    outages = [fault for fault in faults if FAULT_KINDS[fault.kind].outage]
    for one, after in pairwise(outages):
        if after.at_s < one.end_s:
            raise FleetError(
                f"{after.kind} at {after.at_s:g} s begins before {one.kind} ends at "
                f"{one.end_s:g} s",
                where=where,
                remedy="let it begin later, or shorten the other with for_s",
            )
    return tuple(faults)


def load_faults(path: Path) -> Mapping[EndpointId, Sequence[Fault]]:
    """Return the faults of each worker of a fleet file that `load_fleet` accepts.

    Raises
    ------
    FleetError
        Naming file, worker, field and remedy.
    """
    faults: dict[EndpointId, Sequence[Fault]] = {}
    try:
        document = mapping(read_yaml(path, what="fleet file"), "", FleetError)
        for position, worker in enumerate(items(document.get("workers"), "workers", FleetError)):
            where = f"workers[{position}]"
            raw = mapping(worker, where, FleetError)
            if "faults" in raw:
                name = EndpointId(text(raw.get("id"), f"{where}.id", FleetError))
                faults[name] = read_faults(raw["faults"], f"{where}.faults")
    except InvalidInput as error:
        where = f"{path}: {error.where}" if error.where else str(path)
        raise FleetError(error.what, where=where, remedy=error.remedy) from error
    return faults
