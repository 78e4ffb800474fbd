"""How long a silent run may still come back, so that one that never says goodbye ends soon.

Most agents never announce their end. What is known of a run tells how long silence may last:

1. a tool is under way: twice the 0.95 quantile of its delay, from when it started;
2. its workflow has no call after what it did last, or none of the sampled runs did: a few
   seconds;
3. runs of its kind have paused at this place before: three times the 0.95 quantile of the pauses;
4. tools lie before the next call or the end: twice the 0.95 quantiles of their delays, added up;
5. otherwise the default.

A run that comes back after all starts anew: nothing fails by a wrong guess.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence

from planner.domain.estimates import EstimateTable
from planner.domain.ids import NodeId
from planner.domain.run import RunSpec
from planner.domain.workflow import END, Workflow
from runtime.runs import Run

__all__ = ["EndForecast"]

_LEVEL = 0.95
_TOOL_FACTOR, _PAUSE_FACTOR = 2.0, 3.0
_LEAST_PAUSES, _MOST_PAUSES = 20, 128
_PLACES = 4096
"""Places whose pauses are kept; clients name them, so their number is bounded."""
_RARE = 0.02
"""Share of sampled runs with a further call below which a run counts as over."""

_Place = tuple[str, str]


class EndForecast:
    """Says how long a run may stay silent.

    Parameters
    ----------
    estimates
        Delays of tools.
    """

    def __init__(self, estimates: EstimateTable) -> None:
        self._estimates = estimates
        self._workflows: dict[str, Workflow] = {}
        self._more: dict[tuple[str, str, int], float] = {}
        self._visits: dict[_Place, int] = {}
        self._pauses: OrderedDict[_Place, deque[float]] = OrderedDict()

    def add_workflow(self, workflow: Workflow, runs: Sequence[RunSpec]) -> None:
        """Learn a graph; ``runs`` are sampled of it and say after which visit calls still come."""
        key = workflow.content_hash
        self._workflows[key] = workflow
        seen: dict[tuple[str, int], list[bool]] = {}
        for run in runs:
            calls = [task.index for task in run.tasks if task.kind == "llm"]
            last = calls[-1] if calls else -1
            for task in run.tasks:
                seen.setdefault((task.node, task.visit), []).append(task.index < last)
        for (node, visit), more in seen.items():
            self._more[key, node, visit] = sum(more) / len(more)
            place = (key, node)
            self._visits[place] = max(visit, self._visits.get(place, 0))

    def paused(self, run: Run, pause_s: float) -> None:
        """Learn how long a run was silent between two calls."""
        place = _place(run)
        pauses = self._pauses.get(place)
        if pauses is None:
            pauses = self._pauses[place] = deque(maxlen=_MOST_PAUSES)
            if len(self._pauses) > _PLACES:
                self._pauses.popitem(last=False)
        self._pauses.move_to_end(place)
        pauses.append(pause_s)

    def patience_s(self, run: Run, *, idle_s: float, done_s: float) -> float:
        """Return how long the run may be silent before it counts as ended, clock seconds.

        Parameters
        ----------
        idle_s
            Where nothing is known; also the most.
        done_s
            Where the run is over by all that is known; also the least.
        """
        return min(idle_s, max(done_s, self._patience_s(run, idle_s, done_s)))

    def _patience_s(self, run: Run, idle_s: float, done_s: float) -> float:
        if run.tools:
            delays = [self._delay_s(run.workflow_hash, node) for node, _ in run.tools]
            known = [delay_s for delay_s in delays if delay_s is not None]
            if len(known) < len(delays):
                return idle_s
            return max(known) * _TOOL_FACTOR
        ahead = self._ahead(run)
        if ahead is not None and self._over(run, ahead):
            return done_s
        pauses = self._pauses.get(_place(run))
        if pauses is not None and len(pauses) >= _LEAST_PAUSES:
            return sorted(pauses)[int(_LEVEL * len(pauses))] * _PAUSE_FACTOR
        if ahead is not None and ahead.delays_s:
            return done_s + ahead.delays_s * _TOOL_FACTOR
        return idle_s

    def _over(self, run: Run, ahead: _Ahead) -> bool:
        if not ahead.calls:
            # Only tools are left, if anything; how long they take decides.
            return not ahead.delays_s and ahead.delays_s is not None
        most = self._visits.get((run.workflow_hash, run.node))
        visit = run.visit if most is None else min(run.visit, most)
        return self._more.get((run.workflow_hash, run.node, visit), 1.0) < _RARE

    def _ahead(self, run: Run) -> _Ahead | None:
        """Return what may follow the node the run was in last; None if that is not known."""
        workflow = self._workflows.get(run.workflow_hash)
        start = NodeId(run.node)
        if workflow is None or start not in workflow.successors:
            return None
        nodes = {node.id: node for node in workflow.nodes}
        ahead = _Ahead()
        # Which of its calls was the last one is not known.
        ahead.calls = len(nodes[start].call_sites) > 1 if start in nodes else True
        open_ended = {branch.source for branch in workflow.branches if not branch.exhaustive}
        waiting, seen = [start], {start}
        while waiting:
            node = waiting.pop()
            if node in open_ended:
                return None
            for after in workflow.successors.get(node, ()):
                if after == END or after in seen:
                    # A loop back to the node itself brings its call again.
                    ahead.calls |= after == start and nodes[after].kind == "llm"
                    continue
                seen.add(after)
                kind = nodes[after].kind
                if kind in ("llm", "subgraph"):
                    ahead.calls = True
                    continue
                if kind in ("tool", "code"):
                    ahead.add(self._delay_s(run.workflow_hash, after))
                waiting.append(after)
        return ahead

    def _delay_s(self, workflow_hash: str, node: str) -> float | None:
        """Return the 0.95 quantile of a tool's delay, None if nothing is known of it."""
        delay = self._estimates.tool(workflow_hash, node)
        return None if delay.provenance == "prior" else delay.at(_LEVEL)


class _Ahead:
    """What lies between a node and the next calls.

    Attributes
    ----------
    calls
        Whether a call may follow.
    delays_s
        Seconds of all tools on the way, None where one is unknown.
    """

    __slots__ = ("calls", "delays_s")

    def __init__(self) -> None:
        self.calls = False
        self.delays_s: float | None = 0.0

    def add(self, delay_s: float | None) -> None:
        both = delay_s is not None and self.delays_s is not None
        self.delays_s = self.delays_s + delay_s if both else None  # type: ignore[operator]


def _place(run: Run) -> _Place:
    return (run.workflow_hash, run.node) if run.workflow_hash else ("", run.source)
