"""Who may ask for how much: tenants, the limits of the whole gateway, and rates per minute."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from planner.domain.errors import InvalidInput

__all__ = ["ANYONE", "Limits", "Rate", "Tenancy", "Tenant"]

_MINUTE_S = 60.0


def _above_zero(name: str, value: float | None) -> None:
    if value is not None and not 0.0 < value < math.inf:
        raise InvalidInput(f"{value!r}", where=name, remedy="use a number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenant:
    """One party that is told apart by its key.

    Parameters
    ----------
    name
        Not empty; a label in metrics and traces.
    weight
        Share of the service it is due against others when calls have to wait, > 0.
    max_in_flight
        Its calls under way at a time, >= 1, or None for no limit of its own.
    requests_per_minute, tokens_per_minute
        > 0, or None for no limit. Tokens are those of prompts and answers.
    priority
        Its calls' class: higher is more urgent, and shed later.

    Raises
    ------
    InvalidInput
        If a value is out of range.
    """

    name: str
    weight: float = 1.0
    max_in_flight: int | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    priority: int = 0

    def __post_init__(self) -> None:
        if not self.name:
            raise InvalidInput("a tenant without a name", where="name", remedy="give it one")
        _above_zero("weight", self.weight)
        _above_zero("requests_per_minute", self.requests_per_minute)
        _above_zero("tokens_per_minute", self.tokens_per_minute)
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise InvalidInput(
                f"{self.max_in_flight!r}", where="max_in_flight", remedy="use 1 or more"
            )

    def own(self, name: str) -> str:
        """Return the name of a run as it is known here: two tenants may choose the same."""
        return name if self is ANYONE else f"{self.name}/{name}"


ANYONE = Tenant(name="default")
"""Whoever calls a gateway that knows no tenants."""


class Tenancy(Protocol):
    """Tells tenants apart."""

    def of(self, headers: Mapping[str, str]) -> Tenant:
        """Return the tenant whose key a request bears.

        Raises
        ------
        ApiError
            401 if the key is missing or nobody's.
        """
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Limits of the gateway as a whole.

    Parameters
    ----------
    max_in_flight
        Calls under way at a time, >= 1, or None for no limit.
    queue_limit
        Calls that may wait for their turn, >= 0.
    queue_timeout_s
        Wall seconds that a call may wait for its turn, > 0.
    ageing_s
        Wall seconds after which a waiting call goes before all that came later, whatever its
        class, > 0.

    Raises
    ------
    InvalidInput
        If a value is out of range.
    """

    max_in_flight: int | None = None
    queue_limit: int = 1000
    queue_timeout_s: float = 30.0
    ageing_s: float = 10.0

    def __post_init__(self) -> None:
        if self.max_in_flight is not None and self.max_in_flight < 1:
            raise InvalidInput(
                f"{self.max_in_flight!r}", where="max_in_flight", remedy="use 1 or more"
            )
        if self.queue_limit < 0:
            raise InvalidInput(f"{self.queue_limit!r}", where="queue_limit", remedy="use 0 or more")
        _above_zero("queue_timeout_s", self.queue_timeout_s)
        _above_zero("ageing_s", self.ageing_s)


class Rate:
    """A token bucket: so much a minute, and at most a minute's worth at once.

    Parameters
    ----------
    per_minute
        > 0.
    now_s
        The clock, seconds; the bucket starts full.
    """

    __slots__ = ("_last_s", "_left", "per_minute")

    def __init__(self, per_minute: float, now_s: float) -> None:
        self.per_minute = per_minute
        self._left = per_minute
        self._last_s = now_s

    def wait_s(self, amount: float, now_s: float) -> float:
        """Return how long it takes until an amount may be taken; 0 if it may now.

        More than a minute's worth may be taken from a full bucket, which then owes the rest.
        """
        self._fill(now_s)
        missing = min(amount, self.per_minute) - self._left
        return max(0.0, missing) * _MINUTE_S / self.per_minute

    def take(self, amount: float, now_s: float) -> None:
        """Take an amount, or give one back if it is negative; the bucket may owe."""
        self._fill(now_s)
        self._left = min(self.per_minute, self._left - amount)

    def _fill(self, now_s: float) -> None:
        grown = (now_s - self._last_s) * self.per_minute / _MINUTE_S
        self._left = min(self.per_minute, self._left + grown)
        self._last_s = now_s
