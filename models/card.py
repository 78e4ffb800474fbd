"""The model card: what was learned from what, what was left out, and what it is worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from models.tables import Dataset, SetAside

__all__ = ["CARD_SCHEMA", "Result", "card_json", "card_markdown", "results_table"]

CARD_SCHEMA = "almanac.model_card/1"

_PREFACE = (
    "Measured on held-out rows with a fit on the others; the artifacts are then fitted on all "
    "rows. Smaller is better everywhere. `constant` is what a constant learned from the training "
    "rows scores; where the predictor does not beat it, the artifact holds the constant."
)
_RESULT_COLUMNS = (
    "predictor", "dataset", "train rows", "held-out rows", "metric", "value", "constant", "gain",
    "more", "artifact holds",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """One predictor on one dataset, measured on rows it has not seen.

    Parameters
    ----------
    predictor, dataset
        What was predicted, and from which source.
    rows_train, rows_held_out
        Rows on each side of the split.
    split
        How the held-out rows were chosen.
    metric
        The measure; smaller is better.
    value, baseline
        The measure of the predictor and of the constant that training rows suggest.
    shipped
        ``predictor``, or ``constant`` if the predictor did not beat it and the artifact therefore
        holds the constant.
    more
        Further measures by name.
    note
        What a reader must know to read the numbers right.
    """

    predictor: str
    dataset: str
    rows_train: int
    rows_held_out: int
    split: str
    metric: str
    value: float
    baseline: float
    shipped: str = "predictor"
    more: dict[str, float] = field(default_factory=dict)
    note: str = ""

    @property
    def gain(self) -> float:
        """Share of the baseline's loss that the predictor saves; negative when it loses."""
        return 1.0 - self.value / self.baseline if self.baseline > 0 else 0.0


def results_table(results: Sequence[Result]) -> str:
    """Return the results as an aligned text table."""
    head = ("predictor", "dataset", "train", "held out", "metric", "value", "constant", "gain", "")
    rows = [head]
    for one in results:
        more = " ".join(f"{name} {value:.2f}" for name, value in one.more.items())
        rows.append(
            (
                one.predictor,
                one.dataset,
                str(one.rows_train),
                str(one.rows_held_out),
                one.metric,
                f"{one.value:.4g}",
                f"{one.baseline:.4g}",
                f"{100 * one.gain:+.1f} %",
                more + (" (constant kept)" if one.shipped == "constant" else ""),
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    numeric = {2, 3, 5, 6, 7}
    lines = [
        "  ".join(
            cell.rjust(width) if column in numeric else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def card_json(
    *,
    datasets: Sequence[Dataset],
    results: Sequence[Result],
    extra_set_aside: Sequence[SetAside],
    arrivals: dict[str, Any],
    seed: int,
    table_version: str | None,
    ignored: Sequence[str],
) -> dict[str, Any]:
    """Return the card as a JSON-ready mapping."""
    return {
        "schema": CARD_SCHEMA,
        "seed": seed,
        "datasets": [
            {
                "name": one.name,
                "rows_read": one.rows_read,
                "rows_set_aside": sum(part.rows for part in one.set_aside),
                "set_aside": [asdict(part) for part in one.set_aside],
                "split": one.split,
                "window": one.window,
                "data_hash": one.data_hash,
            }
            for one in datasets
        ],
        "not_fitted": [asdict(part) for part in extra_set_aside],
        "results": [{**asdict(one), "gain": one.gain} for one in results],
        "arrivals": arrivals,
        "estimates_version": table_version,
        "ignored": list(ignored),
    }


def card_markdown(card: dict[str, Any]) -> str:
    """Return the card of `card_json` as Markdown."""
    lines = [
        "# Model card",
        "",
        _PREFACE,
        "",
        f"Seed {card['seed']}.",
        "",
        "## Results",
        "",
        "| " + " | ".join(_RESULT_COLUMNS) + " |",
        "|---|---|---:|---:|---|---:|---:|---:|---|---|",
    ]
    for one in card["results"]:
        more = ", ".join(f"{name} {value:.3g}" for name, value in one["more"].items())
        lines.append(
            f"| {one['predictor']} | {one['dataset']} | {one['rows_train']} | "
            f"{one['rows_held_out']} | {one['metric']} | {one['value']:.4g} | "
            f"{one['baseline']:.4g} | {100 * one['gain']:+.1f} % | {more} | {one['shipped']} |"
        )
    notes = dict.fromkeys(
        f"- {one['predictor']}: {one['note']}" for one in card["results"] if one["note"]
    )
    if notes:
        lines += ["", "Notes", "", *notes]
    lines += ["", "## Data", "", "| dataset | rows read | set aside | split | window | hash |"]
    lines += ["|---|---:|---:|---|---|---|"]
    lines += [
        f"| {one['name']} | {one['rows_read']} | {one['rows_set_aside']} | {one['split']} | "
        f"{one['window']} | {one['data_hash']} |"
        for one in card["datasets"]
    ]
    aside = [part for one in card["datasets"] for part in one["set_aside"]] + card["not_fitted"]
    lines += ["", "## Rows set aside", ""]
    lines += [f"- {part['table']}: {part['rows']} rows, {part['reason']}" for part in aside] or [
        "None."
    ]
    if card["arrivals"]:
        lines += ["", "## Arrivals", ""]
        lines += ["| service | arrivals a second | gap variation | minute variance / mean |"]
        lines += ["|---|---:|---:|---:|"]
        lines += [
            f"| {name} | {one['rate_per_s']:.3f} | {one['gap_cv']:.2f} | "
            f"{one['minute_index']:.1f} |"
            for name, one in card["arrivals"].items()
        ]
    if card["ignored"]:
        lines += ["", f"Passed over in the folder: {', '.join(card['ignored'])}."]
    return "\n".join(lines) + "\n"
