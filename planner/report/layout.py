"""Layered layout of a workflow graph, left to right, without any drawing.

After Sugiyama, Tagawa and Toda (1981): back edges are set aside, layers are longest paths from
START, an edge that spans layers gets a waypoint in each, layers are ordered by barycentres, and
heights are then moved towards the neighbours without changing the order.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass

from planner.domain.ids import NodeId
from planner.domain.workflow import END, START, Workflow

__all__ = ["Layout", "lay_out"]

Item = tuple[str, ...]
"""A node ``(id,)`` or a waypoint ``(source, target, layer)`` of an edge."""
SWEEPS = 12


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where things are.

    Parameters
    ----------
    positions
        Node -> (layer from 0, height); heights within a layer differ by at least 1.
    routes
        Forward edge -> its points from source to target, ends included.
    back_edges
        Edges that close a loop; they have no route.
    """

    positions: Mapping[NodeId, tuple[float, float]]
    routes: Mapping[tuple[NodeId, NodeId], tuple[tuple[float, float], ...]]
    back_edges: tuple[tuple[NodeId, NodeId], ...]

    @property
    def layers(self) -> int:
        """Number of layers."""
        return 1 + int(max(x for x, _ in self.positions.values()))


def lay_out(workflow: Workflow) -> Layout:
    """Return the layout of one level of a workflow, START and END included."""
    back = tuple(edge for loop in workflow.loops for edge in loop.back_edges)
    # Sorted, so that the layout does not depend on the order in which the graph was written.
    forward = sorted(
        (source, target)
        for source, targets in workflow.successors.items()
        for target in targets
        if (source, target) not in back
    )
    layer = _layers(forward)
    chains: dict[tuple[NodeId, NodeId], list[Item]] = {}
    for source, target in forward:
        between = range(layer[source] + 1, layer[target])
        chains[source, target] = [
            (source,),
            *((source, target, str(step)) for step in between),
            (target,),
        ]
    columns: list[list[Item]] = [[] for _ in range(max(layer.values()) + 1)]
    for node, column in sorted(layer.items()):
        columns[column].append((node,))
    for chain in chains.values():
        for item in chain[1:-1]:
            columns[int(item[2])].append(item)
    near: dict[Item, list[Item]] = {item: [] for column in columns for item in column}
    column_of = {item: number for number, column in enumerate(columns) for item in column}
    for chain in chains.values():
        for left, right in itertools.pairwise(chain):
            near[left].append(right)
            near[right].append(left)
    height = _heights(columns, near, column_of)
    return Layout(
        positions={node: (float(layer[node]), height[node,]) for node in layer},
        routes={
            edge: tuple((float(column_of[item]), height[item]) for item in chain)
            for edge, chain in chains.items()
        },
        back_edges=back,
    )


def _layers(forward: list[tuple[NodeId, NodeId]]) -> dict[NodeId, int]:
    layer = {START: 0, END: 0}
    pending = True
    # Bellman-Ford on longest paths; the graph is acyclic, so it ends after at most its depth.
    while pending:
        pending = False
        for source, target in forward:
            if source in layer and layer.get(target, 0) < layer[source] + 1:
                layer[target] = layer[source] + 1
                pending = True
    layer[END] = 1 + max(column for node, column in layer.items() if node != END)
    return layer


def _heights(
    columns: list[list[Item]],
    near: Mapping[Item, list[Item]],
    column_of: Mapping[Item, int],
) -> dict[Item, float]:
    height = {
        item: float(row) - (len(column) - 1) / 2
        for column in columns
        for row, item in enumerate(column)
    }

    def centre(item: Item, side: int) -> float:
        beside = [
            height[other]
            for other in near[item]
            if column_of[other] - column_of[item] in ((side,) if side else (-1, 1))
        ]
        return sum(beside) / len(beside) if beside else height[item]

    for sweep in range(SWEEPS):
        side = -1 if sweep % 2 == 0 else 1
        for column in columns if side < 0 else reversed(columns):
            wanted = {item: centre(item, side) for item in column}
            column.sort(key=lambda item: (wanted[item], item))
            for row, item in enumerate(column):
                height[item] = float(row) - (len(column) - 1) / 2
    for _ in range(SWEEPS):
        for column in columns:
            spaced = _spaced([centre(item, 0) for item in column])
            height.update(zip(column, spaced, strict=True))
    return height


def _spaced(wanted: list[float]) -> list[float]:
    """Return heights in the same order, at least 1 apart, nearest to the wanted ones.

    Least squares under an order with gaps is isotonic regression of ``wanted - position``; blocks
    that break the order are pooled.
    """
    blocks: list[tuple[float, int]] = []
    for position, value in enumerate(wanted):
        mean, count = value - position, 1
        while blocks and blocks[-1][0] > mean:
            before, size = blocks.pop()
            mean, count = (before * size + mean * count) / (size + count), size + count
        blocks.append((mean, count))
    flat = [mean for mean, count in blocks for _ in range(count)]
    return [value + position for position, value in enumerate(flat)]
