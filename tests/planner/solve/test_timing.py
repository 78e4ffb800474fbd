"""Chains of runs, and what moves of single calls would change."""

from __future__ import annotations

import numpy as np
import pytest

from planner.cli.bench_questions import random_fleet, random_workflow
from planner.domain.estimates import EstimateTable
from planner.graph.analysis import completion_s
from planner.graph.sampling import scenarios
from planner.solve.arrays import Ints
from planner.solve.descent import Descent
from planner.solve.instance import Instance, build_instance
from planner.solve.timing import Timing, build_timing
from tests.planner.graph.research import research_estimate, research_workflow


def layered() -> tuple[Instance, Timing]:
    """Return ten call sites in layers, three scenarios, on five endpoints."""
    rng = np.random.default_rng(0)
    fleet = random_fleet(5, rng)
    workflow, estimates = random_workflow(10, rng)
    runs = scenarios(workflow, estimates.workflows[workflow.content_hash], 3, 0)
    instance = build_instance(workflow, fleet, estimates, runs, arrival_rate_rps=0.2, run_classes=2)
    return instance, build_timing(instance)


def placed(instance: Instance, seed: int) -> tuple[Ints, Ints]:
    """Return a random placement of one class, and levels."""
    rng = np.random.default_rng(seed)
    sites, options = instance.allowed.shape
    grids = [len(grid) for grid in instance.levels]
    return rng.integers(0, options, (1, sites)), rng.integers(0, grids)[np.newaxis]


@pytest.mark.parametrize("seed", range(3))
def test_latencies_are_longest_paths(seed: int) -> None:
    """Loops, branches, joins and delays: latencies over chains are those of the tasks."""
    workflow, estimate = research_workflow(), research_estimate()
    fleet = random_fleet(3, np.random.default_rng(seed))
    runs = scenarios(workflow, estimate, 6, seed)
    table = EstimateTable(workflows={workflow.content_hash: estimate})
    instance = build_instance(workflow, fleet, table, runs, arrival_rate_rps=0.1, run_classes=1)
    timing = build_timing(instance)
    placements, levels = placed(instance, seed)
    warm, keep = (np.random.default_rng(n).random(placements.shape) < 0.5 for n in (seed, 9))
    sums = timing.sums(placements, levels) + timing.extras(placements, warm, keep)
    position = 0
    for s, run in enumerate(runs):
        durations = []
        for _ in run.tasks:
            k, ticks = instance.task_site[position], int(instance.delay_ticks[position])
            if k >= 0:
                m = placements[0, k]
                ticks = int(instance.service_ticks[position, m, levels[0, m]])
                ticks += 0 if warm[0, k] else int(instance.memory.cold_ticks[position, m])
                ticks += 0 if keep[0, k] else int(instance.memory.lost_ticks[position, m])
            durations.append(float(ticks))
            position += 1
        assert timing.latencies(sums)[0, s] == completion_s(run, durations)
        # The longest way through any chain is the latency.
        assert timing.through(sums)[0, timing.scenario == s].max() == timing.latencies(sums)[0, s]


def test_estimates_of_moves_are_exact_in_layers() -> None:
    """Where layers follow each other, the gain of each move is what it changes in truth."""
    instance, timing = layered()
    placements, levels = placed(instance, 1)
    descent = Descent(instance, timing, levels[0], 1e6)
    sums = timing.sums(placements, levels)
    gains = descent.gains(placements[0], sums[0])
    for k, m in np.ndindex(gains.shape):
        moved = placements.copy()
        moved[0, k] = m
        after = timing.latency(timing.sums(moved, levels))
        assert gains[k, m] == timing.latency(sums)[0] - after[0]


def test_descent_improves_within_the_room() -> None:
    """The value returned is that of the placements, which fit and are no worse than before."""
    instance, timing = layered()
    top = np.array([len(grid) - 1 for grid in instance.levels])
    placements = np.vstack([placed(instance, seed)[0] for seed in (2, 3)])
    levels = np.tile(top, (2, 1))
    before = timing.latency(timing.sums(placements, levels)).sum()
    value = Descent(instance, timing, top, 1e7).improve(placements)
    assert value == timing.latency(timing.sums(placements, levels)).sum() < before
    load = np.zeros(top.size, dtype=np.int64)
    sites = np.arange(placements.shape[1])
    for row in placements:
        np.add.at(load, row, instance.class_load[sites, row, top[row]])
    assert (load <= instance.room[np.arange(top.size), top]).all()
