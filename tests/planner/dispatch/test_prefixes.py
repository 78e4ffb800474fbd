"""Believed prefixes: one endpoint's, and those of all endpoints at once."""

import numpy as np
import pytest

from planner.dispatch.prefixes import Holders, PrefixIndex, concerns, levels


def chain(*parts: tuple[str, int]) -> tuple[int, ...]:
    """Return a chain of items: equal where all before is equal."""
    items: list[int] = []
    parent = 0
    for name, count in parts:
        for number in range(count):
            parent = hash((parent, sum(name.encode()), number))
            items.append(parent)
    return tuple(items)


def fleet(count: int, capacity: float = 1e9) -> tuple[Holders, list[PrefixIndex]]:
    holders = Holders()
    made = [PrefixIndex(capacity) for _ in range(count)]
    for index, one in enumerate(made):
        one.join(holders, 1 << index)
    return holders, made


def test_a_prompt_that_goes_on_is_matched_exactly() -> None:
    """Each turn finds all of the turn before, however long the conversation."""
    index = PrefixIndex(1e9)
    for turn in range(1, 40):
        prompt = chain(("a", 13 * turn))
        assert index.match(prompt) == 13 * (turn - 1)
        index.record(prompt, 16.0)
        assert index.held_tokens == 16.0 * len(prompt)


def test_a_branch_is_matched_to_within_an_eighth_and_never_too_far() -> None:
    """Where prompts part between anchors, the match ends at the anchor before."""
    for shared in (1, 5, 16, 17, 40, 100, 333, 1000):
        index = PrefixIndex(1e9)
        index.record(chain(("s", shared), ("a", 200)), 16.0)
        found = index.match(chain(("s", shared), ("b", 200)))
        assert shared * 7 / 8 <= found <= shared


def test_the_directory_agrees_with_every_endpoint() -> None:
    """The matches of all endpoints at once are those of each alone, whatever was forgotten."""
    rng = np.random.default_rng(0)
    forks: dict[int, int] = {}
    holders, made = fleet(9, capacity=16.0 * 400)
    prompts = [
        chain((f"head{h}", int(rng.integers(1, 80))), (f"run{r}", int(rng.integers(1, 200))))
        for h in range(4)
        for r in range(6)
    ]
    for step in range(600):
        prompt = prompts[int(rng.integers(len(prompts)))]
        cut = prompt[: int(rng.integers(1, len(prompt) + 1))]
        made[int(rng.integers(9))].record(cut, 16.0)
        if step % 97 == 0:
            made[int(rng.integers(9))].clear()
        asked = prompts[int(rng.integers(len(prompts)))]
        found = [0] * 9
        for depth, who in levels(asked, holders, forks):
            for place in range(9):
                if who >> place & 1:
                    assert depth > found[place]
                    found[place] = depth
        assert found == [one.match(asked) for one in made]


def test_what_was_dropped_is_not_claimed() -> None:
    """Beyond the capacity least recent use goes first, tail before head, and is claimed no more."""
    holders, (index, other) = fleet(2, capacity=16.0 * 100)
    old, new = chain(("old", 90)), chain(("new", 90))
    index.record(old, 16.0)
    other.record(old, 16.0)
    index.record(new, 16.0)
    assert index.held_tokens <= 16.0 * 100
    assert index.match(new) == 90
    assert 0 < index.match(old) <= 10
    assert levels(old, holders, {}) == [(index.match(old), 0b11), (90, 0b10)]


def test_nothing_is_left_in_the_directory_by_endpoints_that_forgot() -> None:
    """When all have forgotten, the directory is empty."""
    holders, made = fleet(3)
    for one in made:
        one.record(chain(("a", 300)), 16.0)
        one.record(chain(("a", 310)), 16.0)
        one.clear()
    assert holders == {}
    assert levels(chain(("a", 300)), holders, {}) == []


@pytest.mark.parametrize("capacity", [1e9, 150.0])
def test_changes_that_do_not_concern_a_prompt_leave_its_match_as_it_was(capacity: float) -> None:
    """Who looks again only where `since` names something of interest misses nothing."""
    rng = np.random.default_rng(5)
    looked = concerned = 0
    for _ in range(20):
        holders, indices = fleet(3, capacity)
        prompts = [
            chain(("system", int(rng.integers(1, 30))), (str(run), int(rng.integers(1, 90))))
            for run in rng.integers(5, size=12)
        ]
        known = {(place, one): 0 for place in range(3) for one in range(12)}
        seen = [holders.version] * 12
        for _ in range(150):
            sent = prompts[rng.integers(12)]
            indices[rng.integers(3)].record(sent[: rng.integers(1, len(sent) + 1)], 1.0)
            if rng.random() < 0.02:
                indices[rng.integers(3)].clear()
            if rng.random() < 0.7:
                continue
            for one in np.flatnonzero(rng.random(12) < 0.6).tolist():
                for bit, news in holders.since(seen[one]).items():
                    place = bit.bit_length() - 1
                    looked += 1
                    if concerns(news, prompts[one]):
                        concerned += 1
                        known[place, one] = indices[place].match(prompts[one])
                seen[one] = holders.version
                assert [known[place, one] for place in range(3)] == [
                    index.match(prompts[one]) for index in indices
                ]
    assert concerned < looked or capacity < 1e9


def test_what_was_used_again_outlives_what_was_not() -> None:
    """Of three prompts the one not used since goes first, though it came second."""
    index = PrefixIndex(250.0)
    first, second, third = (chain((name, 100)) for name in "abc")
    for prompt in (first, second, first, third):
        index.record(prompt, 1.0)
    assert index.match(first) == index.match(third) == 100
    assert index.match(second) < 100


def test_a_match_asked_for_again_is_the_present_one() -> None:
    """An answer is not given twice where something was sent, forgotten or restored in between."""
    index = PrefixIndex(150.0)
    one, other = chain(("a", 100)), chain(("b", 140))
    assert index.match(one) == index.match(()) == 0
    index.record(one, 1.0)
    assert index.match(one) == 100
    assert index.match(()) == 0
    index.record(other, 1.0)
    assert index.match(one) < 100
    index.record(one, 1.0)
    kept = index.newest(1000)
    assert index.match(one) == 100
    index.clear()
    assert index.match(one) == 0
    index.restore(kept)
    assert index.match(one) == 100
