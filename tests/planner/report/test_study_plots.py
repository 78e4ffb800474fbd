"""Which settings of a study make a curve over load, and what curves look like."""

from typing import Any

from planner.report.study_plots import attainment_plot, load_plot, panels
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


def test_a_policy_looks_the_same_in_every_panel() -> None:
    """Although the panels rank the policies otherwise, and name others."""

    def attained(setting: Setting, *ranked: str) -> dict[str, Any]:
        policies = [
            {"policy": name, "attainment": [(1.0, 0.5), (2.0, 0.9 - 0.01 * rank)]}
            for rank, name in enumerate(ranked)
        ]
        return {"name": setting.name, "policies": policies}

    names = ["almanac", "a", "b", "c", "d", "e", "f"]
    shown = [attained(Setting(load=0.5), *names), attained(Setting(load=0.7), *reversed(names))]
    looks: dict[str, set[tuple[Any, ...]]] = {}
    for axes in attainment_plot(shown).axes:
        for line in axes.lines:
            if not str(line.get_label()).startswith("_"):
                look = (line.get_color(), line.get_linestyle(), line.get_linewidth())
                looks.setdefault(str(line.get_label()), set()).add(look)
    assert set(looks) == set(names)
    assert all(len(found) == 1 for found in looks.values())
    assert len(set.union(*looks.values())) == len(names)
