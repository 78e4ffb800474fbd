"""What what-if answers are held to, measured on the demo fleet (`almanac whatif --demo`).

* the first question is answered within 15 s;
* a grid of 20 scenarios x 5 policies is done within 10 minutes, and goes on where it was when it
  is interrupted half way;
* answers agree with full simulations: on 20 random scenarios the figure of many other seeds lies
  inside the stated interval. An interval of 95 % is meant to miss one in twenty; agreement is
  therefore asked of the 99 % interval, and the count of the 95 % interval is printed beside it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from planner.report.terminal import align
from planner.whatif.asking import ask
from planner.whatif.changes import Scenario
from planner.whatif.demo import demo_question
from planner.whatif.effort import Effort
from planner.whatif.figures import Figure
from planner.whatif.grid import Grid, run_grid
from planner.whatif.notation import parse_scenario
from planner.whatif.question import METRICS, Metric, Question, Target
from planner.whatif.scenarios import what_if
from planner.whatif.store import Store

__all__ = ["GRID", "Bar", "bars_json", "bars_table", "measure_bars", "random_scenarios"]

Timer = Callable[[], float]
Progress = Callable[[str], object]

GRID = Grid(
    scenarios=tuple(
        parse_scenario(text)
        for text in ("", "+1xh100", "-l4, -a10g", "gpu l4=h100", "retention off")
    ),
    loads=(0.5, 0.9, 1.2, 1.5),
    policies=(
        "marginal_cost", "least_expected_finish", "power_of_two", "prefix_affinity", "almanac",
    ),
)  # fmt: skip
"""20 scenarios (five fleets at four loads) under five policies."""
_GRID_EFFORT = Effort(seeds=2, runs=100)
_FULL_SEEDS = 24
_FULL_FROM = 1000
_AGREE = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A measured value and the bar it is held against; None where there is no bar."""

    name: str
    value: float
    unit: str
    bar: float | None = None
    holds: bool | None = None


def measure_bars(jobs: int, timer: Timer, progress: Progress) -> list[Bar]:
    """Measure everything; takes about ten minutes on two cores."""
    return [
        *_first_question(jobs, timer),
        *_grid(jobs, timer, progress),
        *_agreement(jobs, progress),
    ]


def bars_table(bars: Sequence[Bar]) -> str:
    """Return the bars as aligned text."""
    rows = [["figure", "value", "bar", ""]]
    for one in bars:
        verdict = "" if one.holds is None else ("holds" if one.holds else "MISSED")
        bar = "" if one.bar is None else f"{one.bar:g} {one.unit}"
        rows.append([one.name, f"{one.value:.4g} {one.unit}", bar, verdict])
    return align(rows)


def _first_question(jobs: int, timer: Timer) -> list[Bar]:
    started = timer()
    what_if(demo_question(), target=Target.parse("p95=8"), store=Store(jobs=jobs))
    took = timer() - started
    return [Bar(name="first question", value=took, unit="s", bar=15.0, holds=took < 15.0)]


class _Stopped(Exception):
    """Stands for the user's Ctrl-C."""


def _grid(jobs: int, timer: Timer, progress: Progress) -> list[Bar]:
    shown = 0

    def half_way(text: str) -> None:
        nonlocal shown
        progress(text)
        done, _, rest = text.removeprefix("[").partition("/")
        whole = int(rest.partition("]")[0])
        shown = int(done)
        if whole > len(GRID.scenarios) * len(GRID.loads) and 2 * shown >= whole:
            raise _Stopped

    with _scratch() as folder:
        started = timer()
        try:
            run_grid(
                demo_question(), GRID, effort=_GRID_EFFORT,
                store=Store(folder=folder, jobs=jobs, progress=half_way),
            )  # fmt: skip
        except _Stopped:
            progress("interrupted half way; now resumed")
        counted: list[str] = []

        def count(text: str) -> None:
            counted.append(text)
            progress(text)

        result = run_grid(
            demo_question(), GRID, effort=_GRID_EFFORT,
            store=Store(folder=folder, jobs=jobs, progress=count),
        )  # fmt: skip
        took = timer() - started
    cells = len(result.cells)
    return [
        Bar(name="grid of 20 scenarios x 5 policies", value=took / 60, unit="min", bar=10.0,
            holds=took < 600.0 and cells == 100),
        Bar(name="grid: cells answered", value=float(cells), unit="cells", bar=100.0,
            holds=cells == 100),
        Bar(name="grid: simulations done before the interruption and not again",
            value=float(shown), unit="simulations"),
        Bar(name="grid: simulations after it", value=float(len(counted)), unit="simulations"),
    ]  # fmt: skip


@contextmanager
def _scratch() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="almanac-whatif-"))
    try:
        yield folder
    finally:
        # Processes that were interrupted may still be writing their last result.
        shutil.rmtree(folder, ignore_errors=True)


def random_scenarios(question: Question, count: int, seed: int = 0) -> list[tuple[str, Question]]:
    """Return labelled random questions: fleets, loads, policies and retention drawn together."""
    rng = np.random.default_rng(seed)
    fleets = ("", "+1xh100", "+1xl40s", "-l4", "-a10g", "+1xa100, -l40s", "gpu l4=h100")
    policies = ("marginal_cost", "least_expected_finish", "power_of_two")
    made = []
    for _ in range(count):
        parts = (
            str(rng.choice(fleets)),
            f"load {rng.uniform(0.3, 1.3):.2f}",
            f"policy {rng.choice(policies)}",
            f"retention {rng.choice(('lru', 'on', 'off'))}",
        )
        scenario: Scenario = parse_scenario(", ".join(filter(None, parts)))
        made.append((str(scenario), scenario.apply(question)))
    return made


def _agreement(jobs: int, progress: Progress, count: int = 20) -> list[Bar]:
    questions = random_scenarios(demo_question(), count)
    store = Store(jobs=jobs, progress=progress)
    wide = Effort(bounds=(), level=_AGREE)
    stated = ask(questions, wide, store=store)
    usual = ask(questions, Effort(bounds=()), store=store)
    full = ask(questions, Effort(bounds=(), seeds=_FULL_SEEDS, first_seed=_FULL_FROM), store=store)
    bars = []
    for metric in METRICS:
        inside = sum(map(_inside, stated, full, [metric] * count))
        often = sum(map(_inside, usual, full, [metric] * count))
        bars.append(
            Bar(name=f"agreement of {metric}: scenarios inside the 99 % interval",
                value=float(inside), unit=f"of {count}", bar=float(count), holds=inside == count)
        )  # fmt: skip
        bars.append(
            Bar(name=f"agreement of {metric}: inside the 95 % interval", value=float(often),
                unit=f"of {count}")
        )  # fmt: skip
    return bars


def _inside(stated: Any, full: Any, metric: Metric) -> bool:
    one: Figure = stated.figures[metric]
    return one.covers(full.figures[metric].value)


def bars_json(bars: Sequence[Bar]) -> list[dict[str, Any]]:
    """Return the JSON form."""
    return [asdict(one) for one in bars]
