"""A table as HTML, for the cells of notebooks."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from mhacut.text import safe

Rows = Sequence[Sequence[str]]


def html_table(rows: Rows, notes: Sequence[str] = ()) -> str:
    """Return a table in which the first column and the first row are headings, and lines below it.

    >>> html_table([["<vit>", "dense"], ["FLOPs", "1.26G"]])
    '<table><tr><th>&lt;vit&gt;</th><th>dense</th></tr><tr><th>FLOPs</th><td>1.26G</td></tr></table>'

    Args:
        rows: cells as text, which is escaped.
        notes: lines below the table, likewise.
    """
    lines = []
    for number, row in enumerate(rows):
        tags = ["th" if number == 0 or column == 0 else "td" for column in range(len(row))]
        cells = (f"<{tag}>{escape(safe(cell))}</{tag}>" for tag, cell in zip(tags, row, strict=True))
        lines.append(f"<tr>{''.join(cells)}</tr>")
    below = "".join(f"<div>{escape(safe(note))}</div>" for note in notes)
    return f"<table>{''.join(lines)}</table>{below}"
