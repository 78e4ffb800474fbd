"""`instrument`: give every run of a compiled graph an identity and report its lifecycle.

The instrumented graph is a copy of the same type with two methods extended, ``stream`` and
``astream``; LangGraph builds everything else (``invoke``, ``batch``, events) on those. The original
is left as it was. A graph that runs inside an instrumented run, as a sub-graph or by hand, takes
part in that run.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import functools
import logging
import uuid
from collections.abc import AsyncIterator, Iterator, Mapping
from typing import Any, Protocol, TypeVar, cast

from langchain_core.callbacks import BaseCallbackManager
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config
from langgraph.errors import GraphDrained
from langgraph.pregel import Pregel

from runtime.langgraph.declare import CallDeclaration
from runtime.langgraph.ir import content_hash, declared_sites, workflow_ir
from runtime.langgraph.reporter import Reporter
from runtime.langgraph.resume import Resumption, aresumption, persists, resumption
from runtime.langgraph.settings import keys_of, settings_of
from runtime.langgraph.tracker import RunTracker, Shape, tracker_of

__all__ = ["Instrumentation", "instrument"]

_log = logging.getLogger(__name__)

G = TypeVar("G")


class Listener(Protocol):
    """Takes what is known of workflows and runs; must neither block nor raise."""

    def register(self, ir: Mapping[str, Any]) -> None:
        """Take a workflow graph."""
        ...

    def emit(self, event: Mapping[str, Any]) -> None:
        """Take one lifecycle event."""
        ...


class Instrumentation:
    """What `instrument` learned about a graph, and the way to the gateway.

    Attributes
    ----------
    ir
        The workflow graph as JSON, or None if it could not be read.
    workflow, workflow_hash
        Its name and content hash; both empty without a graph.
    reporter
        Takes the workflow graph and lifecycle events, or None without a gateway.
    """

    def __init__(
        self,
        ir: Mapping[str, Any] | None,
        reporter: Listener | None,
        declared: Mapping[str, CallDeclaration] | None = None,
    ) -> None:
        self.ir = ir
        self.workflow = "" if ir is None else str(ir["name"])
        self.workflow_hash = "" if ir is None else content_hash(ir)
        self.reporter = reporter
        self._shape = Shape(ir, declared)
        if reporter is not None and ir is not None:
            reporter.register(ir)

    def begin(
        self, *configs: Mapping[str, Any] | None, goes_on: Resumption | None = None
    ) -> RunTracker:
        """Return the identity of a run that starts or goes on.

        Parameters
        ----------
        configs
            LangChain configs, the later ones winning.
        goes_on
            The run that is resumed, or None for a new one.
        """
        ambient = var_child_runnable_config.get()
        given: dict[str, Any] = {}
        run_id = None
        for config in filter(None, configs):
            given |= config.get("configurable") or {}
            run_id = config.get("run_id") or run_id
        inherited = (ambient or {}).get("configurable") or {}
        settings = settings_of(given)
        if goes_on is not None:
            saved = settings_of(goes_on.saved)
            settings = {
                name: saved[name] if value is None else value for name, value in settings.items()
            }
        tracker = RunTracker(
            run_id=str(settings["run_id"] or run_id or uuid.uuid4().hex),
            session_id=settings["session_id"] or given.get("thread_id"),
            deadline_s=settings["deadline_s"],
            priority=settings["priority"],
            workflow=self.workflow,
            workflow_hash=self.workflow_hash,
            shape=self._shape,
            root=str(given.get("checkpoint_ns") or inherited.get("checkpoint_ns") or ""),
            visits=None if goes_on is None else goes_on.visits,
            emit=None if self.reporter is None else self.reporter.emit,
        )
        tracker.event("run_start", **({} if goes_on is None else {"resumed": True}))
        return tracker

    def close(self) -> None:
        """Send what is still queued and stop the background sender."""
        if isinstance(self.reporter, Reporter):  # any other listener belongs to its maker
            self.reporter.close()

    async def aclose(self) -> None:
        """`close` without blocking the event loop."""
        if isinstance(self.reporter, Reporter):
            await self.reporter.aclose()


def instrument(
    compiled_graph: G,
    *,
    workflow: str | None = None,
    gateway: str | Listener | None = None,
    api_key: str | None = None,
) -> G:
    """Return a compiled graph whose runs carry an identity; use it in place of the original.

    Parameters
    ----------
    compiled_graph
        What ``StateGraph(...).compile()`` returned.
    workflow
        Name of the workflow; the compiled graph's own if None.
    gateway
        Address of the Almanac gateway, to which the workflow graph and lifecycle events go in the
        background; or the router of this process that ``almanac.embed`` returned. None sends
        nothing; requests still carry their identity.
    api_key
        Key for a gateway that asks for one: the same as the chat model's.

    Returns
    -------
    CompiledStateGraph
        Of the same type, with ``close``, ``aclose`` and the attribute ``almanac``, the
        `Instrumentation`. Anything that is not a LangGraph is returned as it is, with a warning.

    Raises
    ------
    TypeError
        If the graph has not been compiled, or the gateway is neither address nor router.
    ValueError
        If the gateway is not an http address or a declaration names an unknown outcome.
    """
    if not isinstance(compiled_graph, Pregel):
        if hasattr(compiled_graph, "compile") and not hasattr(compiled_graph, "invoke"):
            raise TypeError(
                f"{type(compiled_graph).__name__} has not been compiled; call .compile() first"
            )
        _log.warning(
            "not a LangGraph, left as it is", extra={"type": type(compiled_graph).__name__}
        )
        return compiled_graph
    if not (gateway is None or isinstance(gateway, str) or hasattr(gateway, "emit")):
        raise TypeError(f"gateway={gateway!r:.80}: give http://host:port or an embedded router")
    try:
        ir = workflow_ir(compiled_graph, workflow)
    except TypeError as error:
        _log.warning("workflow graph not read", extra={"error": str(error)})
        ir = None
    kind = type(compiled_graph)
    kind = kind if issubclass(kind, _Instrumented) else _instrumented_type(kind)
    graph = kind.__new__(kind)
    # A shallow copy: nodes and channels are templates, which a run does not change.
    vars(graph).update(vars(compiled_graph))
    reporter = Reporter(gateway, api_key=api_key) if isinstance(gateway, str) else gateway
    declared = None if ir is None else declared_sites(compiled_graph)
    cast("_Instrumented", graph).almanac = Instrumentation(ir, reporter, declared)
    return cast("G", graph)


class _Instrumented:
    """Mixed into the type of an instrumented graph."""

    almanac: Instrumentation

    def close(self) -> None:
        """Send what is still queued for the gateway and stop sending; runs go on as before."""
        self.almanac.close()

    async def aclose(self) -> None:
        """`close` without blocking the event loop."""
        await self.almanac.aclose()

    def copy(self, update: dict[str, Any] | None = None) -> Any:
        """Return a copy that is instrumented too (``with_config`` makes one)."""
        clone = copy.copy(self)
        vars(clone).update(update or {})
        return clone

    def stream(
        self,
        input: Any,  # noqa: A002 LangGraph's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> Iterator[Any]:
        """Run the graph and yield its output; see LangGraph."""
        graph = cast("Any", super())
        configs = (getattr(self, "config", None), config)
        if _inside_a_run(*configs):
            yield from graph.stream(input, config, **kwargs)
            return
        goes_on = resumption(self, input, *configs)
        tracker = self.almanac.begin(*configs, goes_on=goes_on)
        with _lifecycle(tracker):
            config = _with(config, tracker, saved=persists(self))
            yield from graph.stream(input, config, **kwargs)

    async def astream(
        self,
        input: Any,  # noqa: A002 LangGraph's name
        config: RunnableConfig | None = None,
        **kwargs: Any,
    ) -> AsyncIterator[Any]:
        """Run the graph and yield its output; see LangGraph."""
        graph = cast("Any", super())
        configs = (getattr(self, "config", None), config)
        tracker = None
        if not _inside_a_run(*configs):
            goes_on = await aresumption(self, input, *configs)
            tracker = self.almanac.begin(*configs, goes_on=goes_on)
            config = _with(config, tracker, saved=persists(self))
        with _lifecycle(tracker):
            # A consumer that stops early must stop the run, and not when garbage is collected.
            async with contextlib.aclosing(graph.astream(input, config, **kwargs)) as chunks:
                async for chunk in chunks:
                    yield chunk


@functools.cache
def _instrumented_type(base: type) -> type:
    return type(f"Instrumented{base.__name__}", (_Instrumented, base), {"__doc__": base.__doc__})


def _inside_a_run(*configs: Mapping[str, Any] | None) -> bool:
    return any(tracker_of(config) for config in (var_child_runnable_config.get(), *configs))


def _with(config: RunnableConfig | None, tracker: RunTracker, *, saved: bool) -> RunnableConfig:
    # Not LangChain's merge: that would mix the surrounding config into the explicit one.
    callbacks: Any = (config or {}).get("callbacks")
    if isinstance(callbacks, BaseCallbackManager):
        callbacks = callbacks.copy()
        callbacks.add_handler(tracker, inherit=True)
    else:
        callbacks = [*(callbacks or ()), tracker]
    changed: dict[str, Any] = {**(config or {}), "callbacks": callbacks}
    if saved:  # what resumes the run reads its identity from the checkpoint
        known = changed.get("metadata") or (var_child_runnable_config.get() or {}).get("metadata")
        changed["metadata"] = {
            **(known or {}),
            **keys_of(
                run_id=tracker.run_id,
                session_id=tracker.session_id,
                deadline_s=tracker.deadline_s,
                priority=tracker.priority,
            ),
        }
    return cast("RunnableConfig", changed)


@contextlib.contextmanager
def _lifecycle(tracker: RunTracker | None) -> Iterator[None]:
    if tracker is None:
        yield
        return
    status = "failed"
    try:
        yield
        status = "interrupted" if tracker.interrupted else "ok"
    except (GeneratorExit, asyncio.CancelledError, KeyboardInterrupt, GraphDrained):
        status = "cancelled"
        raise
    finally:
        tracker.event("run_end", status=status)
