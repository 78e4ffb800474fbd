"""What goes into a study under which name: a policy, maybe changed, maybe with parameters.

Written ``[label=]policy[-variant][:key=value,...]``: ``prefix_affinity`` is tuned,
``ray=prefix_affinity:imbalanced_threshold=inf`` is not and goes by another name, ``almanac-speed``
is almanac without what it knows of speeds. One policy may thus go in several times.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from planner.dispatch.policies import parse_policy
from planner.domain.errors import InvalidInput
from planner.study.ablation import VARIANTS, Grid, Variant

__all__ = ["Entry", "parse_entry"]

_FORM = re.compile(
    r"(?:(?P<label>[^:=]+)=)?(?P<name>[^:=-]+)(?:-(?P<variant>[^:=]+))?(?P<rest>:.*)?"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One competitor.

    Parameters
    ----------
    label
        Its name in tables; unique in a setting.
    policy
        Registered name.
    parameters
        Given ones; with any, nothing is tuned.
    variant
        Name among the policy's in `planner.study.ablation.VARIANTS`, or None.
    """

    label: str
    policy: str
    parameters: Mapping[str, float]
    variant: str | None = None

    @property
    def change(self) -> Variant:
        """Its variant; one that changes nothing if it has none."""
        return Variant() if self.variant is None else VARIANTS[self.policy][self.variant]

    @property
    def grid(self) -> Grid:
        """What it is tuned over; empty if it is not."""
        return () if self.parameters else self.change.tuned_over(self.policy)


def parse_entry(text: str) -> Entry:
    """Return the entry that a text stands for.

    Raises
    ------
    InvalidInput
        If policy, variant or a parameter is unknown, or the text has another form.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise InvalidInput(
            f"{text!r} is no policy", where="policy",
            remedy="write [label=]policy[-variant][:key=value,...]",
        )  # fmt: skip
    name, variant = found["name"], found["variant"]
    policy, parameters = parse_policy(name + (found["rest"] or ""))
    if variant is not None and variant not in VARIANTS.get(policy, {}):
        known = ", ".join(VARIANTS.get(policy, {})) or "none"
        raise InvalidInput(
            f"policy {policy!r} has no variant {variant!r}", where="policy",
            remedy=f"known: {known}",
        )  # fmt: skip
    return Entry(
        label=found["label"] or text, policy=policy, parameters=parameters, variant=variant
    )
