"""Router, fleet view and prefix index."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from planner.dispatch.events import (
    Call,
    CallArrived,
    CallCancelled,
    CallFailed,
    CallFinished,
    EndpointDown,
    EndpointUp,
    Event,
    FirstToken,
    Hold,
    PrefillFinished,
    RunEnded,
    RunStarted,
    Send,
)
from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import make_policy
from planner.dispatch.router import TRANSITIONS, CallState, Router
from planner.dispatch.view import PrefixIndex
from planner.domain.errors import IllegalEvent
from planner.domain.estimates import EstimateTable
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.ids import EndpointId
from planner.domain.latency import LatencyRow

ROW = LatencyRow(
    prefill_base_ms=5,
    prefill_us_per_token=50,
    prefill_ns_per_token_sq=0,
    decode_base_ms=10,
    decode_us_per_call=100,
    decode_ns_per_kv_token=0,
)


def fleet(count: int = 3, slots: int = 4) -> Fleet:
    return Fleet(
        name="test",
        endpoints=tuple(
            Endpoint(
                id=EndpointId(f"e{i}"),
                model="m",
                gpu="G",
                latency=ROW,
                kv_blocks=100,
                max_num_seqs=slots,
            )
            for i in range(count)
        ),
    )


def router(count: int = 3, policy: str = "round_robin") -> Router:
    return Router(fleet(count), make_policy(policy), Forecaster(EstimateTable()))


def call(name: str, **values: object) -> Call:
    return Call(call_id=name, prompt_tokens=100, **values)  # type: ignore[arg-type]


EVENTS = {
    PrefillFinished: lambda: PrefillFinished(call_id="c", now_s=1.0),
    FirstToken: lambda: FirstToken(call_id="c", now_s=1.0),
    CallFinished: lambda: CallFinished(call_id="c", now_s=1.0, output_tokens=3),
    CallFailed: lambda: CallFailed(call_id="c", now_s=1.0),
    CallCancelled: lambda: CallCancelled(call_id="c", now_s=1.0),
}


def in_state(state: CallState) -> Router:
    made = router(1)
    if state is CallState.HELD:
        made.handle(EndpointDown(endpoint=0, now_s=0.0))
    made.handle(CallArrived(call=call("c"), now_s=0.0))
    if state is CallState.STREAMING:
        made.handle(FirstToken(call_id="c", now_s=0.5))
    return made


@pytest.mark.parametrize(("state", "event"), list(itertools.product(CallState, EVENTS)))
def test_transition_table_is_complete(state: CallState, event: type) -> None:
    """Every (state, event) pair either follows the table or raises and changes nothing."""
    made = in_state(state)
    before = repr(made), repr(made.view.states)
    if (state, event) not in TRANSITIONS:
        with pytest.raises(IllegalEvent, match=state.value):
            made.handle(EVENTS[event]())
        assert (repr(made), repr(made.view.states)) == before
        return
    assert made.handle(EVENTS[event]()) == []
    if TRANSITIONS[state, event] is None:
        assert made.in_flight == made.held == 0
        assert made.view.states[0].residents == {}
        with pytest.raises(IllegalEvent, match="unknown"):
            made.handle(EVENTS[event]())


def test_a_call_id_is_used_once() -> None:
    """An attempt that arrives twice is refused."""
    made = router()
    made.handle(CallArrived(call=call("c"), now_s=0.0))
    with pytest.raises(IllegalEvent, match="arrived twice"):
        made.handle(CallArrived(call=call("c"), now_s=1.0))


def test_counters_return_to_zero() -> None:
    """Whatever a call was counted for is given back, on every way out."""
    made = router(2)
    for number, ending in enumerate((CallFinished, CallFailed, CallCancelled)):
        made.handle(CallArrived(call=call(f"c{number}", prefix=(1, 2, 3)), now_s=0.0))
        if number:
            made.handle(FirstToken(call_id=f"c{number}", now_s=0.1))
        extra = {"output_tokens": 5} if ending is CallFinished else {}
        made.handle(ending(call_id=f"c{number}", now_s=1.0, **extra))
    for state in made.view.states:
        counters = (state.in_flight, state.decoding, state.prefill_tokens, state.context_tokens)
        assert counters == (0, 0, 0.0, 0.0)
        assert state.criticality == 0.0


def test_held_calls_go_oldest_run_first_when_an_endpoint_comes_up() -> None:
    """Without a healthy endpoint calls are held; the oldest run is served first afterwards."""
    made = router(1)
    made.handle(EndpointDown(endpoint=0, now_s=0.0))
    for name, arrival in (("young", 5.0), ("old", 1.0)):
        event = CallArrived(call=call(name, run_arrival_s=arrival), now_s=6.0)
        assert isinstance(made.handle(event)[0], Hold)
    assert made.held == 2
    commands = made.handle(EndpointUp(endpoint=0, now_s=7.0))
    assert [command.call_id for command in commands] == ["old", "young"]
    assert all(isinstance(command, Send) for command in commands)
    assert made.held == 0


def test_excluded_and_unhealthy_endpoints_are_not_chosen() -> None:
    """A retry avoids the endpoint it failed on, and a dead one gets nothing."""
    made = router(3)
    made.handle(EndpointDown(endpoint=1, now_s=0.0))
    chosen = set()
    for number in range(6):
        event = CallArrived(call=call(f"c{number}"), now_s=0.0, exclude=frozenset({0}))
        (command,) = made.handle(event)
        assert isinstance(command, Send)
        chosen.add(command.endpoint)
    assert chosen == {2}


def test_a_cold_endpoint_has_forgotten_its_prefixes() -> None:
    """After a restart the router expects no cache hit."""
    made = router(1)
    made.handle(CallArrived(call=call("a", prefix=(1, 2, 3)), now_s=0.0))
    assert made.view.states[0].prefix.match((1, 2, 3)) == 3
    made.handle(EndpointDown(endpoint=0, now_s=1.0))
    made.handle(EndpointUp(endpoint=0, now_s=2.0, cold=True))
    assert made.view.states[0].prefix.match((1, 2, 3)) == 0


def test_replaying_the_events_gives_the_same_commands() -> None:
    """The router has no hidden input: the same log gives the same decisions."""
    log = [
        RunStarted(run_id="r", workflow_hash="w", now_s=0.0),
        *(CallArrived(call=call(f"c{i}", prefix=(i % 3, i)), now_s=float(i)) for i in range(20)),
        RunEnded(run_id="r", now_s=30.0),
    ]
    for policy in ("power_of_two", "prefix_affinity", "least_expected_finish", "marginal_cost"):
        first, second = router(3, policy), router(3, policy)
        assert [first.handle(e) for e in log] == [second.handle(e) for e in log]


def test_prefix_index_finds_the_longest_match() -> None:
    """The match is the number of leading items sent before."""
    index = PrefixIndex(1000.0)
    index.record((1, 2, 3, 4, 5), 16.0)
    assert index.match((1, 2, 3, 9)) == 3
    assert index.match((1, 2, 3, 4, 5, 6)) == 5
    assert index.match((7, 2)) == 0
    assert index.match(()) == 0


def test_prefix_index_forgets_least_recently_used_tails_first() -> None:
    """Beyond the capacity the oldest tail goes and the head of the chain stays."""
    index = PrefixIndex(64.0)
    index.record((1, 2, 3), 16.0)
    index.record((9, 8), 16.0)
    assert index.held_tokens == 64.0
    assert index.match((1, 2, 3)) == 2
    assert index.match((9, 8)) == 2


@pytest.mark.parametrize("policy", ["round_robin", "marginal_cost", "fcfs_workflow"])
def test_counting_after_the_answer_changes_no_command(policy: str) -> None:
    """Decisions that are counted late give the commands of those that are counted at once."""
    rng = np.random.default_rng(0)
    late, at_once = router(3, policy), router(3, policy)
    under_way: list[str] = []
    for number in range(200):
        event: Event
        if under_way and rng.random() < 0.45:
            over = under_way.pop(int(rng.integers(len(under_way))))
            event = CallFinished(call_id=over, now_s=float(number), output_tokens=10)
        else:
            prefix = tuple(range(int(rng.integers(1, 40))))
            arrived = call(f"c{number}", prefix=prefix)
            event = CallArrived(call=arrived, now_s=float(number))
        commands = late.decide(event)
        assert commands == at_once.handle(event)
        under_way += [command.call_id for command in commands if isinstance(command, Send)]
    assert late.in_flight == at_once.in_flight == len(under_way)


def test_whoever_looks_sees_what_was_sent() -> None:
    """A call that was sent and not counted yet is counted before the view is shown."""
    made = router(1)
    made.decide(CallArrived(call=call("a", prefix=(1, 2, 3)), now_s=0.0))
    assert made.on("a", 0)
    assert made.view.states[0].in_flight == made.in_flight == 1
    assert made.view.states[0].prefix.match((1, 2, 3)) == 3
    with pytest.raises(IllegalEvent):
        made.decide(CallArrived(call=call("a"), now_s=0.0))


@pytest.mark.parametrize("roles", [("both", "both"), ("prefill", "decode")])
def test_a_crowd_holds_what_is_not_counted_yet(roles: tuple[str, ...]) -> None:
    """It is the same before a call is counted and after, and asking for it counts nothing."""
    pools = Fleet(
        name="f",
        endpoints=tuple(
            replace(one, role=role, kv_bytes_per_token=1000)
            for one, role in zip(fleet(2).endpoints, roles, strict=True)
        ),
    )
    made = Router(pools, make_policy("least_load"), Forecaster(EstimateTable()))
    for name in ("a", "b", "c"):
        made.decide(CallArrived(call=call(name, prefix=(1, 2, 3)), now_s=0.0))
        before = [crowd_of(made, index) for index in range(2)]
        assert before == [crowd_of(made, index) for index in range(2)]
        made.settle()
        assert before == [crowd_of(made, index) for index in range(2)]
        assert [one[0] for one in before] == [state.in_flight for state in made.view.states]


def crowd_of(made: Router, index: int) -> tuple[float, ...]:
    crowd = made.crowd(index)
    return crowd.in_flight, crowd.prefill_tokens, crowd.context_tokens, crowd.output_tokens
