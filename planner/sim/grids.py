"""What each policy is tuned over: every tuned one gets the same number of trials."""

from __future__ import annotations

import math
from collections.abc import Mapping

__all__ = ["GRIDS"]

GRIDS: Mapping[str, tuple[tuple[str, tuple[float, ...]], ...]] = {
    "prefix_affinity": (
        ("imbalanced_threshold", (4, 0, 1, 2, 3, 6, 8, 12, 20, math.inf)),
        ("match_rate_threshold", (0.1, 0.3, 0.5)),
    ),
    "marginal_cost": (("theta", (1.0, 0.25, 0.5, 0.75, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 0.0, 6.0)),),
    "cache_aware": (
        ("balance_abs_threshold", (4, 0, 1, 2, 6, 8, 16, 64)),
        ("cache_threshold", (0.3, 0.1, 0.5, 0.7, 0.9)),
    ),
    "cache_aware_smg": (
        ("least_gap", (4, 0, 1, 2, 3, 6, 8)),
        ("cache_threshold", (0.3, 0.1, 0.2, 0.5, 0.7, 0.9)),
    ),
    "consistent_hash": (
        ("bound", (math.inf, 1.0, 1.1, 1.25, 1.4, 1.5, 1.75, 2.0, 2.5, 3.0, 4.0, 6.0)),
    ),
    "session_affinity": (
        ("bound", (2.0, 1.0, 1.1, 1.25, 1.4, 1.5, 1.75, 2.5, 3.0, 4.0, 6.0, math.inf)),
    ),
    "kv_cost": (
        ("prefill_load_scale", (1.0, 0.25, 0.5, 2.0, 4.0, 8.0, 16.0)),
        ("overlap_credit", (1.0, 0.0, 0.5, 0.75, 1.5, 2.0)),
    ),
    "weighted_scorers": (
        ("queue", (2.0, 0.5, 1.0, 4.0)),
        ("kv", (2.0, 0.0, 0.5, 4.0, 8.0)),
        ("prefix", (3.0, 0.5, 1.0, 2.0, 6.0)),
    ),
    "llf_workflow": (("scale", (3.0, 1.0, 1.5, 2.0, 2.5, 4.0, 5.0, 6.0, 8.0, 12.0, 16.0, 32.0)),),
    "plas": (
        ("quantum_s", (2.0, 0.5, 1.0, 4.0, 8.0, 16.0)),
        ("beta", (10.0, 0.5, 1.0, 2.0, 5.0, 20.0, math.inf)),
    ),
    "atlas": (
        ("quantum_s", (2.0, 0.5, 1.0, 4.0, 8.0, 16.0)),
        ("beta", (10.0, 0.5, 1.0, 2.0, 5.0, 20.0, math.inf)),
    ),
    "astraea": (
        ("quantum_tokens", (128, 32, 64, 256, 512)),
        ("tau_age", (10.0, 5.0, 20.0)),
        ("one_queue", (1, 0)),
        ("queues", (6, 1, 2, 3, 4)),
    ),
    "saga": (
        ("theta", (0.8, 0.5, 0.6, 0.7, 0.9, 1.0)),
        ("steal_both", (1, 0)),
        ("idle_s", (0.1, 0.0, 0.5, 2.0)),
        ("slo", (1.5, 2.0, 3.0)),
    ),
    "llmsched": (
        ("epsilon", (0.2, 0.0, 0.05, 0.1, 0.3, 0.5)),
        ("bins", (5, 3, 4, 6)),
        ("least_runs", (20, 10, 40, 80)),
    ),
    "almanac": (
        ("theta", (1.0, 0.75, 1.5)),
        ("price_scale", (0.5, 0.0, 0.25, 1.0)),
        ("join_weight", (0.5, 0.0, 0.35, 0.7)),
        ("tail_weight", (0.5, 0.35, 0.75, 1.0)),
    ),
}
"""Parameters in the order they are tuned, each with its values, the starting value first. Every
tuned policy gets 12 evaluations."""
