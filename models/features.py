"""From steps to features: one set of functions for training and for serving.

A *step* is one call of an agent session, one tool execution, or one branch choice, in order.
Each function below sees, for a row, only the row's own facts known before the predicted event and
the rows before it in the same session. To serve a running session, pass its steps so far plus the
pending one (its outcome left NaN or empty) and take the last row: the numbers are the same as in
training, which a test checks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

__all__ = [
    "CHOICE",
    "DELAY",
    "LENGTH",
    "STEP_COLUMNS",
    "FeatureSchema",
    "choice_features",
    "delay_features",
    "length_features",
    "steps",
]

STEP_COLUMNS: dict[str, type] = {
    "session_id": str,  # rows of one session share history; sorted by step inside it
    "family": str,  # the unit of splitting: never on both sides
    "step": float,  # position in the session, from 0
    "kind": str,  # coarse class of the site (agent system, node kind)
    "site": str,  # call site, node or branch
    "model": str,
    "input_kind": str,  # what is new in the prompt, if known before the call
    "prompt_tokens": float,
    "shared_prefix_tokens": float,  # common with the previous call of the session
    "max_tokens": float,  # declared limit on the answer
    "output_tokens": float,
    "action": str,  # what the answer asked for: tool, command class, next speaker, outcome
    "words": str,  # first words of the command
    "argument_chars": float,
    "status": str,  # how the action ended
    "delay_s": float,  # from the end of this call to the next call of the session
    "held_out": bool,
}
"""Columns of a step table with their types; absent facts are NaN or ``""``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FeatureSchema:
    """Names and order of the columns an estimator is trained on; categories come first."""

    version: str
    categorical: tuple[str, ...]
    numeric: tuple[str, ...] = ()

    @property
    def columns(self) -> list[str]:
        """All columns, in order."""
        return [*self.categorical, *self.numeric]


LENGTH = FeatureSchema(
    version="length/3",
    categorical=(
        "kind", "site", "model", "input_kind", "last_site", "last_site_2", "last_action",
        "last_action_2", "last_words", "last_status",
    ),
    numeric=(
        "step", "prompt_tokens", "new_tokens", "last_output_tokens", "last_output_tokens_2",
        "mean_log_output", "site_mean_log_output", "turn_last_output_tokens", "turn_visits",
        "last_delay_s", "last_argument_chars", "max_tokens",
    ),
)  # fmt: skip
DELAY = FeatureSchema(
    version="delay/1",
    categorical=("kind", "site", "action", "words", "last_action", "last_status"),
    numeric=(
        "step", "argument_chars", "output_tokens", "prompt_tokens", "last_delay_s",
        "mean_log_delay", "action_mean_log_delay",
    ),
)  # fmt: skip
CHOICE = FeatureSchema(
    version="choice/1",
    categorical=("kind", "site", "last_action", "input_kind", "last_status", "last_action_2"),
)
"""Contexts of a choice, from the most general to the most specific."""


def steps(**columns: object) -> pd.DataFrame:
    """Return a step table from some of its columns; the others say that nothing is known.

    The table is sorted by session and step.
    """
    given = pd.DataFrame(columns)
    out = pd.DataFrame(index=given.index)
    for name, kind in STEP_COLUMNS.items():
        if name in given.columns:
            out[name] = given[name].astype(kind)
        elif kind is str:
            out[name] = ""
        else:
            out[name] = False if kind is bool else np.nan
    return out.sort_values(["session_id", "step"], kind="stable").reset_index(drop=True)


def _last(table: pd.DataFrame, column: str, back: int = 1) -> pd.Series:
    shifted = table.groupby("session_id", sort=False)[column].shift(back)
    return shifted.fillna("") if STEP_COLUMNS[column] is str else shifted


def _running_mean(values: pd.Series, keys: list[pd.Series]) -> pd.Series:
    """Mean of the earlier values of the same key, NaN where there is none."""
    seen = values.notna().astype(float).groupby(keys, sort=False)
    total = values.fillna(0.0).groupby(keys, sort=False)
    earlier = seen.cumsum() - values.notna().astype(float)
    return (total.cumsum() - values.fillna(0.0)) / earlier.where(earlier > 0)


def length_features(table: pd.DataFrame) -> pd.DataFrame:
    """Return the `LENGTH` features: what is known when a call is dispatched.

    Parameters
    ----------
    table
        Steps, sorted by session and step; ``output_tokens`` and all that follows from the answer
        (``action``, ``words``, ``status``, ``delay_s``) are read from earlier rows only.

    Returns
    -------
    One row per step, same index, columns in the schema's order.
    """
    log_output = pd.Series(np.log1p(table["output_tokens"]), index=table.index)
    session = table["session_id"]
    # A turn is a site after the one before it: who answers whom says more than who answers.
    turn = table.groupby([session, table["site"], _last(table, "site")], sort=False)
    known = {
        "last_site": _last(table, "site"),
        "last_site_2": _last(table, "site", 2),
        "last_action": _last(table, "action"),
        "last_action_2": _last(table, "action", 2),
        "last_words": _last(table, "words"),
        "last_status": _last(table, "status"),
        "new_tokens": table["prompt_tokens"] - table["shared_prefix_tokens"],
        "last_output_tokens": _last(table, "output_tokens"),
        "last_output_tokens_2": _last(table, "output_tokens", 2),
        "mean_log_output": _running_mean(log_output, [session]),
        "site_mean_log_output": _running_mean(log_output, [session, table["site"]]),
        "turn_last_output_tokens": turn["output_tokens"].shift(1),
        "turn_visits": turn.cumcount(),
        "last_delay_s": _last(table, "delay_s"),
        "last_argument_chars": _last(table, "argument_chars"),
    }
    return table.assign(**known)[LENGTH.columns]


def delay_features(table: pd.DataFrame) -> pd.DataFrame:
    """Return the `DELAY` features: what is known when a call's answer has ended.

    As `length_features`, but the answer itself (``action``, ``words``, ``argument_chars``,
    ``output_tokens``) is known and ``delay_s`` and ``status`` are not.
    """
    log_delay = pd.Series(np.log1p(table["delay_s"]), index=table.index)
    session = table["session_id"]
    known = {
        "last_action": _last(table, "action"),
        "last_status": _last(table, "status"),
        "last_delay_s": _last(table, "delay_s"),
        "mean_log_delay": _running_mean(log_delay, [session]),
        "action_mean_log_delay": _running_mean(log_delay, [session, table["action"]]),
    }
    return table.assign(**known)[DELAY.columns]


def choice_features(table: pd.DataFrame) -> pd.DataFrame:
    """Return the `CHOICE` contexts: what is known before a step's ``action`` is chosen."""
    known = {
        "last_action": _last(table, "action"),
        "last_action_2": _last(table, "action", 2),
        "last_status": _last(table, "status"),
    }
    return table.assign(**known)[CHOICE.columns]
