"""Which widths are allowed, and which of them a budget buys."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mhacut.surgery import UnitKey


def width_choices(dense: int, round_to: int) -> tuple[int, ...]:
    """Multiples of ``round_to`` below the dense width, and the dense width itself.

    >>> width_choices(20, 8)
    (8, 16, 20)
    >>> width_choices(6, 8)
    (6,)
    """
    return (*range(round_to, dense, round_to), dense)


def nearest_width(count: float, dense: int, round_to: int) -> int:
    """The allowed width nearest to ``count``; the smaller of two at the same distance."""
    return min(width_choices(dense, round_to), key=lambda width: abs(width - count))


def lowest_flops(
    choices: Mapping[UnitKey, Sequence[int]], flops: Callable[[Mapping[UnitKey, int]], int]
) -> int:
    """What the model costs at the least allowed width of every unit."""
    return flops({key: widths[0] for key, widths in choices.items()})


def fill_budget(
    ranked: Mapping[UnitKey, Sequence[float]],
    choices: Mapping[UnitKey, Sequence[int]],
    flops: Callable[[Mapping[UnitKey, int]], int],
    budget: int,
) -> dict[UnitKey, int]:
    """Widths within ``budget`` for channels ranked by one score across all units.

    First one threshold for all units, as low as the budget allows; then, since widths move in steps, the best
    step that still fits, again and again until none does.

    Args:
        ranked: per unit, the score of its best, second best, ... channel.
        choices: allowed widths per unit, ascending.
        flops: of the model at given widths; grows with each.
        budget: reachable with the least widths.
    """

    def widths_at(threshold: float) -> dict[UnitKey, int]:
        widths = {}
        for key, scores in ranked.items():
            count = sum(score > threshold for score in scores)
            widths[key] = max((width for width in choices[key] if width <= count), default=choices[key][0])
        return widths

    thresholds = sorted({score for scores in ranked.values() for score in scores}, reverse=True)
    low, high = 0, len(thresholds)  # thresholds[low] fits (or nothing is kept), thresholds[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        if flops(widths_at(thresholds[middle])) <= budget:
            low = middle
        else:
            high = middle
    widths = widths_at(thresholds[low])

    def next_step(key: UnitKey) -> tuple[float, UnitKey, int] | None:
        wider = next((width for width in choices[key] if width > widths[key]), None)
        if wider is None:
            return None
        gained = ranked[key][widths[key] : wider]
        return sum(gained) / len(gained), key, wider

    while True:
        steps = sorted(
            (step for step in map(next_step, ranked) if step is not None), key=lambda s: (-s[0], s[1])
        )
        for _, key, wider in steps:
            if flops({**widths, key: wider}) <= budget:
                widths[key] = wider
                break
        else:
            return widths
