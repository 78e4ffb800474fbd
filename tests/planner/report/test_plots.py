"""Pictures: what stands in them, units on every axis, and the same input the same bytes."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from planner.domain.errors import InvalidInput
from planner.domain.ids import NodeId
from planner.domain.trace import CallRecord
from planner.domain.workflow import END, START, Node, Workflow
from planner.metrics import PairedDifference
from planner.report import plots
from planner.report.comparison import compare
from tests.planner.graph.research import branch, edge, llm, research_workflow
from tests.planner.report.samples import WORKFLOW, records, results, table


def words(figure: Figure) -> str:
    """Return all text of a figure."""
    return "\n".join(one.get_text() for one in figure.findobj(Text) if one.get_text())


def points(*values_s: float) -> list[plots.LoadPoint]:
    """Return a point per value, at loads 0.5, 1, 1.5, ..."""
    return [
        plots.LoadPoint(load=0.5 + 0.5 * place, value_s=value, low_s=0.9 * value)
        for place, value in enumerate(values_s)
    ]


LOADS = {"a": points(1.0, 2.0), "b": points(2.0, 30.0), "empty": []}
EFFECTS = {
    "less": PairedDifference(-0.1, -0.12, -0.08),
    "tie": PairedDifference(0.01, -0.02, 0.04),
    "alone": PairedDifference(0.5, -math.inf, math.inf),
}


def figures() -> Iterator[tuple[str, Figure]]:
    """Yield one figure of each kind that has axes."""
    series = plots.forecasts_of(records("almanac", 0), "almanac")
    yield "cdf", plots.latency_cdfs({"a": [1.0, 2.0], "b": [3.0]})
    yield "bars", plots.latency_bars(compare(results()))
    yield "forecasts", plots.predicted_vs_actual({"runs": [series[0]], "calls": [series[1]]})
    yield "gantt", plots.run_gantt([("almanac", records("almanac", 0))], "s0-r1")
    yield "table", plots.table_heatmaps(table())
    trace = records("almanac", 0)
    yield "fleet", plots.fleet_gantt(trace, ["h100", "a100", "idle"], run_id="s0-r1")
    yield "busy", plots.fleet_occupancy(trace, {"h100": 1, "a100": 2})
    yield "parts", plots.time_parts({"almanac": plots.mean_parts(trace)})
    yield "search", plots.search_progress([(0.1, 5.0, 3.0), (0.4, 4.0, 3.5)])
    yield "load", plots.load_latency(LOADS, bound=LOADS["a"])
    yield "effects", plots.effects(EFFECTS, against="b")


@pytest.mark.parametrize(("name", "figure"), list(figures()), ids=lambda one: str(one)[:9])
def test_every_axis_is_labelled(name: str, figure: Figure) -> None:
    """Quantities carry their unit; categories are named."""
    axes = [one for one in figure.axes if one.get_label() != "<colorbar>"]
    assert axes
    labels = [axes[-1].get_xlabel(), *(one.get_ylabel() for one in axes)]
    if name == "table":
        assert {"endpoint", "call site"} <= {axes[0].get_xlabel(), axes[0].get_ylabel()}
    else:
        ends = {"load": "capacity)", "effects": "(%)"}
        assert labels[0].endswith(ends.get(name, "(s)"))


@pytest.mark.parametrize(("name", "figure"), list(figures()), ids=lambda one: str(one)[:9])
def test_nothing_hides_what_a_legend_says(name: str, figure: Figure) -> None:
    """A legend beside the axes lies inside the figure, and on none of its axes."""
    figure.canvas.draw()
    frame = figure.bbox
    for legend in figure.legends:
        box = legend.get_window_extent()
        assert frame.x0 - 1 <= box.x0, name
        assert box.x1 <= frame.x1 + 1, name
        assert not any(box.overlaps(axes.get_window_extent()) for axes in figure.axes), name


def test_pictures_are_reproducible() -> None:
    """The same figure made twice gives the same PNG bytes."""
    first, second = (plots.to_png(plots.latency_cdfs({"a": [1.0, 2.0, 5.0]})) for _ in range(2))
    assert first == second
    assert first.startswith(b"\x89PNG")


def test_no_global_state() -> None:
    """Importing and drawing never loads pyplot, so no window and no global figure list."""
    code = (
        "import sys; from planner.report import plots; "
        "plots.to_png(plots.latency_cdfs({'a': [1.0]})); "
        "sys.exit('matplotlib.pyplot' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603


def test_curves_differ_without_colour() -> None:
    """Policies up to the number of dash patterns differ by line style alone."""
    figure = plots.latency_cdfs({f"p{k}": [1.0 + k] for k in range(6)})
    lines = [line for line in figure.axes[0].get_lines() if line.get_label().startswith("p")]
    assert len({str(line.get_linestyle()) + str(line._dash_pattern) for line in lines}) == 6


def test_cdf_needs_a_value() -> None:
    """Empty curves are left out; nothing at all is an error."""
    assert "b" not in words(plots.latency_cdfs({"a": [1.0], "b": []})).split()
    with pytest.raises(InvalidInput, match="no run ended well"):
        plots.latency_cdfs({"a": []})


def test_wide_range_is_logarithmic() -> None:
    """A policy five times slower than the best must not squeeze the best one."""
    assert plots.latency_cdfs({"a": [1.0], "b": [4.0]}).axes[0].get_xscale() == "linear"
    assert plots.latency_cdfs({"a": [1.0], "b": [9.0]}).axes[0].get_xscale() == "log"


def test_bars_state_wins_losses_and_the_best_baseline() -> None:
    """Beside the bars stand the paired differences of all policies."""
    shown = words(plots.latency_bars(compare(results(1.2))))
    assert "+20.0% [+20.0%, +20.0%] loss" in shown
    assert "best baseline" in shown


def test_bars_cut_off_what_would_hide_the_rest() -> None:
    """A policy far off says so instead of stretching the axis."""
    shown = words(plots.latency_bars(compare(results(0.01))))
    assert "off the axis" in shown


def test_forecasts_are_durations_from_dispatch() -> None:
    """Calls count from dispatch to finish, runs from arrival; both by hand."""
    runs, calls = plots.forecasts_of(records("round_robin", 0), "rr")
    assert runs.predicted_s == (11.0,) * 5
    assert runs.actual_s == (10.0, 11.0, 12.0, 13.0, 14.0)
    assert calls.actual_s[0] == pytest.approx(10 / 3 - 0.1)
    assert calls.predicted_s[0] == pytest.approx(4 - 0.1)


def test_forecast_titles_state_error_and_coverage() -> None:
    """Median error and the share within a factor of 1.25 stand above the panel."""
    one = plots.Forecast(label="x", predicted_s=(1.0, 1.0, 1.0), actual_s=(1.0, 1.25, 2.0))
    shown = words(plots.predicted_vs_actual({"runs": [one]}))
    assert "runs (n = 3): median error 20%" in shown
    assert "67% within" in shown
    empty = plots.Forecast(label="x", predicted_s=(), actual_s=())
    with pytest.raises(InvalidInput, match="no forecast"):
        plots.predicted_vs_actual({"runs": [empty]})


def test_gantt_names_calls_tools_and_endpoints() -> None:
    """Each panel says when the run was done; bars name endpoint or tool."""
    panels = [(name, records(name, 0)) for name in ("round_robin", "almanac")]
    shown = words(plots.run_gantt(panels, "s0-r0"))
    assert "round_robin: done after 10.00 s" in shown
    assert "almanac: done after 7.20 s" in shown
    for word in ("triage", "draft", "search", "h100", "a100", "tool"):
        assert word in shown
    with pytest.raises(InvalidInput, match="no run 'nobody'"):
        plots.run_gantt(panels, "nobody")


def test_workflow_graph_names_everything() -> None:
    """Nodes, outcomes, joins and loops are in the picture."""
    shown = words(plots.workflow_graph(research_workflow()))
    for node in research_workflow().nodes:
        assert node.id in shown
    for word in ("start", "end", "quick", "deep", "accept", "join: all", "again", "loop"):
        assert word in shown


def test_workflow_graph_draws_every_kind_and_a_self_loop() -> None:
    """Routers, code, tools, sub-graphs, dynamic nodes and a node that repeats itself."""
    inner = Workflow(
        name="inner", nodes=(llm("one"),), edges=(edge(START, "one"), edge("one", END))
    )
    kinds = Workflow(
        name="kinds",
        nodes=(
            Node(id=NodeId("a_router_with_a_long_name"), kind="router"),
            Node(id=NodeId("code"), kind="code", dynamic=True),
            Node(id=NodeId("tool"), kind="tool"),
            Node(id=NodeId("sub"), kind="subgraph", subgraph=inner),
        ),
        edges=(
            edge(START, "a_router_with_a_long_name"),
            edge("code", "tool"),
            edge("tool", "sub"),
        ),
        branches=(
            branch("pick", "a_router_with_a_long_name", x=("code", "tool"), y=("sub",), none=()),
            branch("repeat", "sub", more=("sub",), enough=(END,)),
        ),
    )
    shown = words(plots.workflow_graph(kinds))
    for word in ("code *", "sub-graph", "router", "again", "more"):
        assert word in shown


def test_heat_map_states_share_and_cost() -> None:
    """Cells hold share and seconds; the titles the load; an unknown workflow is an error."""
    shown = words(plots.table_heatmaps(table(), WORKFLOW.content_hash))
    for word in ("75%\n1.25 s", "25%\n2.50 s", "load 0 to 0.5", "load above 0.5"):
        assert word in shown
    with pytest.raises(InvalidInput, match="no row of workflow"):
        plots.table_heatmaps(table(), "other")


def test_graph_states_shares_and_critical_path() -> None:
    """Boxes state who reached and who waited; waits that no edge explains are drawn, too."""
    trace = records("almanac", 0)
    picture = plots.workflow_graph(WORKFLOW, plots.graph_weights(WORKFLOW, trace))
    shown = words(picture)
    for word in ("triage\n100% / 100%", "market\n0% / 0%", "5 runs", "waited for without an edge"):
        assert word in shown


def test_gantt_marks_the_critical_path() -> None:
    """Names on the critical path are bold, those beside it are not."""
    trace = records("almanac", 0)
    calls = [one for one in trace if isinstance(one, CallRecord) and one.run_id == "s0-r1"]
    aside = replace(calls[0], node="aside", finish_s=calls[0].sent_s + 0.5)
    figure = plots.run_gantt([("almanac", [*trace, aside])], "s0-r1")
    figure.canvas.draw()
    weight = {one.get_text(): one.get_fontweight() for one in figure.axes[0].get_yticklabels()}
    assert weight["aside"] == "normal"
    assert {weight[name] for name in ("triage", "search", "draft")} == {"bold"}


def test_calls_side_by_side_have_rows_of_their_own() -> None:
    """Two calls at once on an endpoint take two rows; one after the other takes the same."""
    trace = records("almanac", 0)
    figure = plots.fleet_gantt(trace, ["h100"], run_id="s0-r0", margin_s=100.0)
    bars = [one for one in figure.axes[0].patches if one.get_width() > 0]
    spans = sorted((one.get_y(), one.get_x(), one.get_x() + one.get_width()) for one in bars)
    for (row, _, end), (other, start, _) in itertools.pairwise(spans):
        assert row != other or start >= end - 1e-9
    with pytest.raises(InvalidInput, match="no call of run 'x'"):
        plots.fleet_gantt(trace, ["h100"], run_id="x")


def test_occupancy_states_the_share_of_busy_slots() -> None:
    """One call of a second on one slot of two, over two seconds, is a quarter."""
    base = next(one for one in records("almanac", 0) if isinstance(one, CallRecord))
    trace = [
        replace(base, endpoint="h100", sent_s=0.0, finish_s=1.0),
        replace(base, endpoint="a100", sent_s=0.0, finish_s=2.0),
    ]
    shown = words(plots.fleet_occupancy(trace, {"h100": 2, "a100": 1}))
    assert "25% of\n2 slots busy" in shown
    assert "100% of\n1 slots busy" in shown
    with pytest.raises(InvalidInput, match="no call finished"):
        plots.fleet_occupancy([], {"h100": 1})


def test_prefill_pairs_keep_both_endpoints_busy() -> None:
    """A split call is on its prefill endpoint to the first token, then where it decodes."""
    base = next(one for one in records("almanac", 0) if isinstance(one, CallRecord))
    split = replace(
        base, endpoint="d", prefill_endpoint="p", sent_s=0.0, first_token_s=1.0, finish_s=4.0
    )
    shown = words(plots.fleet_occupancy([split], {"p": 1, "d": 1}))
    assert "25% of" in shown
    assert "75% of" in shown


def test_a_bound_once_proven_stays() -> None:
    """A search that begins a new stage with a weaker bound does not take the first one back."""
    shown = words(plots.search_progress([(0.0, 10.0, 9.0), (1.0, 10.0, 5.0)]))
    assert "10.00 s, at least 9.00 s: gap 10.0%" in shown


def test_effects_and_parts_state_their_figures() -> None:
    """Intervals, single seeds and totals stand beside the marks; nothing to draw is an error."""
    shown = words(plots.effects(EFFECTS, against="b"))
    for word in ("-10.0% [-12.0%, -8.0%]", "+50.0% (one seed)"):
        assert word in shown
    assert "3.00 s" in words(plots.time_parts({"x": {"decode": 2.0, "tool": 1.0}}))
    for draw in (lambda: plots.effects({}, against="b"), lambda: plots.time_parts({}),
                 lambda: plots.load_latency({}), lambda: plots.search_progress([])):  # fmt: skip
        with pytest.raises(InvalidInput):
            draw()
