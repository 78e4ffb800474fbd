"""Frozen forecasts: what the planner and the router read instead of the estimators.

An `EstimateTable` holds, per workflow, quantiles of output length and prompt length per call
site, delay quantiles per tool node, and outcome probabilities per branch; and latency
coefficients per endpoint. It loads in milliseconds and needs no scikit-learn. Look-ups fall back
from call site to node kind to the global prior, and say so in the provenance.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from planner.domain.errors import InvalidInput
from planner.domain.files import atomic_write, read_json
from planner.domain.latency import LatencyRow
from planner.domain.show import html_table

__all__ = [
    "ESTIMATES_SCHEMA",
    "LEVELS",
    "PRIOR_OUTPUT",
    "PRIOR_TOOL",
    "EstimateTable",
    "Quantiles",
    "SiteEstimate",
    "WorkflowEstimate",
    "load_estimates",
    "save_estimates",
]

ESTIMATES_SCHEMA = "almanac.estimates/1"
LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
"""Quantile levels of every length and delay estimate."""
MOST_OVERDUE = 10.0
"""Longest tail of what is overdue, in multiples; a Pareto tail of index 1 has no mean."""
_MEAN_STEPS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Quantiles:
    """A distribution by its quantiles at `LEVELS`, with its mean.

    Parameters
    ----------
    values
        Quantiles, non-decreasing, >= 0; tokens or seconds, as the holder says.
    mean
        Mean, same unit.
    count
        Observations behind it; 0 for a prior or a declaration.
    provenance
        ``learned``, ``declared`` or ``prior``.
    """

    values: tuple[float, ...]
    mean: float
    count: int = 0
    provenance: str = "prior"

    def __post_init__(self) -> None:
        finite = all(math.isfinite(value) and value >= 0 for value in (*self.values, self.mean))
        ordered = all(a <= b for a, b in zip(self.values, self.values[1:], strict=False))
        if len(self.values) != len(LEVELS) or not finite or not ordered:
            raise InvalidInput(
                f"quantiles {self.values} with mean {self.mean}",
                where="estimate",
                remedy=f"give {len(LEVELS)} finite non-decreasing values >= 0",
            )

    def at(self, level: float) -> float:
        """Return the quantile at a level in [0, 1], linear between and flat beyond `LEVELS`."""
        right = bisect_right(LEVELS, level)
        if right == 0:
            return self.values[0]
        if right == len(LEVELS):
            return self.values[-1]
        low, high = self.values[right - 1], self.values[right]
        slope = (high - low) / (LEVELS[right] - LEVELS[right - 1])
        return low + slope * (level - LEVELS[right - 1])

    def share_below(self, value: float) -> float:
        """Return the share of the distribution at or below a value, in [0, 1).

        Linear between the quantiles; a Pareto tail beyond the last, whose index is that of the
        quantiles at 0.75 and 0.95.
        """
        if value < self.values[0]:
            return LEVELS[0] * value / self.values[0]
        if value >= self.values[-1]:
            index = self._tail_index()
            left = (self.values[-1] / value) ** index if math.isfinite(index) and value > 0 else 0.0
            return 1.0 - (1.0 - LEVELS[-1]) * left
        right = bisect_right(self.values, value)
        low, high = self.values[right - 1], self.values[right]
        share = (value - low) / (high - low)
        return LEVELS[right - 1] + share * (LEVELS[right] - LEVELS[right - 1])

    def given(self, elapsed: float) -> Quantiles:
        """Return the distribution of the whole, given that it is longer than ``elapsed``.

        Parameters
        ----------
        elapsed
            What has passed already: tokens produced so far, seconds waited so far; >= 0.

        Returns
        -------
        Quantiles
            Of the total (what is left is that less ``elapsed``), each >= ``elapsed``; the
            distribution itself if nothing has passed.

        Notes
        -----
        Survival conditioning: the quantile at u becomes the one at F(elapsed) + (1 - F(elapsed)) u.
        Beyond the last quantile the tail is Pareto, as in `share_below`, so that what is overdue
        is expected to take longer the longer it has taken: lengths and delays are heavy-tailed.
        The tail is cut at `MOST_OVERDUE` times the larger of ``elapsed`` and the last quantile.
        """
        if elapsed <= 0.0:
            return self
        index = self._tail_index()
        past = self.share_below(elapsed)
        cap = MOST_OVERDUE * max(elapsed, self.values[-1])
        # Far in the tail 1 - F loses its digits; there the Pareto law is free of scale.
        overdue = elapsed >= self.values[-1]

        def whole(level: float) -> float:
            if overdue:
                return float(min(elapsed * (1.0 - level) ** (-1.0 / index), cap))
            share = past + (1.0 - past) * level
            if share <= LEVELS[0]:
                return max(elapsed, self.values[0] * share / LEVELS[0])
            if share <= LEVELS[-1]:
                return max(elapsed, self.at(share))
            tail = ((1.0 - LEVELS[-1]) / (1.0 - share)) ** (1.0 / index)
            return float(min(max(elapsed, self.values[-1] * tail), cap))

        return Quantiles(
            values=tuple(whole(level) for level in LEVELS),
            mean=sum(whole((step + 0.5) / _MEAN_STEPS) for step in range(_MEAN_STEPS))
            / _MEAN_STEPS,
            count=self.count,
            provenance=self.provenance,
        )

    def _tail_index(self) -> float:
        middle, last = self.values[LEVELS.index(0.75)], self.values[-1]
        if last <= middle:
            return math.inf
        if middle <= 0.0:
            return 1.0
        spread = math.log((1.0 - 0.75) / (1.0 - LEVELS[-1]))
        return max(1.0, spread / math.log(last / middle))

    def sample(self, uniform: float) -> float:
        """Return the value for a uniform number in [0, 1] (inverse transform)."""
        return self.at(uniform)

    @classmethod
    def from_samples(cls, samples: Any, provenance: str = "learned") -> Quantiles:
        """Return the empirical quantiles of a non-empty array of finite values >= 0."""
        array = np.asarray(samples, dtype=float)
        return cls(
            values=tuple(float(value) for value in np.quantile(array, LEVELS)),
            mean=float(array.mean()),
            count=int(array.size),
            provenance=provenance,
        )

    @classmethod
    def constant(cls, value: float, provenance: str = "declared") -> Quantiles:
        """Return the distribution that always gives ``value``."""
        return cls(values=(value,) * len(LEVELS), mean=value, provenance=provenance)


PRIOR_OUTPUT = Quantiles(values=(12.0, 24.0, 70.0, 180.0, 380.0, 700.0, 1000.0), mean=280.0)
"""Output tokens of a call nothing is known of (the order of public agent and chat traces)."""
PRIOR_TOOL = Quantiles(values=(0.05, 0.1, 0.3, 1.0, 3.0, 10.0, 20.0), mean=3.5)
"""Seconds of a tool nothing is known of."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteEstimate:
    """Forecasts for one call site.

    Parameters
    ----------
    output_tokens
        Quantiles of the answer's length.
    prompt_tokens
        Quantiles of the prompt's length, shared prefix included, on the first visit in a run.
    shared_prefix_tokens
        Leading prompt tokens that are the same in every run (system prompt), >= 0.
    growth_tokens
        On a later visit of the site in the same run the prompt is the previous prompt of that
        site, its answer, and this many fresh tokens; None if later visits start afresh with
        ``prompt_tokens``.
    """

    output_tokens: Quantiles
    prompt_tokens: Quantiles
    shared_prefix_tokens: float = 0.0
    growth_tokens: Quantiles | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowEstimate:
    """Forecasts for one workflow.

    Parameters
    ----------
    sites
        By call site id.
    tools
        Delay quantiles in seconds by tool or code node id.
    branches
        Branch id -> outcome id -> probabilities by visit (0, 1, 2, ...; the last one repeats).
        For each visit the probabilities of a branch's outcomes sum to one.
    remaining_s
        Mean seconds from the start of a node to the end of the run, by node id, on the fleet the
        estimates were made for; empty when unknown.
    name
        The workflow's name, for people.
    """

    name: str = ""
    sites: Mapping[str, SiteEstimate] = field(default_factory=dict)
    tools: Mapping[str, Quantiles] = field(default_factory=dict)
    branches: Mapping[str, Mapping[str, tuple[float, ...]]] = field(default_factory=dict)
    remaining_s: Mapping[str, float] = field(default_factory=dict)


_UNKNOWN_SITE = SiteEstimate(
    output_tokens=PRIOR_OUTPUT,
    prompt_tokens=Quantiles(
        values=(60.0, 120.0, 400.0, 1200.0, 3500.0, 9000.0, 16000.0), mean=3300.0
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EstimateTable:
    """All frozen forecasts.

    Parameters
    ----------
    workflows
        By workflow hash.
    endpoints
        Latency coefficients by endpoint id, learned; an endpoint that is absent keeps the row of
        its fleet file.
    default_site
        What to assume of a call site that is not in the table.
    version
        Content version, shown in traces.
    """

    workflows: Mapping[str, WorkflowEstimate] = field(default_factory=dict)
    endpoints: Mapping[str, LatencyRow] = field(default_factory=dict)
    default_site: SiteEstimate = _UNKNOWN_SITE
    version: str = "prior"

    def site(self, workflow_hash: str, site: str) -> SiteEstimate:
        """Return the forecasts of a call site, or the default one."""
        workflow = self.workflows.get(workflow_hash)
        if workflow is None:
            return self.default_site
        return workflow.sites.get(site, self.default_site)

    def tool(self, workflow_hash: str, node: str) -> Quantiles:
        """Return the delay quantiles (seconds) of a tool node, or the prior."""
        workflow = self.workflows.get(workflow_hash)
        if workflow is None:
            return PRIOR_TOOL
        return workflow.tools.get(node, PRIOR_TOOL)

    def _repr_html_(self) -> str:
        """Return the forecasts of each call site, for a notebook."""
        return html_table(
            [
                {
                    "workflow": estimate.name or key,
                    "call site": site,
                    "output tokens P50": one.output_tokens.at(0.5),
                    "P90": one.output_tokens.at(0.9),
                    "prompt tokens P50": one.prompt_tokens.at(0.5),
                    "shared prefix": one.shared_prefix_tokens,
                    "observed": one.output_tokens.count,
                    "from": one.output_tokens.provenance,
                }
                for key, estimate in self.workflows.items()
                for site, one in sorted(estimate.sites.items())
            ],
            f"estimates {self.version}",
        )

    def to_json(self) -> dict[str, Any]:
        """Return a JSON-ready form, schema included."""
        return {"schema": ESTIMATES_SCHEMA, **asdict(self)}

    @classmethod
    def from_json(cls, raw: Any, where: str = "estimates") -> EstimateTable:
        """Rebuild a table.

        Raises
        ------
        InvalidInput
            If the schema or a field does not fit.
        """
        if not isinstance(raw, dict) or raw.get("schema") != ESTIMATES_SCHEMA:
            found = raw.get("schema") if isinstance(raw, dict) else type(raw).__name__
            raise InvalidInput(
                f"schema is {found!r}",
                where=where,
                remedy=f"give a file of schema {ESTIMATES_SCHEMA} (made by `almanac train`)",
            )
        try:
            return cls(
                workflows={
                    key: _workflow_from_json(value) for key, value in raw["workflows"].items()
                },
                endpoints={key: LatencyRow(**value) for key, value in raw["endpoints"].items()},
                default_site=_site_from_json(raw["default_site"]),
                version=str(raw["version"]),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise InvalidInput(
                f"a field is missing or of the wrong type ({error})",
                where=where,
                remedy="make it again with `almanac train`",
            ) from error


def _quantiles_from_json(raw: Mapping[str, Any]) -> Quantiles:
    return Quantiles(
        values=tuple(float(value) for value in raw["values"]),
        mean=float(raw["mean"]),
        count=int(raw["count"]),
        provenance=str(raw["provenance"]),
    )


def _site_from_json(raw: Mapping[str, Any]) -> SiteEstimate:
    return SiteEstimate(
        output_tokens=_quantiles_from_json(raw["output_tokens"]),
        prompt_tokens=_quantiles_from_json(raw["prompt_tokens"]),
        shared_prefix_tokens=float(raw["shared_prefix_tokens"]),
        growth_tokens=None
        if raw["growth_tokens"] is None
        else _quantiles_from_json(raw["growth_tokens"]),
    )


def _workflow_from_json(raw: Mapping[str, Any]) -> WorkflowEstimate:
    return WorkflowEstimate(
        name=str(raw["name"]),
        sites={key: _site_from_json(value) for key, value in raw["sites"].items()},
        tools={key: _quantiles_from_json(value) for key, value in raw["tools"].items()},
        branches={
            branch: {outcome: tuple(map(float, values)) for outcome, values in outcomes.items()}
            for branch, outcomes in raw["branches"].items()
        },
        remaining_s={key: float(value) for key, value in raw["remaining_s"].items()},
    )


def load_estimates(path: Path) -> EstimateTable:
    """Read an estimate table from a JSON file."""
    return EstimateTable.from_json(read_json(path, what="estimate table"), where=str(path))


def save_estimates(table: EstimateTable, path: Path) -> None:
    """Write an estimate table as JSON, atomically."""
    with atomic_write(path) as temporary:
        temporary.write_text(
            json.dumps(table.to_json(), indent=1, sort_keys=True, allow_nan=False) + "\n",
            encoding="utf-8",
        )
