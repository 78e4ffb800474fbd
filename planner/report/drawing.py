"""What all pictures share: palette, line styles, fonts, and how a figure becomes a file.

House rules: the object interface only (no pyplot, no global state), a unit on every axis, the
Okabe-Ito palette, and never colour alone: a line style, a hatch or a word says the same thing, so
that a picture survives a grey printer and colour-blind eyes. Input order is drawing order.

References
----------
Okabe, Ito, Color Universal Design, 2008 (palette).
"""

from __future__ import annotations

import io
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

__all__ = [
    "DASHES",
    "FAINT",
    "GREY",
    "HATCHES",
    "MARKERS",
    "PALETTE",
    "STYLE",
    "WIDE",
    "is_own",
    "new_figure",
    "plain_number",
    "tint",
    "to_png",
]

PALETTE = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#B5A900",
)  # fmt: skip
"""Okabe and Ito, with the yellow darkened so that a line of it shows on white."""
DASHES = (
    "-",
    (0, (5, 1.5)),
    (0, (1, 1)),
    (0, (5, 1.5, 1, 1.5)),
    (0, (8, 2)),
    (0, (3, 1, 1, 1, 1, 1)),
)
MARKERS = ("o", "^", "s", "D", "v", "P", "X", "*")
HATCHES = ("", "///", "....", "xxx", "\\\\\\", "++", "oo", "--")
WIDE = 5.0
"""Beyond this ratio of worst to best a linear axis hides the good ones."""
GREY, FAINT = "#555555", "#dddddd"
STYLE: dict[Any, Any] = {
    "font.size": 9.0,
    "font.family": "DejaVu Sans",
    "axes.titlesize": 10.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "hatch.linewidth": 0.6,
}


def to_png(figure: Figure, dpi: int = 130) -> bytes:
    """Return the figure as PNG bytes; the same figure gives the same bytes."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None})
    return buffer.getvalue()


def is_own(name: str) -> bool:
    """Return whether a policy is Almanac's own, by its name."""
    return name.startswith("almanac")


def plain_number(value: float, _: object) -> str:
    """Format a tick as a plain number (a matplotlib tick formatter)."""
    return f"{value:g}"


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of a size in inches, laid out by constraints."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def tint(colour: str, strength: float = 0.25) -> tuple[float, float, float]:
    """Return a colour ``#rrggbb`` mixed with white, as RGB in [0, 1]."""
    red, green, blue = (int(colour[k : k + 2], 16) / 255 for k in (1, 3, 5))
    return (
        1 - strength * (1 - red),
        1 - strength * (1 - green),
        1 - strength * (1 - blue),
    )
