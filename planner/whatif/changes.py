"""Changes of a question, each a frozen record whose text is its notation.

How they are written and read: `planner.whatif.notation`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from typing import Protocol

from planner.domain.errors import FleetError, InvalidInput
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId
from planner.domain.memory import GB
from planner.domain.workflow import Node, Workflow
from planner.whatif.hardware import fresh_id, known_kind, on_gpu, pattern, with_model
from planner.whatif.question import Question, Stream

__all__ = [
    "AS_IT_IS",
    "RETENTION_WORDS",
    "AddEndpoints",
    "AddKv",
    "AddSlots",
    "Change",
    "RemoveEndpoints",
    "ScaleLoad",
    "ScaleTenant",
    "Scenario",
    "SetDeadline",
    "SetPolicy",
    "SetRetention",
    "SplitPools",
    "SwapGpu",
    "SwapModel",
]

RETENTION_WORDS = {"on": "pin:300", "off": "drop", "lru": "leave"}
"""Words for what becomes of idle KV -> what the simulator calls it."""


class Change(Protocol):
    """One change of a question; its text is how it is written."""

    def apply(self, question: Question) -> Question:
        """Return the changed question, or raise `InvalidInput` if it does not fit."""
        ...

    def __str__(self) -> str:
        """Return its notation."""
        ...


def _with_endpoints(question: Question, endpoints: list[Endpoint], change: Change) -> Question:
    name = question.fleet.name
    try:
        fleet = Fleet(name=f"{name} {change}", endpoints=tuple(endpoints))
    except FleetError as error:
        raise InvalidInput(
            error.what, where=f"change {str(change)!r}", remedy=error.remedy
        ) from error
    return replace(question, fleet=fleet)


def _endpoint(question: Question, name: str, change: Change) -> Endpoint:
    try:
        return question.fleet.endpoints[question.fleet.index_of(EndpointId(name))]
    except FleetError as error:
        raise InvalidInput(
            error.what, where=f"change {str(change)!r}", remedy=error.remedy
        ) from error


def _swapped(question: Question, name: str, other: Endpoint, change: Change) -> Question:
    endpoints = [other if one.id == name else one for one in question.fleet.endpoints]
    return _with_endpoints(question, endpoints, change)


@dataclass(frozen=True, slots=True, kw_only=True)
class AddEndpoints:
    """``count`` (>= 1) more endpoints of a kind: an id or GPU of the fleet, or a GPU."""

    count: int
    kind: str

    def apply(self, question: Question) -> Question:
        """Append them, each with an id of its own and no address."""
        made = known_kind(question.fleet, self.kind)
        endpoints = list(question.fleet.endpoints)
        for _ in range(self.count):
            name = fresh_id(made, (one.id for one in endpoints))
            endpoints.append(replace(made, id=name, url=None))
        return _with_endpoints(question, endpoints, self)

    def __str__(self) -> str:
        """Return its notation."""
        return f"+{self.count}x{self.kind}"


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveEndpoints:
    """The endpoint of this id leaves, or the last ``count`` of this GPU."""

    count: int
    kind: str

    def apply(self, question: Question) -> Question:
        """Take them out."""
        endpoints = list(question.fleet.endpoints)
        for _ in range(self.count):
            like = pattern(question.fleet, self.kind)
            of_kind = [one for one in endpoints if like and _alike(one, like, self.kind)]
            if not of_kind:
                raise InvalidInput(
                    f"no endpoint {self.kind!r} is left to remove",
                    where=f"change {str(self)!r}",
                    remedy=f"known: {', '.join(one.id for one in question.fleet.endpoints)}",
                )
            endpoints.remove(of_kind[-1])
        return _with_endpoints(question, endpoints, self)

    def __str__(self) -> str:
        """Return its notation."""
        return f"-{self.kind}" if self.count == 1 else f"-{self.count}x{self.kind}"


def _alike(one: Endpoint, like: Endpoint, kind: str) -> bool:
    return one.id == kind if like.id == kind else one.gpu == like.gpu


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapGpu:
    """One endpoint, or all (``*``), on another GPU; its price is that of a like one, if any."""

    endpoint: str
    gpu: str

    def apply(self, question: Question) -> Question:
        """Replace speed and memory."""
        if self.endpoint != "*":
            _endpoint(question, self.endpoint, self)
        endpoints = [
            self._moved(question.fleet, one) if self.endpoint in ("*", one.id) else one
            for one in question.fleet.endpoints
        ]
        return _with_endpoints(question, endpoints, self)

    def _moved(self, fleet: Fleet, one: Endpoint) -> Endpoint:
        like = pattern(fleet, self.gpu)
        if like is not None and like.model == one.model:
            return replace(like, id=one.id, url=one.url, role=one.role, labels=one.labels)
        return on_gpu(one, self.gpu)

    def __str__(self) -> str:
        """Return its notation."""
        return f"gpu {self.endpoint}={self.gpu}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapModel:
    """Endpoints that serve one model serve another, and calls that ask for the one ask for that."""

    old: str
    new: str

    def apply(self, question: Question) -> Question:
        """Replace it in fleet, workflows and, by their new hashes, in forecasts."""
        if all(one.model != self.old for one in question.fleet.endpoints):
            models = sorted({one.model for one in question.fleet.endpoints})
            raise InvalidInput(
                f"no endpoint serves {self.old!r}",
                where=f"change {str(self)!r}",
                remedy=f"served: {', '.join(models)}",
            )
        endpoints = [
            with_model(one, self.new) if one.model == self.old else one
            for one in question.fleet.endpoints
        ]
        changed = _with_endpoints(question, endpoints, self)
        graphs = {str(one.content_hash): self._graph(one) for one in question.workflows}
        truth = question.truth
        return replace(
            changed,
            streams=tuple(
                replace(one, workflow=graphs[one.workflow.content_hash]) for one in question.streams
            ),
            estimates=_rekeyed(question.estimates, graphs),
            truth=None if truth is None else _rekeyed(truth, graphs),
        )

    def _graph(self, workflow: Workflow) -> Workflow:
        return replace(workflow, nodes=tuple(self._node(one) for one in workflow.nodes))

    def _node(self, node: Node) -> Node:
        return replace(
            node,
            call_sites=tuple(
                replace(site, model=self.new) if site.model == self.old else site
                for site in node.call_sites
            ),
            subgraph=None if node.subgraph is None else self._graph(node.subgraph),
        )

    def __str__(self) -> str:
        """Return its notation."""
        return f"model {self.old}={self.new}"


def _rekeyed(table: EstimateTable, graphs: dict[str, Workflow]) -> EstimateTable:
    workflows = {
        graphs[key].content_hash if key in graphs else key: one
        for key, one in table.workflows.items()
    }
    return replace(table, workflows=workflows)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleLoad:
    """All arrival rates times a factor, > 0."""

    factor: float

    def apply(self, question: Question) -> Question:
        """Scale the streams."""
        return replace(
            question,
            streams=tuple(
                replace(one, rate_rps=one.rate_rps * self.factor) for one in question.streams
            ),
        )

    def __str__(self) -> str:
        """Return its notation."""
        return f"load {self.factor:g}"


def _of_tenant(question: Question, tenant: str, change: Change) -> None:
    tenants = sorted({one.tenant for one in question.streams})
    if tenant not in tenants:
        raise InvalidInput(
            f"no tenant {tenant!r}",
            where=f"change {str(change)!r}",
            remedy=f"known: {', '.join(tenants)}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScaleTenant:
    """The arrival rates of one tenant times a factor, >= 0."""

    tenant: str
    factor: float

    def apply(self, question: Question) -> Question:
        """Scale its streams."""
        _of_tenant(question, self.tenant, self)
        return replace(
            question,
            streams=tuple(
                replace(one, rate_rps=one.rate_rps * self.factor)
                if one.tenant == self.tenant
                else one
                for one in question.streams
            ),
        )

    def __str__(self) -> str:
        """Return its notation."""
        return f"tenant {self.tenant}={self.factor:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetDeadline:
    """Deadlines of ``seconds``, or ``seconds`` later than now; of one tenant or of all (None)."""

    seconds: float
    more: bool = False
    tenant: str | None = None

    def apply(self, question: Question) -> Question:
        """Change the streams."""
        if self.tenant is not None:
            _of_tenant(question, self.tenant, self)
        return replace(question, streams=tuple(self._stream(one) for one in question.streams))

    def _stream(self, one: Stream) -> Stream:
        if self.tenant not in (None, one.tenant) or (self.more and one.deadline_s is None):
            return one
        base = one.deadline_s if self.more and one.deadline_s is not None else 0.0
        return replace(one, deadline_s=base + self.seconds)

    def __str__(self) -> str:
        """Return its notation."""
        whose = "" if self.tenant is None else f"{self.tenant}="
        return f"deadline {whose}{self.seconds:{'+' if self.more else ''}g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetRetention:
    """What becomes of idle KV: ``on``, ``off``, ``lru``, or as in `Question.retention`."""

    word: str

    def apply(self, question: Question) -> Question:
        """Change the retention."""
        return replace(question, retention=RETENTION_WORDS.get(self.word, self.word))

    def __str__(self) -> str:
        """Return its notation."""
        return f"retention {self.word}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitPools:
    """Some endpoints only prefill and some only decode; (0, 0) makes all serve calls whole.

    Those whose prefill is fast for their decode prefill; of the others the fastest decode, and
    what is left over serves calls whole.
    """

    prefill: int
    decode: int

    def apply(self, question: Question) -> Question:
        """Give out the roles."""
        endpoints = [replace(one, role="both") for one in question.fleet.endpoints]
        if self.prefill + self.decode > len(endpoints):
            raise InvalidInput(
                f"{self.prefill} + {self.decode} endpoints, the fleet has {len(endpoints)}",
                where=f"change {str(self)!r}",
                remedy="use as many at most",
            )
        order = sorted(range(len(endpoints)), key=lambda i: (_prefill_share(endpoints[i]), i))
        for place in order[: self.prefill]:
            endpoints[place] = replace(endpoints[place], role="prefill")
        rest = sorted(order[self.prefill :], key=lambda i: (_step_s(endpoints[i]), i))
        for place in rest[: self.decode]:
            endpoints[place] = replace(endpoints[place], role="decode")
        return _with_endpoints(question, endpoints, self)

    def __str__(self) -> str:
        """Return its notation."""
        return f"split {self.prefill}p{self.decode}d" if self.prefill else "split off"


def _step_s(endpoint: Endpoint) -> float:
    return endpoint.latency.decode_step_s(8, 8e3)


def _prefill_share(endpoint: Endpoint) -> float:
    return endpoint.latency.prefill_marginal_s(1000.0) / _step_s(endpoint)


@dataclass(frozen=True, slots=True, kw_only=True)
class AddSlots:
    """``count`` more calls side by side on an endpoint, fewer if below 0."""

    endpoint: str
    count: int

    def apply(self, question: Question) -> Question:
        """Change its slots."""
        one = _endpoint(question, self.endpoint, self)
        slots = one.max_num_seqs + self.count
        if slots < 1:
            raise InvalidInput(
                f"{slots} slots would be left",
                where=f"change {str(self)!r}",
                remedy="leave at least one, or remove the endpoint",
            )
        return _swapped(question, self.endpoint, replace(one, max_num_seqs=slots), self)

    def __str__(self) -> str:
        """Return its notation."""
        return f"slots {self.endpoint}={self.count:+d}"


@dataclass(frozen=True, slots=True, kw_only=True)
class AddKv:
    """More KV cache on an endpoint, GB (1e9 bytes); less if below 0."""

    endpoint: str
    gb: float

    def apply(self, question: Question) -> Question:
        """Change its blocks, in whole ones."""
        one = _endpoint(question, self.endpoint, self)
        where = f"change {str(self)!r}"
        if one.kv_bytes_per_token is None:
            raise InvalidInput(
                f"the KV size of model {one.model!r} is unknown",
                where=where,
                remedy="give kv_bytes_per_token in the fleet file",
            )
        blocks = one.kv_blocks + int(self.gb * GB / (one.kv_bytes_per_token * one.block_tokens))
        if blocks < 2:
            raise InvalidInput(
                f"{blocks} KV blocks would be left", where=where, remedy="take less away"
            )
        return _swapped(question, self.endpoint, replace(one, kv_blocks=blocks), self)

    def __str__(self) -> str:
        """Return its notation."""
        return f"kv {self.endpoint}={self.gb:+g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SetPolicy:
    """Another policy: ``name`` or ``name:key=value,...``."""

    policy: str

    def apply(self, question: Question) -> Question:
        """Change who decides."""
        return replace(question, policy=self.policy)

    def __str__(self) -> str:
        """Return its notation."""
        return f"policy {self.policy.replace(',', '+')}"


AS_IT_IS = "as it is"
"""A scenario without changes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """Changes made together, in order; none leaves the question as it is."""

    changes: tuple[Change, ...] = ()

    def apply(self, question: Question) -> Question:
        """Return the changed question."""
        return reduce(lambda done, change: change.apply(done), self.changes, question)

    def __str__(self) -> str:
        """Return its notation, ``as it is`` for none."""
        return ", ".join(map(str, self.changes)) or AS_IT_IS
