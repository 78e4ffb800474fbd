"""What-if from Python: files or objects in, records out that notebooks can show.

::

    import almanac

    now = almanac.whatif("fleet.yaml", "workflow.json", "estimates.json", rate=1.0,
                         changes=["+1xh100", "load 1.5"], target="p95=20")
    now.answers[0].figures["p95_s"], now.to_frame()
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from planner.domain.errors import InvalidInput
from planner.domain.estimates import EstimateTable, load_estimates
from planner.domain.fleet import Fleet, load_fleet
from planner.domain.trace import load_trace
from planner.domain.workflow import Workflow, load_workflow
from planner.whatif import whynot as reasons
from planner.whatif.cheapest import cheapest_fleet
from planner.whatif.diff import Diff, compare_files
from planner.whatif.effort import Effort
from planner.whatif.grid import Grid, GridResult, load_grid, run_grid
from planner.whatif.notation import parse_scenario
from planner.whatif.prices import marginal_values
from planner.whatif.question import Question, Stream, Target
from planner.whatif.regret import Regret, hindsight
from planner.whatif.scenarios import WhatIf, what_if
from planner.whatif.store import Store

__all__ = [
    "Effort",
    "cheapest_fleet",
    "diff",
    "marginal_values",
    "question",
    "regret",
    "whatif",
    "whatif_grid",
    "why_not",
]

PathLike = str | Path


def question(
    fleet: PathLike | Fleet,
    workflow: PathLike | Workflow | Sequence[PathLike | Workflow],
    estimates: PathLike | EstimateTable | None = None,
    *,
    rate: float | Sequence[float],
    tenant: Sequence[str] = (),
    deadline_s: float | Sequence[float | None] | None = None,
    truth: PathLike | EstimateTable | None = None,
    policy: str = "marginal_cost",
    retention: str = "leave",
    burst_cv: float = 1.0,
) -> Question:
    """Return a question.

    Parameters
    ----------
    fleet, workflow, estimates, truth
        Files or what is in them; several workflows arrive together.
    rate
        Runs per second, one for each workflow.
    tenant
        Whose runs they are, one for each workflow; all ``default`` if empty.
    deadline_s
        Seconds a run may take, one for all workflows or one for each.
    policy, retention, burst_cv
        See `Question`.

    Raises
    ------
    InvalidInput
        If a file cannot be read, or there are more or fewer of one thing than of another.
    """
    graphs = [workflow] if isinstance(workflow, (str, Path, Workflow)) else list(workflow)
    rates = [rate] if isinstance(rate, (int, float)) else list(rate)
    tenants = list(tenant) or ["default"] * len(graphs)
    deadlines = (
        [deadline_s] * len(graphs)
        if deadline_s is None or isinstance(deadline_s, (int, float))
        else list(deadline_s)
    )
    if len(deadlines) == 1:
        deadlines *= len(graphs)
    for given, name in ((rates, "rate"), (tenants, "tenant"), (deadlines, "deadline")):
        if len(given) != len(graphs):
            raise InvalidInput(
                f"{len(given)} values for {len(graphs)} workflows",
                where=name,
                remedy="give one for each workflow, in the same order",
            )
    return Question(
        fleet=fleet if isinstance(fleet, Fleet) else load_fleet(Path(fleet)),
        streams=tuple(
            Stream(
                workflow=graph if isinstance(graph, Workflow) else load_workflow(Path(graph)),
                rate_rps=one,
                tenant=whose,
                deadline_s=within,
            )
            for graph, one, whose, within in zip(graphs, rates, tenants, deadlines, strict=True)
        ),
        estimates=_estimates(estimates) or EstimateTable(),
        truth=_estimates(truth),
        policy=policy,
        retention=retention,
        burst_cv=burst_cv,
    )


def _estimates(given: PathLike | EstimateTable | None) -> EstimateTable | None:
    return (
        given if given is None or isinstance(given, EstimateTable) else load_estimates(Path(given))
    )


def _store(folder: PathLike | None, jobs: int, progress: Callable[[str], object] | None) -> Store:
    return Store(
        folder=None if folder is None else Path(folder),
        jobs=jobs,
        progress=progress or (lambda _: None),
    )


def _target(given: str | Target | None) -> Target | None:
    return Target.parse(given) if isinstance(given, str) else given


def whatif(
    fleet: PathLike | Fleet,
    workflow: PathLike | Workflow | Sequence[PathLike | Workflow],
    estimates: PathLike | EstimateTable | None = None,
    *,
    changes: Sequence[str] = (),
    target: str | Target | None = None,
    effort: Effort | None = None,
    folder: PathLike | None = None,
    jobs: int = 1,
    progress: Callable[[str], object] | None = None,
    **asked: Any,
) -> WhatIf:
    """Return what is expected as things are, and after each change.

    Parameters
    ----------
    changes
        Each a text as in `planner.whatif.changes`; commas join changes made together.
    target
        ``p95=8`` and the like, judged for each answer.
    effort
        Seeds, runs and what is bounded.
    folder
        Where results are kept; memory if None.
    jobs
        Processes.
    asked
        ``rate`` and the others of `question`.
    """
    return what_if(
        question(fleet, workflow, estimates, **asked),
        [parse_scenario(one) for one in changes],
        target=_target(target),
        effort=effort,
        store=_store(folder, jobs, progress),
    )


def whatif_grid(
    asked: Question,
    grid: PathLike | Grid,
    *,
    target: str | Target | None = None,
    effort: Effort | None = None,
    folder: PathLike | None = None,
    jobs: int = 1,
    progress: Callable[[str], object] | None = None,
) -> GridResult:
    """Return the answers of a grid of changes, loads and policies; see `planner.whatif.grid`."""
    return run_grid(
        asked,
        grid if isinstance(grid, Grid) else load_grid(Path(grid)),
        target=_target(target),
        effort=effort,
        store=_store(folder, jobs, progress),
    )


def why_not(
    asked: Question,
    target: str | Target,
    *,
    changes: Sequence[str] | None = None,
    most: int = 2,
    jobs: int = 1,
) -> reasons.WhyNot:
    """Return why a target is missed and the smallest changes that meet it."""
    parsed = None
    if changes is not None:
        parsed = [one for text in changes for one in parse_scenario(text).changes]
    wanted = Target.parse(target) if isinstance(target, str) else target
    return reasons.why_not(asked, wanted, changes=parsed, most=most, store=Store(jobs=jobs))


def diff(before: PathLike, after: PathLike) -> Diff:
    """Return the differences of two plans, dispatch tables or fleet files."""
    return compare_files(Path(before), Path(after))


def regret(
    trace: PathLike,
    fleet: PathLike | Fleet,
    workflow: PathLike | Workflow | Sequence[PathLike | Workflow] = (),
    estimates: PathLike | EstimateTable | None = None,
    *,
    last: int = 80,
    steps: int = 60,
    seed: int = 0,
) -> Regret:
    """Return where the excess of recorded runs comes from; see `planner.whatif.regret`."""
    graphs = [workflow] if isinstance(workflow, (str, Path, Workflow)) else list(workflow)
    return hindsight(
        load_trace(Path(trace)),
        fleet if isinstance(fleet, Fleet) else load_fleet(Path(fleet)),
        [one if isinstance(one, Workflow) else load_workflow(Path(one)) for one in graphs],
        _estimates(estimates),
        last=last,
        steps=steps,
        seed=seed,
    )
