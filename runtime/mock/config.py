"""Settings of the mock endpoints: what ``vllm serve`` would be told by options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from planner.domain.errors import InvalidInput

__all__ = ["MockConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MockConfig:
    """Settings of a mock fleet.

    Parameters
    ----------
    dilation
        Engine seconds per wall second, > 0.
    stream_interval
        Tokens per chunk after the first, >= 1; a request may ask for another.
    seed
        Of answers, noise and random faults.
    noise_cv
        Coefficient of variation of step times, in [0, 10].
    prompt_tokens_details
        Whether usage tells the cached tokens (off in vLLM unless asked for, on here).
    request_id_headers
        Echo ``X-Request-Id`` in every answer.
    api_keys
        Accepted bearer tokens of the ``/v1`` routes; empty asks for none.
    dev_mode
        Serve the routes of ``VLLM_SERVER_DEV_MODE``: cache reset, sleep, server info (off in vLLM
        unless asked for, on here).
    old_metrics
        Expose the metric names that 0.10.2 had, too.
    track_load
        Count requests in ``/load``, which otherwise says 0.
    max_queued
        Requests with no slot above which new ones get 503, or None; vLLM has no limit unless told.
    lora
        Names of adapters that are served beside the model.
    kv_load_failure_policy
        What happens to a request whose KV does not arrive: ``fail`` or ``recompute``.
    transfer_setup_s, lease_s
        Set-up of a KV pull, >= 0, and how long a prefill keeps its blocks for it, > 0.
    """

    dilation: float = 1.0
    stream_interval: int = 1
    seed: int = 0
    noise_cv: float = 0.0
    prompt_tokens_details: bool = True
    request_id_headers: bool = False
    api_keys: tuple[str, ...] = ()
    dev_mode: bool = True
    old_metrics: bool = False
    track_load: bool = False
    max_queued: int | None = None
    lora: tuple[str, ...] = ()
    kv_load_failure_policy: Literal["fail", "recompute"] = "fail"
    transfer_setup_s: float = 0.001
    lease_s: float = 30.0

    def __post_init__(self) -> None:
        if self.stream_interval < 1:
            raise InvalidInput(
                f"{self.stream_interval!r}", where="stream_interval", remedy="use 1 or more"
            )
        if not 0 <= self.noise_cv < 10:
            raise InvalidInput(f"{self.noise_cv!r}", where="noise_cv", remedy="use 0 to 10")
        if self.max_queued is not None and self.max_queued < 0:
            raise InvalidInput(f"{self.max_queued!r}", where="max_queued", remedy="use 0 or more")
        if self.kv_load_failure_policy not in ("fail", "recompute"):
            raise InvalidInput(
                f"{self.kv_load_failure_policy!r}",
                where="kv_load_failure_policy",
                remedy="use fail or recompute",
            )
        if not all(self.api_keys) or not all(self.lora):
            where = "lora" if all(self.api_keys) else "api_keys"
            raise InvalidInput("an empty text", where=where, remedy="leave it out")
