"""The delay of a run by one of several branches."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from planner.dispatch.joins import RunDelay, run_delays
from planner.domain.blocks import Segment
from planner.domain.ids import NodeId, RunId, SiteId, WorkflowHash
from planner.domain.run import RunSpec, Task, TaskKind


def fork(*, tool: bool = False) -> RunSpec:
    """Return s -> {a, b} -> j, calls but for b if that is a tool."""

    def task(index: int, preds: tuple[int, ...], kind: TaskKind = "llm") -> Task:
        node = "sabj"[index]
        prompt, tokens = ((Segment(1, 10),), 1) if kind == "llm" else ((), 0)
        site = SiteId(f"{node}#0") if kind == "llm" else None
        return Task(
            index=index, node=NodeId(node), kind=kind, site=site, preds=preds, prompt=prompt,
            output_tokens=tokens,
        )  # fmt: skip

    second = task(2, (0,), "tool" if tool else "llm")
    return RunSpec(
        run_id=RunId("r"),
        workflow="w",
        workflow_hash=WorkflowHash("h"),
        arrival_s=0.0,
        tasks=(task(0, ()), task(1, (0,)), second, task(3, (1, 2))),
    )


def fixed(run: RunSpec) -> Sequence[float]:
    """Take 1, 2, 5 and 1 s."""
    return (1.0, 2.0, 5.0, 1.0)


def test_a_call_delays_its_run_by_what_exceeds_its_allowance() -> None:
    """Expected to take 2 s, allowed 1 or 3: 4 s delay the run by (3 + 1) / 2, 1 s by none."""
    delay = RunDelay([2.0, 2.0], [1.0, 3.0])
    times = np.array([0.0, 1.0, 2.0, 4.0, 32.0, 1000.0])
    assert delay.of(times).tolist() == pytest.approx([0.0, 0.0, 0.5, 2.0, 30.0, 998.0])


def test_lengths_that_vary_are_late_more_often() -> None:
    """Calls of 1 or 3 s allowed 2 s: at the expected 2 s they delay the run by half a second."""
    delay = RunDelay([1.0, 3.0], [2.0, 2.0])
    assert delay.of(np.array([2.0])).tolist() == [0.5]


def test_delays_are_convex_and_end_with_a_slope_of_one() -> None:
    """Each second more costs at least as much as the one before."""
    rng = np.random.default_rng(1)
    delay = RunDelay(rng.lognormal(0, 1, 50).tolist(), rng.lognormal(1, 1, 50).tolist())
    times = np.linspace(0.0, 40.0, 400)
    slopes = np.diff(delay.of(times)) / np.diff(times)
    assert (np.diff(slopes) > -1e-9).all()
    far = delay.of(np.array([5e4, 5e4 + 1.0]))
    assert far[1] - far[0] == pytest.approx(1.0)


def test_only_sites_with_an_allowance_have_delays() -> None:
    """Calls on every chain are left to their own time; tools count, but have no site."""
    assert set(run_delays([fork()], fixed)) == {"a#0", "b#0"}
    delays = run_delays([fork(tool=True)], fixed)
    assert set(delays) == {"a#0"}
    # The tool's five seconds are the same on every endpoint.
    assert delays["a#0"].of(np.array([4.0, 8.0])).tolist() == pytest.approx([0.0, 3.0])


def test_delays_follow_the_seed() -> None:
    """The same seed gives the same delays, another one others."""
    times = np.array([1.0, 3.0])
    first, again, other = (
        run_delays([fork()], fixed, seed=seed)["a#0"].of(times).tolist() for seed in (0, 0, 1)
    )
    assert first == again != other
