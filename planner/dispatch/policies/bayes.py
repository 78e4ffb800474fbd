"""A Bayesian network over the stages of an application: a tree, learned from runs that have ended.

Each stage is a variable with a few bins of its duration and one more state, ABSENT, for runs in
which it did not occur. The structure is the Chow-Liu tree: of all trees the one whose joint
distribution is closest to the data. On a tree posteriors are exact in two passes, and what a stage
tells about all others it tells through its unfinished neighbours, which are independent of each
other given it; so its information about everything to come is a small sum.

References
----------
Chow, Liu, Approximating discrete probability distributions with dependence trees, IEEE Trans.
Inf. Theory 1968; Pearl, Probabilistic reasoning in intelligent systems, 1988, ch. 4.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import reduce

import numpy as np
from numpy.typing import NDArray

__all__ = ["ABSENT", "Posterior", "StageNetwork"]

Floats = NDArray[np.float64]

ABSENT = 0
"""State of a stage that does not occur; its bins are 1, 2, ..."""
_MOST_STAGES = 24
_LEAST_INFORMATION = 0.02
"""Nats; stages that share less count as independent, since counts alone give that much."""
_SMOOTHING = 0.1
"""Added to each count."""
_LEAST_SHARE = 0.05
"""Bins less likely than this do not count for a stage's range."""
_MOST_NEIGHBOURS = 4


def _entropy(probabilities: Floats) -> float:
    """Return the entropy in nats."""
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())


class StageNetwork:
    """A tree over stages, fitted to the durations of whole runs.

    Parameters
    ----------
    runs
        Stage -> duration in seconds, of runs that have ended; at least one.
    bins
        Bins per stage, >= 1.

    Attributes
    ----------
    stages
        The most frequent ones, at most 24, in order of their names.
    seconds
        Stage -> mean duration of each state, s, 0 for ABSENT.
    parents
        Stage -> the stage it depends on, or None.
    """

    def __init__(self, runs: Sequence[Mapping[str, float]], *, bins: int = 5) -> None:
        frequent = Counter(stage for run in runs for stage in run).most_common(_MOST_STAGES)
        self.stages = sorted(stage for stage, _ in frequent)
        self._edges: dict[str, Floats] = {}
        self.seconds: dict[str, Floats] = {}
        for stage in self.stages:
            values = np.array([run[stage] for run in runs if stage in run])
            # Edges are durations that occurred, so that no bin is empty.
            levels = np.arange(1, bins) / bins
            inner = np.unique(np.quantile(values, levels, method="higher"))
            edges = self._edges[stage] = inner[inner > values.min()]
            places = np.searchsorted(edges, values, side="right")
            means = [float(values[places == place].mean()) for place in range(len(edges) + 1)]
            self.seconds[stage] = np.array([0.0, *means])
        states = {
            stage: np.array([self.state(stage, run.get(stage)) for run in runs])
            for stage in self.stages
        }
        self.parents: dict[str, str | None] = {}
        self._tables: dict[str, Floats] = {}
        self._order: list[str] = []  # parents first
        self._children: dict[str, list[str]] = {stage: [] for stage in self.stages}
        self._span(states)

    def state(self, stage: str, seconds: float | None) -> int:
        """Return the state of a stage of the network that took so long, or did not occur."""
        if seconds is None:
            return ABSENT
        return int(np.searchsorted(self._edges[stage], seconds, side="right")) + 1

    def _joint(self, states: Mapping[str, NDArray[np.int64]], one: str, other: str) -> Floats:
        counts = np.full((len(self.seconds[one]), len(self.seconds[other])), _SMOOTHING)
        np.add.at(counts, (states[one], states[other]), 1.0)
        joint: Floats = counts / counts.sum()
        return joint

    def _span(self, states: Mapping[str, NDArray[np.int64]]) -> None:
        """Grow the tree of most mutual information, from each stage that nothing informs."""
        best: dict[str, tuple[float, str | None]] = dict.fromkeys(self.stages, (0.0, None))
        left = list(self.stages)
        while left:
            stage = max(left, key=lambda one: best[one][0])
            information, parent = best[stage]
            left.remove(stage)
            self._order.append(stage)
            if parent is None or information < _LEAST_INFORMATION:
                parent = None
                counts = np.full(len(self.seconds[stage]), _SMOOTHING)
                np.add.at(counts, states[stage], 1.0)
                self._tables[stage] = counts / counts.sum()
            else:
                joint = self._joint(states, parent, stage)
                self._tables[stage] = joint / joint.sum(axis=1, keepdims=True)
                self._children[parent].append(stage)
            self.parents[stage] = parent
            for other in left:
                joint = self._joint(states, stage, other)
                apart = joint.sum(axis=1, keepdims=True) * joint.sum(axis=0, keepdims=True)
                shared = float((joint * np.log(joint / apart)).sum())
                if shared > best[other][0]:
                    best[other] = shared, stage

    def posterior(self, evidence: Mapping[str, int]) -> Posterior:
        """Return the distribution given the states of some stages.

        Notes
        -----
        Belief propagation: messages from the leaves to the roots, then back.
        """
        up: dict[str, Floats] = {}  # stage -> likelihood of what lies below, by its own state
        sent: dict[str, Floats] = {}  # stage -> the same, by its parent's state
        for stage in reversed(self._order):
            below = np.ones(len(self.seconds[stage]))
            known = evidence.get(stage)
            if known is not None:
                below[:] = 0.0
                below[known] = 1.0
            below = reduce(np.multiply, (sent[child] for child in self._children[stage]), below)
            up[stage] = below / below.sum()
            if self.parents[stage] is not None:
                sent[stage] = self._tables[stage] @ up[stage]
        marginals: dict[str, Floats] = {}
        pairs: dict[str, Floats] = {}
        for stage in self._order:
            parent = self.parents[stage]
            if parent is None:
                belief = self._tables[stage] * up[stage]
                marginals[stage] = belief / belief.sum()
                continue
            outside = np.divide(
                marginals[parent], sent[stage], out=np.zeros_like(sent[stage]),
                where=sent[stage] > 0,
            )  # fmt: skip
            joint = outside[:, None] * self._tables[stage] * up[stage][None, :]
            pairs[stage] = joint / joint.sum()
            marginals[stage] = pairs[stage].sum(axis=0)
        return Posterior(self, frozenset(evidence), marginals, pairs)

    def neighbours(self, stage: str) -> list[str]:
        """Return the stages that a stage is tied to directly."""
        parent = self.parents[stage]
        return [*self._children[stage], *([] if parent is None else [parent])]


class Posterior:
    """What is believed of a run's stages, given those that are over.

    Attributes
    ----------
    marginals
        Stage -> probability of each state.
    """

    def __init__(
        self,
        network: StageNetwork,
        known: frozenset[str],
        marginals: Mapping[str, Floats],
        pairs: Mapping[str, Floats],
    ) -> None:
        self._network = network
        self._known = known
        self.marginals = marginals
        self._pairs = pairs
        # It does not change, and runs that wait ask for the same again and again.
        self._left_s: float | None = None
        self._reductions: dict[str, float] = {}

    def left_s(self) -> float:
        """Return the expected duration of all stages that are not over, s; ABSENT takes none."""
        if self._left_s is None:
            seconds = self._network.seconds
            self._left_s = sum(
                float(belief @ seconds[stage])
                for stage, belief in self.marginals.items()
                if stage not in self._known
            )
        return self._left_s

    def reduction(self, stage: str) -> float:
        """Return the uncertainty that a stage's end would take away.

        ``I(X; Y1..Yk | evidence) x product of Range(Yi)`` over the unfinished stages tied to X;
        0 if there are none or the stage is over or unknown. Only the four that share most with it
        are counted, so that their joint distribution stays small.

        References
        ----------
        LLMSched (arXiv 2504.03444), uncertainty-aware scheduling.
        """
        if stage in self._known or stage not in self.marginals:
            return 0.0
        if stage not in self._reductions:
            self._reductions[stage] = self._reduction(stage)
        return self._reductions[stage]

    def _reduction(self, stage: str) -> float:
        own = self.marginals[stage]
        tied: list[tuple[float, str, Floats]] = []
        for other in self._network.neighbours(stage):
            if other in self._known:
                continue
            if self._network.parents[other] == stage:
                joint = self._pairs[other]
            else:
                joint = self._pairs[stage].T
            shared = _entropy(own) + _entropy(joint.sum(axis=0)) - _entropy(joint)
            given = np.divide(joint, own[:, None], out=np.zeros_like(joint), where=own[:, None] > 0)
            tied.append((shared, other, given))
        if not tied:
            return 0.0
        tied.sort(key=lambda one: (-one[0], one[1]))
        tied = tied[:_MOST_NEIGHBOURS]
        # Given X its neighbours are independent: P(n1..nk) = sum over x of P(x) prod P(ni | x).
        both = own[:, None]
        conditional = 0.0
        for _, _, given in tied:
            both = (both[:, :, None] * given[:, None, :]).reshape(len(own), -1)
            conditional += sum(
                float(weight) * _entropy(row) for weight, row in zip(own, given, strict=True)
            )
        information = _entropy(both.sum(axis=0)) - conditional
        return max(0.0, information) * math.prod(self._range_s(other) for _, other, _ in tied)

    def _range_s(self, stage: str) -> float:
        """Return the distance between the least and the greatest duration that are likely, s."""
        likely = self._network.seconds[stage][self.marginals[stage] >= _LEAST_SHARE]
        return float(likely.max() - likely.min()) if likely.size else 0.0
