"""Tool delay: heavy-tailed quantiles from the tool's name, command words and history."""

from __future__ import annotations

from collections.abc import Sequence

from models.features import DELAY, delay_features
from models.output_length import shrunk_quantiles
from models.predictor import StepQuantilePredictor
from planner.domain.estimates import PRIOR_TOOL, Quantiles

__all__ = ["node_delay_s", "tool_delay_predictor"]


def tool_delay_predictor(*, constant: bool = False, seed: int = 0) -> StepQuantilePredictor:
    """Return the (unfitted) predictor of seconds between an answer and the session's next call.

    It is asked when the answer has ended: the tool, its command and the length of the answer are
    known. Where people answer too (Claude Code), their thinking time is part of the delay.
    """
    return StepQuantilePredictor(
        target="delay_s",
        features=delay_features,
        schema=DELAY,
        groups=("kind", "action", "words"),
        constant=constant,
        seed=seed,
    )


def node_delay_s(sample: Sequence[float], strength: float = 2.0) -> Quantiles:
    """Return delay quantiles (seconds) of a tool node, pulled towards the public prior.

    The pull is weak: a tool's own times say far more than the spread of all tools.
    """
    return shrunk_quantiles(sample, PRIOR_TOOL, strength)
