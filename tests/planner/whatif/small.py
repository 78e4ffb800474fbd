"""A question whose answer is known: one call a run, always of the same length.

An endpoint takes 1 ms per uncached prompt token and 10 ms per output token with one call in
flight, so a run of 200 and 100 tokens takes a step of 9 + 200 ms and 99 of 10 ms, 1.199 s alone,
besides the 0.5 ms that a decision is charged. At the default rate runs hardly ever meet.
"""

from __future__ import annotations

import itertools

from planner.domain.estimates import EstimateTable, Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId, NodeId, SiteId
from planner.domain.latency import LatencyRow
from planner.domain.workflow import END, START, CallSite, Node, Workflow
from planner.whatif.question import Question, Stream

ALONE_S = 1.199
DISPATCH_S = 0.0005


def endpoint(name: str, *, scale: float = 1.0, slots: int = 4, usd: float | None = 1.0) -> Endpoint:
    """Return an endpoint ``scale`` times slower than the usual one; GPUs are named after ids."""
    return Endpoint(
        id=EndpointId(name),
        model="m",
        gpu=name.upper(),
        latency=LatencyRow(
            prefill_base_ms=0.0,
            prefill_us_per_token=1000.0,
            prefill_ns_per_token_sq=0.0,
            decode_base_ms=9.0,
            decode_us_per_call=1000.0,
            decode_ns_per_kv_token=0.0,
            scale=scale,
        ),
        kv_blocks=10_000,
        max_num_seqs=slots,
        scheduling="priority",
        usd_per_hour=usd,
        kv_bytes_per_token=100_000,
    )


def constant(value: float) -> Quantiles:
    """Return quantiles of something that does not vary."""
    return Quantiles(values=(value,) * 7, mean=value)


def chain(name: str, length: int = 1) -> Workflow:
    """Return nodes with one call to model m each, one after the other."""
    ids = [NodeId(f"n{position}") for position in range(length)]
    stops = (START, *ids, END)
    return Workflow(
        name=name,
        nodes=tuple(
            Node(id=one, kind="llm", call_sites=(CallSite(id=SiteId(f"{one}#0"), model="m"),))
            for one in ids
        ),
        edges=tuple(itertools.pairwise(stops)),
    )


def forecasts(*graphs: Workflow, prompt: float = 200.0, output: float = 100.0) -> EstimateTable:
    """Return constant lengths for all calls."""
    site = SiteEstimate(output_tokens=constant(output), prompt_tokens=constant(prompt))
    return EstimateTable(
        workflows={
            one.content_hash: WorkflowEstimate(
                name=one.name,
                sites={str(call.id): site for node in one.nodes for call in node.call_sites},
            )
            for one in graphs
        }
    )


def question(
    *endpoints: Endpoint, rate: float = 1e-6, deadline_s: float | None = None, tenants: int = 1
) -> Question:
    """Return the question, its rate shared by tenants t0, t1 and so on."""
    graph = chain("one")
    return Question(
        fleet=Fleet(name="small", endpoints=endpoints or (endpoint("a"),)),
        streams=tuple(
            Stream(
                workflow=graph, rate_rps=rate / tenants, tenant=f"t{number}", deadline_s=deadline_s
            )
            for number in range(tenants)
        ),
        estimates=forecasts(graph),
    )
