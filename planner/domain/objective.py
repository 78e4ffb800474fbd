"""What a plan is good at: the objectives of fleet plans, by definition.

Let ``L[w, r, s]`` be the latency in seconds of scenario s of workflow w under the placements of
run class r. Each workflow has a share ``v[w]`` of the objective (its arrival rate times its
weight, in thousandths by largest remainder, `mix_shares`), spread evenly over its R classes and S
scenarios, so that the weights ``p[w, r, s] = v[w] / (1000 R S)`` sum to one.

=========  ====================================================================
mean       sum of p L
cvar       least over eta of  eta + sum of p max(0, L - eta) / (1 - alpha): the
           mean of the worst 1 - alpha (Rockafellar and Uryasev 2000); what
           stands for the P95 is alpha 0.95
makespan   largest L
tardiness  sum of p max(0, L - deadline), workflows without a deadline left out
miss       sum of p over those with L > deadline: the share that comes too late
=========  ====================================================================

Several terms are summed with their weights, or taken one after the other: each next one is
minimised among the plans that keep those before within ``tolerance`` of the best found. A hard
deadline is no term but a limit: every scenario has to keep it.

All terms grow with L, which is what lets a checker allow for the rounding of durations.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fractions import Fraction
from typing import Any, Literal, get_args

from planner.domain.errors import InvalidInput

__all__ = ["MEAN", "Objective", "Term", "TermKind", "mix_shares"]

TermKind = Literal["mean", "cvar", "makespan", "tardiness", "miss"]
_PARTS = 1000
"""Resolution of shares, of term weights and of ``1 - alpha``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Term:
    """One part of an objective.

    Parameters
    ----------
    kind
        See the module.
    weight
        Factor in a weighted sum, > 0; rounded to thousandths. A missed share of 1 counts like
        one second.
    alpha
        Level of ``cvar``, in [0, 1), rounded to thousandths; 0 for the other kinds.
    """

    kind: TermKind
    weight: float = 1.0
    alpha: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in get_args(TermKind):
            raise InvalidInput(
                f"unknown term {self.kind!r}",
                where="objective",
                remedy=f"use {', '.join(get_args(TermKind))}",
            )
        if not (math.isfinite(self.weight) and 1 / _PARTS <= self.weight <= 1e4):
            raise InvalidInput(
                f"weight {self.weight!r} of {self.kind}",
                where="objective",
                remedy="use a number from 0.001 to 10000",
            )
        if not 0 <= self.alpha <= 1 - 1 / _PARTS or (self.alpha and self.kind != "cvar"):
            raise InvalidInput(
                f"level {self.alpha!r} of {self.kind}",
                where="objective",
                remedy="give cvar a level from 0 to 0.999, as in cvar:0.95, others none",
            )

    @property
    def factor(self) -> Fraction:
        """The weight as an exact fraction."""
        return Fraction(round(self.weight * _PARTS), _PARTS)

    @property
    def tail(self) -> Fraction:
        """``1 - alpha`` as an exact fraction."""
        return 1 - Fraction(round(self.alpha * _PARTS), _PARTS)

    @property
    def name(self) -> str:
        """The kind, with its level where it has one: ``cvar:0.95``."""
        return f"cvar:{self.alpha:g}" if self.kind == "cvar" else self.kind


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """The terms, and how they are combined.

    Parameters
    ----------
    terms
        At least one, each name once.
    lexicographic
        Take the terms one after the other instead of summing them.
    tolerance
        Relative loss of an earlier term that a later one may cause, >= 0.
    """

    terms: tuple[Term, ...] = (Term(kind="mean"),)
    lexicographic: bool = False
    tolerance: float = 0.0

    def __post_init__(self) -> None:
        names = [term.name for term in self.terms]
        if not names or len(set(names)) < len(names) or not 0 <= self.tolerance < math.inf:
            raise InvalidInput(
                f"terms {', '.join(names) or 'missing'}, tolerance {self.tolerance!r}",
                where="objective",
                remedy="name each term once; a tolerance is a number >= 0",
            )

    @property
    def needs_deadline(self) -> bool:
        """Whether a term says nothing without a deadline."""
        return any(term.kind in ("tardiness", "miss") for term in self.terms)

    @property
    def stages(self) -> tuple[Objective, ...]:
        """What is minimised one after the other, each a weighted sum."""
        if not self.lexicographic:
            return (self,)
        return tuple(Objective(terms=(term,)) for term in self.terms)

    @property
    def name(self) -> str:
        """The form that `parse` reads."""
        if self.lexicographic:
            return ">".join(term.name for term in self.terms)
        return "+".join(
            term.name if term.weight == 1 else f"{term.weight:g}*{term.name}" for term in self.terms
        )

    @classmethod
    def parse(cls, text: str, *, tolerance: float = 0.0) -> Objective:
        """Read ``mean``, ``cvar:0.95``, ``mean+0.5*cvar:0.95`` or ``miss>mean``.

        ``+`` sums terms with their weights, ``>`` takes them one after the other, and
        ``deadline`` is another word for ``tardiness``.

        Raises
        ------
        InvalidInput
            If the text is none of these.
        """
        lexicographic = ">" in text
        parts = text.split(">" if lexicographic else "+")
        terms = tuple(_term(part.strip(), text) for part in parts)
        if lexicographic and any(term.weight != 1 for term in terms):
            raise InvalidInput(
                f"weights in {text!r}",
                where="objective",
                remedy="terms taken one after the other have none",
            )
        return cls(terms=terms, lexicographic=lexicographic, tolerance=tolerance)

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready form."""
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Any) -> Objective:
        """Rebuild an objective; a wrong form raises ``KeyError`` or ``TypeError``."""
        return cls(**{**raw, "terms": tuple(Term(**term) for term in raw["terms"])})


MEAN = Objective()
"""The expected run latency, which plans minimise unless told otherwise."""


def _term(part: str, text: str) -> Term:
    weight, star, name = part.rpartition("*")
    kind, colon, level = name.partition(":")
    if kind == "deadline":
        kind = "tardiness"
    try:
        return Term(
            kind=kind,  # type: ignore[arg-type]  # checked by the record itself
            weight=float(weight) if star else 1.0,
            alpha=float(level) if colon else 0.95 if kind == "cvar" else 0.0,
        )
    except ValueError as error:
        if isinstance(error, InvalidInput):
            raise
        raise InvalidInput(
            f"{part!r} in {text!r} is no term",
            where="objective",
            remedy="write mean, cvar:0.95, makespan, deadline or miss, with + or > between",
        ) from error


def mix_shares(amounts: Sequence[float]) -> tuple[int, ...]:
    """Return shares in thousandths by largest remainder, at least 1 each; one amount has all.

    Parameters
    ----------
    amounts
        Rate times weight of each workflow, > 0; at least one.
    """
    if len(amounts) == 1:
        return (_PARTS,)
    total = sum(amounts)
    exact = [_PARTS * amount / total for amount in amounts]
    shares = [max(1, int(value)) for value in exact]
    left = _PARTS - sum(shares)
    order = sorted(range(len(exact)), key=lambda w: (int(exact[w]) - exact[w], w))
    for w in order[: max(0, left)]:
        shares[w] += 1
    return tuple(shares)
