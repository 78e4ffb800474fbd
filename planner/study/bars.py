"""The bars of a study: its claims, and what almanac is held to wherever it takes part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from planner.metrics import PairedDifference
from planner.report.terminal import align
from planner.study.claims import Bar, Claim
from planner.study.clairvoyant import Clairvoyant
from planner.study.entries import parse_entry
from planner.study.figures import Figures
from planner.study.grid import Outcome
from planner.study.settings import Setting
from planner.study.studies import OURS, Study

__all__ = ["bars_of", "bars_text"]

_MOST_SHARE, _MOST_LOSS = 50.0, 3.0
_HELD = (("mean_s", "mean"), ("p95_s", "P95"))
_GAP, _LEAST_CLOSED = 0.05, 1 / 3
"""Where clairvoyance saves more than the one, ours is to save at least this share of it."""

Clairvoyants = Mapping[Setting, Sequence[Clairvoyant]]


def bars_of(study: Study, figures: Figures, clairvoyants: Clairvoyants) -> list[Bar]:
    """Return the bars whose figures are there: a study may have been cut to a few settings.

    Parameters
    ----------
    clairvoyants
        Estimates by setting, one per seed; may lack settings.
    """
    claimed = [_judged(claim, figures) for claim in study.claims]
    # Variants of ours and what a claim brings along are no competitors.
    rivals = {one.label for one in map(parse_entry, study.policies) if one.policy != OURS}
    held = _held(rivals, figures) if rivals else []
    if study.most_loss is not None:
        held += _held_to_baseline(study.baseline, study.most_loss, figures)
    held += _closed(study.baseline, figures, clairvoyants)
    return [*held, *(bar for bar in claimed if bar is not None)]


def _judged(claim: Claim, figures: Figures) -> Bar | None:
    of = _find(claim.of.setting, claim.of.policy, figures)
    if of is None:
        return None
    if claim.measured == "value":
        value = figures.value(of, claim.metric)
        alone = None if value is None else PairedDifference(value, float("nan"), float("nan"))
        return None if alone is None else claim.judged(alone)
    others = [_find(side.setting, side.policy, figures) for side in claim.against]
    if any(one is None for one in others):
        return None
    rival = figures.least([one for one in others if one is not None], claim.metric)
    if rival is None:
        return None
    # Of two settings the name of the claim says it all; of one, who the rival is.
    name = rival.policy if rival.setting == of.setting else ""
    if claim.measured == "relative":
        found = figures.difference(rival, of, claim.metric)
        return None if found is None else claim.judged(found, name)
    mine, theirs = figures.value(of, claim.metric), figures.value(rival, claim.metric)
    if mine is None or theirs is None:
        return None
    return claim.judged(PairedDifference(mine - theirs, float("nan"), float("nan")), name)


def _find(setting: Setting, policy: str, figures: Figures) -> Outcome | None:
    return figures.find(setting, parse_entry(policy).label)


def _held(rivals: set[str], figures: Figures) -> list[Bar]:
    """Return what almanac is held to against the best of the others in every setting."""
    bars = []
    for metric, name in _HELD:
        found: list[tuple[float, bool]] = []
        for group in figures.by_setting.values():
            mine = next((one for one in group if one.policy == OURS), None)
            best = figures.least([one for one in group if one.policy in rivals], metric)
            if mine is None or best is None:
                continue
            difference = figures.difference(best, mine, metric)
            if difference is not None:
                found.append((difference.mean, difference.high < 0))
        if not found:
            continue
        wins = sum(won for _, won in found)
        bars += [
            Bar(
                name=f"settings where almanac's {name} beats the best other, interval below zero "
                f"({wins} of {len(found)})",
                value=100.0 * wins / len(found),
                unit="%",
                low=_MOST_SHARE,
            ),
            Bar(
                name=f"almanac's {name} against the best other, worst setting",
                value=100.0 * max(mean for mean, _ in found),
                unit="%",
                high=_MOST_LOSS,
            ),
        ]
    return bars


def _held_to_baseline(baseline: str, most_loss: float, figures: Figures) -> list[Bar]:
    """Return how far almanac lies above the baseline where it does so most."""
    bars = []
    for metric, name in _HELD:
        found = [
            (difference.mean, setting, difference)
            for setting in figures.by_setting
            if (difference := _difference(setting, baseline, metric, figures)) is not None
        ]
        if found:
            _, setting, worst = max(found, key=lambda one: one[0])
            bars.append(
                Bar(
                    name=f"almanac's {name} against {baseline}, worst setting ({setting.name})",
                    value=100.0 * worst.mean,
                    unit="%",
                    high=100.0 * most_loss,
                    interval=(100.0 * worst.low, 100.0 * worst.high),
                )
            )
    return bars


def _closed(baseline: str, figures: Figures, clairvoyants: Clairvoyants) -> list[Bar]:
    """Return how much of what clairvoyance saves almanac saves, wherever that is much."""
    gaps = {
        setting: sum(one.gap for one in estimates) / len(estimates)
        for setting, estimates in clairvoyants.items()
    }
    bars = []
    for setting, gap in gaps.items():
        difference = _difference(setting, baseline, "mean_s", figures)
        if gap > _GAP and difference is not None:
            bars.append(
                Bar(
                    name=f"share of the clairvoyant gap of {gap:.1%} that almanac closes, "
                    f"{setting.name}",
                    value=-100.0 * difference.mean / gap,
                    unit="%",
                    low=100.0 * _LEAST_CLOSED,
                    interval=(-100.0 * difference.high / gap, -100.0 * difference.low / gap),
                )
            )
    if gaps:
        largest = max(gaps, key=lambda setting: gaps[setting])
        open_ = Bar(
            name=f"settings with a clairvoyant gap above {_GAP:.0%} of which almanac closes less "
            f"than a third (largest gap {gaps[largest]:.1%}, {largest.name})",
            value=float(sum(not bar.holds for bar in bars)),
            unit="",
            high=0.0,
        )
        bars.insert(0, open_)
    return bars


def _difference(
    setting: Setting, baseline: str, metric: str, figures: Figures
) -> PairedDifference | None:
    held, ours = figures.find(setting, baseline), figures.find(setting, OURS)
    return None if held is None or ours is None else figures.difference(held, ours, metric)


def bars_text(bars: Sequence[Mapping[str, Any]]) -> str:
    """Return bars, in their JSON form, as aligned text."""
    rows = [["bar", "figure", "interval", "expected", "holds", "published"]]
    for bar in bars:
        interval = bar["interval"]
        rows.append(
            [
                bar["name"],
                f"{bar['value']:.4g} {bar['unit']}".strip(),
                "-" if interval is None else f"{interval[0]:.3g} to {interval[1]:.3g}",
                bar["range"],
                "yes" if bar["holds"] else "NO",
                bar["source"] or "-",
            ]
        )
    held = sum(bar["holds"] for bar in bars)
    return f"{align(rows)}\n{held} of {len(bars)} hold"
