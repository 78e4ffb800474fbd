"""Settings of the gateway; every time is in wall seconds unless it says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, fields

from planner.domain.errors import InvalidInput

__all__ = ["GatewayConfig"]

_MAY_BE_ZERO = frozenset({"retries", "hold_limit", "seed", "drain_s", "online"})


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig:
    """What `almanac serve` may be told.

    Parameters
    ----------
    dilation
        Engine seconds per wall second; 1 in front of real engines.
    retries
        Further attempts after the first, before the first byte, >= 0.
    hold_limit, hold_timeout_s
        Calls that may wait while no endpoint is up, and for how long.
    connect_timeout_s, read_timeout_s
        Limits on a connect, and on the silence between two reads of an answer.
    breaker_failures, breaker_pause_s, probe_interval_s
        See `runtime.health.Breaker`; how often endpoints that are down are looked at.
    run_idle_s
        Engine seconds of silence after which a run counts as ended.
    max_body_bytes
        Largest request body.
    drain_s
        Time given to calls in flight when the gateway is stopped.
    seed
        Of policies that draw at random, and of the scenarios behind criticalities.
    online
        Whether latency rows, lengths and finish forecasts follow what finished calls show.
    admin_key
        Key of the admin routes; None turns them off.
    """

    dilation: float = 1.0
    retries: int = 2
    hold_limit: int = 1000
    hold_timeout_s: float = 30.0
    connect_timeout_s: float = 5.0
    read_timeout_s: float = 600.0
    breaker_failures: int = 3
    breaker_pause_s: float = 1.0
    probe_interval_s: float = 0.5
    run_idle_s: float = 900.0
    max_body_bytes: int = 64 * 2**20
    drain_s: float = 20.0
    seed: int = 0
    online: bool = True
    admin_key: str | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name in _MAY_BE_ZERO else 1e-9
            if isinstance(value, (int, float)) and not least <= value < float("inf"):
                raise InvalidInput(
                    f"{value!r} is out of range",
                    where=field.name,
                    remedy="use a number above 0" if least else "use a number >= 0",
                )
        if self.admin_key == "":
            raise InvalidInput("the key is empty", where="admin_key", remedy="give a secret text")
