"""`almanac evaluate`: every bar, measured again on rows the predictors have not seen.

How rows are held out
---------------------
* Services: the last 30 % in time. Agents: whole families (a session, a task, an instance; the
  Claude Code set repeats sessions across traces). Sets of fewer than `SMALL` rows are judged by
  five folds of families instead of one split, because one odd session decides a small split.
* Coverage after online correction goes through the held-out rows in order; each quantile is
  corrected by the rows before it only (`planner.domain.calibration`).
* With saved artifacts nothing is fitted: they are judged on all rows given, which must then be
  rows they were not trained on; the note says so where the content hash is the same.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.artifacts import load_artifact, read_info
from models.branching import ChoicePredictor
from models.endpoint_latency import LatencyPredictor, RelativeNonNegativeRegressor, call_design
from models.evaluation import coverage, log_loss, median_relative_error, pinball_loss
from models.importers.folder import read_folder
from models.latency_pool import ADAPTATION_REQUESTS, LatencyPool
from models.output_length import output_length_predictor
from models.predictor import StepQuantilePredictor
from models.sequences import END_SYMBOL, SequenceModel
from models.tables import Dataset
from models.tool_delay import tool_delay_predictor
from planner.domain.calibration import adapted
from planner.domain.estimates import LEVELS
from planner.domain.show import html_table

__all__ = ["Bar", "Curve", "Evaluation", "bar", "evaluate"]

Floats = npt.NDArray[np.float64]
Progress = Callable[[str], None]

SMALL = 3000
"""Rows below which a family-split set is judged by folds."""
FOLDS = 5
PINBALL_LEVELS = (0.5, 0.9, 0.95)
R2_BARS = {
    "lmcache_agents": 0.50,
    "miniswe_swebench_verified": 0.35,
    "claude_code_sessions": 0.20,
}
MAGENTIC_BAR = 0.85
MAGENTIC = ("who_and_when", "hand")
"""Dataset and kind of the Magentic-One logs (hand-crafted part of Who&When)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """One measured figure and what it has to be.

    Parameters
    ----------
    name
        What was measured, on what.
    value
        The figure, or None if it could not be measured (the note says why).
    unit
        Its unit; ``1`` for shares and coefficients.
    bar
        What it has to be: ``>= x``, ``<= x``, ``x to y``; empty if it is only reported.
    holds
        Whether it is; None without a bar or a value.
    note
        What a reader must know to read the figure right.
    """

    name: str
    value: float | None
    unit: str
    bar: str = ""
    holds: bool | None = None
    note: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Curve:
    """Promised against observed, for a picture.

    ``kind`` is ``calibration`` (promised and observed coverage), ``reliability`` (forecast
    probability and observed share, ``weight`` rows a point) or ``latency`` (forecast and observed
    seconds).
    """

    kind: str
    name: str
    promised: tuple[float, ...]
    observed: tuple[float, ...]
    weight: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """All bars, and the points behind the pictures."""

    bars: tuple[Bar, ...]
    curves: tuple[Curve, ...] = ()
    set_aside: tuple[str, ...] = ()

    def to_frame(self) -> pd.DataFrame:
        """Return the bars as a data frame, a row each."""
        return pd.DataFrame(self.to_json())

    def _repr_html_(self) -> str:
        """Return the bars for a notebook."""
        return html_table(self.to_json())

    def to_json(self) -> list[dict[str, Any]]:
        """Return the bars as JSON-ready rows; ``bar`` is None where a figure is only reported."""
        return [{**asdict(one), "bar": one.bar or None} for one in self.bars]

    def curves_json(self) -> list[dict[str, Any]]:
        """Return the curves as JSON-ready rows."""
        return [asdict(one) for one in self.curves]

    def text(self) -> str:
        """Return the bars as an aligned table."""
        state = {True: "holds", False: "MISSED", None: ""}
        rows = [("bar", "value", "unit", "wanted", "", "note")]
        rows += [
            (
                one.name,
                "-" if one.value is None else f"{one.value:.4g}",
                one.unit,
                one.bar,
                state[one.holds],
                one.note,
            )
            for one in self.bars
        ]
        widths = [max(len(row[column]) for row in rows) for column in range(5)]
        return "\n".join(
            "  ".join(
                [*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[5]]
            ).rstrip()
            for row in rows
        )


def bar(
    name: str,
    value: float | None,
    unit: str,
    *,
    least: float | None = None,
    most: float | None = None,
    note: str = "",
) -> Bar:
    """Return a bar that holds between ``least`` and ``most`` (either may be absent)."""
    if least is not None and most is not None:
        wanted = f"{least:g} to {most:g}"
    elif least is not None:
        wanted = f">= {least:g}"
    else:
        wanted = "" if most is None else f"<= {most:g}"
    holds = None
    if wanted and value is not None:
        # The figure itself is judged, not what is printed of it.
        holds = (least is None or value >= least) and (most is None or value <= most)
    return Bar(name=name, value=value, unit=unit, bar=wanted, holds=holds, note=note)


@dataclass(slots=True)
class _Report:
    bars: list[Bar] = field(default_factory=list)
    curves: list[Curve] = field(default_factory=list)


def evaluate(
    traces: Path,
    *,
    artifacts: Path | None = None,
    seed: int = 0,
    progress: Progress = lambda _: None,
    clock: Callable[[], float] = time.perf_counter,
) -> Evaluation:
    """Measure every bar that the data allows.

    Parameters
    ----------
    traces
        A trace file, a dataset folder, or a folder that holds some of either.
    artifacts
        Folder of `almanac train`: judge these, fit nothing.
    seed
        Seed of splits and fits.
    clock
        Seconds, for the bar on training time.

    Raises
    ------
    InvalidInput
        If there is nothing to read or an artifact cannot be loaded.
    """
    sources = read_folder(traces, seed, progress)
    datasets = [*([sources.own.dataset] if sources.own else []), *sources.public]
    saved = _saved(artifacts)
    report = _Report()
    slowest = ("", 0.0)
    for dataset in datasets:
        began = clock()
        for kind, table in (("output_length", dataset.calls), ("tool_delay", dataset.delays)):
            if table is not None:
                progress(f"judging {kind.replace('_', ' ')} of {dataset.name}")
                _quantiles(kind, dataset, table, saved, seed, report)
        spent = clock() - began
        if spent > slowest[1]:
            slowest = (dataset.name, spent)
        if dataset.choices is not None:
            progress(f"judging next action of {dataset.name}")
            _choices(dataset, dataset.choices, saved, report)
            if saved is None:
                _sequences(dataset, dataset.choices, report)
        if dataset.requests is not None:
            progress(f"judging endpoint latency of {dataset.name}")
            began = clock()
            if saved is not None:
                _saved_latency(dataset, dataset.requests, saved, report)
            elif dataset.requests["config"].nunique() >= 5:
                _known_and_new(dataset, dataset.requests, seed, report)
            else:
                _logs(dataset, dataset.requests, report)
            spent = clock() - began
            if spent > slowest[1]:
                slowest = (dataset.name, spent)
    if slowest[0]:
        report.bars.append(
            bar(
                "fit and judge the slowest dataset",
                slowest[1],
                "s",
                most=120,
                note=f"{slowest[0]}; all fits of its evaluation, which are more than training",
            )
        )
    aside = tuple(
        f"{one.table}: {one.rows} rows, {one.reason}" for data in datasets for one in data.set_aside
    )
    return Evaluation(bars=tuple(report.bars), curves=tuple(report.curves), set_aside=aside)


@dataclass(frozen=True, slots=True)
class _Saved:
    predictor: Any
    data_hash: str


def _saved(folder: Path | None) -> dict[tuple[str, str], _Saved] | None:
    if folder is None:
        return None
    out = {}
    for path in sorted(folder.glob("*.joblib")):
        info = read_info(path)
        predictor, _ = load_artifact(path, info.kind)
        out[info.kind, info.dataset] = _Saved(predictor, info.data_hash)
    return out


def _parts(
    table: pd.DataFrame, known: pd.Series, dataset: Dataset
) -> Iterator[tuple[pd.Series, pd.Series]]:
    """Give (training rows, held-out rows): one split, or folds of families on a small set."""
    if "in time" in dataset.split or known.sum() >= SMALL:
        yield known & ~table["held_out"], known & table["held_out"]
        return
    fold = table["family"].map(
        lambda name: int(hashlib.sha256(str(name).encode()).hexdigest()[:8], 16) % FOLDS
    )
    for number in range(FOLDS):
        yield known & (fold != number), known & (fold == number)


def _quantiles(
    kind: str,
    dataset: Dataset,
    table: pd.DataFrame,
    saved: dict[tuple[str, str], _Saved] | None,
    seed: int,
    report: _Report,
) -> None:
    target = "output_tokens" if kind == "output_length" else "delay_s"
    make = output_length_predictor if kind == "output_length" else tool_delay_predictor
    unit = "tokens" if kind == "output_length" else "s"
    known = table[target].notna()
    count = len(table)
    forecast, flat = np.full((count, len(LEVELS)), np.nan), np.full((count, len(LEVELS)), np.nan)
    per_node, log_mean, centre = flat.copy(), np.full(count, np.nan), np.full(count, np.nan)
    kept = 0
    note = dataset.split
    if saved is not None:
        found = saved.get((kind, dataset.name))
        if found is None:
            return
        forecast = found.predictor.predict_quantiles(table)
        log_mean = found.predictor.predict_log_mean(table)
        _baselines(table, known, known, target, flat, per_node, centre)
        note = "saved artifact, all rows; constants are those of these very rows"
        if found.data_hash == dataset.data_hash:
            note += "; THE ROWS IT WAS TRAINED ON, not held out"
    else:
        for training, test in _parts(table, known, dataset):
            if min(training.sum(), test.sum()) < 20:
                continue
            fitted: StepQuantilePredictor = make(seed=seed).fit(table, training)
            kept += fitted.constant_
            places = np.flatnonzero(test)
            forecast[places] = fitted.predict_quantiles(table)[places]
            log_mean[places] = fitted.predict_log_mean(table)[places]
            _baselines(table, training, test, target, flat, per_node, centre)
        if "in time" not in dataset.split and known.sum() < SMALL:
            note = f"{FOLDS} folds of families"
    judged = known.to_numpy() & ~np.isnan(forecast[:, 0]) & ~np.isnan(flat[:, 0])
    if not judged.any():
        return
    if kept:
        note += "; features did not beat the constant in training, the constant is kept"
    observed = table[target].to_numpy(float)[judged]
    forecast, flat, per_node = forecast[judged], flat[judged], per_node[judged]
    title = f"{kind}, {dataset.name}"
    is_length = kind == "output_length"
    nodes = table.loc[judged, ["kind", "site"]].drop_duplicates()
    report.bars.append(
        bar(
            f"{title}: pinball gain over the constant",
            _gain(observed, forecast, flat),
            "%",
            least=10.0 if is_length else None,
            note=note,
        )
    )
    if len(nodes) > 1:
        report.bars.append(
            bar(
                f"{title}: pinball gain over the per-node constant",
                _gain(observed, forecast, per_node),
                "%",
                least=5.0 if is_length else None,
                note=note,
            )
        )
    report.bars.append(
        bar(
            f"{title}: pinball loss (mean of 0.5, 0.9, 0.95)",
            _pinball(observed, forecast),
            unit,
            note=f"{len(observed)} held-out rows",
        )
    )
    report.bars.append(
        bar(
            f"{title}: R2 of log(1 + y)",
            _r2(np.log1p(observed), log_mean[judged], centre[judged]),
            "1",
            least=R2_BARS.get(dataset.name) if is_length else None,
            note=note,
        )
    )
    if is_length and dataset.name == MAGENTIC[0]:
        mine = (table["kind"] == MAGENTIC[1]).to_numpy()
        _magentic(table, known, dataset, judged & mine, log_mean, report, saved is not None)
    _coverage(title, observed, forecast, report)


def _magentic(
    table: pd.DataFrame,
    known: pd.Series,
    dataset: Dataset,
    mine: npt.NDArray[np.bool_],
    log_mean: Floats,
    report: _Report,
    saved: bool,
) -> None:
    if not mine.any():
        return
    log_y = np.log1p(table["output_tokens"].to_numpy(float))
    centre = np.full(len(table), log_y[mine].mean())
    if not saved:
        for training, test in _parts(table, known, dataset):
            part = training.to_numpy() & (table["kind"] == MAGENTIC[1]).to_numpy()
            if part.any():
                centre[test.to_numpy()] = log_y[part].mean()
    report.bars.append(
        bar(
            "output_length, Magentic logs: R2 of log(1 + y)",
            _r2(log_y[mine], log_mean[mine], centre[mine]),
            "1",
            least=MAGENTIC_BAR,
            note="Magentic-One part of who_and_when, against the constant of that part",
        )
    )


def _baselines(
    table: pd.DataFrame,
    training: pd.Series,
    test: pd.Series,
    target: str,
    flat: Floats,
    per_node: Floats,
    centre: Floats,
) -> None:
    """Fill in, for the test rows, the constant of the training rows, overall and per node."""
    values = table[target].to_numpy(float)
    places = np.flatnonzero(test)
    flat[places] = np.quantile(values[training.to_numpy()], LEVELS)
    per_node[places] = flat[places]
    centre[places] = np.log1p(values[training.to_numpy()]).mean()
    node = (table["kind"] + "\x1f" + table["site"]).to_numpy()
    for name in np.unique(node[places]):
        sample = values[training.to_numpy() & (node == name)]
        if len(sample):
            per_node[places[node[places] == name]] = np.quantile(sample, LEVELS)


def _r2(log_y: Floats, log_mean: Floats, centre: Floats) -> float:
    """Return R2 of logarithms against the training mean of each row's own fold."""
    total = float(np.sum((log_y - centre) ** 2))
    return 1.0 - float(np.sum((log_y - log_mean) ** 2)) / total if total > 0 else 0.0


def _pinball(observed: Floats, quantiles: Floats) -> float:
    return float(
        np.mean(
            [
                pinball_loss(observed, quantiles[:, LEVELS.index(level)], level)
                for level in PINBALL_LEVELS
            ]
        )
    )


def _gain(observed: Floats, forecast: Floats, baseline: Floats) -> float:
    return 100.0 * (1.0 - _pinball(observed, forecast) / _pinball(observed, baseline))


def _coverage(title: str, observed: Floats, forecast: Floats, report: _Report) -> None:
    online = np.array(adapted(forecast.tolist(), observed.tolist(), LEVELS))
    column = LEVELS.index(0.9)
    half = len(observed) // 2
    report.bars.append(
        bar(f"{title}: coverage of 0.9, offline", coverage(observed, forecast[:, column]), "1")
    )
    report.bars.append(
        bar(
            f"{title}: coverage of 0.9, online",
            coverage(observed, online[:, column]),
            "1",
            least=0.88,
            most=0.92,
        )
    )
    report.bars.append(
        bar(
            f"{title}: coverage of 0.9, online, second half",
            coverage(observed[half:], online[half:, column]),
            "1",
            least=0.88,
            most=0.92,
        )
    )
    report.bars.append(
        bar(
            f"{title}: pinball loss after online correction",
            _pinball(observed, online),
            "s" if title.startswith("tool") else "tokens",
        )
    )
    for label, quantiles in (("offline", forecast), ("online", online)):
        report.curves.append(
            Curve(
                kind="calibration",
                name=f"{title}, {label}",
                promised=LEVELS,
                observed=tuple(coverage(observed, quantiles[:, i]) for i in range(len(LEVELS))),
            )
        )


def _choices(
    dataset: Dataset,
    table: pd.DataFrame,
    saved: dict[tuple[str, str], _Saved] | None,
    report: _Report,
) -> None:
    known = table["action"] != ""
    losses: list[Floats] = []
    bases: list[Floats] = []
    hits, top3, majority = [], [], []
    forecast: list[float] = []
    happened: list[bool] = []
    parts: list[tuple[pd.Series, pd.Series]] = list(_parts(table, known, dataset))
    if saved is not None:
        if ("branching", dataset.name) not in saved:
            return
        parts = [(known, known)]
    for training, test in parts:
        if min(training.sum(), test.sum()) < 20:
            continue
        if saved is None:
            fitted = ChoicePredictor().fit(table, training)
        else:
            fitted = saved["branching", dataset.name].predictor
        taken = table.loc[test, "action"].to_numpy()
        for predictor, into in (
            (fitted, losses),
            (ChoicePredictor(contexts=False).fit(table, training), bases),
        ):
            chances = predictor.probabilities(table)[test.to_numpy()]
            values = chances.to_numpy()
            column = chances.columns.get_indexer(pd.Index(taken))
            into.append(np.where(column >= 0, values[np.arange(len(taken)), column], 0.0))
            order = np.argsort(-values, axis=1)
            if into is losses:
                hits.append(order[:, 0] == column)
                top3.append((order[:, :3] == column[:, None]).any(axis=1))
                forecast += values.ravel().tolist()
                happened += (
                    (np.arange(values.shape[1])[None, :] == column[:, None]).ravel().tolist()
                )
            else:
                majority.append(order[:, 0] == column)
    if not losses:
        return
    title = f"branching, {dataset.name}"
    base = log_loss(np.concatenate(bases))
    value = log_loss(np.concatenate(losses))
    report.bars += [
        bar(f"{title}: log loss", value, "nats", most=round(base, 4), note="bar: the base rates"),
        bar(
            f"{title}: top-1",
            float(np.mean(np.concatenate(hits))),
            "1",
            note=f"majority {float(np.mean(np.concatenate(majority))):.2f}",
        ),
        bar(f"{title}: top-3", float(np.mean(np.concatenate(top3))), "1"),
    ]
    report.curves.append(_reliability(title, np.array(forecast), np.array(happened)))


def _sequences(dataset: Dataset, table: pd.DataFrame, report: _Report) -> None:
    """Judge what a variable-order model makes of the sessions alone, the end included."""
    known = pd.Series(True, index=table.index)
    sequences = {
        str(name): part["action"].where(part["action"] != "", part["site"]).tolist()
        for name, part in table.groupby("session_id", sort=False)
    }
    family = table.groupby("session_id")["family"].first()
    scores: dict[int, list[tuple[float, bool, bool]]] = {0: [], 1: [], 3: []}
    for training, test in _parts(table, known, dataset):
        fitting, judged = set(table.loc[training, "family"]), set(table.loc[test, "family"])
        for order, into in scores.items():
            model = SequenceModel(order).fit(
                sequences[name] for name in sequences if family[name] in fitting - judged
            )
            for name in sequences:
                if family[name] in judged:
                    into += _followed(model, sequences[name])
    if len(scores[3]) < 20:
        return
    loss = {order: log_loss(np.array([one[0] for one in into])) for order, into in scores.items()}
    title = f"next step without a graph, {dataset.name}"
    report.bars += [
        bar(
            f"{title}: log loss",
            loss[3],
            "nats",
            most=round(loss[0], 4),
            note=f"variable order up to 3; bar: the base rates; first order {loss[1]:.3f}",
        ),
        bar(
            f"{title}: top-1",
            float(np.mean([one[1] for one in scores[3]])),
            "1",
            note=f"majority {np.mean([one[1] for one in scores[0]]):.2f}",
        ),
        bar(f"{title}: top-3", float(np.mean([one[2] for one in scores[3]])), "1"),
    ]


def _followed(model: SequenceModel, sequence: list[str]) -> list[tuple[float, bool, bool]]:
    """Return per step the probability of what came next, and whether it was first, or in three."""
    out = []
    known: dict[tuple[str, ...], tuple[dict[str, float], list[str]]] = {}
    for place, symbol in enumerate([*sequence, END_SYMBOL]):
        context = tuple(sequence[max(0, place - model.order) : place])
        if context not in known or place < model.order:
            chances = model.probabilities(sequence[:place])
            known[context] = chances, sorted(chances, key=lambda one: (-chances[one], one))[:3]
        chances, best = known[context]
        out.append((chances.get(symbol, 0.0), symbol == best[0], symbol in best))
    return out


def _reliability(title: str, forecast: Floats, happened: npt.NDArray[np.bool_]) -> Curve:
    place = np.minimum((forecast * 10).astype(int), 9)
    full = [number for number in range(10) if (place == number).sum() >= 10]
    return Curve(
        kind="reliability",
        name=title,
        promised=tuple(float(forecast[place == number].mean()) for number in full),
        observed=tuple(float(happened[place == number].mean()) for number in full),
        weight=tuple(float((place == number).sum()) for number in full),
    )


def _total(rows: pd.DataFrame) -> Floats:
    return (rows["ttft_s"] + rows["decode_s"]).to_numpy(float)


def _known_and_new(dataset: Dataset, rows: pd.DataFrame, seed: int, report: _Report) -> None:
    """Judge requests of many configurations: known ones, an unseen load, unseen pairs."""
    sent = "what is known when a request is sent; output length given"
    draw = pd.Series(np.random.default_rng(seed).random(len(rows)), index=rows.index)
    late = rows["sent_s"] > rows.groupby("run")["sent_s"].transform(
        lambda times: times.quantile(0.8)
    )
    cases = (
        ("known configurations, last fifth of each run in time", late, 10.0, sent),
        (
            "known configurations, a fifth at random",
            draw < 0.2,
            10.0,
            f"easier than the split by time, which is the one that counts; {sent}",
        ),
        (
            "unseen load level",
            rows["held_out"] == "unseen load",
            20.0,
            f"one inner load level of each configuration; {sent}",
        ),
    )
    for name, test, most, note in cases:
        if not test.any() or test.all():
            continue
        pool = LatencyPool(seed).fit(rows[~test], rows)
        predicted = pool.total_s(rows[test], rows)
        observed = _total(rows[test])
        report.bars.append(
            bar(
                f"latency, {dataset.name}: {name}",
                100 * median_relative_error(observed, predicted),
                "% median error end to end",
                most=most,
                note=note,
            )
        )
        if name.endswith("in time"):
            report.curves.append(
                _scatter(f"{dataset.name}, last fifth in time", predicted, observed)
            )
    pair = rows["config"].str.replace(r" \d+ x ", " ", regex=True)
    names = sorted(pair.unique())
    if len(names) < 2 * FOLDS:
        return
    errors, physical = [], []
    for number in range(FOLDS):
        new = pair.isin(names[number::FOLDS])
        pool = LatencyPool(seed, known=False).fit(rows[~new])
        for _, part in rows[new].groupby("config"):
            ordered = part.sort_values("sent_s", kind="stable")
            first, later = ordered[:ADAPTATION_REQUESTS], ordered[ADAPTATION_REQUESTS:]
            if later.empty:
                continue
            observed = _total(later)
            errors.append(np.abs(pool.adapted_s(first, later) / observed - 1))
            own = LatencyPredictor.fit(first, prior=pool.prior_).total_s(later)
            physical.append(np.abs(own / observed - 1))
    report.bars.append(
        bar(
            f"latency, {dataset.name}: unseen model-GPU pair after {ADAPTATION_REQUESTS} requests",
            100 * float(np.median(np.concatenate(errors))),
            "% median error end to end",
            most=20.0,
            note=f"{FOLDS} folds of pairs; the first requests come from all load levels; physics "
            f"alone {100 * float(np.median(np.concatenate(physical))):.1f} %; {sent}",
        )
    )


def _logs(dataset: Dataset, rows: pd.DataFrame, report: _Report) -> None:
    """Judge engine logs after 50 requests of each run, under a given state of the engine."""
    given, at_admission, seen = [], [], []
    for _, part in rows.groupby("config"):
        run = part.sort_values("sent_s", kind="stable").reset_index(drop=True)
        if len(run) < 2 * ADAPTATION_REQUESTS:
            continue
        observed = _total(run)
        first = np.arange(len(run)) < ADAPTATION_REQUESTS
        design, _ = call_design(
            pd.DataFrame(
                {
                    "sent_s": run["sent_s"],
                    "first_token_s": run["sent_s"] + run["ttft_s"],
                    "finish_s": run["sent_s"] + observed,
                    "prompt_tokens": run["prompt_tokens"],
                    "cached_tokens": 0.0,
                    "output_tokens": run["output_tokens"],
                }
            )
        )
        whole = design[: len(run)] + design[len(run) :]
        model = RelativeNonNegativeRegressor(huber=0.05, rounds=15)
        model.fit(whole[first], observed[first])
        predicted = whole[~first] @ model.coef_
        given.append(np.abs(predicted / observed[~first] - 1))
        seen.append((predicted, observed[~first]))
        sent = LatencyPredictor.fit_whole(run[first]).total_s(run[~first])
        at_admission.append(np.abs(sent / observed[~first] - 1))
    if not given:
        return
    report.bars += [
        bar(
            f"latency, {dataset.name}: after {ADAPTATION_REQUESTS} requests, state given",
            100 * float(np.median(np.concatenate(given))),
            "% median error from admission",
            most=5.0,
            note="the engine's state during the request (calls, context, prefills) and the output "
            "length are given; fitted on the first 50 requests of each run",
        ),
        bar(
            f"latency, {dataset.name}: after {ADAPTATION_REQUESTS} requests, state at admission",
            100 * float(np.median(np.concatenate(at_admission))),
            "% median error from admission",
            most=5.0,
            note="only the state at admission is known, and the output length; fitted to whole "
            "times",
        ),
    ]
    report.curves.append(
        _scatter(
            f"{dataset.name}, state given",
            np.concatenate([one for one, _ in seen]),
            np.concatenate([one for _, one in seen]),
        )
    )


def _saved_latency(
    dataset: Dataset,
    rows: pd.DataFrame,
    saved: dict[tuple[str, str], _Saved],
    report: _Report,
) -> None:
    """Judge a saved latency predictor: known configurations at once, new ones after requests."""
    found = saved.get(("endpoint_latency", dataset.name))
    if found is None:
        return
    pool = found.predictor if isinstance(found.predictor, LatencyPool) else None
    physics: dict[str, LatencyPredictor] = pool.physics_ if pool else found.predictor
    known = rows["config"].isin(physics)
    note = "saved artifact, all rows; output length given"
    if found.data_hash == dataset.data_hash:
        note += "; THE ROWS IT WAS TRAINED ON, not held out"
    if known.any():
        mine = rows[known]
        if pool:
            predicted, observed = pool.total_s(mine, mine), _total(mine)
        else:
            parts = [(physics[str(name)], part) for name, part in mine.groupby("config")]
            predicted = np.concatenate([one.total_s(part) for one, part in parts])
            observed = np.concatenate([_total(part) for _, part in parts])
        report.bars.append(
            bar(
                f"latency, {dataset.name}: known configurations",
                100 * median_relative_error(observed, predicted),
                "% median error end to end",
                most=10.0 if pool else None,
                note=note,
            )
        )
        report.curves.append(_scatter(f"{dataset.name}, saved predictor", predicted, observed))
    errors = []
    for _, part in rows[~known].groupby("config"):
        ordered = part.sort_values("sent_s", kind="stable")
        first, later = ordered[:ADAPTATION_REQUESTS], ordered[ADAPTATION_REQUESTS:]
        if pool is not None and not later.empty:
            errors.append(np.abs(pool.adapted_s(first, later) / _total(later) - 1))
    if errors:
        report.bars.append(
            bar(
                f"latency, {dataset.name}: configurations new to it, after "
                f"{ADAPTATION_REQUESTS} requests",
                100 * float(np.median(np.concatenate(errors))),
                "% median error end to end",
                most=20.0,
                note=note,
            )
        )


def _scatter(name: str, predicted: Floats, observed: Floats) -> Curve:
    return Curve(
        kind="latency",
        name=name,
        promised=tuple(map(float, predicted)),
        observed=tuple(map(float, observed)),
    )
