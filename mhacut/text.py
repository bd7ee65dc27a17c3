"""Text for people: unsafe characters escaped, runs of indices shortened."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

_ESCAPED = {"Cc", "Cf", "Cs", "Zl", "Zp"}


def safe(text: object) -> str:
    r"""``text`` with control, bidi and other invisible characters shown as escapes.

    Names in a checkpoint are anyone's text: printed as they are they can clear the screen, set the window's
    title or turn the reading order. Brackets stay: nothing here is ever parsed as rich markup.

    >>> print(safe("blocks.0\x1b[2J[red]\u202e"))
    blocks.0\x1b[2J[red]\u202e
    """
    return "".join(
        char.encode("unicode_escape").decode() if unicodedata.category(char) in _ESCAPED else char
        for char in str(text)
    )


def ranges(indices: Sequence[int]) -> str:
    """Ascending indices with neighbours drawn together.

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
