"""One of three endpoints goes bad in front of clients that never stop: what they notice of it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from runtime.mock.scenarios import SCENARIOS, Load, play

LIMITS = {
    "first_byte_floor_s": 0.3,
    "stall_floor_s": 0.4,
    "health_interval_s": 0.1,
    "breaker_pause_s": 0.05,
    "probe_interval_s": 0.05,
}
# Far slower than the scenario has it, so that a busy machine does not hide the difference; and
# nothing but slowness gives it away.
CRAWL = {"kind": "straggler", "factor": 60}
PATIENT = {**LIMITS, "first_byte_floor_s": 10.0, "stall_floor_s": 10.0}
NOTICED_S = 3.0
"""Within which a call that is cut off is told so: the limits above, on a slow machine."""


@pytest.mark.parametrize("name", sorted(SCENARIOS))
async def test_one_bad_endpoint_of_three(stack, until, name):
    """Calls without a first byte succeed, cut ones hear why, and the endpoint is left alone."""
    slow = name == "slow"
    scenario = replace(SCENARIOS[name], fault=CRAWL) if slow else SCENARIOS[name]
    # Slowness shows only against the usual, which takes calls to know.
    warm_calls, output_tokens = (150, 4) if slow else (20, 16)
    async with stack(
        3,
        policy="least_load",
        config=PATIENT if slow else LIMITS,
        dilation=4.0,
        mock_config={"stream_interval": 8},
    ) as s:

        async def attempts():
            return s.control.metrics.selected.get("e1")

        async def detected():
            await until(lambda: not s.control.breakers[1].takes_calls, 0.01)

        score = await play(
            scenario,
            Load(
                model="m",
                output_tokens=output_tokens,
                warm_calls=warm_calls,
                later_calls=200,
            ),
            router_url=s.gateway.address,
            fault_url=s.mock.addresses[0],
            victim="e1",
            attempts=attempts,
            detected=detected,
        )
        assert (score.refused, score.lost, score.broken) == (0, 0, 0), score.details
        assert score.error_events == 0 or scenario.cuts
        assert score.slowest_error_s < NOTICED_S
        assert score.later_share < 0.02
        assert s.control.router.in_flight == 0
        assert s.control.admission.in_flight == 0
