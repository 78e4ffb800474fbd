"""Who is calling: request headers read from LangGraph's own config, without wrapping anything.

A hook on the HTTP client runs inside the context of the node that makes the call, so LangGraph's
config says which node, which super-step and which task it is: in parallel branches, `Send`,
``Command``, sub-graphs, tools, threads, async code and streams. Outside a graph the hook adds
nothing.

========================= ======================================================================
header                    value
========================= ======================================================================
``x-almanac-run-id``      one execution of the workflow
``x-almanac-workflow``    content hash of the workflow graph
``x-almanac-node``        path of the node; ``outer|inner`` inside a sub-graph
``x-almanac-site``        call site, ``<node path>#<n>``
``x-almanac-step``        super-step of the graph the node belongs to
``x-almanac-visit``       how often this run entered the node before, from 0
``x-almanac-attempt``     tries before this one, by LangGraph's retry policy and by the client
``x-session-id``          runs that share history; LangGraph's ``thread_id`` unless given
``x-almanac-deadline-s``  declared hard limit of the call, seconds after the start of the run
``x-almanac-priority``    declared priority of the call or its run: a class, or a number; a
                          higher one is more urgent
========================= ======================================================================

Values are ASCII: other characters, control characters and ``%`` are percent-encoded as UTF-8. A
header that the caller has set itself is left alone.
"""

from __future__ import annotations

import logging
import string
import sys
from collections.abc import Callable, Mapping, MutableMapping
from types import ModuleType
from typing import Any, Protocol
from urllib.parse import quote

from langchain_core.runnables.config import var_child_runnable_config
from langgraph.runtime import get_runtime

from runtime.langgraph.tracker import node_path, tracker_of

__all__ = [
    "aclose_clients",
    "async_request_hook",
    "identity_headers",
    "openai_client_kwargs",
    "request_hook",
]

_log = logging.getLogger(__name__)

_PLAIN = "".join(sorted(set(string.printable) - set(string.whitespace) - {"%"})) + " "


class _Request(Protocol):
    @property
    def headers(self) -> MutableMapping[str, str]: ...


def identity_headers(*, client_retries: int = 0) -> dict[str, str]:
    """Return the headers for a request made at this point of the program.

    Parameters
    ----------
    client_retries
        How often the HTTP client has tried this request before.

    Returns
    -------
    dict
        Header name to value; empty outside a LangGraph node.
    """
    config: Mapping[str, Any] = var_child_runnable_config.get() or {}
    metadata = config.get("metadata") or {}
    namespace = metadata.get("langgraph_checkpoint_ns")
    if namespace is None:
        return {}
    info = getattr(_runtime(), "execution_info", None)
    attempt = getattr(info, "node_attempt", 1) - 1 + client_retries
    tracker = tracker_of(config)
    headers: dict[str, Any] = {
        "x-almanac-step": metadata.get("langgraph_step"),
        "x-almanac-attempt": attempt,
    }
    if tracker is None:  # a graph that is not instrumented: what LangGraph itself knows
        path = node_path(namespace)
        headers |= {
            "x-almanac-run-id": getattr(info, "run_id", None),
            "x-almanac-node": path,
            "x-almanac-site": f"{path}#0",
            "x-session-id": (config.get("configurable") or {}).get("thread_id"),
        }
    else:
        site = tracker.site(namespace, attempt - client_retries, repeated=client_retries > 0)
        headers |= {
            "x-almanac-run-id": tracker.run_id,
            "x-almanac-workflow": tracker.workflow_hash or None,
            "x-almanac-node": tracker.path(namespace),
            "x-almanac-site": site,
            "x-almanac-visit": tracker.visit(namespace),
            "x-session-id": tracker.session_id,
            "x-almanac-deadline-s": tracker.deadline_of(site),
            "x-almanac-priority": tracker.priority_of(site),
        }
    return {name: _ascii(str(value)) for name, value in headers.items() if value is not None}


def request_hook(request: _Request) -> None:
    """Add the identity of the calling node to a request; for ``httpx.Client(event_hooks=...)``.

    Never raises: a request without identity is better than none.
    """
    try:
        headers = request.headers
        retries = headers.get("x-stainless-retry-count", "")
        for name, value in identity_headers(
            client_retries=int(retries) if retries.isdecimal() else 0
        ).items():
            if name not in headers:
                headers[name] = value
    except Exception:  # noqa: BLE001 the application comes first
        _log.debug("no identity for a request", exc_info=True)


async def async_request_hook(request: _Request) -> None:
    """Add the identity of the calling node; for ``httpx.AsyncClient(event_hooks=...)``."""
    request_hook(request)


def openai_client_kwargs(
    gateway_headers: bool = True,
    *,
    transports: Callable[[ModuleType], tuple[Any, Any]] | None = None,
) -> dict[str, Any]:
    """Return ``http_client`` and ``http_async_client`` for ``ChatOpenAI``, with the hooks set.

    The clients are those the installed OpenAI package prefers, with its time-outs, and without a
    limit on connections: the gateway does the queueing. Share them between models.

    Parameters
    ----------
    gateway_headers
        False returns nothing, so that a switch in the caller's settings can turn this off.
    transports
        Makes a sync and an async transport of the HTTP library given, to be used in place of the
        network; None for the network.

    Raises
    ------
    ImportError
        If the ``openai`` package is not installed.
    """
    if not gateway_headers:
        return {}
    import openai

    # openai < 3 is built on httpx, openai >= 3 on httpx2, which has the same interface.
    library = sys.modules[openai.DefaultHttpxClient.__mro__[1].__module__.partition(".")[0]]
    limits = library.Limits(max_connections=None, max_keepalive_connections=None)
    sync, asynchronous = (None, None) if transports is None else transports(library)
    return {
        "http_client": openai.DefaultHttpxClient(
            limits=limits, transport=sync, event_hooks={"request": [request_hook]}
        ),
        "http_async_client": openai.DefaultAsyncHttpxClient(
            limits=limits,
            transport=asynchronous,
            event_hooks={"request": [async_request_hook]},
        ),
    }


async def aclose_clients(clients: Mapping[str, Any]) -> None:
    """Close the HTTP clients that `openai_client_kwargs` made."""
    if clients:
        clients["http_client"].close()
        await clients["http_async_client"].aclose()


def _ascii(value: str) -> str:
    encoded = quote(value, safe=_PLAIN)
    # HTTP forbids a value that starts or ends with a space.
    return encoded if encoded == encoded.strip() else encoded.replace(" ", "%20")


def _runtime() -> Any:
    try:
        return get_runtime()
    except (KeyError, RuntimeError):
        return None
