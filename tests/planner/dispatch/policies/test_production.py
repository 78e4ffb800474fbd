"""Production routers' rules on hand-made situations."""

import math

import pytest

from planner.dispatch.events import CallArrived, Tick
from planner.dispatch.policies import make_policy
from planner.dispatch.policies.cache_aware import expected_wait_s
from planner.dispatch.policies.sticky import affinity_key
from planner.dispatch.view import FleetView

from .bench import busy, call, endpoint, ready, states


def three(**more: object):
    return states(*(endpoint(f"e{number}", slots=8, **more) for number in range(3)))


def test_expected_wait_is_queued_tokens_over_throughput_and_kv_in_use() -> None:
    """400 uncached tokens at 100 us, and 400 of 16000 tokens of KV: 0.04 + 0.15 x 0.025 / 0.975."""
    one, two, _ = three()
    busy(one, 2, uncached=200.0)
    FleetView([one])
    assert expected_wait_s(one) == pytest.approx(0.04 + 0.15 * 0.025 / 0.975)
    assert make_policy("expected_wait").choose(ready([one, two])).endpoint == 1


def test_cache_aware_follows_the_prefix_unless_loads_are_unbalanced() -> None:
    """Both thresholds have to be exceeded: by more than 3 calls and by more than half."""
    one, two, _ = fleet = three()
    one.prefix.record(tuple(range(10)), 16.0)  # half of the prompt
    policy = make_policy("cache_aware", balance_abs_threshold=3)
    busy(one, 3)
    assert policy.choose(ready(fleet)).reason == "prefix"
    busy(two, 1)
    one.remove("0-0")
    busy(fleet[2], 1)
    assert policy.choose(ready(fleet)).endpoint == 0
    busy(fleet[0], 8)
    choice = policy.choose(ready(fleet))
    assert (choice.endpoint, choice.reason) == (1, "unbalanced")


def test_cache_aware_without_a_good_match_takes_the_shortest_queue() -> None:
    """A match of exactly the threshold does not count."""
    one, two, three_ = three()
    one.prefix.record(tuple(range(6)), 16.0)  # 30 %
    busy(one, 1)
    assert make_policy("cache_aware").choose(ready([one, two, three_])).endpoint == 1
    loose = make_policy("cache_aware", cache_threshold=0.2)
    assert loose.choose(ready([one, two, three_])).endpoint == 0


def test_cache_aware_smg_leaves_a_match_that_is_far_above_the_mean() -> None:
    """Loads 6, 0, 0: mean 2, two deviations 5.7; 6 is below 7.7. Loads 9, 0, 0: 9 < 3 + 8.5.

    With a gap of at most 4 calls, 9 exceeds 7 and 4.5, and the expected wait decides.
    """
    fleet = three()
    fleet[0].prefix.record(tuple(range(20)), 16.0)
    busy(fleet[0], 9)
    assert make_policy("cache_aware_smg").choose(ready(fleet)).endpoint == 0
    choice = make_policy("cache_aware_smg", most_gap=4).choose(ready(fleet))
    assert (choice.endpoint, choice.reason) == (1, "wait")


def test_affinity_goes_by_session_then_run_then_prompt() -> None:
    """The most lasting identity a call has is its key."""
    assert affinity_key(call("r.0", session_id="s")) == "session s"
    assert affinity_key(call("r.0")) == "run r"
    assert affinity_key(call("c", run_id="", prefix=(7, 8))) == "prompt 7"


def test_consistent_hashing_moves_only_the_keys_of_a_lost_endpoint() -> None:
    """Without endpoint 1 its keys go elsewhere and all others stay."""
    fleet = three()
    view = FleetView(fleet)
    policy = make_policy("consistent_hash")
    keys = [f"run{number}" for number in range(60)]
    before = [policy.choose(ready(fleet, view, run_id=key)).endpoint for key in keys]
    after = [policy.choose(ready([fleet[0], fleet[2]], view, run_id=key)).endpoint for key in keys]
    assert set(before) == {0, 1, 2}
    assert all(old == new for old, new in zip(before, after, strict=True) if old != 1)
    assert 1 not in after


def test_bounded_hashing_passes_over_a_full_endpoint() -> None:
    """With a bound of 1.25 and loads 5, 0, 0 an endpoint takes at most ceil(1.25 x 6 / 3) = 3."""
    fleet = three()
    view = FleetView(fleet)
    plain, bounded = make_policy("consistent_hash"), make_policy("consistent_hash", bound=1.25)
    key = next(
        key
        for key in map(str, range(99))
        if plain.choose(ready(fleet, view, run_id=key)).endpoint == 0
    )
    busy(fleet[0], 5)
    assert plain.choose(ready(fleet, view, run_id=key)).endpoint == 0
    assert bounded.choose(ready(fleet, view, run_id=key)).endpoint != 0


def test_a_session_stays_moves_when_overloaded_and_is_forgotten_in_time() -> None:
    """New where fewest sessions are; above the bound it moves for good; after the TTL it is new."""
    fleet = three()
    view = FleetView(fleet)
    policy = make_policy("session_affinity", bound=1.5, ttl_s=100.0)

    def choose(session: str, now_s: float) -> tuple[int, str]:
        one = ready(fleet, view, session_id=session)
        policy.observe(CallArrived(call=one.call, now_s=now_s), view)
        choice = policy.choose(type(one)(one.call, fleet, view, one.forecaster, now_s))
        return choice.endpoint, choice.reason

    assert [choose(name, 0.0) for name in "ab"] == [(0, "new"), (1, "new")]
    assert choose("a", 1.0) == (0, "session")
    busy(fleet[0], 4)
    assert choose("a", 2.0) == (1, "moved")
    assert choose("a", 3.0) == (1, "session")
    policy.observe(Tick(now_s=200.0), view)
    assert choose("a", 200.0)[1] == "new"
    assert not math.isinf(policy.ttl_s)


def test_kv_cost_adds_prefill_to_do_and_decode_under_way() -> None:
    """Prompt 320. Cold and idle: 320 + 320. Cached, with two of 200 tokens running: 0 + 400 + 320.

    With prefill weighted twice the warm one wins: 960 against 720.
    """
    cold, warm, _ = three()
    warm.prefix.record(tuple(range(20)), 16.0)
    busy(warm, 2)
    assert make_policy("kv_cost").choose(ready([cold, warm])).endpoint == 0
    assert make_policy("kv_cost", prefill_load_scale=2.0).choose(ready([cold, warm])).endpoint == 1


def test_weighted_scorers_add_queue_kv_and_prefix() -> None:
    """Cached but queueing: 0 + 2 x 0.975 + 3 against 2 + 2 + 0; without the prefix it loses."""
    warm, idle, _ = three()
    warm.prefix.record(tuple(range(20)), 16.0)
    busy(warm, 2)
    assert make_policy("weighted_scorers").choose(ready([warm, idle])).endpoint == 0
    assert make_policy("weighted_scorers", prefix=1.0).choose(ready([warm, idle])).endpoint == 1
