"""Almanac for agent applications: one import, one line.

::

    import almanac

    chat = ChatOpenAI(base_url="http://localhost:8000/v1", model="llama-3.1-8b",
                      **almanac.openai_client_kwargs())        # adds identity headers
    app = almanac.instrument(graph.compile(), workflow="research",
                             gateway="http://localhost:8000")  # structure, identity, lifecycle
    await app.ainvoke(inputs, config=almanac.run(session_id=chat_id, deadline_s=20))

Optional declarations refine what is otherwise learned from runs::

    @almanac.llm_call(static_prefix=PROMPT, expected_output_tokens=8)
    async def triage(state): ...

    @almanac.tool_call(expected_latency_s=0.8)
    async def search(query): ...

    @almanac.branch(outcomes=["quick", {"legal", "market"}])
    def route(state): ...

Without a gateway, the router runs in this process and requests go straight to the endpoints::

    with almanac.embed("fleet.yaml", policy="least_expected_finish") as router:
        chat = ChatOpenAI(model="llama-3.1-8b", **router.openai_client_kwargs())
        app = almanac.instrument(graph.compile(), gateway=router)

What to expect of a fleet, and of the same after changes::

    almanac.whatif("fleet.yaml", "workflow.json", "estimates.json", rate=1.0,
                   changes=["+1xh100", "load 1.5"], target="p95=20")

Importing this module loads nothing; each name is loaded on first use.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from planner.whatif.facade import (
        Effort,
        cheapest_fleet,
        diff,
        marginal_values,
        question,
        regret,
        whatif,
        whatif_grid,
        why_not,
    )
    from runtime.embedded import embed
    from runtime.langgraph.declare import branch, llm_call, tool_call
    from runtime.langgraph.identity import openai_client_kwargs, request_hook
    from runtime.langgraph.instrument import instrument
    from runtime.langgraph.ir import workflow_ir
    from runtime.langgraph.settings import run

__all__ = [
    "Effort",
    "branch",
    "cheapest_fleet",
    "diff",
    "embed",
    "instrument",
    "llm_call",
    "marginal_values",
    "openai_client_kwargs",
    "question",
    "regret",
    "request_hook",
    "run",
    "tool_call",
    "whatif",
    "whatif_grid",
    "why_not",
    "workflow_ir",
]

_HOME = {
    "branch": "runtime.langgraph.declare",
    "embed": "runtime.embedded",
    "instrument": "runtime.langgraph.instrument",
    "llm_call": "runtime.langgraph.declare",
    "openai_client_kwargs": "runtime.langgraph.identity",
    "request_hook": "runtime.langgraph.identity",
    "run": "runtime.langgraph.settings",
    "tool_call": "runtime.langgraph.declare",
    "workflow_ir": "runtime.langgraph.ir",
}
_WHAT_IF = (
    "Effort", "cheapest_fleet", "diff", "marginal_values", "question", "regret", "whatif",
    "whatif_grid", "why_not",
)  # fmt: skip
_HOME |= dict.fromkeys(_WHAT_IF, "planner.whatif.facade")
_NEEDS_PLANNER = {"embed", *_WHAT_IF}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'almanac' has no attribute {name!r}")
    _refuse_shadow("runtime")
    if name in _NEEDS_PLANNER:
        _refuse_shadow("planner")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


def _refuse_shadow(package: str) -> None:
    """Raise ImportError if a package is not the one beside this file."""
    ours = Path(__file__).resolve().parent / package
    loaded = sys.modules.get(package)
    spec = importlib.util.find_spec(package) if loaded is None else loaded.__spec__
    if spec is None:
        return  # the import that follows says so
    places = [spec.origin] if spec.origin else list(spec.submodule_search_locations or ())
    if not any(Path(place).resolve().is_relative_to(ours) for place in places):
        raise ImportError(
            f"{places[0]} shadows Almanac's package {package!r} ({ours}); rename that module, or "
            "put Almanac's folder before it on sys.path",
            name=package,
            path=str(places[0]),
        )
