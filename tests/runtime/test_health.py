"""Breakers, trials, outliers and drains, without any endpoint."""

from __future__ import annotations

import pytest

from runtime.health import Breaker, FleetHealth, HealthRules, State

RULES = HealthRules(failures=3, pause_s=1.0, trials=2, trial_share=0.01)


def fleet(count=3, *, models=None, **rules):
    return FleetHealth(models or ["m"] * count, HealthRules(**rules))


def is_tried(health, calls):
    """Return how many of so many calls are trials, each of which is called well at once."""
    tried = 0
    for _ in range(calls):
        index = health.trial(health.spared("m"))
        if index is not None:
            tried += 1
            health.breakers[index].begin_trial()
            health.breakers[index].end_trial()
    return tried


class TestBreaker:
    def test_an_unreachable_endpoint_opens_at_once(self):
        """One failed connect opens an endpoint, and marks its cache as lost."""
        breaker = Breaker(RULES)
        assert breaker.failure(10.0, "connect", unreachable=True)
        assert breaker.down
        assert breaker.cold
        assert not breaker.may_probe(10.5)
        assert breaker.may_probe(11.0)
        assert breaker.pause_left_s(10.25) == 0.75

    def test_failures_in_a_row_open_it_and_a_success_forgives(self):
        """It takes failures in a row; one good answer starts the count again."""
        breaker = Breaker(RULES)
        for _ in range(2):
            assert not breaker.failure(0.0)
            assert not breaker.failure(0.0)
            breaker.success(0.0)
        assert not breaker.failure(0.0)
        assert not breaker.failure(0.0)
        assert breaker.failure(0.0)
        assert not breaker.cold

    def test_trials_that_go_well_close_it(self):
        """After the pause a good probe lets trials begin; as many as wanted close it."""
        breaker = Breaker(RULES)
        breaker.failure(0.0, unreachable=True)
        assert not breaker.probed(0.5, well=True)
        assert breaker.probed(1.0, well=True)
        assert breaker.state is State.HALF_OPEN
        assert not breaker.success(1.1)
        assert breaker.success(1.2)
        assert breaker.state is State.CLOSED

    def test_a_bad_trial_opens_it_for_twice_as_long(self):
        """Pauses double up to 32 times, and are short again once it was well for as long."""
        breaker = Breaker(RULES)
        now_s, pauses = 0.0, []
        for _ in range(8):
            breaker.failure(now_s, unreachable=True)
            pauses.append(breaker.pause_left_s(now_s))
            now_s += pauses[-1]
            breaker.probed(now_s, well=True)
        assert pauses == [1, 2, 4, 8, 16, 32, 32, 32]
        breaker.success(now_s)
        breaker.success(now_s)
        breaker.success(now_s + 31.0)
        breaker.success(now_s + 32.0)
        breaker.failure(now_s + 33.0, unreachable=True)
        assert breaker.pause_left_s(now_s + 33.0) == 1

    def test_health_checks_open_and_mark_as_cold(self):
        """Misses in a row open an endpoint that no call has found out about."""
        breaker = Breaker(RULES)
        assert not breaker.probed(0.0, well=False)
        assert not breaker.probed(1.0, well=True)
        assert not breaker.probed(2.0, well=False)
        assert breaker.probed(3.0, well=False)
        assert (breaker.state, breaker.why, breaker.cold) == (State.OPEN, "health", True)


class TestTrials:
    def test_hardly_any_call_tries_an_endpoint_that_fails_calls(self):
        """Where the health check was well all along, one call in a hundred is a trial."""
        health = fleet()
        for _ in range(3):
            health.failed(1, 0.0, "http_500")
        health.breakers[1].probed(1.0, well=True)
        assert health.spared("m") == {1}
        assert is_tried(health, 99) == 0
        assert is_tried(health, 401) == 5

    def test_an_endpoint_that_is_back_is_tried_at_once(self):
        """One that was out of reach and answers again gets the next call, one at a time."""
        health = fleet()
        health.failed(1, 0.0, "connect", unreachable=True)
        health.breakers[1].probed(1.0, well=True)
        assert health.trial(health.spared("m")) == 1
        health.breakers[1].begin_trial()
        assert health.trial(health.spared("m")) is None
        health.succeeded(1, 2.0)
        assert health.trial(health.spared("m")) == 1

    def test_on_trial_is_better_than_nothing(self):
        """Nothing is spared while no endpoint of the model is closed."""
        health = fleet(models=["m", "m", "other"])
        for index in (0, 1):
            health.failed(index, 0.0, "connect", unreachable=True)
            health.breakers[index].probed(1.0, well=True)
        assert health.spared("m") == frozenset()
        assert health.spared(None) == {0, 1}


class TestOutliers:
    def test_what_fails_more_than_its_peers_is_left_out(self):
        """Half of the calls failing, never three in a row, is enough beside peers that do well."""
        health = fleet()
        opened = False
        for turn in range(10):
            now_s = turn * 0.1
            health.succeeded(0, now_s)
            health.succeeded(2, now_s)
            health.succeeded(1, now_s)
            opened = opened or health.failed(1, now_s, "http_500")
        assert opened
        assert health.breakers[1].why == "errors"
        assert health.to_json(1, 1.0)["outlier"]

    def test_what_fails_everywhere_is_not_an_outlier(self):
        """Failures all over the fleet eject nobody."""
        health = fleet()
        for turn in range(20):
            for index in range(3):
                assert not health.succeeded(index, turn * 0.1)
                assert not health.failed(index, turn * 0.1, "http_500")

    def test_refusing_most_calls_is_an_outlier_though_no_failure(self):
        """Refusals never open a breaker, but one that refuses all alone is left out."""
        health = fleet(1)
        assert not any(health.refused(0, 0.0) for _ in range(50))
        health = fleet()
        for turn in range(10):
            health.succeeded(0, turn * 0.1)
            health.succeeded(2, turn * 0.1)
            health.refused(1, turn * 0.1)
        assert health.breakers[1].down

    def test_slowness_counts_against_the_peers(self):
        """Four times its peers' ratio is too slow; the same ratio everywhere is load."""
        health = fleet(slow_ratio=4.0)
        for turn in range(10):
            for index in range(3):
                health.succeeded(index, turn * 0.1, 12.0)
        assert not any(breaker.down for breaker in health.breakers)
        for turn in range(10, 30):
            for index, ratio in ((0, 2.0), (1, 9.0), (2, 2.0)):
                health.succeeded(index, turn * 0.1, ratio)
        assert [breaker.why for breaker in health.breakers] == ["", "slow", ""]

    def test_a_trial_that_is_slow_is_a_bad_one(self):
        """An endpoint left out for slowness comes back only when it is quick again."""
        health = fleet(slow_ratio=4.0)
        for turn in range(10):
            for index, ratio in ((0, 1.0), (1, 9.0), (2, 1.0)):
                health.succeeded(index, turn * 0.1, ratio)
        breaker = health.breakers[1]
        breaker.probed(5.0, well=True)
        assert health.succeeded(1, 5.1, 9.0)
        assert breaker.down
        breaker.probed(10.0, well=True)
        health.succeeded(1, 10.1, 1.0)
        assert health.succeeded(1, 10.2, 1.0)
        assert breaker.state is State.CLOSED
        assert not health.to_json(1, 10.2)["outlier"]

    @pytest.mark.parametrize(("count", "most"), [(1, 0), (2, 1), (3, 1), (4, 2)])
    def test_never_more_than_a_share_is_ejected(self, count, most):
        """However bad the rest, half of a model's endpoints stay."""
        health = fleet(count, failures=10**6, max_ejected=0.5)
        for turn in range(200):
            now_s = turn * 0.01
            health.succeeded(0, now_s)
            for index in range(1, count):
                health.failed(index, now_s, "http_500")
                if turn % 3 == 0:
                    health.succeeded(index, now_s)
        assert sum(breaker.down for breaker in health.breakers) <= most

    def test_old_outcomes_are_forgotten(self):
        """Failures of a minute ago make nobody an outlier today."""
        health = fleet(failures=100)
        for _ in range(20):
            health.failed(1, 0.0, "http_500")
        for _ in range(5):
            health.succeeded(0, 60.0)
            health.succeeded(2, 60.0)
            assert not health.succeeded(1, 60.0)


def test_a_fleet_may_grow():
    """New endpoints begin closed, and those known keep their state."""
    health = fleet(2)
    health.failed(0, 0.0, "connect", unreachable=True)
    health.refit(["m", "m", "n"])
    assert [breaker.down for breaker in health.breakers] == [True, False, False]
    assert health.spared("n") == frozenset()
