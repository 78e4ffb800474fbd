"""Policies by name; one interface for the simulator, the gateway and replay."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from planner.dispatch.policies.astraea import Astraea
from planner.dispatch.policies.base import Choice, Policy
from planner.dispatch.policies.cache_aware import CacheAware, CacheAwareSmg, ExpectedWait
from planner.dispatch.policies.classic import LeastLoad, PowerOfTwo, RandomChoice, RoundRobin
from planner.dispatch.policies.finish import LeastExpectedFinish, MarginalCost
from planner.dispatch.policies.hexagent import HexAGenT
from planner.dispatch.policies.llmsched import LlmSched
from planner.dispatch.policies.orders import (
    Atlas,
    FirstComeCall,
    FirstComeWorkflow,
    LeastAttainedService,
    LeastLaxity,
    Plas,
)
from planner.dispatch.policies.planned import Planned
from planner.dispatch.policies.prefix import PrefixAffinity
from planner.dispatch.policies.saga import Saga
from planner.dispatch.policies.scores import KvCost, WeightedScorers
from planner.dispatch.policies.sticky import ConsistentHash, SessionAffinity
from planner.domain.errors import InvalidInput

__all__ = ["POLICIES", "Choice", "Planned", "Policy", "make_policy", "parse_policy"]

POLICIES: Mapping[str, Callable[..., Policy]] = {
    kind.name: kind
    for kind in (
        RoundRobin,
        RandomChoice,
        LeastLoad,
        PowerOfTwo,
        PrefixAffinity,
        ExpectedWait,
        CacheAware,
        CacheAwareSmg,
        ConsistentHash,
        SessionAffinity,
        KvCost,
        WeightedScorers,
        LeastExpectedFinish,
        MarginalCost,
        FirstComeCall,
        FirstComeWorkflow,
        LeastLaxity,
        LeastAttainedService,
        Plas,
        Atlas,
        HexAGenT,
        Astraea,
        Saga,
        LlmSched,
        Planned,
    )
}


def make_policy(name: str, *, seed: int = 0, **parameters: Any) -> Policy:
    """Return a fresh policy.

    Parameters
    ----------
    name
        One of `POLICIES`.
    seed
        For policies that draw at random; the others ignore it.
    parameters
        Passed on; see the classes.

    Raises
    ------
    InvalidInput
        If the name or a parameter is unknown.
    """
    try:
        kind = POLICIES[name]
    except KeyError:
        raise InvalidInput(
            f"{name!r} is unknown", where="policy", remedy=f"use one of {', '.join(POLICIES)}"
        ) from None
    known = inspect.signature(kind).parameters
    _check_names(name, parameters, [key for key in known if key != "seed"])
    if "seed" in known:
        parameters["seed"] = seed
    return kind(**parameters)


def parse_policy(text: str) -> tuple[str, dict[str, float]]:
    """Split ``name`` or ``name:key=value,key=value`` into name and numeric parameters.

    Raises
    ------
    InvalidInput
        If the name or a parameter is unknown, or a parameter is not ``key=number`` with a number
        >= 0.
    """
    name, _, rest = text.partition(":")
    if name not in POLICIES:
        make_policy(name)  # says so
    parameters: dict[str, float] = {}
    for part in filter(None, rest.split(",")):
        key, _, value = part.partition("=")
        try:
            parameters[key] = float(value)
        except ValueError:
            raise InvalidInput(
                f"{part!r} is not key=number", where=f"policy {name!r}", remedy="correct it"
            ) from None
        if not parameters[key] >= 0:
            raise InvalidInput(
                f"{part!r} is out of range", where=f"policy {name!r}", remedy="use a number >= 0"
            )
    # A seed comes with the experiment, a table from its file.
    numeric = [key for key in inspect.signature(POLICIES[name]).parameters if key not in _GIVEN]
    _check_names(name, parameters, numeric)
    return name, parameters


_GIVEN = ("seed", "table")


def _check_names(policy: str, parameters: Iterable[str], known: Sequence[str]) -> None:
    for key in parameters:
        if key not in known:
            raise InvalidInput(
                f"policy {policy!r} has no parameter {key!r}",
                where="policy",
                remedy=f"known: {', '.join(known) or 'none'}",
            )
