"""Orders of waiting calls: by call, by run, by laxity, by attained service.

All five share the queue, the rules of room and the placement of `QueuedPolicy`; they differ in
the key alone.
"""

from __future__ import annotations

from bisect import bisect_right

from planner.dispatch.events import Call
from planner.dispatch.policies.base import Choice, Ready, Wait
from planner.dispatch.policies.outlook import Outlook
from planner.dispatch.policies.queued import QueuedPolicy

__all__ = [
    "Atlas",
    "FirstComeCall",
    "FirstComeWorkflow",
    "LeastAttainedService",
    "LeastLaxity",
    "Plas",
]


class FirstComeCall(QueuedPolicy):
    """Calls in the order in which they became ready: what engines do with each call alone."""

    name = "fcfs_call"

    def key(self, call: Call, now_s: float) -> float:  # noqa: ARG002 - it does not age
        """Return when the call became ready."""
        return call.ready_s


class FirstComeWorkflow(QueuedPolicy):
    """The calls of older runs first; within a run, in the order in which they became ready."""

    name = "fcfs_workflow"

    def key(self, call: Call, now_s: float) -> tuple[float, float]:  # noqa: ARG002 - it does not age
        """Return the arrival of the run, then of the call."""
        return call.run_arrival_s, call.ready_s


class LeastLaxity(QueuedPolicy):
    """The run first that can least afford to wait: deadline less now less what is left to do.

    A run without a deadline gets ``scale`` times what its graph promises on an idle fleet, from
    its arrival. What is left comes from the graph too. Now is the same for all that wait, so the
    key is deadline less what is left.

    Parameters
    ----------
    scale
        Target of a run without a deadline, in standalone times, > 0.

    Notes
    -----
    Reconstruction. HexAGenT compares with a least-laxity order "per workflow" whose targets and
    estimate of the rest are not known to us.

    References
    ----------
    HexAGenT (arXiv 2605.16637), baselines; Mok, Fundamental design problems of distributed systems
    for the hard real-time environment, 1983 (least laxity).
    """

    name = "llf_workflow"

    def __init__(self, *, scale: float = 3.0) -> None:
        super().__init__()
        self.scale = scale
        self._outlook: Outlook | None = None

    def key(self, call: Call, now_s: float) -> float:  # noqa: ARG002 - laxity falls alike for all
        """Return the latest instant at which the call could begin."""
        if self._outlook is None:
            return call.run_arrival_s
        left_s = self._outlook.ahead(call).remaining_s
        whole_s = self._outlook.whole_s(call.workflow_hash)
        target_s = call.deadline_s
        if target_s is None:
            if whole_s is None:
                whole_s = self.runs.of(call).path_before(call) + left_s
            target_s = self.scale * whole_s
        return call.run_arrival_s + target_s - left_s

    def choose(self, ready: Ready) -> Choice | Wait:
        """Return where the offered call goes now."""
        if self._outlook is None:
            self._outlook = Outlook(ready.fleet, ready.forecaster)
        return super().choose(ready)


class LeastAttainedService(QueuedPolicy):
    """The run first that has been served least so far, all its calls added up.

    References
    ----------
    Nuyens, Wierman, The foreground-background queue: a survey, Performance Evaluation 2008.
    """

    name = "las"

    def key(self, call: Call, now_s: float) -> tuple[float, float]:  # noqa: ARG002 - it does not age
        """Return the service the run has attained, then its arrival."""
        return self.runs.of(call).attained_s, call.run_arrival_s


class Plas(QueuedPolicy):
    """Autellix for single-threaded programs: attained service in queues, with anti-starvation.

    A call starts in the queue whose limit its program's attained service has not reached; limits
    double. Within a queue the first to come is served first. A run that has waited ``beta`` times
    as long as it was served goes to the first queue.

    Parameters
    ----------
    quantum_s
        Service up to which a run stays in the first queue, s, > 0.
    queues
        How many, >= 1.
    beta
        Ratio of waiting to service that lifts a run into the first queue, > 0.

    Notes
    -----
    Deviations: a call is not demoted or preempted while it runs, since the router cannot take it
    back; a program's threads run where they finish first, not by Autellix's locality rule. The
    number of queues and the limits are ours.

    References
    ----------
    Autellix (arXiv 2502.13965), section 4.2: PLAS, anti-starvation.
    """

    name = "plas"

    def __init__(self, *, quantum_s: float = 2.0, queues: float = 8, beta: float = 10.0) -> None:
        super().__init__()
        self.beta = beta
        self._limits = [quantum_s * 2.0**level for level in range(int(queues) - 1)]

    def attained_s(self, call: Call) -> float:
        """Return the service that counts for a call, s."""
        return self.runs.of(call).attained_s

    def key(self, call: Call, now_s: float) -> tuple[int, float]:
        """Return the queue, then the call's arrival in it."""
        run = self.runs.of(call)
        waited_s = run.waited_s + now_s - call.ready_s
        if waited_s >= self.beta * max(run.attained_s, self._limits[0] if self._limits else 1.0):
            return 0, call.ready_s
        return bisect_right(self._limits, self.attained_s(call)), call.ready_s


class Atlas(Plas):
    """Autellix for multi-threaded programs: service along the longest chain that leads to a call.

    A call's attained service is the largest, over the calls that made it ready, of theirs plus
    their own time; threads that run beside each other do not count twice.

    References
    ----------
    Autellix (arXiv 2502.13965), section 4.2: ATLAS.
    """

    name = "atlas"

    def attained_s(self, call: Call) -> float:
        """Return the service on the longest chain of calls that leads to this one, s."""
        return self.runs.of(call).path_before(call)
