"""Who is run on further seeds: the policies among which a setting's comparison is decided.

Most policies are far behind after a few seeds, and more of them change nothing. Between the best,
tails of a few thousand runs differ by less than their noise. So all policies are screened on the
study's seeds, and those that come close to the best are run on more. Close is measured among the
others: ours is held against the best of them, however far ahead of it ours may be.

References
----------
Nelson, Swann, Goldsman, Song, Simple procedures for selecting the best simulated system when the
number of alternatives is large, Operations Research 2001: screening before the second stage.
"""

from __future__ import annotations

from collections.abc import Sequence

from planner.study.figures import Figures
from planner.study.grid import Outcome
from planner.study.studies import OURS, Study

__all__ = ["CLOSE", "MOST", "contenders"]

CLOSE = 0.02
"""Share by which the mean or P95 of one that is run again may lie above the least of the others."""
MOST = 3
"""Of these, how many are run again at most for their mean, and for their P95: the best ones."""
_METRICS = ("mean_s", "p95_s")


def contenders(study: Study, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcomes to decide between, in their order; none if the study has no more seeds.

    Ours, the baseline, and in each setting the best few of the others whose mean or P95 is close to
    the least among these. Variants of ours that are as good are run too, no more of them, but are
    no competitors.
    """
    if not study.more_seeds:
        return []
    figures = Figures(outcomes)
    always = {OURS, study.baseline}
    found = []
    for group in figures.by_setting.values():
        names = set(always)
        for metric in _METRICS:
            others = _ranked(figures, [one for one in group if one.entry.policy != OURS], metric)
            variants = _ranked(figures, [one for one in group if one.entry.policy == OURS], metric)
            limit = (1.0 + CLOSE) * others[0][0] if others else 0.0
            for ranked in (others, variants):
                near = [name for value, name in ranked if value <= limit and name not in always]
                names.update(near[:MOST])
        found += [one for one in group if one.policy in names]
    return found


def _ranked(figures: Figures, group: Sequence[Outcome], metric: str) -> list[tuple[float, str]]:
    """Return the known figures of some outcomes with their names, the least first."""
    values = {one.policy: figures.value(one, metric) for one in group}
    return sorted((value, name) for name, value in values.items() if value is not None)
