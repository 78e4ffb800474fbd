"""What clients say of urgency and length."""

from __future__ import annotations

import pytest
from multidict import CIMultiDict

from runtime.hints import (
    HINT_SOURCES,
    NO_HINTS,
    Hints,
    deadline_s,
    head_start_s,
    read_hints,
    stepping_back,
)


def hints(headers=None, payload=None, sources=HINT_SOURCES):
    return read_hints(CIMultiDict(headers or {}), payload or {}, sources)


@pytest.mark.parametrize(
    ("headers", "payload", "expected"),
    [
        ({}, {}, NO_HINTS),
        (
            {
                "X-Almanac-Priority": "2",
                "x-almanac-deadline-s": "1.5",
                "x-almanac-output-tokens": "9",
            },
            {},
            Hints(priority=2, run_deadline_s=1.5, output_tokens=9),
        ),
        (
            {},
            {"nvext": {"agent_hints": {"priority": 3, "strict_priority": 1, "osl": 20}}},
            Hints(priority=3, strict_priority=1, output_tokens=20),
        ),
        (
            {},
            {
                "vllm_xargs": {
                    "agentic_context": {
                        "priority": -1, "deadline_seconds": 30, "expected_output_length": 64,
                    }
                }
            },
            Hints(priority=-1, deadline_s=30.0, output_tokens=64),
        ),
        (
            {"x-llm-d-slo-ttft-ms": "250", "x-slo-tpot-ms": "20"},
            {},
            Hints(ttft_s=0.25, tpot_s=0.02),
        ),
        ({"x-smg-priority": "High"}, {}, Hints(priority=1)),
    ],
)  # fmt: skip
def test_hints_of_all_dialects(headers, payload, expected):
    """Each dialect's words come out as the same record, in seconds and tokens."""
    assert hints(headers, payload) == expected


def test_the_first_source_wins_value_by_value():
    """Sources are read in the order configured, and those left out are not read."""
    headers = {"x-smg-priority": "5", "x-almanac-priority": "1", "x-almanac-output-tokens": "7"}
    assert hints(headers) == Hints(priority=1, output_tokens=7)
    assert hints(headers, sources=("smg", "almanac")) == Hints(priority=5, output_tokens=7)
    assert hints(headers, sources=()) is NO_HINTS


@pytest.mark.parametrize("value", ["soon", "", "nan", "inf", "-1", "0", "1e99", True, [1], {}])
def test_wrong_hints_are_ignored_and_named(value):
    """A length or deadline that makes no sense is left out and its name is told."""
    context = {"expected_output_length": value, "deadline_seconds": value, "priority": 4}
    found = hints(payload={"vllm_xargs": {"agentic_context": context}})
    assert found.priority == 4
    assert found.output_tokens is None
    assert found.deadline_s is None
    assert set(found.ignored) == {
        "agentic_context.expected_output_length", "agentic_context.deadline_seconds",
    }  # fmt: skip


@pytest.mark.parametrize(
    "payload", [{"nvext": 3}, {"nvext": {"agent_hints": []}}, {"vllm_xargs": "x"}]
)
def test_containers_of_the_wrong_kind_hold_nothing(payload):
    """A container that is no object is as good as absent."""
    assert hints(payload=payload) is NO_HINTS


def test_higher_is_more_urgent_and_waiting_makes_up():
    """A class is worth a minute, a nearer deadline comes first, a strict tier before everything."""
    usual, urgent = head_start_s(NO_HINTS), head_start_s(Hints(priority=1))
    assert (usual, urgent) == (0.0, 60.0)
    near, far = head_start_s(Hints(deadline_s=10.0)), head_start_s(Hints(deadline_s=200.0))
    assert near > far > usual
    assert head_start_s(Hints(deadline_s=5000.0)) == usual
    # A minute into the run, 50 s are left of its 110, which is as near as 50 s from now.
    late = head_start_s(Hints(run_deadline_s=110.0), age_s=60.0)
    assert late == head_start_s(Hints(deadline_s=50.0), age_s=60.0) == 250.0
    assert deadline_s(Hints(run_deadline_s=110.0, deadline_s=10.0), age_s=60.0) == 70.0
    assert deadline_s(NO_HINTS) is None
    assert head_start_s(Hints(strict_priority=1)) > head_start_s(Hints(priority=1000))
    assert head_start_s(Hints(priority=-2)) < usual


def test_stepping_back_leaves_deadlines_and_lengths():
    """What is more urgent than usual becomes usual; what is less stays so."""
    urgent = Hints(priority=5, strict_priority=2, deadline_s=3.0, output_tokens=7)
    expected = Hints(priority=0, strict_priority=0, deadline_s=3.0, output_tokens=7)
    assert stepping_back(urgent) == expected
    assert stepping_back(Hints(priority=-2)) == Hints(priority=-2)
    assert stepping_back(NO_HINTS) is NO_HINTS
