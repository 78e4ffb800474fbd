"""The named studies: each asks one question of a grid of settings, policies and seeds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from planner.dispatch.policies import POLICIES
from planner.domain.errors import InvalidInput
from planner.study import acceptance
from planner.study.ablation import SIGNALS
from planner.study.claims import Claim, Side, sides_of
from planner.study.settings import Setting

__all__ = ["OURS", "STUDIES", "Study", "make_study"]

OURS = "almanac"
"""The policy that studies are about."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What is compared, on what.

    Parameters
    ----------
    question
        What it answers, one sentence.
    settings, policies
        The grid; policies as `planner.study.entries.parse_entry` reads them. Those with a grid of
        parameters and none given are tuned.
    claims
        What is expected; policies and settings that they need are part of the study.
    tuned
        Whether anything is tuned; else policies have the parameters of their papers.
    runs, seeds
        Runs per seed, warm-up included, and replications.
    more_seeds
        Further replications of the best, see `planner.study.contenders`.
    tuning_runs, tuning_seeds
        The same for tuning, on other seeds; see `tuning_runs_in`.
    baseline
        The policy that the others are held against, besides the best of the others.
    most_loss
        Share by which mean and P95 of ours may lie above the baseline's, or None for no such bar.
    bounds
        Whether means are held against the mean that no policy beats.
    clairvoyant_steps
        Steps of the local search for what knowing all lengths would gain; 0 leaves it out.
    threats
        What may be wrong with its answer.
    """

    name: str
    question: str
    settings: tuple[Setting, ...]
    policies: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()
    tuned: bool = True
    runs: int = 600
    seeds: int = 10
    more_seeds: int = 0
    tuning_runs: int = 400
    tuning_seeds: int = 3
    baseline: str = "marginal_cost"
    most_loss: float | None = None
    bounds: bool = False
    clairvoyant_steps: int = 0
    threats: tuple[str, ...] = ()

    def policies_in(self, setting: Setting) -> tuple[str, ...]:
        """Return the policies of a setting: those of the grid, and those that claims need."""
        wanted = [side.policy for side in sides_of(self.claims) if side.setting == setting]
        return tuple(dict.fromkeys((*self.policies, *wanted)))

    def tuning_runs_in(self, setting: Setting) -> int:
        """Return the runs of a tuning seed: a burst of fewer runs would be another burst."""
        return self.runs if setting.arrivals == "burst" else self.tuning_runs


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

_ALL = (*(name for name in POLICIES if name != "almanac"), "almanac")
_RAY = "ray_default=prefix_affinity:imbalanced_threshold=inf"
_BASE = Setting(load=0.85)
_IDLE = Setting(fleet="h00", load=0.02)
_CALIBRATED = (
    Setting(load=0.85),
    Setting(load=0.95),
    Setting(mix="mapreduce", load=0.95),
    Setting(mix="tree", load=0.95),
    Setting(fleet="hetero1", mix="rag", arrivals="burst"),
    Setting(fleet="hetero2", mix="react", arrivals="burst"),
    acceptance.POOLS,
    acceptance.ALIKE,
    acceptance.TENANTS,
)
_SCARCE = tuple(
    Setting(kv="scarce", mix=mix, load=load)
    for mix, load in (("agents", 0.7), ("agents", 0.85), ("tool_heavy", 0.7))
)


def _standard() -> tuple[Setting, ...]:
    """Return a point for each value of each factor, the others as in the middle."""
    fleets = [Setting(fleet=fleet) for fleet in ("h00", "measured")]
    # Pools have too many slots for a few hundred runs to fill them steadily.
    pools = [
        Setting(fleet=fleet, mix=mix, arrivals="burst")
        for fleet, mix in (("hetero1", "rag"), ("hetero2", "react"))
    ]
    loads = [Setting(load=load) for load in (0.1, 0.5, 0.7, 0.85, 0.95, 1.1)]
    arrivals = [
        Setting(load=0.7, arrivals="gamma", cv=3.0),
        Setting(load=0.7, arrivals="azure_conv"),
        Setting(load=0.7, arrivals="mooncake_conversation"),
        Setting(load=0.5, arrivals="closed"),
        Setting(arrivals="burst"),
    ]
    names = ("rag", "react", "mapreduce", "tree", "tool_heavy", "multi_tenant")
    mixes = [Setting(mix=name) for name in names]
    scarce = [Setting(kv="scarce", mix=mix, load=0.7) for mix in ("agents", "tool_heavy")]
    return tuple(fleets + pools + loads + arrivals + mixes + scarce)


def _agentir() -> tuple[tuple[Setting, ...], tuple[Claim, ...]]:
    """Return AgentIR's setting: its published gains, asked of each heterogeneity level."""
    # Its means and throughputs are reciprocal, as only a closed loop makes them.
    fleets = ("h00", "h01", "h02")
    # How many clients there were is not published: a quarter, a half, and one for each slot.
    closed = [
        Setting(fleet=fleet, load=load, arrivals="closed")
        for fleet in fleets
        for load in (0.25, 0.5, 1.0)
    ]
    opened = [Setting(fleet=fleet, load=load) for fleet in fleets for load in (0.7, 0.85)]
    published = (
        ("round_robin", -0.413, 0.705),
        ("power_of_two", -0.215, 0.274),
        (_RAY, -0.205, 0.265),
        ("prefix_affinity", -0.205, 0.265),
    )
    claims = []
    for setting in (*closed, *opened):
        of = Side(setting=setting, policy="almanac")
        unit = "clients a slot" if setting.arrivals == "closed" else "of capacity"
        name = f"almanac, {setting.fleet}, {setting.load:g} {unit}"
        for rival, mean, throughput in published:
            against = (Side(setting=setting, policy=rival),)
            source = f"AgentIR: {mean:+.1%} mean, {throughput:+.1%} throughput"
            claims += [
                Claim(name=name, metric="mean_s", of=of, against=against, high=mean, source=source),
                Claim(
                    name=name, metric="throughput_rps", of=of, against=against, low=throughput,
                    source=source,
                ),
                Claim(name=name, metric="p95_s", of=of, against=against, high=0.0,
                      source="not published"),
            ]  # fmt: skip
    return (*closed, *opened), tuple(claims)


def _regimes() -> tuple[Claim, ...]:
    """Return the checks of the regimes that the other studies rely on."""
    idle = [
        Claim(name=f"idle: {policy}", metric="mean_s", of=Side(setting=_IDLE, policy=policy),
              against=(Side(setting=_IDLE, policy="least_expected_finish"),), low=-0.02, high=0.02,
              source="notes: all policies within 2 % near idle")
        for policy in _ALL if policy != "least_expected_finish"
    ]  # fmt: skip
    calm = [
        Claim(name=f"idle: {policy}", metric="stretch_p95", measured="value", high=1.3,
              of=Side(setting=_IDLE, policy=policy), source="notes: Req95 < 1.3 near idle")
        for policy in ("fcfs_workflow", "almanac")
    ]  # fmt: skip
    calibrated = [
        Claim(name=f"calibrated: {setting.name}", metric="stretch_p95", measured="value",
              of=Side(setting=setting, policy="fcfs_workflow"), low=3.0, high=9.0,
              source="HexAGenT's range")
        for setting in _CALIBRATED
    ]  # fmt: skip
    scarce = [
        Claim(name=f"KV pressure: {setting.name}", metric="refilled_share", measured="value",
              of=Side(setting=setting, policy="least_expected_finish"), low=0.2,
              source="SAGA: 22 to 38 % of the time")
        for setting in (*_SCARCE, acceptance.ENGINE)
    ]  # fmt: skip
    return (*idle, *calm, *calibrated, *scarce)


def _cost_of_wrong_forecasts() -> tuple[Claim, ...]:
    """Return what worse forecasts may cost, against learned ones."""
    allowed = {"oracle": 0.01, "noise30": 0.05, "type_mean": 0.15, "wrong": 0.3}
    return tuple(
        Claim(
            name=f"almanac, {quality} forecasts", metric=metric,
            of=Side(setting=Setting(fleet=_BASE.fleet, load=_BASE.load, forecasts=quality),
                    policy="almanac"),
            against=(Side(setting=_BASE, policy="almanac"),), high=most,
            source="our own limit, against learned forecasts",
        )
        for quality, most in allowed.items() for metric in ("mean_s", "p95_s")
    )  # fmt: skip


def _settings_of(claims: tuple[Claim, ...]) -> tuple[Setting, ...]:
    return tuple(dict.fromkeys(side.setting for side in sides_of(claims)))


_AGENTIR_SETTINGS, _AGENTIR_CLAIMS = _agentir()

STUDIES: Mapping[str, Study] = {
    study.name: study
    for study in (
        Study(
            name="standard",
            question="Is almanac better than the best of all other policies, whatever the fleet, "
            "load, arrivals, work, room for KV and forecasts?",
            settings=_standard(),
            policies=_ALL,
            runs=360,
            more_seeds=20,
            tuning_runs=180,
            tuning_seeds=1,
            bounds=True,
            threats=_THREATS,
        ),
        Study(
            name="agentir",
            question="In AgentIR's setting of five endpoints, what does almanac gain over round "
            "robin, two choices and prefix affinity, as shipped and tuned?",
            settings=_AGENTIR_SETTINGS,
            policies=(
                "round_robin",
                "power_of_two",
                _RAY,
                "prefix_affinity",
                "marginal_cost",
                "almanac",
            ),
            claims=_AGENTIR_CLAIMS,
            baseline="prefix_affinity",
            threats=(*_THREATS, "AgentIR's workload and simulator are not public: ours differ."),
        ),
        Study(
            name="ablation",
            question="What is each signal of almanac worth? Each is removed in turn, and the rest "
            "tuned again.",
            settings=(
                _BASE,
                Setting(kv="scarce"),
                Setting(arrivals="burst"),
                Setting(mix="mapreduce"),
                Setting(mix="multi_tenant"),
            ),
            policies=("almanac", *(f"almanac-{signal}" for signal in SIGNALS), "almanac-tail"),
            baseline="almanac",
            threats=_THREATS,
        ),
        Study(
            name="forecasts",
            question="What do worse forecasts cost, and whom?",
            settings=tuple(
                Setting(load=0.85, forecasts=quality)
                for quality in ("learned", "oracle", "noise30", "type_mean", "wrong")
            ),
            policies=(
                "power_of_two",
                "least_expected_finish",
                "marginal_cost",
                "llf_workflow",
                "hexagent",
                "almanac",
            ),
            claims=_cost_of_wrong_forecasts(),
            threats=_THREATS,
        ),
        Study(
            name="acceptance",
            question="Do the literature's mechanisms do here what their papers say?",
            settings=_settings_of(acceptance.CLAIMS),
            claims=acceptance.CLAIMS,
            tuned=False,
            runs=400,
            baseline="fcfs_workflow",
            threats=(*_THREATS, "Policies are reconstructions; their modules list the deviations."),
        ),
        Study(
            name="regimes",
            question="Are the regimes what the studies take them for: idle, calibrated, short of "
            "KV?",
            settings=_settings_of(_regimes()),
            claims=_regimes(),
            tuned=False,
            runs=400,
            seeds=5,
            baseline="least_expected_finish",
            threats=_THREATS,
        ),
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
            policies=(*_COMPARED, "almanac-tail"),
            runs=500,
            more_seeds=20,
            tuning_runs=450,
            tuning_seeds=2,
            most_loss=0.01,
            clairvoyant_steps=60,
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
