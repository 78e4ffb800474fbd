"""Graph layout: layers follow the edges and nothing overlaps."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from planner.domain.ids import NodeId
from planner.domain.workflow import END, START, Node, Workflow
from planner.report.layout import Layout, lay_out
from tests.planner.graph.research import edge, llm, research_workflow


def check(workflow: Workflow, layout: Layout) -> None:
    """Assert what holds for every layout."""
    assert set(layout.positions) == {START, END, *(node.id for node in workflow.nodes)}
    for (source, target), route in layout.routes.items():
        assert layout.positions[source][0] < layout.positions[target][0]
        assert [x for x, _ in route] == list(
            range(int(layout.positions[source][0]), int(layout.positions[target][0]) + 1)
        )
    rows: dict[float, list[float]] = {}
    for x, y in layout.positions.values():
        rows.setdefault(x, []).append(y)
    for heights in rows.values():
        heights.sort()
        assert all(b - a >= 1 - 1e-9 for a, b in itertools.pairwise(heights))
    others = [x for node, (x, _) in layout.positions.items() if node != END]
    assert layout.positions[START][0] == 0
    assert layout.positions[END][0] > max(others)


def test_research_workflow() -> None:
    """Fan-out in one layer, its join in a later one, the loop's edge set aside."""
    workflow = research_workflow()
    layout = lay_out(workflow)
    check(workflow, layout)
    x = {node: place[0] for node, place in layout.positions.items()}
    assert x[NodeId("search")] == x[NodeId("market")] == x[NodeId("legal")]
    assert x[NodeId("draft")] == x[NodeId("read")] + 1
    assert layout.back_edges == (("revise", "critic"),)
    assert ("revise", "critic") not in layout.routes


def test_same_graph_same_layout() -> None:
    """The layout depends on the graph alone, not on the order of its nodes."""
    workflow = research_workflow()
    turned = Workflow(
        name="research",
        nodes=tuple(reversed(workflow.nodes)),
        edges=tuple(reversed(workflow.edges)),
        joins=workflow.joins,
        branches=tuple(reversed(workflow.branches)),
    )
    assert lay_out(turned).positions == lay_out(workflow).positions


@given(st.data())
def test_random_graphs(data: st.DataObject) -> None:
    """Any connected graph, loops included, is laid out without overlap."""
    count = data.draw(st.integers(1, 8))
    names = [f"n{number}" for number in range(count)]
    nodes: tuple[Node, ...] = tuple(map(llm, names))
    chain = [edge(START, names[0]), *(edge(a, b) for a, b in itertools.pairwise(names))]
    extra = data.draw(
        st.lists(st.tuples(st.sampled_from(names), st.sampled_from(names)), max_size=10)
    )
    edges = dict.fromkeys([*chain, edge(names[-1], END), *(edge(a, b) for a, b in extra)])
    workflow = Workflow(name="random", nodes=nodes, edges=tuple(edges))
    check(workflow, lay_out(workflow))
