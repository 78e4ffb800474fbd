"""The picture of a workflow graph: kinds, joins, branches, loops, and what its runs waited for."""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Mapping, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, Patch, Polygon
from matplotlib.path import Path as Outline

from planner.domain.ids import NodeId
from planner.domain.workflow import END, START, Workflow
from planner.report.anatomy import GraphWeights
from planner.report.drawing import DASHES, PALETTE, STYLE, new_figure
from planner.report.layout import Layout, lay_out

__all__ = ["workflow_graph"]

_KINDS = {
    "llm": ("#CFE4F2", "language model call"),
    "tool": ("#FBE3B5", "tool"),
    "router": ("#D9EFE6", "router"),
    "code": ("#EEEEEE", "code"),
    "subgraph": ("#F3DCEA", "sub-graph"),
}
_X, _Y, _BOX_W, _BOX_H = 2.05, 1.0, 1.3, 0.5
_RARE = 0.02
"""Share of runs from which on a wait is drawn."""
_THIN, _THICK = 1.1, 4.0
"""Widths in points of a line of no share, and of one that every run waited for."""


def workflow_graph(workflow: Workflow, weights: GraphWeights | None = None) -> Figure:
    """Draw one level of a workflow graph as compiled, left to right.

    Shape, colour and legend give a node's kind. A bar before a node is a join (``all``, or how
    many of how many); a small diamond after a node is a branch, its edges labelled with outcome
    and probability where known; dashed curves lead back (loops). ``*`` marks nodes started a
    number of times known only at run time.

    Parameters
    ----------
    weights
        What runs of it did (`planner.report.anatomy.graph_weights`): lines and borders get as
        thick as runs had them on their critical path, boxes state the shares of runs, and branches
        the shares of their outcomes, in place of declared probabilities. None draws the structure.
    """
    layout = lay_out(workflow)
    heights = [y for _, y in layout.positions.values()] + [
        y for route in layout.routes.values() for _, y in route
    ]
    arcs = _arc_heights(layout)
    bottom = min([min(heights) - 0.7, *(y - 0.35 for y in arcs.values())])
    top = max(heights) + 0.7
    spots = {node: (x * _X, y * _Y) for node, (x, y) in layout.positions.items()}
    joined = {(source, one.target) for one in workflow.joins for source in one.sources}
    outcomes = _edge_outcomes(workflow, weights)
    with rc_context(STYLE):
        figure = new_figure(
            max(6.0, 0.78 * _X * layout.layers), max(2.4, 0.78 * (top - bottom) + 0.6)
        )
        axes = figure.subplots()
        axes.set_axis_off()
        axes.set_xlim(-0.8, (layout.layers - 1) * _X + 0.8)
        axes.set_ylim(bottom, top)
        axes.set_aspect("equal")
        for edge, route in layout.routes.items():
            _draw_edge(
                axes, workflow, edge, route, joined=edge in joined, label=outcomes.get(edge),
                width=_width(weights, edge),
            )  # fmt: skip
        for edge in layout.back_edges:
            _draw_back_edge(
                axes, spots, edge, arcs[edge] * _Y, outcomes.get(edge), width=_width(weights, edge)
            )
        for node, spot in spots.items():
            _draw_node(axes, workflow, node, spot, weights)
        for join in workflow.joins:
            x, y = spots[join.target]
            left = x - _half_width(workflow, join.target) - 0.09
            axes.plot([left, left], [y - 0.3, y + 0.3], color="black", linewidth=3.2,
                      solid_capstyle="butt", zorder=4)  # fmt: skip
            need = "all" if join.need is None else f"{join.need} of {len(join.sources)}"
            axes.text(left, y + 0.34, f"join: {need}", ha="center", va="bottom", fontsize=7.5)
        used = [kind for kind in _KINDS if any(node.kind == kind for node in workflow.nodes)]
        handles: list[Patch | Line2D] = [
            Patch(facecolor=_KINDS[kind][0], edgecolor="black", label=_KINDS[kind][1])
            for kind in used
        ]
        if workflow.branches:
            handles.append(Line2D([], [], color="white", marker="D", markersize=6,
                                  markeredgecolor="black", label="branch"))  # fmt: skip
        if workflow.joins:
            handles.append(Line2D([], [], color="black", linewidth=3.2, label="join"))
        if layout.back_edges:
            handles.append(Line2D([], [], color=PALETTE[1], linestyle=DASHES[1], label="loop"))
        if weights is not None:
            handles.append(
                Line2D([], [], color="black", linewidth=_THICK, label="on the critical path")
            )
            figure.suptitle(
                f"{weights.runs} runs; in a box: share of runs that reached it / that waited for "
                "it (critical path)",
                fontsize=9,
            )
            waits = _draw_waits(axes, workflow, weights, spots)
            handles += [Line2D([], [], color=PALETTE[3], linestyle=DASHES[2], linewidth=1.5,
                               label="waited for without an edge")] * waits  # fmt: skip
        fitting = int(figure.get_figwidth() / 1.6)
        figure.legend(handles=handles, loc="outside lower center",
                      ncols=min(len(handles), fitting), frameon=False)  # fmt: skip
    return figure


def _draw_waits(
    axes: Axes,
    workflow: Workflow,
    weights: GraphWeights,
    spots: Mapping[NodeId, tuple[float, float]],
) -> bool:
    """Draw what critical paths passed over although no edge does; return whether there is any.

    In supersteps a node waits for everything that began with its predecessor.
    """
    edges = {(one, other) for one, others in workflow.successors.items() for other in others}
    found = {
        pair: share
        for pair, share in weights.followed.items()
        if pair not in edges and share >= _RARE and spots.keys() >= set(pair)
    }
    for (source, target), share in sorted(found.items()):
        (x0, y0), (x1, y1) = spots[source], spots[target]
        axes.add_patch(
            FancyArrowPatch(
                (x0 + _half_width(workflow, source), y0), (x1 - _half_width(workflow, target), y1),
                arrowstyle="-|>", mutation_scale=9, linewidth=_between(share), color=PALETTE[3],
                linestyle=DASHES[2], shrinkA=0, shrinkB=0, zorder=2.5,
            )
        )  # fmt: skip
    return bool(found)


def _width(weights: GraphWeights | None, edge: tuple[NodeId, NodeId]) -> float:
    """Return the width of an edge in points."""
    return _THIN if weights is None else _between(weights.followed.get(edge, 0.0))


def _between(share: float) -> float:
    return 0.6 + (_THICK - 0.6) * share


def _half_width(workflow: Workflow, node: NodeId) -> float:
    if node in (START, END):
        return 0.26
    return 0.78 if workflow.node(node).kind == "router" else _BOX_W / 2


def _edge_outcomes(
    workflow: Workflow, weights: GraphWeights | None
) -> dict[tuple[NodeId, NodeId], str]:
    """Return edge -> outcome names with probabilities, of edges that a branch makes."""
    labels: dict[tuple[NodeId, NodeId], list[str]] = {}
    for branch in workflow.branches:
        for outcome in branch.outcomes:
            share = outcome.probability
            if weights is not None:
                share = weights.taken.get((branch.id, outcome.id), 0.0)
            chance = "" if share is None else f" {share:.2f}"
            for target in outcome.targets or (END,):
                labels.setdefault((branch.source, target), []).append(f"{outcome.id}{chance}")
    return {edge: "\n".join(names) for edge, names in labels.items()}


def _draw_edge(
    axes: Axes,
    workflow: Workflow,
    edge: tuple[NodeId, NodeId],
    route: Sequence[tuple[float, float]],
    *,
    joined: bool,
    label: str | None,
    width: float,
) -> None:
    source, target = edge
    points = [(x * _X, y * _Y) for x, y in route]
    gap = 0.12 if joined else 0.02
    start = (points[0][0] + _half_width(workflow, source) + (0.16 if label else 0.0), points[0][1])
    end = (points[-1][0] - _half_width(workflow, target) - gap, points[-1][1])
    points = [start, *points[1:-1], end]
    vertices, codes = [points[0]], [Outline.MOVETO]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        middle = (x0 + x1) / 2
        vertices += [(middle, y0), (middle, y1), (x1, y1)]
        codes += [Outline.CURVE4] * 3
    axes.add_patch(
        FancyArrowPatch(
            path=Outline(vertices, codes),
            arrowstyle="-" if joined else "-|>", mutation_scale=9, linewidth=width,
            color="black", shrinkA=0, shrinkB=0, zorder=2,
        )
    )  # fmt: skip
    if label is not None:
        x0, y0 = points[0]
        x1, y1 = points[1]
        axes.add_patch(_diamond(x0 - 0.08, y0, 0.08))
        _edge_label(axes, (x0 + x1) / 2, (y0 + y1) / 2, label)


def _edge_label(axes: Axes, x: float, y: float, label: str) -> None:
    axes.text(
        x, y, label, ha="center", va="center", fontsize=7.5, zorder=5,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.8},
    )  # fmt: skip


def _diamond(x: float, y: float, radius: float) -> Polygon:
    corners = [(x - radius, y), (x, y + radius), (x + radius, y), (x, y - radius)]
    return Polygon(corners, closed=True, facecolor="white", edgecolor="black", zorder=4)


def _arc_heights(layout: Layout) -> dict[tuple[NodeId, NodeId], float]:
    """Return how low each back edge dips: below everything between its ends, apart in steps."""
    depth = {}
    for number, (source, target) in enumerate(layout.back_edges):
        left, right = sorted((layout.positions[source][0], layout.positions[target][0]))
        inside = [y for x, y in layout.positions.values() if left <= x <= right]
        inside += [y for route in layout.routes.values() for x, y in route if left <= x <= right]
        depth[source, target] = min(inside) - 0.75 - 0.3 * number
    return depth


def _draw_back_edge(
    axes: Axes,
    spots: Mapping[NodeId, tuple[float, float]],
    edge: tuple[NodeId, NodeId],
    low: float,
    label: str | None,
    *,
    width: float,
) -> None:
    (x0, y0), (x1, y1) = spots[edge[0]], spots[edge[1]]
    y0, y1 = y0 - _BOX_H / 2, y1 - _BOX_H / 2 - 0.02
    if edge[0] == edge[1]:
        x0, x1 = x0 + 0.35, x1 - 0.35
    # A cubic reaches three quarters of the way to its control points.
    deep = (low - (y0 + y1) / 8) / 0.75
    axes.add_patch(
        FancyArrowPatch(
            path=Outline(
                [(x0, y0), (x0, deep), (x1, deep), (x1, y1)],
                [Outline.MOVETO, Outline.CURVE4, Outline.CURVE4, Outline.CURVE4],
            ),
            arrowstyle="-|>", mutation_scale=9, linewidth=width, linestyle=DASHES[1],
            color=PALETTE[1], shrinkA=0, shrinkB=0, zorder=2,
        )
    )  # fmt: skip
    said = label if label and "again" in label else f"again\n{label}" if label else "again"
    _edge_label(axes, (x0 + x1) / 2, low, said)


def _draw_node(
    axes: Axes,
    workflow: Workflow,
    node: NodeId,
    spot: tuple[float, float],
    weights: GraphWeights | None,
) -> None:
    x, y = spot
    if node in (START, END):
        face = "white" if node == START else "black"
        axes.add_patch(Circle((x, y), 0.24, facecolor=face, edgecolor="black", zorder=3))
        word = "start" if node == START else "end"
        axes.text(x, y, word, ha="center", va="center", fontsize=7.5, zorder=4,
                  color="black" if node == START else "white")  # fmt: skip
        return
    record = workflow.node(node)
    face = _KINDS[record.kind][0]
    critical = 0.0 if weights is None else weights.critical.get(node, 0.0)
    width = 1.0 if weights is None else _between(critical) * 0.7
    left, low = x - _BOX_W / 2, y - _BOX_H / 2
    if record.kind == "router":
        half = _half_width(workflow, node)
        inner, high = half - 0.25, y + _BOX_H / 2
        corners = [(x - half, y), (x - inner, high), (x + inner, high),
                   (x + half, y), (x + inner, low), (x - inner, low)]  # fmt: skip
        axes.add_patch(Polygon(corners, closed=True, facecolor=face, edgecolor="black",
                               linewidth=width, zorder=3))  # fmt: skip
    else:
        rounding = 0.18 if record.kind == "llm" else 0.001
        axes.add_patch(
            FancyBboxPatch(
                (left, low), _BOX_W, _BOX_H, facecolor=face, edgecolor="black", zorder=3,
                linewidth=width, boxstyle=f"round,pad=0,rounding_size={rounding}",
                linestyle="--" if record.kind == "tool" else "-",
            )
        )  # fmt: skip
        if record.kind == "subgraph":
            axes.add_patch(
                FancyBboxPatch(
                    (left + 0.06, low + 0.06), _BOX_W - 0.12, _BOX_H - 0.12, facecolor="none",
                    edgecolor="black", linewidth=0.7, zorder=3,
                    boxstyle="round,pad=0,rounding_size=0.001",
                )
            )  # fmt: skip
    name = "\n".join(textwrap.wrap(node, 14, break_long_words=True)[:2])
    shown = f"{name}{' *' if record.dynamic else ''}"
    if weights is not None:
        shown += f"\n{weights.reached.get(node, 0.0):.0%} / {critical:.0%}"
    axes.text(x, y, shown, ha="center", va="center", zorder=4,
              fontsize=8 if shown.count("\n") < 2 else 6.5)  # fmt: skip
