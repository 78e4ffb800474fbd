"""Arrival processes: rates, bursts, recorded clients."""

import numpy as np
import pytest

from planner.domain.arrivals import ArrivalWindow
from planner.domain.errors import InvalidInput
from planner.domain.ids import RunId, WorkflowHash
from planner.domain.run import RunSpec
from planner.sim.workload import burst_arrivals, gamma_arrivals, windowed_arrivals, with_clients


def spread(times: np.ndarray) -> float:
    gaps = np.diff(times)
    return float(gaps.std() / gaps.mean())


@pytest.mark.parametrize("cv", [0.5, 1.0, 3.0])
def test_gamma_gaps_have_the_wanted_mean_and_variation(cv: float) -> None:
    """Rate and coefficient of variation are those asked for."""
    times = gamma_arrivals(2.0, cv, 40_000, np.random.default_rng(0))
    assert len(times) / times[-1] == pytest.approx(2.0, rel=0.1)
    assert spread(times) == pytest.approx(cv, rel=0.1)


def window(
    client: str, start_s: float, rate: float, shape: float = 1.0, **rest: object
) -> ArrivalWindow:
    values = {"end_s": start_s + 600.0, "law": "gamma", **rest}
    return ArrivalWindow(client=client, start_s=start_s, rate_rps=rate, shape=shape, **values)  # type: ignore[arg-type]


def test_clients_keep_their_shares_over_the_windows() -> None:
    """Client a sends three times as often as b in all, but in the first window only."""
    windows = [window("a", 0.0, 6.0), window("b", 0.0, 1.0), window("b", 600.0, 1.0)]
    times, clients = windowed_arrivals(windows, 1.0, 60_000, np.random.default_rng(3))
    assert np.all(np.diff(times) >= 0)
    assert times[-1] == pytest.approx(60_000.0)
    assert clients.count("a") / clients.count("b") == pytest.approx(3.0, rel=0.1)
    silent = np.diff([time_s for time_s, name in zip(times, clients, strict=True) if name == "a"])
    assert silent.max() > 100 * np.median(silent)


@pytest.mark.parametrize(("law", "shape", "cv"), [("gamma", 0.25, 2.0), ("weibull", 0.5, 5**0.5)])
def test_gaps_follow_their_law(law: str, shape: float, cv: float) -> None:
    """One client in one long window: the variation of gamma and Weibull gaps of that shape."""
    one = [window("a", 0.0, 1.0, shape, end_s=1e9, law=law)]
    times, _ = windowed_arrivals(one, 1.0, 30_000, np.random.default_rng(1))
    assert spread(times) == pytest.approx(cv, rel=0.1)


def test_a_seed_fixes_the_arrivals() -> None:
    """The same generator state gives the same arrivals, another one others."""
    windows = [window("a", 600.0 * k, 1.0 + k % 3, 0.3) for k in range(50)]
    one, two, three = (
        windowed_arrivals(windows, 2.0, 500, np.random.default_rng(seed))[0] for seed in (1, 1, 2)
    )
    assert np.array_equal(one, two)
    assert not np.array_equal(one, three)


def test_a_burst_comes_at_once() -> None:
    """All at 0."""
    assert burst_arrivals(3).tolist() == [0.0, 0.0, 0.0]


def test_runs_get_tenants_deadlines_and_patience() -> None:
    """Shares hold, the mean patience is the one asked for, and given tenants stay in order."""
    runs = [
        RunSpec(
            run_id=RunId(str(i)),
            workflow="w",
            workflow_hash=WorkflowHash("h"),
            arrival_s=0.0,
            tasks=(),
        )
        for i in range(4000)
    ]
    rng = np.random.default_rng(0)
    changed = with_clients(runs, {"a": 3, "b": 1}, rng, deadline_s=9.0, patience_s=5.0)
    assert np.mean([run.tenant == "a" for run in changed]) == pytest.approx(0.75, abs=0.03)
    assert np.mean([run.patience_s or 0 for run in changed]) == pytest.approx(5.0, rel=0.05)
    assert {run.deadline_s for run in changed} == {9.0}
    assert [run.tenant for run in with_clients(runs[:2], ["x", "y"], rng)] == ["x", "y"]


def test_impossible_arrivals_are_refused() -> None:
    """Rates, variations, shapes and shares that make no sense are input errors."""
    rng = np.random.default_rng(0)
    for wrong in (lambda: gamma_arrivals(1.0, 0.0, 5, rng), lambda: burst_arrivals(0),
                  lambda: windowed_arrivals([], 1.0, 5, rng), lambda: window("a", 0.0, -1.0),
                  lambda: window("a", 0.0, 1.0, law="pareto")):  # fmt: skip
        with pytest.raises(InvalidInput, match="arrivals"):
            wrong()
    with pytest.raises(InvalidInput, match="tenants"):
        with_clients([], {}, rng)
