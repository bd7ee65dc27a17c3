"""Choice of widths under budgets, given the error of each unit as a function of its width.

The method assumes that errors of units add up and that costs are linear in each width. For 1 budget, the best
widths are found at a common price of error per cost (Lagrangian relaxation of the knapsack problem, exact on
the convex hulls of the error curves). Single steps then spend the rest of the budget.

For several budgets, each budget has a multiplier. If the best widths for one budget keep all budgets, they
are optimal. Otherwise a grid search finds the ratios of the multipliers, and bisection finds their level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import NamedTuple

from mhacut.plan import UnitKey
from mhacut.pruning.curves import Curve
from mhacut.pruning.job import Job
from mhacut.pruning.limits import Choices, Limit, Limits, keeps, qk_and_v
from mhacut.surgery.costs import CostTable

Widths = Mapping[UnitKey, int]
Curves = Mapping[UnitKey, Curve]

TIE = 0.01
"""Give q/k and v of a layer equal widths, which run faster in attention, if the predicted error rises by at
most this fraction. Set by hand."""
_PARTS = 12
"""Number of evenly spread widths that the search for unequal q/k and v widths tries for q/k and for v."""
_LESS = 0.03
"""A limit is lowered by this fraction to measure how much the error rises per saved cost."""
_RATIOS = {2: 16, 3: 8, 4: 6, 5: 4}
"""Steps per axis of the grid of price ratios, by number of limits. 2 to 5 limits give 17 to 84 points."""
NEAR = 0.99
"""A budget counts as used up if the plan uses at least this fraction."""
REACH = 6
"""Number of allowed widths above and below the current width that a local search tries."""
MAX_CANDIDATES = 20_000
"""Maximum number of states of the knapsack search that spends the rest of a budget."""


def job_widths(
    job: Job, limits: Limits, curves: Curves, table: CostTable | None = None, *, close_gap: bool = True
) -> dict[UnitKey, int]:
    """Return the widths of least total error within the limits and the constraints of the job."""
    equal, within = job.constraints.equal_qkv, job.limits_on_widths(limits, table)
    return cheapest_widths(curves, job.allowed, within, close_gap=close_gap, equal=equal)


def uniform_widths(choices: Choices, limits: Limits) -> dict[UnitKey, int]:
    ranked = {key: [1 - index / widths[-1] for index in range(widths[-1])] for key, widths in choices.items()}
    return fill_budget(ranked, choices, limits)


def cheapest_widths(
    curves: Curves, choices: Choices, limits: Limits, *, close_gap: bool = True, equal: bool = False
) -> dict[UnitKey, int]:
    """Return the widths of least total error within ``limits``.

    q/k and v of a layer get equal widths if the extra error is small. ``equal`` forces equal widths.
    """
    # Only units with the same choices can be tied.
    pairs = {qk: v for qk, v in qk_and_v(choices) if choices[qk] == choices[v]}
    tied = _solve(curves, choices, limits, close_gap, pairs)
    if equal or not pairs:
        return tied
    free = _solve(curves, choices, limits, close_gap)
    if any(limit.resource == "max_latency" for limit in limits):  # which counts what ties save
        some, plans = _worth_tying(curves, choices, limits, pairs, tied), [tied, free]
        if 0 < len(some) < len(pairs):
            plans.insert(1, _solve(curves, choices, limits, close_gap, some))
        return min(plans, key=lambda widths: total_error(curves, widths))  # the first of equals
    if not any(limit.cost(tied) >= min(limit.cost(free), NEAR * limit.most) for limit in limits):
        return free  # a budget is there to be used
    return tied if total_error(curves, tied) <= (1 + TIE) * total_error(curves, free) else free


def total_error(curves: Curves, widths: Widths) -> float:
    return sum(curve[widths[key]] for key, curve in curves.items())


def _solve(
    curves: Curves,
    choices: Choices,
    limits: Limits,
    close_gap: bool,
    pairs: Mapping[UnitKey, UnitKey] | None = None,
) -> dict[UnitKey, int]:
    """Return the best widths within ``limits``. ``pairs`` (q/k and v of a layer) get equal widths."""
    if pairs:
        tied = pairs

        def untied(widths: Widths) -> dict[UnitKey, int]:
            return dict(widths) | {v: widths[qk] for qk, v in tied.items() if qk in widths}

        def of_both(limit: Limit) -> Limit:
            return replace(limit, cost=lambda widths: limit.cost(untied(widths)))

        joint = {key: curve for key, curve in curves.items() if key not in tied.values()}
        for qk, v in tied.items():
            joint[qk] = {width: curves[qk][width] + curves[v][width] for width in choices[qk]}
        return untied(_solve(joint, {key: choices[key] for key in joint}, [*map(of_both, limits)], close_gap))
    prices = [_prices(choices, limit) for limit in limits]

    def solved(within: Limits, price: Mapping[UnitKey, float], close_gap: bool) -> dict[UnitKey, int]:
        ranked = {key: _worth(curves[key], choices[key], price[key]) for key in curves}
        return fill_budget(ranked, choices, within, price, close_gap=close_gap)

    if len(limits) == 1:
        return solved(limits, prices[0], close_gap)
    for limit, price in zip(limits, prices, strict=True):  # where it alone binds
        widths = solved((limit,), price, close_gap)
        if keeps(limits, widths):
            return widths
    # Only ratios of multipliers are searched, since `fill_budget` finds their level.
    parts = _RATIOS[len(limits)]
    best: tuple[float, dict[UnitKey, float]] | None = None
    for shares in product(range(parts + 1), repeat=len(limits)):
        if sum(shares) != parts:
            continue
        price = {
            key: sum(
                share / parts * unit_prices[key] / limit.most
                for share, unit_prices, limit in zip(shares, prices, limits, strict=True)
            )
            for key in choices
        }
        error = total_error(curves, solved(limits, price, False))
        if best is None or error < best[0]:
            best = error, price
    assert best is not None
    return solved(limits, best[1], close_gap)


def _prices(choices: Choices, limit: Limit) -> dict[UnitKey, float]:
    # The cost of a layer is bilinear in its widths, so the mean of both extremes equals the mean over all.
    # The time penalty of unequal q/k and v widths cancels in this mean.
    most = {key: widths[-1] for key, widths in choices.items()}
    least = {key: widths[0] for key, widths in choices.items()}
    full, bare = limit.cost(most), limit.cost(least)
    prices = {}
    for key, widths in choices.items():
        cost = full - limit.cost({**most, key: widths[0]}) + limit.cost({**least, key: widths[-1]}) - bare
        prices[key] = cost / 2 / max(widths[-1] - widths[0], 1)
    return prices


def _worth_tying(
    curves: Curves, choices: Choices, limits: Limits, pairs: Mapping[UnitKey, UnitKey], tied: Widths
) -> dict[UnitKey, UnitKey]:
    """Return the pairs (q/k and v of a layer) for which equal widths save more cost than they add error."""
    # Costs are converted to errors by the derivative of the error with respect to each limit.
    error, prices = total_error(curves, tied), []
    for limit in limits:
        less = replace(limit, most=int((1 - _LESS) * limit.most))
        others = [other for other in limits if other is not limit]
        narrower = _solve(curves, choices, [less, *others], False, pairs)
        saved = limit.cost(tied) - limit.cost(narrower)
        prices.append(max(total_error(curves, narrower) - error, 0.0) / saved if saved > 0 else 0.0)

    def loss(qk: UnitKey, widths: tuple[int, int]) -> float:
        both = dict(zip((qk, pairs[qk]), widths, strict=True))
        cost = sum(price * limit.cost({**tied, **both}) for price, limit in zip(prices, limits, strict=True))
        return cost + total_error({key: curves[key] for key in both}, both)

    worth = {}
    for qk, v in pairs.items():
        allowed, at = choices[qk], choices[qk].index(tied[qk])
        tried = {
            *allowed[:: -(-len(allowed) // _PARTS)],
            allowed[-1],
            *allowed[max(0, at - REACH) : at + REACH + 1],
        }
        _, best = min((loss(qk, widths), widths) for widths in product(tried, tried))
        if best[0] == best[1]:
            worth[qk] = v
    return worth


def _worth(curve: Curve, choices: Sequence[int], price: float) -> list[float]:
    # On the lower convex hull the worth never rises, so a threshold cuts only once.
    hull: list[int] = []
    for width in choices:
        # A width above the line between its neighbours is never bought: going on to the next is better.
        while len(hull) >= 2 and _slope(curve, hull[-2], hull[-1]) <= _slope(curve, hull[-1], width):
            hull.pop()
        hull.append(width)
    # Channels below the least width are always kept.
    worth = [float("inf")] * choices[0]
    for narrow, wide in pairwise(hull):
        worth += [_slope(curve, narrow, wide) / max(price, 1e-30)] * (wide - narrow)
    return worth


def _slope(curve: Curve, narrow: int, wide: int) -> float:
    return (curve[narrow] - curve[wide]) / (wide - narrow)


def fill_budget(
    ranked: Mapping[UnitKey, Sequence[float]],
    choices: Choices,
    limits: Limits,
    price: Mapping[UnitKey, float] | None = None,
    *,
    close_gap: bool = True,
) -> dict[UnitKey, int]:
    """Return widths within ``limits``. ``ranked`` scores each channel on a scale that all units share."""

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
    # Single steps use up the rest of the budget. If they leave more than 1 %, several at once close the gap.
    while True:
        steps = [step for step in (_next_step(key, widths[key], ranked, choices) for key in ranked) if step]
        for _, key, wider in sorted(steps, key=lambda step: (-step[0], step[1])):
            if keeps(limits, {**widths, key: wider}):
                widths[key] = wider
                break
        else:
            break
    if close_gap and all(limit.cost(widths) < NEAR * limit.most for limit in limits):
        values = ranked
        if price is not None:
            values = {key: [score * price[key] for score in scores] for key, scores in ranked.items()}
        tightest = max(limits, key=lambda limit: limit.cost(widths) / limit.most)
        nearer = _closer(widths, values, choices, tightest, limits)
        if tightest.cost(widths) < tightest.cost(nearer) and keeps(limits, nearer):
            return nearer
    return widths


def _next_step(
    key: UnitKey, width: int, ranked: Mapping[UnitKey, Sequence[float]], choices: Choices
) -> tuple[float, UnitKey, int] | None:
    wider = next((choice for choice in choices[key] if choice > width), None)
    if wider is None:
        return None
    gained = ranked[key][width:wider]
    return sum(gained) / len(gained), key, wider


class _Changes(NamedTuple):
    """Linked list of width changes, latest first. A unit occurs at most once."""

    key: UnitKey
    width: int
    before: _Changes | None


def _closer(
    widths: Widths,
    values: Mapping[UnitKey, Sequence[float]],
    choices: Choices,
    tightest: Limit,
    limits: Limits,
) -> dict[UnitKey, int]:
    """Return widths near ``widths`` that leave less of the tightest limit unused.

    Dynamic programming over the units, which keeps the best :data:`MAX_CANDIDATES` states. Costs of units are
    treated as independent, so the caller must check the exact cost.
    """
    cost, budget = tightest.cost, tightest.most
    have = cost(widths)
    # Cost gained -> (value lost, chain of widths changed); the cheapest combination for each.
    states: dict[int, tuple[float, _Changes | None]] = {0: (0.0, None)}
    for key, scores in values.items():
        at = choices[key].index(widths[key])
        options = []
        for width in choices[key][max(0, at - REACH) : at + REACH + 1]:
            low, high = sorted((width, widths[key]))
            lost = sum(scores[low:high]) * (1 if width < widths[key] else -1)
            options.append((cost({**widths, key: width}) - have, lost, width))
        extended: dict[int, tuple[float, _Changes | None]] = {}
        for gained, (loss, changed) in states.items():
            for more, lost, width in options:
                total = gained + more
                if total not in extended or loss + lost < extended[total][0]:
                    extended[total] = (loss + lost, _Changes(key, width, changed))
        best = sorted((loss, total) for total, (loss, _) in extended.items())[:MAX_CANDIDATES]
        states = {total: extended[total] for _, total in best}
    fitting = {gained: state for gained, state in states.items() if have + gained <= budget}
    near = {gained: state for gained, state in fitting.items() if have + gained >= NEAR * budget}
    preferred = sorted(near, key=lambda gained: (near[gained][0], -gained)) or sorted(fitting, reverse=True)
    others = [limit for limit in limits if limit is not tightest]
    for gained in preferred:
        nearer, changes = dict(widths), fitting[gained][1]
        while changes is not None:
            nearer[changes.key] = changes.width
            changes = changes.before
        if keeps(others, nearer):
            return nearer
    return dict(widths)
