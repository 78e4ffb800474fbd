"""The engines of a fleet and the links between them, on one clock.

Each engine and the links say when they must next be advanced. The driver takes the soonest with
`Cluster.next_event_s`, advances it, and reads what happened; so engines that have nothing to tell
cost nothing. Whatever it does to one of them happens between those instants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence

import numpy as np

from planner.domain.errors import InvalidInput
from planner.domain.fleet import Fleet
from planner.sim.blockpool import Eviction
from planner.sim.engine import Engine, EngineConfig, EngineEvent
from planner.sim.steptime import RowStepTime, standard_normals
from planner.sim.transfer import Links

__all__ = ["Cluster"]


class Cluster:
    """Engines by endpoint index, with links to the others and to host memory.

    Parameters
    ----------
    fleet
        Its endpoints.
    rng, noise_cv
        Step-time noise; each engine has its own stream.
    eviction
        Makes the eviction order of one engine, or None for vLLM's.
    """

    def __init__(
        self,
        fleet: Fleet,
        rng: np.random.Generator,
        noise_cv: float,
        eviction: Callable[[], Eviction] | None = None,
    ) -> None:
        self.fleet = fleet
        self._normals = [standard_normals(own) for own in rng.spawn(len(fleet.endpoints))]
        self._noise_cv = noise_cv
        self._eviction = eviction
        # The draws of an engine go on after a restart.
        self.engines = [self._engine(index) for index in range(len(fleet.endpoints))]
        self.up = [True] * len(self.engines)
        self._factors: list[dict[Hashable, float]] = [{} for _ in self.engines]
        # Each rank moves its share of the KV over its own link.
        bandwidth: dict[Hashable, float] = {}
        for index, endpoint in enumerate(fleet.endpoints):
            bandwidth["out", index] = bandwidth["in", index] = (
                endpoint.link_gb_s * 1e9 * endpoint.tp
            )
            bandwidth["pcie", index] = endpoint.pcie_gb_s * 1e9 * endpoint.tp
        self._links = Links(bandwidth)
        self._arrived: dict[str, Callable[[float], None]] = {}
        self._changed: list[int] = []
        self._due = [math.inf] * (len(self.engines) + 1)  # the links come last

    def _engine(self, index: int) -> Engine:
        endpoint = self.fleet.endpoints[index]
        return Engine(
            EngineConfig.from_endpoint(endpoint),
            RowStepTime(endpoint.latency),
            normals=self._normals[index],
            noise_cv=self._noise_cv,
            eviction=self._eviction() if self._eviction else None,
        )

    # -- clock --------------------------------------------------------------------------------

    def next_event_s(self) -> float:
        """Return when something must next be advanced; inf if nothing is under way."""
        for index in self._changed:
            self._due[index] = self.engines[index].next_event_s() if self.up[index] else math.inf
        self._changed.clear()
        return min(self._due)

    def advance(self, now_s: float, sink: Callable[[EngineEvent], None]) -> None:
        """Advance what is due at ``now_s`` = `next_event_s`: one engine, or the links."""
        index = self._due.index(now_s)
        if index < len(self.engines):
            self._changed.append(index)
            for event in self.engines[index].advance(now_s):
                sink(event)
        else:
            ended = self._links.advance(now_s)
            self._due[-1] = self._links.next_event_s()
            for name in ended:
                self._arrived.pop(name)(now_s)

    # -- engines ------------------------------------------------------------------------------

    def engine(self, index: int) -> Engine:
        """Return an engine to do something to; when it is next due is looked up afterwards."""
        self._changed.append(index)
        return self.engines[index]

    def set_factor(self, index: int, source: Hashable, factor: float, now_s: float) -> None:
        """Let step times be ``factor`` times longer because of ``source``; sources multiply."""
        self._factors[index][source] = factor
        engine = self.engine(index)
        # Nothing ends before its next event, which lies at or after ``now_s``.
        engine.advance(now_s)
        engine.scale = math.prod(self._factors[index].values())

    def crash(self, index: int) -> None:
        """Lose an engine with all it holds."""
        self.up[index] = False
        self._changed.append(index)

    def restart(self, index: int, now_s: float) -> None:
        """Put a cold engine in place of a lost one."""
        self.up[index] = True
        self.engines[index] = self._engine(index)
        self.set_factor(index, "restart", 1.0, now_s)

    # -- links --------------------------------------------------------------------------------

    def move(
        self,
        name: str,
        links: Sequence[Hashable],
        tokens: int,
        source: int,
        now_s: float,
        arrived: Callable[[float], None],
    ) -> None:
        """Start to move the KV of ``tokens`` of an endpoint's model; ``arrived`` is called then.

        Raises
        ------
        InvalidInput
            If the fleet does not say how large it is.
        """
        endpoint = self.fleet.endpoints[source]
        if endpoint.kv_bytes_per_token is None:
            raise InvalidInput(
                f"the KV size of model {endpoint.model!r} is unknown, so it cannot be moved",
                where=f"endpoint {endpoint.id!r}: kv_bytes_per_token",
                remedy="give it in the fleet file",
            )
        blocks = -(-tokens // endpoint.block_tokens)
        size_bytes = blocks * endpoint.block_tokens * endpoint.kv_bytes_per_token
        self._links.start(name, links, size_bytes, now_s)
        self._arrived[name] = arrived
        self._due[-1] = self._links.next_event_s()

    def stop(self, name: str, now_s: float) -> bool:
        """Stop a move; False if it is not under way."""
        if not self._links.cancel(name, now_s):
            return False
        del self._arrived[name]
        self._due[-1] = self._links.next_event_s()
        return True
