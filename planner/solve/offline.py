"""Known runs on a fleet as an exact scheduling question: small cases with everything revealed.

What a clairvoyant could do with these runs, if an endpoint always worked at the speed of a given
load level: a call holds a slot for prefill and decode, and the prefill lane for its prefill. The
prefix cache is left out (every prompt is computed whole), and speed does not follow the batch;
both are stated limits of the exact model.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.domain.errors import Infeasible
from planner.domain.fleet import Endpoint, Fleet
from planner.domain.plan import PLAN_TICK_S
from planner.domain.run import RunSpec, Task
from planner.domain.schedule import Activity, Mode, ScheduleQuestion
from planner.domain.units import duration_to_ticks

__all__ = ["offline_question"]


def offline_question(
    runs: Sequence[RunSpec], fleet: Fleet, *, level: int | None = None
) -> ScheduleQuestion:
    """Return the question whose objective is the sum of all finishes of runs, in ticks.

    Subtracting the sum of the arrivals gives the sum of the run latencies. Each run ends with an
    activity of no duration, of weight 1; tasks keep their order within and between runs.

    Parameters
    ----------
    runs
        Realised runs; all lengths, delays and branches count as known.
    fleet
        Endpoints of one model: a task does not say which it asks for.
    level
        Calls side by side that an endpoint's speed is taken for, >= 1; all its slots if None.

    Raises
    ------
    Infeasible
        If a call fits no endpoint.
    """
    activities: list[Activity] = []
    for run in runs:
        offset = len(activities)
        arrival = duration_to_ticks(run.arrival_s, PLAN_TICK_S)
        followed = {pred for task in run.tasks for pred in task.preds}
        activities.extend(
            Activity(
                modes=_modes(task, run, fleet, level),
                preds=tuple(offset + pred for pred in task.preds),
                release=arrival,
            )
            for task in run.tasks
        )
        ends = [offset + task.index for task in run.tasks if task.index not in followed]
        activities.append(
            Activity(
                modes=(Mode(endpoint=None, ticks=0),),
                preds=tuple(ends),
                release=arrival,
                weight=1,
            )
        )
    return ScheduleQuestion(
        slots=tuple(endpoint.max_num_seqs for endpoint in fleet.endpoints),
        activities=tuple(activities),
        makespan_weight=0,
    )


def _modes(task: Task, run: RunSpec, fleet: Fleet, level: int | None) -> tuple[Mode, ...]:
    if task.site is None:
        return (Mode(endpoint=None, ticks=duration_to_ticks(task.delay_s, PLAN_TICK_S)),)
    size = task.prompt_tokens + task.output_tokens
    modes = tuple(
        _mode(task, i, endpoint, level or endpoint.max_num_seqs)
        for i, endpoint in enumerate(fleet.endpoints)
        if size <= min(endpoint.kv_tokens, endpoint.max_model_len)
    )
    if not modes:
        raise Infeasible(
            f"call {task.index} of run {run.run_id!r} needs {size} tokens; no endpoint holds them"
        )
    return modes


def _mode(task: Task, position: int, endpoint: Endpoint, level: int) -> Mode:
    row = endpoint.latency
    context = task.prompt_tokens + task.output_tokens / 2
    prefill = duration_to_ticks(row.prefill_s(task.prompt_tokens), PLAN_TICK_S)
    decode_s = task.output_tokens * row.decode_step_s(level, level * context)
    decode = duration_to_ticks(decode_s, PLAN_TICK_S)
    return Mode(endpoint=position, ticks=prefill + decode, lane_ticks=prefill)
