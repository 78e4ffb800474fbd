"""Agent execution graphs: which call follows which, how much text it shares, what work is left.

One graph per workflow, with call sites as nodes. It is filled from hints (runs drawn from the
declared graph and its forecasts) or from runs that have ended; both go in as `Step` sequences.

References
----------
SAGA (arXiv 2605.00528), sections on execution graphs and on workflow-aware eviction:
``P_reuse(s) = sum over successors u of P(s -> u) overlap(s, u)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

__all__ = ["ExecutionGraph", "Step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One call of a run that is over.

    Parameters
    ----------
    site
        Call site.
    parents
        Positions of the steps that made it ready, smaller than its own.
    overlap
        Share of its prompt that the parent's prompt and answer hold, [0, 1], for each parent.
    work_s
        Service on an idle fleet, s.
    """

    site: str
    parents: tuple[int, ...] = ()
    overlap: tuple[float, ...] = ()
    work_s: float = 0.0


@dataclass(slots=True)
class _Site:
    visits: int = 0
    final: int = 0  # visits that nothing followed
    after_s: float = 0.0  # work begun later, over all visits
    followed: dict[str, tuple[int, float]] = field(default_factory=dict)  # site -> times, overlap


class ExecutionGraph:
    """Successors, overlaps and remaining work by call site.

    Parameters
    ----------
    least_probability
        Edges less likely than this are left out, [0, 1]; SAGA's 0.7 for inferred graphs.

    Attributes
    ----------
    runs
        How many went in.
    """

    def __init__(self, least_probability: float = 0.0) -> None:
        self.least_probability = least_probability
        self.runs = 0
        self._sites: dict[str, _Site] = {}
        self._total_s = 0.0

    def add(self, steps: Sequence[Step]) -> None:
        """Take in a run, its calls in order of beginning."""
        self.runs += 1
        left_s = total_s = sum(step.work_s for step in steps)
        self._total_s += total_s
        followed = {parent for step in steps for parent in step.parents}
        for place, step in enumerate(steps):
            left_s -= step.work_s
            site = self._sites.setdefault(step.site, _Site())
            site.visits += 1
            site.final += place not in followed
            site.after_s += left_s
            for parent, overlap in zip(step.parents, step.overlap, strict=True):
                edges = self._sites[steps[parent].site].followed
                times, total = edges.get(step.site, (0, 0.0))
                edges[step.site] = times + 1, total + overlap

    def goes_on(self, site: str) -> float:
        """Return the probability that a call follows one of this site; 0 if it is unknown."""
        found = self._sites.get(site)
        return 0.0 if found is None else 1.0 - found.final / found.visits

    def reuse(self, site: str) -> float:
        """Return P_reuse after a call of this site, [0, 1]; 0 if it is unknown.

        With fan-out each successor reuses the text, and the sum is cut at 1.
        """
        found = self._sites.get(site)
        if found is None:
            return 0.0
        total = 0.0
        for times, overlap in found.followed.values():
            probability = times / found.visits
            if probability >= self.least_probability:
                total += probability * overlap / times
        return min(1.0, total)

    def work_after_s(self, site: str) -> float:
        """Return the mean work of the calls that begin after one of this site, s."""
        found = self._sites.get(site)
        return 0.0 if found is None else found.after_s / found.visits

    @property
    def work_s(self) -> float:
        """Mean work of a run, s."""
        return self._total_s / self.runs if self.runs else 0.0
