"""Allocation: the widths that a budget buys, given every unit's error as a function of its width. Ours.

Errors of units are taken to add up, FLOPs to be linear in each unit's width. Then the best widths are those
at one common price of error per FLOP (the Lagrangian relaxation of the knapsack; exact on the convex hulls of
the curves), and single steps spend what is left.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from mhacut.plan import UnitKey
from mhacut.pruning.curves import Curve
from mhacut.pruning.widths import NEAR, fill_budget

TIE = 0.01
"""Largest relative increase of the predicted error that is accepted for equal q/k and v widths: layers where
they differ run slower."""


def uniform_widths(
    choices: Mapping[UnitKey, Sequence[int]],
    flops: Callable[[Mapping[UnitKey, int]], int],
    budget: int,
) -> dict[UnitKey, int]:
    """Return widths that are the same fraction of every unit, as nearly as the allowed widths permit."""
    ranked = {key: [1 - index / widths[-1] for index in range(widths[-1])] for key, widths in choices.items()}
    return fill_budget(ranked, choices, flops, budget)


def cheapest_widths(
    curves: Mapping[UnitKey, Curve],
    choices: Mapping[UnitKey, Sequence[int]],
    flops: Callable[[Mapping[UnitKey, int]], int],
    budget: int,
    *,
    exchange: bool = True,
) -> dict[UnitKey, int]:
    """Return widths of least total error within ``budget``; q/k as wide as v where that costs little.

    Args:
        curves: error of every unit at each of its choices.
        choices: allowed widths per unit, ascending, the dense one last.
        flops: FLOPs of the model at given widths.
        budget: FLOPs, reachable with the least widths.
        exchange: whether steps may be exchanged to use up the budget, which takes seconds.
    """
    free = _solve(curves, choices, flops, budget, exchange)
    tied = _solve_tied(curves, choices, flops, budget, exchange)
    if tied is None or flops(tied) < min(flops(free), NEAR * budget):  # the budget is there to be used
        return free
    return tied if _total(curves, tied) <= (1 + TIE) * _total(curves, free) else free


def _total(curves: Mapping[UnitKey, Curve], widths: Mapping[UnitKey, int]) -> float:
    return sum(curve[widths[key]] for key, curve in curves.items())


def _solve(
    curves: Mapping[UnitKey, Curve],
    choices: Mapping[UnitKey, Sequence[int]],
    flops: Callable[[Mapping[UnitKey, int]], int],
    budget: int,
    exchange: bool,
) -> dict[UnitKey, int]:
    whole = {key: widths[-1] for key, widths in choices.items()}
    full = flops(whole)
    price = {
        key: (full - flops({**whole, key: widths[0]})) / max(widths[-1] - widths[0], 1)
        for key, widths in choices.items()
    }
    ranked = {key: _worth(curves[key], choices[key], price[key]) for key in curves}
    return fill_budget(ranked, choices, flops, budget, price, exchange=exchange)


def _solve_tied(
    curves: Mapping[UnitKey, Curve],
    choices: Mapping[UnitKey, Sequence[int]],
    flops: Callable[[Mapping[UnitKey, int]], int],
    budget: int,
    exchange: bool,
) -> dict[UnitKey, int] | None:
    """Solve with q/k and v of every layer as one unit; None where their allowed widths differ."""
    partner: dict[UnitKey, UnitKey] = {
        (layer, "qk"): (layer, "v") for layer, kind in choices if kind == "v" and (layer, "qk") in choices
    }
    if not partner or any(choices[qk] != choices[v] for qk, v in partner.items()):
        return None

    def apart(widths: Mapping[UnitKey, int]) -> dict[UnitKey, int]:
        return dict(widths) | {v: widths[qk] for qk, v in partner.items() if qk in widths}

    joint = {key: curve for key, curve in curves.items() if key not in partner.values()}
    for qk, v in partner.items():
        joint[qk] = {width: curves[qk][width] + curves[v][width] for width in choices[qk]}
    own = {key: choices[key] for key in joint}
    return apart(_solve(joint, own, lambda widths: flops(apart(widths)), budget, exchange))


def _worth(curve: Curve, choices: Sequence[int], price: float) -> list[float]:
    """Error that each channel saves per FLOP, first channel first, on the lower convex hull of ``curve``.

    It is infinite for the channels below the least width.
    """
    hull: list[int] = []
    for width in choices:
        while len(hull) >= 2 and _slope(curve, hull[-2], hull[-1]) <= _slope(curve, hull[-1], width):
            hull.pop()
        hull.append(width)
    worth = [float("inf")] * choices[0]
    for narrow, wide in pairwise(hull):
        worth += [_slope(curve, narrow, wide) / max(price, 1e-30)] * (wide - narrow)
    return worth


def _slope(curve: Curve, narrow: int, wide: int) -> float:
    """Error saved per channel from ``narrow`` to ``wide``."""
    return (curve[narrow] - curve[wide]) / (wide - narrow)
