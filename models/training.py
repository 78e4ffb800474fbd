"""`almanac train`: read, split, fit, measure against a constant, fit on all rows, save.

Nothing is written before everything is fitted, and each file is written atomically.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from models.arrivals import ArrivalModel
from models.artifacts import ArtifactInfo, read_info, save_artifact
from models.branching import ChoicePredictor
from models.card import Result, card_json, card_markdown, results_table
from models.endpoint_latency import LatencyPredictor
from models.evaluation import coverage, log_loss, median_relative_error, pinball_loss, r2_log
from models.importers.folder import read_folder
from models.importers.own import OwnTraces
from models.latency_pool import LatencyPool
from models.output_length import output_length_predictor
from models.predictor import StepQuantilePredictor
from models.snapshot import EndpointFit, estimate_table, fit_endpoints
from models.tables import Dataset, SetAside
from models.tool_delay import tool_delay_predictor
from planner.domain.errors import InvalidInput, WorkflowError
from planner.domain.estimates import LEVELS, EstimateTable, load_estimates, save_estimates
from planner.domain.files import atomic_write
from planner.domain.fleet import Endpoint, load_fleet
from planner.domain.workflow import Workflow, load_workflow

__all__ = ["TrainReport", "train"]

Floats = npt.NDArray[np.float64]
Progress = Callable[[str], None]

LEAST_ROWS = 20
"""Training rows a predictor needs; with fewer the priors of the estimate table have to do."""
LEAST_CONFIGURATIONS = 5
"""Configurations that share a correction of their physics; fewer have nothing to share."""
PINBALL_LEVELS = (0.5, 0.9, 0.95)


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainReport:
    """What a training run made.

    Parameters
    ----------
    results
        One row per predictor, dataset and held-out part.
    card
        The model card, JSON-ready.
    table
        The estimate table, or None without traces of our own.
    files
        Files written, in the output folder.
    """

    results: tuple[Result, ...]
    card: dict[str, Any]
    table: EstimateTable | None
    files: tuple[Path, ...]

    def text(self) -> str:
        """Return the results as a text table."""
        return results_table(self.results)

    def to_frame(self) -> pd.DataFrame:
        """Return the results as a data frame, a row per predictor and dataset."""
        return pd.DataFrame([{**asdict(one), "gain": one.gain} for one in self.results])

    def _repr_html_(self) -> str:
        """Return the results for a notebook."""
        columns = ["predictor", "dataset", "rows_held_out", "metric", "value", "baseline", "gain"]
        frame = self.to_frame()[[*columns, "shipped"]]
        return str(frame.to_html(index=False, float_format=lambda value: f"{value:.4g}"))


@dataclass
class _Harvest:
    """What has been fitted so far; written to disk at the end."""

    results: list[Result] = field(default_factory=list)
    artifacts: list[tuple[Any, ArtifactInfo]] = field(default_factory=list)
    not_fitted: list[SetAside] = field(default_factory=list)
    arrivals: dict[str, ArrivalModel] = field(default_factory=dict)

    def keep(self, kind: str, dataset: Dataset, predictor: Any, results: list[Result]) -> None:
        self.results += results
        metrics = {f"{one.dataset}: {one.metric}": one.value for one in results}
        self.artifacts.append(
            (
                predictor,
                ArtifactInfo(
                    kind=kind,
                    dataset=dataset.name,
                    window=dataset.window,
                    data_hash=dataset.data_hash,
                    metrics=metrics,
                ),
            )
        )

    def too_few(self, kind: str, dataset: Dataset, rows: int) -> None:
        self.not_fitted.append(
            SetAside(
                table=f"{kind} of {dataset.name}",
                reason=f"fewer than {LEAST_ROWS} rows on a side of the split, priors are kept",
                rows=rows,
            )
        )


def train(
    traces: Path,
    out: Path,
    *,
    workflows: Path | None = None,
    fleet: Path | None = None,
    seed: int = 0,
    progress: Progress = lambda _: None,
) -> TrainReport:
    """Fit all predictors that the data allows and write them with a model card.

    Parameters
    ----------
    traces
        A trace file of ours, a public dataset folder, or a folder that holds some of either.
    out
        Folder for the artifacts, ``model_card.md``, ``model_card.json`` and, with traces of our
        own, ``estimates.json``. Artifacts and table of an earlier training that the new card does
        not speak of are removed.
    workflows
        Folder of workflow graphs (JSON), or one file; they add declared hints, static prefixes
        and unseen outcomes.
    fleet
        Fleet file with the prior latency rows, slots and step budgets of the endpoints.
    seed
        Seed of splits and trees.
    progress
        Called with one line at each stage.

    Raises
    ------
    InvalidInput
        If there is nothing to learn from, or a file is missing or broken.
    """
    graphs = _load_graphs(workflows)
    endpoints: dict[str, Endpoint] = (
        {one.id: one for one in load_fleet(fleet).endpoints} if fleet else {}
    )
    sources = read_folder(traces, seed, progress)
    datasets = [*([sources.own.dataset] if sources.own else []), *sources.public]
    harvest = _Harvest()
    for dataset in datasets:
        _learn(dataset, harvest, seed, progress)
    table = None
    if sources.own:
        progress("fitting endpoint latency of our traces")
        table = _snapshot(sources.own, graphs, endpoints, harvest)
    if not harvest.artifacts and not (table and table.workflows):
        raise InvalidInput(
            "too few usable rows for any predictor",
            where=str(traces),
            remedy=f"give at least {LEAST_ROWS} rows on each side of a split; "
            + _reasons(datasets),
        )
    card = card_json(
        datasets=datasets,
        results=harvest.results,
        extra_set_aside=harvest.not_fitted,
        arrivals={name: asdict(one) for name, one in harvest.arrivals.items()},
        seed=seed,
        table_version=table.version if table else None,
        ignored=sources.ignored,
    )
    progress(f"writing {out}")
    earlier = _of_earlier_training(out)
    files = _write(out, harvest, card, table)
    for path in sorted(earlier - set(files)):
        progress(f"removing {path}: of an earlier training, not in this model card")
        path.unlink()
    return TrainReport(results=tuple(harvest.results), card=card, table=table, files=tuple(files))


def _load_graphs(path: Path | None) -> dict[str, Workflow]:
    if path is None:
        return {}
    if not path.exists():
        raise InvalidInput("no such folder", where=str(path), remedy="check --workflows")
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise WorkflowError("no workflow (*.json)", where=str(path), remedy="check --workflows")
    graphs = [load_workflow(one) for one in files]
    return {graph.content_hash: graph for graph in graphs}


def _reasons(datasets: list[Dataset]) -> str:
    parts = [f"{one.rows} {one.reason}" for data in datasets for one in data.set_aside]
    return f"set aside: {', '.join(parts)}" if parts else "none was set aside"


def _learn(dataset: Dataset, harvest: _Harvest, seed: int, progress: Progress) -> None:
    if dataset.calls is not None:
        progress(f"fitting output length of {dataset.name}")
        _quantiles(
            "output_length", "tokens", dataset, dataset.calls, output_length_predictor,
            harvest, seed,
        )  # fmt: skip
    if dataset.delays is not None:
        progress(f"fitting tool delay of {dataset.name}")
        _quantiles("tool_delay", "s", dataset, dataset.delays, tool_delay_predictor, harvest, seed)
    if dataset.choices is not None:
        progress(f"fitting next action of {dataset.name}")
        _choices(dataset, dataset.choices, harvest)
    if dataset.requests is not None:
        progress(f"fitting endpoint latency of {dataset.name}")
        _latency(dataset, dataset.requests, harvest, seed)
    if dataset.arrivals is not None and dataset.arrivals["time_s"].nunique() > 1:
        progress(f"fitting arrivals of {dataset.name}")
        model = ArrivalModel.fit(dataset.arrivals)
        harvest.arrivals[dataset.name] = model
        harvest.keep("arrivals", dataset, model, [])


def _quantiles(
    kind: str,
    unit: str,
    dataset: Dataset,
    table: pd.DataFrame,
    make: Callable[..., StepQuantilePredictor],
    harvest: _Harvest,
    seed: int,
) -> None:
    target = "output_tokens" if kind == "output_length" else "delay_s"
    known = table[target].notna()
    training, test = known & ~table["held_out"], known & table["held_out"]
    if min(training.sum(), test.sum()) < LEAST_ROWS:
        harvest.too_few(kind, dataset, int(known.sum()))
        return
    fitted = make(seed=seed).fit(table, training)
    constant = make(seed=seed, constant=True).fit(table, training)
    observed = table.loc[test, target].to_numpy(float)
    quantiles = fitted.predict_quantiles(table)[test.to_numpy()]
    flat = constant.predict_quantiles(table)[test.to_numpy()]
    value, baseline = _pinball(observed, quantiles), _pinball(observed, flat)
    # The predictor itself keeps the constant where its calibration rows say so.
    better = not fitted.constant_
    level = LEVELS.index(0.9)
    log_y = np.log1p(table.loc[training, target].to_numpy(float))
    result = Result(
        predictor=kind,
        dataset=dataset.name,
        rows_train=int(training.sum()),
        rows_held_out=int(test.sum()),
        split=dataset.split,
        metric=f"pinball ({unit}; mean of 0.5, 0.9, 0.95)",
        value=value,
        baseline=baseline,
        shipped="predictor" if better else "constant",
        more={
            "R2log": r2_log(
                observed, fitted.predict_log_mean(table)[test.to_numpy()], float(log_y.mean())
            ),
            "coverage90": coverage(observed, quantiles[:, level]),
        },
    )
    harvest.keep(kind, dataset, make(seed=seed).fit(table, known), [result])


def _pinball(observed: Floats, quantiles: Floats) -> float:
    losses = [
        pinball_loss(observed, quantiles[:, LEVELS.index(level)], level) for level in PINBALL_LEVELS
    ]
    return float(np.mean(losses))


def _choices(dataset: Dataset, table: pd.DataFrame, harvest: _Harvest) -> None:
    known = table["action"] != ""
    training, test = known & ~table["held_out"], known & table["held_out"]
    if min(training.sum(), test.sum()) < LEAST_ROWS:
        harvest.too_few("branching", dataset, int(known.sum()))
        return
    fitted = ChoicePredictor().fit(table, training)
    constant = ChoicePredictor(contexts=False).fit(table, training)
    taken = table.loc[test, "action"]

    def score(predictor: ChoicePredictor) -> tuple[float, float]:
        chances = predictor.probabilities(table)[test.to_numpy()]
        column = chances.columns.get_indexer(pd.Index(taken))
        values = chances.to_numpy()[np.arange(len(taken)), column]
        # An outcome never seen in training has no column: probability zero, floored by the loss.
        happened = np.where(column >= 0, values, 0.0)
        likeliest = chances.columns[chances.to_numpy().argmax(axis=1)]
        return log_loss(happened), float(np.mean(likeliest.to_numpy() == taken.to_numpy()))

    (value, accuracy), (baseline, majority) = score(fitted), score(constant)
    better = value < baseline
    result = Result(
        predictor="branching",
        dataset=dataset.name,
        rows_train=int(training.sum()),
        rows_held_out=int(test.sum()),
        split=dataset.split,
        metric="log loss (nats)",
        value=value,
        baseline=baseline,
        shipped="predictor" if better else "constant",
        more={"top1": accuracy, "majority": majority},
    )
    harvest.keep("branching", dataset, ChoicePredictor(contexts=better).fit(table, known), [result])


def _latency(dataset: Dataset, requests: pd.DataFrame, harvest: _Harvest, seed: int) -> None:
    results = []
    training = requests[requests["held_out"] == ""]
    enough = training["config"].value_counts()
    usable = requests["config"].isin(enough[enough >= LEAST_ROWS].index)
    if not usable.all():
        harvest.too_few("endpoint_latency", dataset, int((~usable).sum()))
    requests, training = requests[usable], training[training["config"].isin(requests["config"])]
    if requests.empty:
        return
    pooled = requests["config"].nunique() >= LEAST_CONFIGURATIONS
    # Run once on the training rows, to be judged, and once on all rows, to be kept.
    judged = LatencyPool(seed).fit(training, requests) if pooled else _each(training)
    middle = training.assign(total_s=training["ttft_s"] + training["decode_s"])
    constant = middle.groupby("config")["total_s"].median()
    first = training.groupby("config")["ttft_s"].median()
    for part in sorted(set(requests["held_out"]) - {""}):
        test = requests[requests["held_out"] == part]
        physics = judged.physics_ if isinstance(judged, LatencyPool) else judged
        total = pd.Series(0.0, index=test.index)
        ttft = pd.Series(0.0, index=test.index)
        for name, rows in test.groupby("config"):
            total[rows.index] = physics[str(name)].total_s(rows)
            ttft[rows.index] = physics[str(name)].ttft_s(rows)
        predicted = total.to_numpy(float)
        if isinstance(judged, LatencyPool):
            predicted = judged.total_s(test, requests)
        observed = (test["ttft_s"] + test["decode_s"]).to_numpy(float)
        results.append(
            Result(
                predictor="endpoint_latency",
                dataset=f"{dataset.name}: {part}",
                rows_train=len(training),
                rows_held_out=len(test),
                split=dataset.split,
                metric="median relative error, end to end",
                value=median_relative_error(observed, predicted),
                baseline=median_relative_error(
                    observed, test["config"].map(constant).to_numpy(float)
                ),
                more={
                    "physics alone": median_relative_error(observed, total.to_numpy(float)),
                    "ttft": median_relative_error(
                        test["ttft_s"].to_numpy(float), ttft.to_numpy(float)
                    ),
                    "ttft constant": median_relative_error(
                        test["ttft_s"].to_numpy(float),
                        test["config"].map(first).to_numpy(float),
                    ),
                },
                note="output length given, load as seen when the request is sent; the constant is "
                "the configuration's median",
            )
        )
    final = LatencyPool(seed).fit(requests) if pooled else _each(requests)
    harvest.keep("endpoint_latency", dataset, final, results)


def _each(rows: pd.DataFrame) -> dict[str, LatencyPredictor]:
    return {str(name): LatencyPredictor.fit(part) for name, part in rows.groupby("config")}


def _snapshot(
    own: OwnTraces,
    graphs: Mapping[str, Workflow],
    endpoints: Mapping[str, Endpoint],
    harvest: _Harvest,
) -> EstimateTable:
    fits, skipped = fit_endpoints(own.calls, endpoints)
    harvest.not_fitted += [
        SetAside(table="endpoint_latency of traces", reason=reason, rows=rows)
        for reason, rows in skipped.items()
    ]
    unreported = int(own.calls["cached_tokens"].isna().sum())
    if unreported:
        harvest.not_fitted.append(
            SetAside(
                table="endpoint_latency of traces",
                reason="cached_tokens not reported, prompt counted as uncached (used)",
                rows=unreported,
            )
        )
    rows = {name: fit.row for name, fit in fits.items()}
    if fits:
        results = [_endpoint_result(name, fit, name in endpoints) for name, fit in fits.items()]
        harvest.keep("endpoint_latency", own.dataset, rows, results)
    return estimate_table(own, graphs, rows)


def _endpoint_result(name: str, fit: EndpointFit, in_fleet: bool) -> Result:
    more = {"fleet row": median_relative_error(fit.observed_s, fit.prior_s)} if in_fleet else {}
    return Result(
        predictor="endpoint_latency",
        dataset=f"traces: {name}",
        rows_train=fit.calls - len(fit.observed_s),
        rows_held_out=len(fit.observed_s),
        split="last 30 % of the runs in time held out",
        metric="median relative error, end to end",
        value=median_relative_error(fit.observed_s, fit.predicted_s),
        baseline=median_relative_error(fit.observed_s, fit.constant_s),
        more=more,
        note="for our traces the endpoint's state during the call is rebuilt from all calls and "
        "taken as known, as the output length is",
    )


def _of_earlier_training(out: Path) -> set[Path]:
    """Return the artifacts in a folder, and its table if the card there speaks of it."""
    found = set()
    for path in out.glob("*.joblib"):
        with contextlib.suppress(InvalidInput):  # not ours
            read_info(path)
            found.add(path)
    table = out / "estimates.json"
    with contextlib.suppress(InvalidInput, OSError, ValueError, TypeError, KeyError):
        card = json.loads((out / "model_card.json").read_text(encoding="utf-8"))
        if card["estimates_version"] == load_estimates(table).version:
            found.add(table)
    return found


def _write(
    out: Path, harvest: _Harvest, card: dict[str, Any], table: EstimateTable | None
) -> list[Path]:
    files = []
    for predictor, info in harvest.artifacts:
        path = out / f"{info.kind}-{info.dataset}.joblib"
        save_artifact(predictor, info, path)
        files.append(path)
    if table is not None:
        save_estimates(table, out / "estimates.json")
        files.append(out / "estimates.json")
    texts = {
        "model_card.md": card_markdown(card),
        "model_card.json": json.dumps(card, indent=1, allow_nan=False) + "\n",
    }
    for name, content in texts.items():
        with atomic_write(out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
        files.append(out / name)
    return files
