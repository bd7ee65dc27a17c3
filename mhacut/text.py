"""Text for terminals: escaped characters, ranges of indices, tables."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

# Control, format (bidi marks among them) and surrogate characters, and separators of lines and paragraphs.
_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def safe(text: object) -> str:
    r"""Escape control, bidi and other invisible characters.

    Names in a checkpoint are untrusted: control characters could clear the screen or reverse the text.

    >>> print(safe("blocks.0\x1b[2J[red]\u202e"))
    blocks.0\x1b[2J[red]\u202e
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _ESCAPED else char
        for char in str(text)
    )


def dtype_name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def listed(names: Sequence[str], most: int = 10) -> str:
    """Return the first ``most`` names and the number of further names, as text.

    >>> listed(["a", "b", "c"], most=2), listed([])
    ('a, b and 1 more', 'none')
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) + more) or "none"


def ranges(indices: Sequence[int]) -> str:
    """Format ascending indices as ranges.

    >>> ranges([0, 1, 2, 5, 7, 8])
    '0-2, 5, 7-8'
    >>> ranges([])
    'none'
    """
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in runs) or "none"


def table(rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Return rows as a text table: the first ``left`` columns left-aligned, others right-aligned.

    >>> print(table([["", "dense", "slim"], ["FLOPs", "4.61G", "2.00G"]]))
           dense   slim
    FLOPs  4.61G  2.00G
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for number, (cell, width) in enumerate(zip(row, widths, strict=True)):
            cells.append(cell.ljust(width) if number < left else cell.rjust(width))
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def filled_columns(rows: Sequence[Sequence[str]]) -> list[list[str]]:
    """Return table rows without the columns that are empty below the heading row."""
    columns = [column for column in zip(*rows, strict=True) if any(column[1:])]
    return [list(row) for row in zip(*columns, strict=True)]


def safe_table(rows: Sequence[Sequence[str]], notes: Sequence[str] = ()) -> str:
    """Return a :func:`table` with lines below it. Unsafe characters are escaped."""
    return "\n".join([table([list(map(safe, row)) for row in rows]), *map(safe, notes)])
