"""Runs a study cell by cell, in parallel, and keeps what is done.

The study folder holds

    forecasts/*.json   learned estimate tables, by mix and fleet
    tables/*.json      dispatch tables, one for all loads of a fleet, mix and forecast
    alone/*.json       latency of each run alone on the idle fleet, by seed
    cells/*.json       one result each, tuning cells included
    clairvoyant/*.json what knowing all lengths gains, by setting and seed
    bounds/*.json      mean latency that no policy beats, by setting and seed

A cell's file is named by a hash of all that its result depends on: setting, policy, variant,
parameters, table, seed, number of runs, and `CODE_SCHEMA`. So an interrupted study goes on where it
was, and studies with common cells share them in one folder. Tuning is replayed from its cells.
"""

from __future__ import annotations

import fnmatch
import gc
import hashlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from joblib import Parallel, delayed

from planner.dispatch.forecast import Forecaster
from planner.dispatch.policies.finish import MarginalCost
from planner.dispatch.table import DispatchTable, Tuning, load_table, save_table
from planner.domain.errors import InvalidInput
from planner.domain.files import atomic_write, read_json
from planner.domain.run import RunSpec
from planner.sim.experiment import Cell, PolicySetup, World, run_cell, tuner, tuning_score_s
from planner.study.ablation import VARIANTS, VariedSetup
from planner.study.clairvoyant import Clairvoyant, estimate
from planner.study.entries import Entry, parse_entry
from planner.study.loads import capacity_rps
from planner.study.measure import CellResult, Texts, measure, standalone_s, texts_of
from planner.study.settings import Setting, workload
from planner.study.studies import Study

__all__ = [
    "CODE_SCHEMA",
    "Outcome",
    "chosen_settings",
    "run_bounds",
    "run_clairvoyant",
    "run_more",
    "run_study",
]

CODE_SCHEMA = 4
"""Raised when a change of the code makes earlier cells incomparable."""
TUNING_SEED = 1000
"""Tuning uses seeds from here on, evaluation from 0, training of forecasts from 5000."""
PLANNED_LOADS = (0.4, 0.6, 0.8, 0.9)
"""Loads that a dispatch table is planned for; it serves every load of its fleet and mix."""
CLAIRVOYANT_RUNS, CLAIRVOYANT_COUNTED = 160, slice(60, 140)
"""Runs of an estimate, and those that count: the fleet is neither empty before nor after them."""
CLAIRVOYANT_SEEDS = 10
"""Gaps of seeds differ by up to 6 % of the mean where endpoints do: two of them tell little."""
BOUND_SEEDS = 2
_BATCHES = 40
"""Batches that a worker gets at least, of many cells."""

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One entry in one setting: its tuned setup and a result per seed."""

    setting: Setting
    entry: Entry
    setup: PolicySetup
    results: Mapping[int, CellResult]

    @property
    def policy(self) -> str:
        """Its name in tables."""
        return self.entry.label


@dataclass(frozen=True, slots=True, kw_only=True)
class _Job:
    """A cell, self-contained: a worker process builds the rest."""

    setting: Setting
    setup: PolicySetup
    seed: int
    runs: int
    folder: Path
    data: Path | None

    @property
    def variant(self) -> str | None:
        return self.setup.variant if isinstance(self.setup, VariedSetup) else None

    @property
    def key(self) -> str:
        document = {
            "schema": CODE_SCHEMA,
            "setting": _content(self.setting),
            "policy": self.setup.policy,
            "variant": self.variant,
            "parameters": {k: repr(v) for k, v in sorted(self.setup.shown_parameters.items())},
            "table": self.setup.table.version if self.setup.table else None,
            "seed": self.seed,
            "runs": self.runs,
        }
        return _hash(document)

    @property
    def file(self) -> Path:
        return self.folder / "cells" / f"{self.key}.json"


def chosen_settings(study: Study, patterns: str | None) -> tuple[Setting, ...]:
    """Return the settings whose name fits one of some patterns (``*`` and ``?``), all for None.

    Parameters
    ----------
    patterns
        Separated by commas.

    Raises
    ------
    InvalidInput
        If nothing fits one of them.
    """
    if patterns is None:
        return study.settings
    chosen: set[Setting] = set()
    for pattern in patterns.split(","):
        fitting = [one for one in study.settings if fnmatch.fnmatch(one.name, pattern.strip())]
        if not fitting:
            raise InvalidInput(
                f"{pattern!r} fits no setting",
                where="--settings",
                remedy=f"names look like {study.settings[0].name}",
            )
        chosen.update(fitting)
    return tuple(one for one in study.settings if one in chosen)


def run_study(
    study: Study,
    folder: Path,
    *,
    jobs: int = 2,
    data: Path | None = None,
    resume: bool = True,
    progress: Progress = lambda _: None,
) -> list[Outcome]:
    """Tune and run every policy in every setting; return the outcomes, policy within setting.

    Parameters
    ----------
    folder
        The study folder; made if absent.
    jobs
        Processes, >= 1.
    data
        Folder of the public datasets, for recorded arrivals.
    resume
        Whether to believe the cells that are there already.

    Raises
    ------
    InvalidInput
        If a policy or a setting is unknown, or data is missing.
    """
    entered = {
        setting: [parse_entry(text) for text in study.policies_in(setting)]
        for setting in study.settings
    }
    for setting in study.settings:
        workload(setting, 0, 1, data=data)  # missing data is no news for the second hour
    for name in ("forecasts", "tables", "alone", "cells"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    runner = _Runner(folder=folder, jobs=jobs, data=data, resume=resume, progress=progress)
    with Parallel(n_jobs=jobs, return_as="generator_unordered") as pool:
        # What cells share is made first and once: two processes must not both train it.
        shared: dict[tuple[str, ...], list[tuple[Setting, list[Entry]]]] = {}
        for setting, entries in entered.items():
            key = setting.fleet, setting.kv, str(setting.slots), setting.mix
            shared.setdefault(key, []).append((setting, entries))
        for number, name in enumerate(pool(delayed(_prepare)(g, folder) for g in shared.values())):
            progress(f"[{number + 1}/{len(shared)}] forecasts and plans for {name}")
        setups = [
            (setting, one, _setup(setting, one, folder))
            for setting, entries in entered.items()
            for one in entries
        ]
        runner.pool = pool
        evaluated = runner.tuned(setups, study) if study.tuned else setups
        seeds = range(study.seeds)
        results = iter(runner.evaluated([(s, setup) for s, _, setup in evaluated], seeds, study))
        return [
            Outcome(
                setting=setting,
                entry=entry,
                setup=setup,
                results={seed: next(results) for seed in seeds},
            )
            for setting, entry, setup in evaluated
        ]


def run_more(
    study: Study,
    outcomes: Sequence[Outcome],
    chosen: Sequence[Outcome],
    folder: Path,
    *,
    jobs: int = 2,
    data: Path | None = None,
    resume: bool = True,
    progress: Progress = lambda _: None,
) -> list[Outcome]:
    """Run some outcomes on the study's further seeds; return all, in their order.

    Parameters
    ----------
    chosen
        Of ``outcomes``.
    folder, jobs, data, resume
        See `run_study`.
    """
    seeds = range(study.seeds, study.seeds + study.more_seeds)
    with Parallel(n_jobs=jobs, return_as="generator_unordered") as pool:
        runner = _Runner(
            folder=folder, jobs=jobs, data=data, resume=resume, progress=progress, pool=pool
        )
        pairs = [(one.setting, one.setup) for one in chosen]
        results = iter(runner.evaluated(pairs, seeds, study))
    grown = {
        (one.setting, one.policy): replace(
            one, results={**one.results, **{seed: next(results) for seed in seeds}}
        )
        for one in chosen
    }
    return [grown.get((one.setting, one.policy), one) for one in outcomes]


def run_clairvoyant(
    study: Study,
    outcomes: Sequence[Outcome],
    folder: Path,
    *,
    jobs: int = 2,
    data: Path | None = None,
    progress: Progress = lambda _: None,
) -> dict[Setting, list[Clairvoyant]]:
    """Return the clairvoyant estimates of a study that asks for them, by setting.

    They are the slow part of a study; each is kept as a file, as cells are. What they save is
    saved from marginal cost as tuned in the setting, by default where it takes no part.
    """
    if not study.clairvoyant_steps:
        return {}
    (folder / "clairvoyant").mkdir(parents=True, exist_ok=True)
    usual = MarginalCost().theta
    thetas = {
        one.setting: one.setup.parameters.get("theta", usual)
        for one in outcomes
        if one.entry.policy == MarginalCost.name
    }
    wanted = [(one, seed) for one in study.settings for seed in range(CLAIRVOYANT_SEEDS)]
    pool = Parallel(n_jobs=jobs, return_as="generator")
    found: dict[Setting, list[Clairvoyant]] = {}
    done = pool(
        delayed(_clairvoyant)(
            setting, seed, thetas.get(setting, usual), study.clairvoyant_steps, folder, data
        )
        for setting, seed in wanted
    )
    started = time.monotonic()
    for number, ((setting, seed), result) in enumerate(zip(wanted, done, strict=True), start=1):
        left_s = (time.monotonic() - started) / number * (len(wanted) - number)
        progress(
            f"[{number}/{len(wanted)}] clairvoyant {setting.name}, seed {seed}: saves "
            f"{result.gap:.1%}; {_span(left_s)} left"
        )
        found.setdefault(setting, []).append(result)
    return found


def _clairvoyant(
    setting: Setting, seed: int, theta: float, steps: int, folder: Path, data: Path | None
) -> Clairvoyant:
    counted = CLAIRVOYANT_COUNTED
    among = [CLAIRVOYANT_RUNS, counted.start, counted.stop]
    key = _hash([CODE_SCHEMA, _content(setting), seed, theta, steps, among])
    file = folder / "clairvoyant" / f"{key}.json"
    if not file.exists():
        runs = _workload(setting, seed, CLAIRVOYANT_RUNS, data)
        world, graphs = _world(setting, folder), setting.make_mix().workflows
        with _no_collection():
            found = estimate(
                runs, world, graphs, theta=theta, steps=steps, seed=seed, counted=counted
            )
        _write(file, asdict(found))
    return Clairvoyant(**read_json(file, what="clairvoyant estimate"))


def run_bounds(
    study: Study,
    folder: Path,
    *,
    jobs: int = 2,
    data: Path | None = None,
) -> dict[Setting, dict[int, float]]:
    """Return the mean latency, s, that no policy beats, by setting and seed, of a few seeds.

    Of whole workloads, warm-up included; see `planner.solve.workload_bounds`. Closed loops have
    none: when their runs arrive is up to the policy.
    """
    if not study.bounds:
        return {}
    (folder / "bounds").mkdir(parents=True, exist_ok=True)
    wanted = [
        (one, seed)
        for one in study.settings
        if one.arrivals != "closed"
        for seed in range(min(BOUND_SEEDS, study.seeds))
    ]
    pool = Parallel(n_jobs=jobs, return_as="generator")
    done = pool(delayed(_bound_s)(one, seed, study.runs, folder, data) for one, seed in wanted)
    found: dict[Setting, dict[int, float]] = {}
    for (setting, seed), bound_s in zip(wanted, done, strict=True):
        found.setdefault(setting, {})[seed] = bound_s
    return found


def _bound_s(setting: Setting, seed: int, runs: int, folder: Path, data: Path | None) -> float:
    file = folder / "bounds" / f"{_hash([CODE_SCHEMA, _content(setting), seed, runs])}.json"
    if not file.exists():
        from planner.solve.workload_bounds import workload_bound

        specs = workload(setting, seed, runs, data=data)
        _write(file, {"mean_s": workload_bound(specs, setting.make_fleet()).mean_s})
    return float(read_json(file, what="bound of a workload")["mean_s"])


@dataclass(slots=True, kw_only=True)
class _Runner:
    folder: Path
    jobs: int
    data: Path | None
    resume: bool
    progress: Progress
    pool: Parallel | None = None

    def tuned(
        self, setups: Sequence[tuple[Setting, Entry, PolicySetup]], study: Study
    ) -> list[tuple[Setting, Entry, PolicySetup]]:
        """Return the setups with their parameters tuned.

        All go through their parameters side by side: one alone would leave processes idle at the
        end of each parameter, and have the runs made again for each policy.
        """
        best = [setup for _, _, setup in setups]
        tuners = {
            place: tuner(setup, grid=entry.grid) for place, (_, entry, setup) in enumerate(setups)
        }
        scores: dict[int, Any] = dict.fromkeys(tuners)
        for number in itertools.count(1):
            asked: dict[int, list[PolicySetup]] = {}
            for place, one in list(tuners.items()):
                try:
                    asked[place] = one.send(scores[place])
                except StopIteration as end:
                    best[place] = end.value
                    del tuners[place]
            if not asked:
                break
            cells = [
                _Job(
                    setting=setups[place][0], setup=setup, seed=TUNING_SEED + k,
                    runs=study.tuning_runs_in(setups[place][0]), folder=self.folder, data=self.data,
                )
                for place, candidates in asked.items()
                for setup in candidates
                for k in range(study.tuning_seeds)
            ]  # fmt: skip
            results = iter(self.results(cells, f"tuning, parameter {number}"))
            scores = {
                place: [self._score_s(results, study.tuning_seeds) for _ in candidates]
                for place, candidates in asked.items()
            }
        return [(*known[:2], setup) for known, setup in zip(setups, best, strict=True)]

    @staticmethod
    def _score_s(results: Iterator[CellResult], seeds: int) -> float:
        """Return the mean score of the next results, one for each seed."""
        found = itertools.islice(results, seeds)
        return sum(tuning_score_s(one.metrics.latencies_s) for one in found) / seeds

    def evaluated(
        self, pairs: Sequence[tuple[Setting, PolicySetup]], seeds: Sequence[int], study: Study
    ) -> list[CellResult]:
        """Return the results of setups in their settings, each on all seeds."""
        cells = [
            _Job(
                setting=setting, setup=setup, seed=seed, runs=study.runs,
                folder=self.folder, data=self.data,
            )
            for setting, setup in pairs
            for seed in seeds
        ]  # fmt: skip
        return self.results(cells, "evaluation")

    def results(self, cells: Sequence[_Job], what: str) -> list[CellResult]:
        """Return the results of cells, in their order; those on file are read."""
        missing = list(
            {job.key: job for job in cells if not (self.resume and job.file.exists())}.values()
        )
        started = time.monotonic()
        if missing:
            self.progress(f"{what}: {len(missing)} of {len(cells)} cells to simulate")
            assert self.pool is not None  # noqa: S101 - set before the first call
            number = told = 0
            for names in self.pool(
                delayed(_simulated)(one) for one in _batches(missing, self.jobs)
            ):
                number += len(names)
                if len(missing) > 20 and (number - told >= 20 or number == len(missing)):
                    told = number
                    left_s = (time.monotonic() - started) / number * (len(missing) - number)
                    self.progress(f"[{number}/{len(missing)}] {names[-1]}; {_span(left_s)} left")
        return [_read(job.file) for job in cells]


def _batches(cells: Sequence[_Job], workers: int) -> list[list[_Job]]:
    """Return cells in batches of the same runs, which a worker then makes only once.

    With the block hashes of their prompts. No batch is so large that others would wait for it long.
    """
    ordered = sorted(cells, key=lambda job: (job.setting.name, job.seed))
    most = max(1, len(ordered) // (_BATCHES * workers))
    found: list[list[_Job]] = []
    for _, same in itertools.groupby(ordered, key=lambda job: (job.setting.name, job.seed)):
        group = list(same)
        found += [group[start : start + most] for start in range(0, len(group), most)]
    return found


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _hash(document: Any) -> str:
    text = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:20]


@lru_cache(maxsize=256)
def _content(setting: Setting) -> str:
    """Return what a setting stands for: its fields, and what its names mean at present."""
    names = json.dumps(setting.to_json(), sort_keys=True)
    return f"{names} {setting.make_fleet().content_hash()} {setting.make_mix().fingerprint}"


def _read(file: Path) -> CellResult:
    raw = read_json(file, what="study cell")
    return CellResult.from_json(raw["result"], str(file))


def _write(file: Path, document: Any) -> None:
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(document) + "\n", encoding="utf-8")


def _simulated(jobs: Sequence[_Job]) -> list[str]:
    """Run cells one after the other; return what they were."""
    return [_simulate(job) for job in jobs]


def _simulate(job: _Job) -> str:
    """Run one cell and write its file; return what it was."""
    runs = _workload(job.setting, job.seed, job.runs, job.data)
    world = _world(job.setting, job.folder)
    alone = _alone(job, runs, world)
    if job.variant is not None:
        variant = VARIANTS[job.setup.policy][job.variant]
        forecaster = _forecaster(job.setting, job.folder, job.setup.policy, job.variant)
        world = replace(world, forecaster=forecaster, retention=variant.retention)
    cell = Cell(setup=job.setup, seed=job.seed, runs=runs, world=world)
    belady = job.setting.kv != "ample" and job.seed < TUNING_SEED
    with _no_collection():
        records = run_cell(cell, time.perf_counter)
        texts = _texts(job.setting, job.seed, job.runs, job.data)
        result = measure(records, runs, alone, world.fleet, belady=belady, texts=texts)
    document = {
        "schema": CODE_SCHEMA,
        "setting": job.setting.name,
        "policy": job.setup.policy,
        "variant": job.variant,
        "parameters": {k: repr(v) for k, v in sorted(job.setup.shown_parameters.items())},
        "seed": job.seed,
        "result": result.to_json(),
    }
    _write(job.file, document)
    return f"{job.setup.policy} in {job.setting.name}, seed {job.seed}"


@contextmanager
def _no_collection() -> Iterator[None]:
    """Let no garbage be collected: a cell makes little, and looking for it takes a tenth of it."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@lru_cache(maxsize=4)
def _workload(setting: Setting, seed: int, runs: int, data: Path | None) -> tuple[RunSpec, ...]:
    return workload(setting, seed, runs, data=data)


@lru_cache(maxsize=1)
def _texts(setting: Setting, seed: int, runs: int, data: Path | None) -> Texts:
    return texts_of(_workload(setting, seed, runs, data))


@lru_cache(maxsize=8)
def _world(setting: Setting, folder: Path) -> World:
    return setting.world(folder / "forecasts")


def _alone(job: _Job, runs: Sequence[RunSpec], world: World) -> list[float]:
    """Return the standalone latencies: they do not depend on load, arrivals or policy."""
    plain = replace(job.setting, load=1.0, fixed_rps=None, arrivals="poisson")
    key = _hash([CODE_SCHEMA, _content(plain), job.seed, job.runs])
    file = job.folder / "alone" / f"{key}.json"
    if not file.exists():
        _write(file, [round(value, 6) for value in standalone_s(runs, world)])
    found: list[float] = read_json(file, what="standalone latencies")
    return found


@lru_cache(maxsize=8)
def _forecaster(setting: Setting, folder: Path, policy: str, variant: str) -> Forecaster:
    """Return what a variant of a policy may believe."""
    known, change = _world(setting, folder).forecaster, VARIANTS[policy][variant].forecasts
    return known if change is None else change(known, setting.make_fleet())


def _prepare(group: Sequence[tuple[Setting, Sequence[Entry]]], folder: Path) -> str:
    """Train and plan for settings of one fleet and mix; return what they are called."""
    for setting, entries in group:
        _world(setting, folder)
        for entry in entries:
            _setup(setting, entry, folder)
    setting = group[0][0]
    return f"{setting.mix} on {setting.fleet}, {setting.kv} KV"


def _setup(setting: Setting, entry: Entry, folder: Path) -> PolicySetup:
    table = _table(setting, entry, folder) if entry.policy == "almanac" else None
    setup = PolicySetup(policy=entry.policy, parameters=entry.parameters, table=table)
    if entry.variant is None:
        return setup
    fields = {name: getattr(setup, name) for name in PolicySetup.__dataclass_fields__}
    return VariedSetup(**fields, variant=entry.variant).with_parameters(entry.change.fixed)


def _table(setting: Setting, entry: Entry, folder: Path) -> DispatchTable:
    """Return the dispatch table of a setting's fleet, mix and forecasts; the same at each load."""
    from planner.solve.budget import Budget
    from planner.solve.instance import Demand
    from planner.solve.tables import mix_table

    world, mix = _world(setting, folder), setting.make_mix()
    forecaster = world.forecaster
    if entry.variant is not None:
        forecaster = _forecaster(setting, folder, entry.policy, entry.variant)
    estimates = forecaster.estimates
    key = _hash([CODE_SCHEMA, world.fleet.content_hash(), mix.fingerprint, estimates.version])
    file = folder / "tables" / f"{key}.json"
    if file.exists():
        # Plans keep; the weights that are not tuned are those of today's code.
        return replace(load_table(file), tuning=Tuning())
    rate_rps = capacity_rps(world.fleet, mix)
    table = mix_table(
        [
            Demand(workflow=workflow, rate_rps=part.share * rate_rps)
            for part, workflow in zip(mix.parts, mix.workflows, strict=True)
        ],
        world.fleet,
        estimates,
        budget=Budget.reproducible(deterministic=5.0, relative_gap=0.02),
        factors=PLANNED_LOADS,
    )
    save_table(table, file)
    return table
