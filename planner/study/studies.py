"""The named studies: each asks one question of a grid of settings, policies and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.domain.errors import InvalidInput
from planner.study.settings import Setting

__all__ = ["STUDIES", "Study", "make_study"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What is compared, on what.

    Parameters
    ----------
    question
        What it answers, one sentence.
    settings, policies
        The grid; policies as ``name`` or ``name:key=value,...``. Those with a grid of parameters
        and none given are tuned.
    runs, seeds
        Runs per seed, warm-up included, and replications.
    tuning_runs, tuning_seeds
        The same for tuning, on other seeds.
    baseline
        The policy that the others are held against, besides the best of the others.
    clairvoyant_steps
        Steps of the local search for what knowing all lengths would gain; 0 leaves it out.
    threats
        What may be wrong with its answer.
    """

    name: str
    question: str
    settings: tuple[Setting, ...]
    policies: tuple[str, ...]
    runs: int = 600
    seeds: int = 10
    tuning_runs: int = 400
    tuning_seeds: int = 3
    baseline: str = "marginal_cost"
    clairvoyant_steps: int = 0
    threats: tuple[str, ...] = ()


_COMPARED = (
    "round_robin",
    "power_of_two",
    "prefix_affinity",
    "least_expected_finish",
    "marginal_cost",
    "almanac",
)
_THREATS = (
    "Simulated: the engine model follows vLLM's scheduler and measured rows, not hardware.",
    "Workflows are models with lognormal lengths, not recordings.",
    "Capacity is the plan's own, which knows no eviction: scarce KV makes loads higher than named.",
    "P99 of a few hundred runs is a rough figure; read it over all seeds.",
    "With an overloaded policy latency grows with the length of the simulation.",
)

STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        Study(
            name="value",
            question="What is workflow-aware placement worth, by how unlike the endpoints are, "
            "load and room for KV?",
            settings=tuple(
                Setting(fleet=fleet, kv=kv, load=load)
                for fleet in ("h00", "h01", "h02")
                for kv in ("ample", "scarce")
                for load in (0.5, 0.7, 0.85, 0.95)
            ),
            policies=_COMPARED,
            clairvoyant_steps=100,
            threats=_THREATS,
        ),
        Study(
            name="smoke",
            question="Does the machinery work? Two settings, few runs.",
            settings=(
                Setting(fleet="h02", load=0.7),
                Setting(fleet="h02", kv="scarce", load=0.85),
            ),
            policies=("power_of_two", "least_expected_finish", "marginal_cost", "almanac"),
            runs=150,
            seeds=3,
            tuning_runs=100,
            tuning_seeds=1,
            threats=_THREATS,
        ),
    )
}
"""Studies by name."""


def make_study(name: str) -> Study:
    """Return a study by name.

    Raises
    ------
    InvalidInput
        If there is none.
    """
    try:
        return STUDIES[name]
    except KeyError:
        raise InvalidInput(
            f"{name!r} is unknown", where="--study", remedy=f"use one of {', '.join(STUDIES)}"
        ) from None
