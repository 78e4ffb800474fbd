"""Changes: their notation, and what each makes of a question."""

from __future__ import annotations

from dataclasses import replace

import pytest

from planner.domain.errors import InvalidInput
from planner.whatif.changes import Scenario
from planner.whatif.demo import demo_question
from planner.whatif.notation import parse_change, parse_scenario
from planner.whatif.question import Question

from .small import endpoint, question

DEMO = demo_question()


def ids(asked: Question) -> list[str]:
    return [str(one.id) for one in asked.fleet.endpoints]


@pytest.mark.parametrize(
    "text",
    [
        "+2xh100", "-e3", "-2xl4", "gpu e1=h200", "model a=b", "load 1.2", "tenant heavy=0",
        "deadline 20", "deadline +2", "deadline heavy=+2", "retention off", "retention pin:60",
        "split 2p3d", "split off", "slots e1=+4", "kv e1=-2", "policy power_of_two",
        "policy marginal_cost:theta=2",
    ],
)  # fmt: skip
def test_a_change_is_written_as_it_is_read(text: str) -> None:
    """The text of a change is its notation, so reports can be fed back."""
    assert str(parse_change(text)) == text


def test_words_and_commas() -> None:
    """`add` and `remove` are the signs; commas join; nothing is the question as it is."""
    assert str(parse_scenario("add 2 x h100, remove l4")) == "+2xh100, -l4"
    assert parse_scenario("") == parse_scenario("as it is") == Scenario()
    assert Scenario().apply(DEMO) is DEMO


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("faster", "is no change"),
        ("load x", "not a number"),
        ("load -1", "not a number"),
        ("deadline 0", "use a number > 0"),
        ("retention never", "pin:SECONDS"),
        ("+0xh100", "1 to 1000"),
    ],
)
def test_unreadable_changes(text: str, said: str) -> None:
    """What cannot be read is one error with an example or the range."""
    with pytest.raises(InvalidInput, match=said):
        parse_change(text)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("-zz", "no endpoint 'zz' is left"),
        ("+b300", "GPU 'b300' is unknown"),
        ("gpu zz=h200", "no endpoint 'zz'"),
        ("model x=y", "no endpoint serves 'x'"),
        ("model llama-3.1-8b=x", "size of model 'x'"),
        ("tenant zz=0", "no tenant 'zz'"),
        ("split 4p4d", "the fleet has 5"),
        ("slots l4=-8", "0 slots would be left"),
        ("kv l4=-100", "blocks would be left"),
    ],
)
def test_changes_that_do_not_fit(text: str, said: str) -> None:
    """A change that does not fit the question names itself, the value and what is known."""
    with pytest.raises(InvalidInput, match=said):
        parse_scenario(text).apply(DEMO)


def test_endpoints_come_and_go() -> None:
    """New endpoints are like the fleet's own or from the tables, have fresh ids and no address."""
    asked = parse_scenario("+2xh100, +h200, -l4, -a10g").apply(DEMO)
    assert ids(asked) == ["h100", "a100", "l40s", "h100-new1", "h100-new2", "h200-new1"]
    old, new, other = asked.fleet.endpoints[0], *asked.fleet.endpoints[4:]
    assert (new.latency, new.usd_per_hour, new.url) == (old.latency, old.usd_per_hour, None)
    assert other.gpu == "H200"
    assert other.usd_per_hour is None
    assert other.kv_blocks > 10_000
    last = parse_scenario("-a").apply(question(endpoint("a"), endpoint("b")))
    assert ids(last) == ["b"]
    with pytest.raises(InvalidInput, match="no endpoint"):
        parse_scenario("-b").apply(last)


def test_another_gpu_is_that_of_the_fleet() -> None:
    """An endpoint that moves to a GPU of the fleet becomes like its own endpoints there."""
    asked = parse_scenario("gpu l4=h100").apply(DEMO)
    moved, like = asked.fleet.endpoints[4], asked.fleet.endpoints[0]
    assert replace(moved, id=like.id, url=like.url) == like


def test_another_model_goes_with_its_calls() -> None:
    """Call sites that ask for the model ask for the new one, and keep their forecasts."""
    site = DEMO.workflows[0].nodes[0].call_sites
    asked = parse_scenario("gpu *=h100, model llama-3.1-8b=llama-3.1-70b").apply(DEMO)
    assert {one.model for one in asked.fleet.endpoints} == {"llama-3.1-70b"}
    assert {one.tp for one in asked.fleet.endpoints} == {4}
    assert asked.fleet.endpoints[0].usd_per_hour == pytest.approx(4 * 2.8)
    assert asked.workflows[0].content_hash in asked.estimates.workflows
    assert len(site) == len(asked.workflows[0].nodes[0].call_sites)
    named = parse_scenario("model m=llama-3.1-8b")
    small = question(replace(endpoint("a"), gpu="H100"))
    changed = named.apply(small)
    assert changed.workflows[0].nodes[0].call_sites[0].model == "llama-3.1-8b"
    assert changed.workflows[0].content_hash != small.workflows[0].content_hash
    assert changed.workflows[0].content_hash in changed.estimates.workflows


def test_loads_tenants_and_deadlines() -> None:
    """Rates scale, a tenant may leave, deadlines are set or relaxed, each for whom it says."""
    asked = parse_scenario("load 2, tenant heavy=0, deadline small=30").apply(DEMO)
    assert [one.rate_rps for one in asked.streams] == pytest.approx([1.6, 0.0])
    assert [one.deadline_s for one in asked.streams] == [30.0, 20.0]
    later = parse_scenario("deadline +2").apply(asked)
    assert [one.deadline_s for one in later.streams] == [32.0, 22.0]
    with pytest.raises(InvalidInput, match="nothing arrives"):
        parse_scenario("tenant small=0, tenant heavy=0").apply(DEMO)


def test_pools_are_split_by_what_is_fast() -> None:
    """The least prefill per decode step prefills, the fastest of the rest decode."""
    asked = parse_scenario("split 2p2d").apply(DEMO)
    roles = {str(one.id): one.role for one in asked.fleet.endpoints}
    assert sorted(roles.values()) == ["both", "decode", "decode", "prefill", "prefill"]
    whole = parse_scenario("split 2p2d, split off").apply(DEMO)
    assert {one.role for one in whole.fleet.endpoints} == {"both"}


def test_slots_kv_retention_and_policy() -> None:
    """The rest change what they name, KV in whole blocks."""
    asked = parse_scenario("slots h100=+4, kv h100=+1, retention off, policy random").apply(DEMO)
    one, before = asked.fleet.endpoints[0], DEMO.fleet.endpoints[0]
    assert one.max_num_seqs == before.max_num_seqs + 4
    assert one.kv_bytes_per_token is not None
    assert one.kv_blocks - before.kv_blocks == int(1e9 / (16 * one.kv_bytes_per_token))
    assert (asked.retention, asked.policy) == ("drop", "random")
