"""Channel indices as people read them."""

from __future__ import annotations

from collections.abc import Sequence


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
