"""Allowed widths, and the widths that fill a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from mhacut.plan import UnitKey
from mhacut.pruning.limits import Limit, Limits, keeps

MULTIPLE = 8
"""Usual divisor of all widths but the dense ones."""
NEAR = 0.99
"""Fraction of the budget above which the budget counts as used up."""
REACH = 6
"""Number of width steps to either side of a width that are tried: to close the last gap, and around tied
widths of queries and values."""
MOST_CANDIDATES = 20_000
"""Largest number of combinations of widths that closing the last gap keeps in view."""


def width_choices(dense: int, round_to: int) -> tuple[int, ...]:
    """Return the multiples of ``round_to`` below the dense width, and the dense width itself.

    >>> width_choices(20, 8)
    (8, 16, 20)
    >>> width_choices(6, 8)
    (6,)
    """
    return (*range(round_to, dense, round_to), dense)


def nearest_width(count: float, dense: int, round_to: int) -> int:
    """Return the allowed width nearest to ``count``; the smaller of two at the same distance."""
    return min(width_choices(dense, round_to), key=lambda width: abs(width - count))


def lowest_flops(
    choices: Mapping[UnitKey, Sequence[int]], flops: Callable[[Mapping[UnitKey, int]], int]
) -> int:
    """FLOPs, or another cost, of the model at the least allowed width of every unit."""
    return flops({key: widths[0] for key, widths in choices.items()})


def fill_budget(
    ranked: Mapping[UnitKey, Sequence[float]],
    choices: Mapping[UnitKey, Sequence[int]],
    limits: Limits,
    price: Mapping[UnitKey, float] | None = None,
    *,
    exchange: bool = True,
) -> dict[UnitKey, int]:
    """Return widths within ``limits`` for channels ranked by one score across all units.

    First one threshold for all units, as low as the limits allow; then, since widths move in steps, the best
    step that still fits, again and again until none does; then, if more than 1 % of each limit is left,
    exchanges of steps.

    Args:
        ranked: scores of each unit's channels, best first.
        choices: allowed widths per unit, ascending.
        limits: reachable with the least widths.
        price: cost per channel of each unit, where scores are values per cost; None where they are values.
        exchange: whether steps may be exchanged, which takes seconds.
    """
    price = dict.fromkeys(ranked, 1.0) if price is None else price

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
        if keeps(limits, widths_at(thresholds[middle])):
            low = middle
        else:
            high = middle
    widths = widths_at(thresholds[low])
    while True:
        steps = [step for step in (_next_step(key, widths[key], ranked, choices) for key in ranked) if step]
        for _, key, wider in sorted(steps, key=lambda step: (-step[0], step[1])):
            if keeps(limits, {**widths, key: wider}):
                widths[key] = wider
                break
        else:
            break
    if exchange and all(limit.cost(widths) < NEAR * limit.most for limit in limits):
        worth = {key: [score * price[key] for score in scores] for key, scores in ranked.items()}
        tightest = max(limits, key=lambda limit: limit.cost(widths) / limit.most)
        nearer = _exchange(widths, worth, choices, tightest, limits)
        if tightest.cost(widths) < tightest.cost(nearer) and keeps(limits, nearer):
            return nearer
    return widths


def _next_step(
    key: UnitKey,
    width: int,
    ranked: Mapping[UnitKey, Sequence[float]],
    choices: Mapping[UnitKey, Sequence[int]],
) -> tuple[float, UnitKey, int] | None:
    """Return mean score of the channels gained, unit, and next wider width; None at the dense width."""
    wider = next((choice for choice in choices[key] if choice > width), None)
    if wider is None:
        return None
    gained = ranked[key][width:wider]
    return sum(gained) / len(gained), key, wider


class _Changes(NamedTuple):
    """A chain of changed widths, the last change first, each of another unit."""

    key: UnitKey
    width: int
    before: _Changes | None


def _exchange(
    widths: Mapping[UnitKey, int],
    ranked: Mapping[UnitKey, Sequence[float]],
    choices: Mapping[UnitKey, Sequence[int]],
    tightest: Limit,
    limits: Limits,
) -> dict[UnitKey, int]:
    """Return widths a few steps from ``widths`` that use up more of a limit: a knapsack over all units.

    Steps of different prices leave gaps that no single step fills, above all in models with few small
    layers. Prices of units are assumed to be independent of each other, so the caller must count the outcome.

    Args:
        widths: where to start; within all limits.
        ranked: values of each unit's channels, best first.
        choices: allowed widths per unit, ascending.
        tightest: the limit to use up.
        limits: all of them.
    """
    cost, budget = tightest.cost, tightest.most
    have = cost(widths)
    # Cost gained -> (score lost, chain of widths changed); the cheapest combination for each.
    candidates: dict[int, tuple[float, _Changes | None]] = {0: (0.0, None)}
    for key, scores in ranked.items():
        at = choices[key].index(widths[key])
        options = []
        for width in choices[key][max(0, at - REACH) : at + REACH + 1]:
            low, high = sorted((width, widths[key]))
            lost = sum(scores[low:high]) * (1 if width < widths[key] else -1)
            options.append((cost({**widths, key: width}) - have, lost, width))
        extended: dict[int, tuple[float, _Changes | None]] = {}
        for gained, (loss, changed) in candidates.items():
            for more, lost, width in options:
                total = gained + more
                if total not in extended or loss + lost < extended[total][0]:
                    extended[total] = (loss + lost, _Changes(key, width, changed))
        best = sorted((loss, total) for total, (loss, _) in extended.items())[:MOST_CANDIDATES]
        candidates = {total: extended[total] for _, total in best}
    fitting = {gained: candidate for gained, candidate in candidates.items() if have + gained <= budget}
    near = {gained: candidate for gained, candidate in fitting.items() if have + gained >= NEAR * budget}
    preferred = sorted(near, key=lambda gained: (near[gained][0], -gained)) or sorted(fitting, reverse=True)
    others = [limit for limit in limits if limit is not tightest]
    for gained in preferred:
        nearer = _changed(widths, fitting[gained][1])
        if all(limit.holds(nearer) for limit in others):
            return nearer
    return dict(widths)


def _changed(widths: Mapping[UnitKey, int], changes: _Changes | None) -> dict[UnitKey, int]:
    """Return ``widths`` after a chain of changes."""
    found = dict(widths)
    while changes is not None:
        found[changes.key] = changes.width
        changes = changes.before
    return found
