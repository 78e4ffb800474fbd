"""Records show themselves in notebooks as tables."""

from __future__ import annotations

from planner.domain.estimates import load_estimates
from planner.domain.files import data_dir
from planner.domain.fleet import load_fleet
from planner.domain.show import html_table
from planner.report.comparison import compare
from tests.planner.report.samples import plan, results, table


def test_tables_are_escaped_and_rectangular() -> None:
    """Text is escaped, None is a dash, a missing cell is empty, floats are short."""
    shown = html_table([{"a<b": "<i>", "x": 1 / 3}, {"a<b": None}], "one & two")
    assert "<th>a&lt;b</th>" in shown
    assert "<td>&lt;i&gt;</td><td>0.3333</td>" in shown
    assert "<td>-</td><td></td>" in shown
    assert "<caption>one &amp; two</caption>" in shown


def test_records_state_their_figures() -> None:
    """Plan, dispatch table, fleet, estimates and comparison show what one would print of them."""
    assert "10.00 s expected, proven at least 9.50 s (gap 5.0%)" in plan()._repr_html_()
    assert "<td>draft#0</td><td>50%</td>" in plan()._repr_html_()
    assert "h100 75% 1.25 s, a100 25% 2.50 s" in table()._repr_html_()
    assert "<td>H100</td>" in load_fleet(data_dir() / "fleets" / "demo.yaml")._repr_html_()
    truth = load_estimates(data_dir() / "demo" / "truth.json")
    assert "<td>critic#0</td>" in truth._repr_html_()
    frame = compare(results(1.2)).to_frame().set_index("policy")
    assert abs(frame.loc["almanac", "mean_s against best"] - 0.2) < 1e-9
    assert "marginal_cost" in compare(results())._repr_html_()
