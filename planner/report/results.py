"""The results file: what `almanac run` and `almanac simulate` leave for the report.

A results folder holds ``results.json`` and optionally ``simulated.json`` (the simulated twin of a
live run, same schema), ``traces/*.jsonl``, ``workflow.json``, ``fleet.yaml``, ``plan.json``,
``table.json`` and ``models/model_card.json``. Paths inside the file are relative to its folder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

from planner.domain.check import closed_mapping, integer, items, mapping, one_of, text
from planner.domain.errors import InvalidInput
from planner.domain.files import atomic_write, read_json
from planner.metrics import RunMetrics

__all__ = [
    "RESULTS_FILE",
    "RESULTS_SCHEMA",
    "PolicyResult",
    "Results",
    "SeedResult",
    "load_results",
    "save_results",
]

RESULTS_SCHEMA = "almanac.results/1"
RESULTS_FILE = "results.json"
MODES = ("live", "simulated")


@dataclass(frozen=True, slots=True, kw_only=True)
class SeedResult:
    """One replication; ``trace`` is the path of its trace relative to the folder, or None."""

    seed: int
    metrics: RunMetrics
    trace: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyResult:
    """One policy over all its seeds.

    Parameters
    ----------
    policy
        Name of the policy.
    label
        What to call it in tables and pictures; unique within the results.
    parameters
        What it was run with.
    seeds
        Replications, by increasing seed; equal seeds of two policies saw the same runs.
    """

    policy: str
    label: str
    seeds: tuple[SeedResult, ...]
    parameters: Mapping[str, Any] = field(default_factory=dict)

    def values(self, metric: str) -> dict[int, float]:
        """Return seed -> value of a field of `RunMetrics`; seeds without a value are left out."""
        found = {one.seed: getattr(one.metrics, metric) for one in self.seeds}
        return {seed: float(value) for seed, value in found.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """All policies of one comparison.

    Parameters
    ----------
    mode
        ``live`` (real sockets and clocks) or ``simulated``.
    settings
        Facts of the comparison, printed as they are. ``dilation`` (model seconds per wall
        second) and ``notes`` (texts) get a sentence of their own in the report.

    Raises
    ------
    InvalidInput
        If there is no policy or a label or seed repeats.
    """

    title: str
    mode: Literal["live", "simulated"]
    policies: tuple[PolicyResult, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.policies:
            raise InvalidInput("no policy", where="policies", remedy="run at least one")
        labels = [policy.label for policy in self.policies]
        for position, policy in enumerate(self.policies):
            where = f"policies[{position}]"
            if labels.count(policy.label) > 1:
                raise InvalidInput(
                    f"label {policy.label!r} is used twice", where=where, remedy="rename one"
                )
            seeds = [one.seed for one in policy.seeds]
            if not seeds or sorted(set(seeds)) != seeds:
                raise InvalidInput(
                    f"seeds {seeds}", where=f"{where}.seeds", remedy="list each once, increasing"
                )

    def policy(self, label: str) -> PolicyResult:
        """Return a policy by label.

        Raises
        ------
        InvalidInput
            If there is none.
        """
        for policy in self.policies:
            if policy.label == label:
                return policy
        raise InvalidInput(
            f"no policy {label!r}",
            where=f"results {self.title!r}",
            remedy=f"known: {', '.join(policy.label for policy in self.policies)}",
        )

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, schema included."""
        return {
            "schema": RESULTS_SCHEMA,
            "title": self.title,
            "mode": self.mode,
            "settings": dict(self.settings),
            "policies": [
                {
                    "policy": policy.policy,
                    "label": policy.label,
                    "parameters": dict(policy.parameters),
                    "seeds": [
                        {"seed": one.seed, "metrics": one.metrics.to_json(), "trace": one.trace}
                        for one in policy.seeds
                    ],
                }
                for policy in self.policies
            ],
        }

    @classmethod
    def from_json(cls, raw: Any, where: str = "results") -> Results:
        """Rebuild results.

        Raises
        ------
        InvalidInput
            Naming the field, the value and the remedy.
        """
        try:
            return _results_from_json(raw)
        except InvalidInput as error:
            place = f"{where}: {error.where}" if error.where else where
            raise InvalidInput(error.what, where=place, remedy=error.remedy) from error


def _results_from_json(document: Any) -> Results:
    raw = closed_mapping(document, "", {"schema", "title", "mode", "settings", "policies"})
    if raw.get("schema") != RESULTS_SCHEMA:
        raise InvalidInput(
            f"{raw.get('schema')!r} is not a schema this version reads",
            where="schema",
            remedy="make the file again with `almanac run` or `almanac simulate`",
        )
    return Results(
        title=text(raw.get("title"), "title"),
        mode=cast("Literal['live', 'simulated']", one_of(raw.get("mode"), "mode", MODES)),
        settings=mapping(raw.get("settings", {}), "settings"),
        policies=tuple(
            _policy_from_json(value, f"policies[{position}]")
            for position, value in enumerate(items(raw.get("policies"), "policies"))
        ),
    )


def _policy_from_json(value: Any, where: str) -> PolicyResult:
    raw = closed_mapping(value, where, {"policy", "label", "parameters", "seeds"})
    seeds = []
    for position, item in enumerate(items(raw.get("seeds"), f"{where}.seeds")):
        place = f"{where}.seeds[{position}]"
        one = closed_mapping(item, place, {"seed", "metrics", "trace"})
        trace = one.get("trace")
        seeds.append(
            SeedResult(
                seed=integer(one.get("seed"), f"{place}.seed"),
                metrics=RunMetrics.from_json(one.get("metrics"), f"{place}.metrics"),
                trace=None if trace is None else text(trace, f"{place}.trace"),
            )
        )
    name = text(raw.get("policy"), f"{where}.policy")
    return PolicyResult(
        policy=name,
        label=text(raw.get("label", name), f"{where}.label"),
        parameters=mapping(raw.get("parameters", {}), f"{where}.parameters"),
        seeds=tuple(seeds),
    )


def load_results(path: Path) -> Results:
    """Read a results file, or the ``results.json`` of a folder.

    Raises
    ------
    InvalidInput
        Naming file, field, value and remedy.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    return Results.from_json(read_json(file, what="results file"), where=str(file))


def save_results(results: Results, path: Path) -> Path:
    """Write a results file (into ``results.json`` if the path is a folder); return its path."""
    file = path if path.suffix == ".json" else path / RESULTS_FILE
    with atomic_write(file) as temporary:
        temporary.write_text(json.dumps(results.to_json(), indent=1) + "\n", encoding="utf-8")
    return file
