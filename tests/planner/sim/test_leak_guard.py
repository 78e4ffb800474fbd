"""The leak guard: no policy's decisions depend on anything that has not been revealed."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies import POLICIES, Choice, Planned, Policy, make_policy
from planner.dispatch.policies.base import Ready, Wait
from planner.dispatch.table import DispatchTable
from planner.domain.blocks import Segment
from planner.domain.estimates import EstimateTable, load_estimates
from planner.domain.files import data_dir
from planner.domain.fleet import Fleet, load_fleet
from planner.domain.run import RunSpec, Task
from planner.domain.trace import CallRecord, RunRecord, ToolRecord, TraceRecord
from planner.domain.workflow import load_workflow
from planner.sim.companions import companions_of
from planner.sim.kernel import simulate
from planner.sim.workload import poisson_arrivals, sampled_workload
from planner.solve.solver import Budget, Demand
from planner.solve.tables import mix_table

CUT_S = 20.0
"""What happens before this instant is revealed; everything after it is changed."""


Log = list[tuple[float, str, Choice | Wait]]


def logged(policy: Policy) -> Log:
    """Have a policy write down what it decides and when; it still observes and orders itself."""
    log: Log = []
    choose = policy.choose

    def choose_and_log(ready: Ready) -> Choice | Wait:
        choice = choose(ready)
        log.append((ready.now_s, ready.call.call_id, choice))
        return choice

    policy.choose = choose_and_log  # type: ignore[method-assign]
    return log


@cache
def setting() -> tuple[Fleet, EstimateTable, Forecaster, DispatchTable]:
    fleet = load_fleet(data_dir() / "fleets" / "demo.yaml")
    workflow = load_workflow(data_dir() / "demo" / "research.json")
    estimates = load_estimates(data_dir() / "demo" / "truth.json")
    table = mix_table(
        [Demand(workflow=workflow, rate_rps=0.9)],
        fleet,
        estimates,
        budget=Budget.reproducible(1.0, relative_gap=0.1),
    )
    return fleet, estimates, Forecaster(estimates, [workflow]), table


def workload() -> tuple[RunSpec, ...]:
    workflow = load_workflow(data_dir() / "demo" / "research.json")
    truth = setting()[1].workflows[workflow.content_hash]
    times = poisson_arrivals(1.2, 40, np.random.default_rng(5))
    return sampled_workload(workflow, truth, times, seed=5)


def decisions(name: str, runs: Sequence[RunSpec]) -> tuple[Log, list[TraceRecord]]:
    fleet, _, forecaster, table = setting()
    policy = make_policy(name, seed=1)
    if isinstance(policy, Planned):
        policy.table = table
    own = companions_of(policy)
    log = logged(policy)
    records = simulate(
        runs, fleet, policy, forecaster, seed=2, retention=own.retention, eviction=own.eviction
    )
    return log, records


def mutate(run: RunSpec, records: Sequence[TraceRecord], rng: np.random.Generator) -> RunSpec:
    """Return the run with everything changed that ``records`` do not show before the cut."""
    if run.arrival_s > CUT_S:
        return replace(run, arrival_s=run.arrival_s + float(rng.uniform(0, 5)))
    sent = {
        record.call_id: record
        for record in records
        if isinstance(record, CallRecord) and record.ready_s <= CUT_S
    }
    tools: dict[str, list[ToolRecord]] = {}
    for record in records:
        if isinstance(record, ToolRecord) and record.run_id == run.run_id:
            tools.setdefault(record.node, []).append(record)
    tasks: list[Task] = []
    for task in run.tasks:
        if task.kind == "tool":
            record = tools[task.node][task.visit]
            if record.finish_s > CUT_S:
                task = replace(task, delay_s=task.delay_s + float(rng.uniform(1, 30)))
        else:
            call = sent.get(f"{run.run_id}/{task.index}")
            if call is None:
                # Not ready yet: another prompt, another answer, after another delay.
                prompt = (Segment(int(rng.integers(1 << 60)), int(rng.integers(50, 4000))),)
                task = replace(
                    task,
                    prompt=prompt,
                    output_tokens=int(rng.integers(1, 900)),
                    delay_s=float(rng.uniform(0, 3)),
                )
            elif call.finish_s is None or call.finish_s > CUT_S:
                # In flight: it has not stopped yet, so it can only turn out longer.
                task = replace(task, output_tokens=task.output_tokens + int(rng.integers(1, 500)))
        tasks.append(task)
    # The branches taken after the cut change too: the run may end at any point not yet reached.
    done = {t.index for t in tasks if t.kind == "llm" and f"{run.run_id}/{t.index}" in sent}
    last = max(done, default=0)
    if len(tasks) > last + 2 and rng.random() < 0.5:
        tasks = tasks[: last + 1 + int(rng.integers(1, len(tasks) - last))]
    return replace(run, tasks=tuple(tasks))


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_decisions_do_not_depend_on_what_is_not_revealed(name: str) -> None:
    """Changing all future lengths, tool times, branches and arrivals changes no past decision."""
    runs = workload()
    before, records = decisions(name, runs)
    for seed in range(2):
        rng = np.random.default_rng(seed)
        after, changed = decisions(name, [mutate(run, records, rng) for run in runs])
        past = [entry for entry in before if entry[0] <= CUT_S]
        assert len(past) > 50
        assert past == [entry for entry in after if entry[0] <= CUT_S]
        # The change was real: the future went another way.
        assert ends(records) != ends(changed)


def ends(records: Sequence[TraceRecord]) -> list[float]:
    return [record.finish_s for record in records if isinstance(record, RunRecord)]


class Cheat:
    """Looks at an engine-side fact: a policy as the guard must catch it."""

    name = "cheat"

    def __init__(self, runs: Sequence[RunSpec]) -> None:
        self.outputs = {
            f"{run.run_id}/{task.index}": task.output_tokens for run in runs for task in run.tasks
        }

    def choose(self, ready: Ready) -> Choice:
        return Choice(self.outputs[ready.call.call_id] % len(ready.candidates), "cheat")


def test_the_guard_catches_a_policy_that_looks_ahead() -> None:
    """A policy that reads the answer's length decides differently when it changes."""
    fleet, _, forecaster, _ = setting()
    runs = workload()
    policy = Cheat(runs)
    first = logged(policy)
    records = simulate(runs, fleet, policy, forecaster)
    other = [mutate(run, records, np.random.default_rng(0)) for run in runs]
    policy = Cheat(other)
    second = logged(policy)
    simulate(other, fleet, policy, forecaster)
    assert [e for e in first if e[0] <= CUT_S] != [e for e in second if e[0] <= CUT_S]
