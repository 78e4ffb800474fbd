"""Which settings of a study make a curve over load."""

from typing import Any

from planner.report.study_plots import load_plot, panels
from planner.study.settings import Setting


def played(setting: Setting, **mean_s: float) -> dict[str, Any]:
    """Return a setting of a study document, with the mean of each policy."""
    policies = [{"policy": name, "metrics": {"mean_s": {"mean": s}}} for name, s in mean_s.items()]
    return {"name": setting.name, "setting": setting.to_json(), "policies": policies}


def test_a_panel_needs_a_policy_at_three_loads() -> None:
    """Other policies at the third load, fewer loads, and fixed rates give no curve."""
    shown = [
        played(Setting(load=0.5), almanac=1.0, round_robin=2.0),
        played(Setting(load=0.7), almanac=2.0, round_robin=3.0),
        played(Setting(load=0.9), almanac=3.0),
        played(Setting(mix="rag", load=0.5), almanac=1.0),
        played(Setting(mix="rag", load=0.7), almanac=1.5),
        played(Setting(mix="rag", load=0.9), round_robin=1.0),
        played(Setting(mix="tree", fixed_rps=1.0), almanac=1.0),
        played(Setting(mix="tree", fixed_rps=2.0), almanac=2.0),
        played(Setting(mix="react"), almanac=1.0),
    ]
    groups = panels(shown)
    assert list(groups) == ["h02, agents, ample KV, poisson"]
    (axes,) = (one for one in load_plot(groups).axes if one.get_visible())
    assert axes.get_legend_handles_labels()[1] == ["almanac"]


def test_a_closed_loop_has_no_arrival_rate() -> None:
    """Its load is counted in clients."""
    settings = [Setting(arrivals="closed", load=load) for load in (0.25, 0.5, 1.0)]
    groups = panels([played(one, almanac=1.0) for one in settings])
    assert "clients" in load_plot(groups).axes[0].get_xlabel()
