"""What if: a question as things are, and after each of some changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from planner.whatif.answer import Answer
from planner.whatif.asking import ask
from planner.whatif.changes import Scenario
from planner.whatif.effects import Effect, effect
from planner.whatif.effort import Effort, bounded
from planner.whatif.question import Question, Target, check_deadlines
from planner.whatif.store import Store
from planner.whatif.tables import answer_table, effect_table, flat_row

__all__ = ["WhatIf", "what_if"]


@dataclass(frozen=True, slots=True, kw_only=True)
class WhatIf:
    """A question, its changes, and what comes of each.

    Parameters
    ----------
    answers
        The question as it is first, then each scenario.
    effects
        Of each scenario against the question as it is.
    target
        What was asked for, or None.
    """

    answers: tuple[Answer, ...]
    effects: tuple[Effect, ...]
    target: Target | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form."""
        return {
            "schema": "almanac.whatif/1",
            "answers": [one.to_json() for one in self.answers],
            "effects": [one.to_json() for one in self.effects],
            "target": None
            if self.target is None
            else {
                "target": str(self.target),
                "verdicts": {one.label: one.verdict(self.target) for one in self.answers},
            },
        }

    def text(self) -> str:
        """Return the tables for a terminal."""
        lines = [answer_table(self.answers)]
        if self.effects:
            lines += ["", effect_table(self.effects)]
        if self.target is not None:
            lines += ["", *(f"{one.label}: {one.verdict(self.target)}" for one in self.answers)]
        notes = [f"{one.label}: {note}" for one in self.answers for note in one.notes]
        return "\n".join([*lines, *notes])

    def to_frame(self) -> Any:
        """Return the answers as a pandas data frame, a row each."""
        import pandas as pd

        return pd.DataFrame([flat_row(one) for one in self.answers])

    def _repr_html_(self) -> str:
        """Return the table for a notebook."""
        return str(self.to_frame().to_html(index=False, float_format=lambda x: f"{x:.3g}"))


def what_if(
    question: Question,
    scenarios_: Sequence[Scenario] = (),
    *,
    target: Target | None = None,
    effort: Effort | None = None,
    store: Store | None = None,
) -> WhatIf:
    """Return what is expected as things are, and after each scenario.

    Parameters
    ----------
    question
        As things are.
    scenarios_
        Changes to try, each on its own.
    target
        Judged for each answer; its metric is bounded, too.

    Raises
    ------
    InvalidInput
        If a change does not fit the question.
    """
    check_deadlines(target, question.streams)
    effort = bounded(effort or Effort(), target)
    asked = [(str(one), one.apply(question)) for one in (Scenario(), *scenarios_)]
    answers = ask(asked, effort, store=store or Store())
    return WhatIf(
        answers=tuple(answers),
        effects=tuple(effect(answers[0], one, effort.level) for one in answers[1:]),
        target=target,
    )
