"""Small tables in HTML: how records show themselves in a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

__all__ = ["html_table"]


def html_table(rows: Sequence[Mapping[str, object]], caption: str = "") -> str:
    """Return rows as an HTML table; everything is escaped.

    Parameters
    ----------
    rows
        Cells by heading; a heading that a row lacks is left empty there. None is a dash, and
        numbers have four significant digits.
    caption
        A line above it.
    """
    heads = list(dict.fromkeys(name for row in rows for name in row))
    lines = ["<table>"]
    if caption:
        lines.append(f"<caption>{escape(caption)}</caption>")
    lines.append(f"<thead><tr>{''.join(f'<th>{escape(one)}</th>' for one in heads)}</tr></thead>")
    lines.append("<tbody>")
    for row in rows:
        cells = (escape(_text(row[name])) if name in row else "" for name in heads)
        lines.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
