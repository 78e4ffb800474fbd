"""`almanac explain RUN --gateway URL`: a run of a gateway that is serving, asked over HTTP."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit
from urllib.request import Request, urlopen

from planner.domain.errors import InvalidInput
from planner.domain.trace import RunRecord, TraceRecord, record_from_json

__all__ = ["DEFAULT_KEY", "LiveRun", "ask_run"]

DEFAULT_KEY = "ALMANAC_SERVER_ADMIN_KEY"
"""Variable that holds the admin key; the one that `almanac serve` reads, too."""
_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRun:
    """What a gateway knows of a run.

    Parameters
    ----------
    own
        Its record; ``status`` ``running`` and ``finish_s`` now while it is in progress.
    records
        All of them, as in a trace.
    predicted_finish_s
        When it is expected to end by now, on the records' clock; None if it is over or unknown.
    why
        Call site -> reason of its row in the present table at the present load.
    """

    own: RunRecord
    records: tuple[TraceRecord, ...]
    predicted_finish_s: float | None
    why: Mapping[str, str]


def ask_run(
    run_id: str,
    gateway: str,
    variable: str = DEFAULT_KEY,
    *,
    get: Callable[[str, str], tuple[int, bytes]] | None = None,
) -> LiveRun:
    """Return what a gateway knows of a run.

    Parameters
    ----------
    gateway
        Its base address, ``http://host:port``.
    variable
        Environment variable that holds its admin key.
    get
        Returns status and body for an address and a key; tests give their own.

    Raises
    ------
    InvalidInput
        If address, key or run are wrong, or the gateway does not answer as one.
    """
    base = gateway.rstrip("/").removesuffix("/v1")
    if urlsplit(base).scheme not in ("http", "https") or not urlsplit(base).netloc:
        raise InvalidInput(
            f"{gateway!r} is no address", where="--gateway", remedy="give http://host:port"
        )
    key = os.environ.get(variable, "")
    if not key:
        raise InvalidInput(
            f"the environment variable {variable!r} is not set or empty",
            where="--key-env",
            remedy=f"export {variable}=<the gateway's admin key>",
        )
    status, body = (get or _get)(f"{base}/almanac/v1/runs/{quote(run_id, safe='')}", key)
    if status in _REFUSALS:
        what, where, remedy = _REFUSALS[status]
        raise InvalidInput(what.format(run=run_id), where=f"{where} {base}", remedy=remedy)
    try:
        told: dict[str, Any] = json.loads(body) if status == 200 else {}
        records = [record_from_json(one, f"{base}: run") for one in told["records"]]
        (own,) = (one for one in records if isinstance(one, RunRecord))
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidInput(
            f"status {status} and no run in the answer",
            where=f"--gateway {base}",
            remedy="name a gateway of this version",
        ) from error
    why = told.get("why")
    return LiveRun(
        own=own,
        records=tuple(records),
        predicted_finish_s=told.get("predicted_finish_s"),
        why=why if isinstance(why, dict) else {},
    )


_REFUSALS = {
    401: ("wrong admin key", "--key-env of", "give the key the gateway was started with"),
    403: ("the admin routes are off", "--gateway", "start the gateway with an admin key"),
    404: ("no run {run!r}", "gateway", "name one of the latest runs, or explain a trace"),
}
"""Status -> what, where, remedy."""


def _get(address: str, key: str) -> tuple[int, bytes]:
    try:
        request = Request(address, headers={"authorization": f"Bearer {key}"})  # noqa: S310 - checked
        with urlopen(request, timeout=_LIMIT_S) as answer:  # noqa: S310 - as above
            return answer.status, answer.read()
    except HTTPError as error:
        return error.code, b""
    except (URLError, HTTPException, OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        said = "no answer in time" if isinstance(reason, (TimeoutError, socket.timeout)) else reason
        raise InvalidInput(
            f"the gateway cannot be asked ({said})",
            where=f"--gateway {address.partition('/almanac')[0]}",
            remedy="start it, or check address and key",
        ) from error
