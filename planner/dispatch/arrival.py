"""How long a run will take, said when it arrives: a table per workflow, looked up in microseconds.

`planner.dispatch.remaining` needs milliseconds, too many for the path of a call. Its answer at the
start of a run depends on the fleet's load alone, so it is worked out once per workflow for a
ladder of loads and interpolated at arrival. What the ladder does not know (caches, loads to come,
endpoints that drift) is the business of a correction by the runs that end.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

from planner.dispatch.remaining import EndpointLoad, Progress, fleet_service, remaining_s
from planner.domain.fleet import Fleet
from planner.domain.run import RunSpec

__all__ = ["ArrivalForecast"]

LADDER = (0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0)
"""Calls in flight per endpoint; the ladder ends at twice the slots of the largest endpoint."""


class ArrivalForecast:
    """Median seconds of a whole run, by calls in flight per endpoint at its arrival.

    Parameters
    ----------
    runs
        Sampled runs of the workflow (`planner.graph.sampling.scenarios`), at least one; a few
        tens.
    fleet
        The endpoints; all are taken as equally loaded, and as serving every call.

    Raises
    ------
    ValueError
        If ``runs`` is empty.
    """

    def __init__(self, runs: Sequence[RunSpec], fleet: Fleet) -> None:
        most = 2.0 * max(endpoint.max_num_seqs for endpoint in fleet.endpoints)
        self._levels = tuple(level for level in LADDER if level <= most)
        contexts = [
            task.prompt_tokens + task.output_tokens / 2
            for run in runs
            for task in run.tasks
            if task.kind == "llm"
        ]
        context = sum(contexts) / len(contexts) if contexts else 0.0
        self._seconds = tuple(
            remaining_s(
                runs,
                fleet_service(
                    [
                        EndpointLoad(
                            row=endpoint.latency,
                            calls=level,
                            kv_tokens=level * context,
                            slots=endpoint.max_num_seqs,
                        )
                        for endpoint in fleet.endpoints
                    ]
                ),
                Progress(),
            ).at(0.5)
            for level in self._levels
        )

    def at(self, calls: float) -> float:
        """Return median seconds with ``calls`` >= 0 in flight per endpoint."""
        place = bisect_right(self._levels, calls)
        if place == len(self._levels):
            return self._seconds[-1]
        low, high = self._levels[place - 1], self._levels[place]
        share = (calls - low) / (high - low)
        return (1 - share) * self._seconds[place - 1] + share * self._seconds[place]
