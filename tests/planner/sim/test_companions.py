"""What policies bring along for the engines: Astraea's KV manager, SAGA's TTL and eviction."""

import pytest

from planner.dispatch.events import Call, CallArrived, CallFinished, RunStarted
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import POLICIES, make_policy
from planner.dispatch.policies.aeg import ExecutionGraph, Step
from planner.dispatch.policies.astraea import Astraea
from planner.dispatch.policies.saga import Saga
from planner.dispatch.router import Router
from planner.dispatch.view import Resident
from planner.domain.blocks import Segment
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId, NodeId, RunId, SiteId, WorkflowHash
from planner.domain.latency import LatencyRow
from planner.domain.run import RunSpec, Task
from planner.sim.belady import cost_ratios
from planner.sim.companions import AdaptiveKv, ToolTtl, WaLru, companions_of
from planner.sim.experiment import PolicySetup, tune
from planner.sim.grids import GRIDS
from planner.sim.kernel import simulate
from planner.sim.retention import Fate, Idle

ROW = LatencyRow(
    prefill_base_ms=0,
    prefill_us_per_token=100,
    prefill_ns_per_token_sq=0,
    decode_base_ms=10,
    decode_us_per_call=0,
    decode_ns_per_kv_token=0,
)


def desk(policy: Astraea | Saga, pcie_gb_s: float = 1.0) -> Router:
    only = Endpoint(
        id=EndpointId("e"), model="m", gpu="G", latency=ROW, kv_blocks=1000, max_num_seqs=8,
        kv_bytes_per_token=100_000, pcie_gb_s=pcie_gb_s,
    )  # fmt: skip
    return Router(Fleet(name="f", endpoints=(only,)), policy, Forecaster(EstimateTable()))


def pause(router: Router, gap_s: float) -> Call:
    """Let a run of one call, a gap and a call go by; return its first call."""
    router.handle(RunStarted(run_id="r", workflow_hash="w", now_s=0.0))
    first = Call(call_id="r/0", run_id="r", workflow_hash="w", site="x", prompt_tokens=900)
    router.handle(CallArrived(call=first, now_s=0.0))
    router.handle(CallFinished(call_id="r/0", now_s=1.0, output_tokens=100))
    after = Call(
        call_id="r/1", run_id="r", workflow_hash="w", site="y", ready_s=1.0 + gap_s,
        parents=("r/0",), prompt_tokens=10,
    )  # fmt: skip
    router.handle(CallArrived(call=after, now_s=1.0 + gap_s))
    router.handle(CallFinished(call_id="r/1", now_s=2.0 + gap_s, output_tokens=1))
    return first


def idle(call: Call, kv_usage: float) -> Idle:
    return Idle(call=call, endpoint=0, context_tokens=1000, kv_usage=kv_usage, now_s=50.0)


@pytest.mark.parametrize(
    ("gap_s", "pcie_gb_s", "expected"),
    [
        # 1000 own tokens and 500 of others; recomputing takes 0.1 s, swapping 0.1 s each way.
        (0.04, 1.0, "pin"),  # 40 < 50
        (0.06, 1.0, "drop"),  # 60 > 50, and 2 x 0.1 x 500 = 100
        (0.06, 4.0, "offload"),  # 2 x 0.025 x 500 = 25
    ],
)
def test_astraea_wastes_the_least_memory_time(
    gap_s: float, pcie_gb_s: float, expected: str
) -> None:
    """Preserve, drop and swap each win where the formula says so; below the watermark all stays."""
    policy = Astraea()
    router = desk(policy, pcie_gb_s)
    call = pause(router, gap_s)
    router.view.states[0].add(
        Resident(
            call_id="o",
            run_id="o",
            prompt_tokens=400,
            uncached_tokens=0.0,
            output_tokens=100.0,
            criticality=1.0,
            sent_s=0.0,
        )
    )
    manager = AdaptiveKv(policy)
    assert manager.decide(idle(call, 0.95)).action == expected
    assert manager.decide(idle(call, 0.5)).action == "pin"


class Known(Saga):
    """SAGA with a graph in which x is always followed and y never."""

    def graph(self, workflow_hash: str) -> ExecutionGraph | None:
        graph = ExecutionGraph()
        graph.add([Step(site="x"), Step(site="y", parents=(0,), overlap=(0.5,))])
        return graph


def test_a_pin_lasts_for_the_tools_95th_percentile_less_under_pressure() -> None:
    """One gap of 2 s was seen: 2 s, at 80 % of KV a quarter less, from 90 % half."""
    policy = Known()
    call = pause(desk(policy), 2.0)
    keeper = ToolTtl(policy)
    for usage, ttl_s in ((0.5, 2.0), (0.8, 1.5), (0.95, 1.0)):
        fate = keeper.decide(idle(call, usage))
        assert (fate.action, fate.ttl_s) == ("pin", pytest.approx(ttl_s))


def test_what_nothing_follows_is_left_to_the_cache() -> None:
    """The graph says that the run is over, or there is no graph."""
    call = Call(call_id="c", run_id="r", workflow_hash="w", site="y")
    assert ToolTtl(Known()).decide(idle(call, 0.5)) == Fate()
    assert ToolTtl(Saga()).decide(idle(call, 0.5)) == Fate()


def test_eviction_weighs_age_reuse_and_size() -> None:
    """Small or reused sessions rank higher (go later), shared text highest, older text lower."""
    policy = Known()
    router = desk(policy)

    def arrive(run: str, site: str, tokens: int, *items: int, now_s: float = 0.0) -> None:
        call = Call(
            call_id=f"{run}{site}", run_id=run, workflow_hash="w", site=site,
            prompt_tokens=tokens, prefix=items,
        )  # fmt: skip
        router.handle(CallArrived(call=call, now_s=now_s))

    arrive("reused", "x", 1000, 1, 10)
    arrive("final", "y", 1000, 1, 20)
    arrive("small", "y", 100, 30)
    order = WaLru(policy)
    # b (1 - P) + g S: 0.25 + 0.2, 0.5 + 0.2, 0.5 + 0.02; text of two runs: 0.
    items = (10, 20, 30, 1)
    found = dict(zip(items, order.ranks(items, {}), strict=True))
    assert found == pytest.approx({10: -0.45, 20: -0.7, 30: -0.52, 1: 0.0})
    arrive("late", "y", 1000, 40, now_s=150.0)
    assert order.ranks([40], {}) == [pytest.approx(0.15 - 0.7)]


def test_companions_come_with_their_policies_and_can_be_switched_off() -> None:
    """Only Astraea and SAGA bring any."""
    bringing = {
        name
        for name in POLICIES
        if (own := companions_of(make_policy(name))).retention or own.eviction
    }
    assert bringing == {"astraea", "saga"}
    for quiet in (Astraea(adaptive_kv=False), Saga(ttl=False, wa_lru=False)):
        own = companions_of(quiet)
        assert (own.retention, own.eviction) == (None, None)


@pytest.mark.parametrize("name", sorted(GRIDS))
def test_every_tuned_policy_gets_twelve_trials(name: str) -> None:
    """Equal budgets, and every value of the grid makes a policy."""
    tried: list[PolicySetup] = []

    def score(setups: object) -> list[float]:
        found = list(setups)  # type: ignore[call-overload]
        tried.extend(found)
        return [1.0] * len(found)

    tune(PolicySetup(policy=name), score)
    if name != "almanac":  # its parameters are those of a table
        for setup in tried:
            setup.make(0)
    assert len(tried) == 12


def chains(count: int) -> list[RunSpec]:
    """Return runs that take turns: each reads 400 tokens of its own, pauses, reads them again."""
    return [
        RunSpec(
            run_id=RunId(f"r{number}"),
            workflow="turns",
            workflow_hash=WorkflowHash("w"),
            arrival_s=10.0 * number,
            tasks=tuple(
                Task(
                    index=step,
                    node=NodeId("n"),
                    kind="llm",
                    preds=(step - 1,) if step else (),
                    site=SiteId("n#0"),
                    prompt=(Segment(100 * number + 1, 400),),
                    output_tokens=2,
                    output_key=100 * number + 2 + step,
                    delay_s=10.0 * count if step else 0.0,
                    visit=step,
                )
                for step in range(2)
            ),
        )
        for number in range(count)
    ]


@pytest.mark.parametrize(("blocks", "least", "most"), [(1000, 1.0, 1.0), (110, 1.2, 2.0)])
def test_the_ratio_to_belady_is_one_where_all_fits(blocks: int, least: float, most: float) -> None:
    """Of six contexts of 25 blocks four fit: LRU, asked for them in turn, finds none of them."""
    endpoint = Endpoint(
        id=EndpointId("e"), model="m", gpu="G", latency=ROW, kv_blocks=blocks, max_num_seqs=1
    )
    fleet = Fleet(name="f", endpoints=(endpoint,))
    specs = chains(6)
    records = simulate(specs, fleet, make_policy("least_load"), Forecaster(EstimateTable()))
    ratios = cost_ratios(specs, records, fleet)
    assert ratios.computed is not None
    assert least <= ratios.computed <= most
    if blocks == 1000:
        assert ratios.refilled is None  # nothing is computed twice
    else:
        # What has to be computed once is the same for both and no merit of either.
        assert ratios.refilled is not None
        assert ratios.refilled > ratios.computed
