"""Random planning questions of a stated size, for `almanac bench-planner`; seeds fix them."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np

from planner.domain.estimates import EstimateTable, Quantiles, SiteEstimate, WorkflowEstimate
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId, NodeId, SiteId
from planner.domain.latency import LatencyRow
from planner.domain.workflow import END, START, CallSite, Node, Workflow
from planner.solve.window import Window

__all__ = ["random_fleet", "random_window", "random_workflow"]

_ROW = LatencyRow(
    prefill_base_ms=12.0,
    prefill_us_per_token=60.0,
    prefill_ns_per_token_sq=1.0,
    decode_base_ms=12.0,
    decode_us_per_call=150.0,
    decode_ns_per_kv_token=60.0,
)
"""About an 8 billion parameter model on an 80 GB card."""
_FAMILIES = 6
"""Call sites with a prefix of their own in a random window."""


def random_fleet(endpoints: int, rng: np.random.Generator) -> Fleet:
    """Return endpoints of 8 slots whose speeds differ by up to a factor of four."""
    factors = 2.0 ** rng.uniform(-1.0, 1.0, endpoints)
    return Fleet(
        name="random",
        endpoints=tuple(
            Endpoint(
                id=EndpointId(f"e{i:02d}"),
                model="m",
                gpu="any",
                latency=replace(_ROW, scale=float(factor)),
                kv_blocks=3000,
                max_num_seqs=8,
            )
            for i, factor in enumerate(factors)
        ),
    )


def random_workflow(sites: int, rng: np.random.Generator) -> tuple[Workflow, EstimateTable]:
    """Return layers of one to three calls, each waiting for all of the layer before."""
    layers: list[list[NodeId]] = []
    names = [NodeId(f"n{k:03d}") for k in range(sites)]
    position = 0
    while position < sites:
        width = int(rng.integers(1, 4))
        layers.append(names[position : position + width])
        position += width
    stops = [[START], *layers, [END]]
    workflow = Workflow(
        name="random",
        nodes=tuple(
            Node(id=name, kind="llm", call_sites=(CallSite(id=SiteId(f"{name}#0")),))
            for name in names
        ),
        edges=tuple((a, b) for one, two in itertools.pairwise(stops) for a in one for b in two),
    )
    spread = np.exp(0.6 * np.array([-1.645, -1.282, -0.674, 0.0, 0.674, 1.282, 1.645]))
    estimates = {}
    for site in workflow.call_sites:
        median = float(rng.uniform(50, 600))
        estimates[str(site)] = SiteEstimate(
            output_tokens=Quantiles(
                values=tuple(float(median * factor) for factor in spread), mean=median * 1.2
            ),
            prompt_tokens=Quantiles.constant(float(rng.uniform(300, 4000))),
            shared_prefix_tokens=float(rng.uniform(0, 250)),
        )
    table = EstimateTable(workflows={workflow.content_hash: WorkflowEstimate(sites=estimates)})
    return workflow, table


def random_window(
    calls: int, endpoints: int, scenarios: int, rng: np.random.Generator, *, joins: int = 3
) -> Window:
    """Return calls of a few families that are ready on a busy fleet; some meet in joins of four.

    Each call pays the queue it finds, its own prefill and its decode, and delays the calls there;
    another call of the window costs it that call's prefill and, for as long as both decode, a
    slower step; one of the same family whose prefix is nowhere cached saves it that prefix.
    """
    fleet = random_fleet(endpoints, rng)
    rows = [one.latency for one in fleet.endpoints]
    prefill = np.array([row.scale * row.prefill_us_per_token * 1e-6 for row in rows])
    residents = rng.integers(0, 8, endpoints)
    step = np.array(
        [row.decode_step_s(int(n) + 1, 2000 * n) for row, n in zip(rows, residents, strict=True)]
    )
    slope = np.array([row.decode_step_s(2, 2000) - row.decode_step_s(1, 0) for row in rows])
    queue = rng.exponential(0.3, endpoints)
    output = rng.lognormal(5.0, 0.6, calls) * rng.lognormal(0.0, 0.5, (scenarios, calls))
    family = rng.integers(0, _FAMILIES, calls)
    prefix = rng.uniform(0, 1500, _FAMILIES)[family]
    warm = (rng.random((_FAMILIES, endpoints)) < 0.3)[family]
    prompt = prefix + rng.uniform(100, 2500, calls)
    own_prefill = (prompt[:, None] - warm * prefix[:, None]) * prefill
    imposed = residents * (own_prefill + 0.5 * output.mean(axis=0)[:, None] * slope)
    shorter = np.minimum(output[:, :, None], output[:, None, :])
    delay = own_prefill[None, None] + shorter[..., None] * slope
    kin = family[:, None] == family[None, :]
    saved = (kin / kin.sum(axis=1))[:, :, None] * (prefix[:, None] * ~warm)[:, None] * prefill
    delay = delay - saved
    delay[:, np.arange(calls), np.arange(calls)] = 0.0
    return Window(
        own_s=queue + own_prefill + output[..., None] * step,
        imposed_s=imposed,
        delay_s=delay,
        allowed=np.ones((calls, endpoints), dtype=bool),
        joins=tuple(tuple(range(4 * j, 4 * j + 4)) for j in range(min(joins, calls // 4))),
        weight=np.ones(calls),
        tail_s=np.zeros(calls),
    )
