"""Allocation: the widths that budgets buy, given every unit's error as a function of its width. Ours.

Errors of units are assumed to add up, and costs to be linear in each unit's width. Then the best widths for
one budget are those at one common price of error per cost (the Lagrangian relaxation of the knapsack; exact
on the convex hulls of the curves). Single steps spend the rest of the budget.

Each of several budgets has a multiplier. A budget that does not bind has the multiplier 0: if the best widths
for some of the budgets meet all of them, they are the best for all. Otherwise the ratios of the multipliers
are searched on a grid, and their level by bisection, as for one budget. Of the widths that meet all budgets,
those with the least error are taken, and the exact final step counts every cost.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import NamedTuple

from mhacut.plan import UnitKey
from mhacut.pruning.curves import Curve, divergence_by_cut
from mhacut.pruning.job import Job
from mhacut.pruning.limits import MULTIPLE, Constraint, Limit, Limits, keeps, qk_and_v
from mhacut.surgery.costs import CostTable

TIE = 0.01
"""Largest relative increase of the predicted error that is accepted for equal q/k and v widths where time is
no limit: layers where they differ run slower."""
_PARTS = 12
"""Number of parts into which the widths of q/k, and of v, are divided to try unequal ones in a layer."""
_LESS = 0.03
"""Part of a limit that is taken away to find what it is worth."""
_RATIOS = {2: 16, 3: 8, 4: 6}
"""Number of parts into which several multipliers are divided, by their number."""
NEAR = 0.99
"""Fraction of the budget above which the budget counts as used up."""
REACH = 6
"""Number of width steps to either side of a width that are tried: to close the last gap, and around tied
widths of queries and values."""
MOST_CANDIDATES = 20_000
"""Largest number of combinations of widths that closing the last gap keeps in view."""


def job_widths(
    job: Job,
    limits: Limits,
    curves: Mapping[UnitKey, Curve],
    table: CostTable | None = None,
    *,
    exchange: bool = True,
) -> dict[UnitKey, int]:
    """Return the widths of least total error within limits and the job's constraints.

    Args:
        job: what is pruned.
        limits: limits that the plan must keep.
        curves: curves of the job's units.
        table: FLOPs of its model with merges; None for the job's own.
        exchange: whether steps may be exchanged, which takes seconds.
    """
    equal, within = job.constraints.equal_qkv, job.limits_on_widths(limits, table)
    return cheapest_widths(curves, job.allowed, within, exchange=exchange, equal=equal)


def costs_of_constraints(
    job: Job,
    limits: Limits,
    curves: Mapping[UnitKey, Curve],
    widths: Mapping[UnitKey, int],
    table: CostTable,
    usual: Mapping[UnitKey, Curve] | None = None,
) -> tuple[Constraint, ...]:
    """Return the job's constraints, each with the divergence that would be saved without it.

    Multiples are one where they are larger than the usual ones, which they are compared with. Where time is
    limited, widths between its multiples are taken to be as fast as the table of times interpolates.

    Args:
        job: what is pruned.
        limits: limits that the plan keeps.
        curves: curves of the job's units.
        widths: those that were chosen under all constraints.
        table: FLOPs of its model with the merges that were chosen.
        usual: curves at the usual multiples; None leaves multiples out.
    """
    expected = divergence_by_cut(total_error(curves, widths))

    def cost(freer: Job, own: Mapping[UnitKey, Curve]) -> float:
        without = total_error(own, job_widths(freer, limits, own, table, exchange=False))
        return max(expected - divergence_by_cut(without), 0.0)

    found = [
        Constraint(name, value, cost(replace(job, constraints=others), curves))
        for name, value, others in job.constraints.without_each()
    ]
    if usual is not None:
        found.append(Constraint("round_to", job.round_to, cost(replace(job, round_to=MULTIPLE), usual)))
    return tuple(found)


def uniform_widths(choices: Mapping[UnitKey, Sequence[int]], limits: Limits) -> dict[UnitKey, int]:
    """Return widths that are the same fraction of every unit, as nearly as the allowed widths permit."""
    ranked = {key: [1 - index / widths[-1] for index in range(widths[-1])] for key, widths in choices.items()}
    return fill_budget(ranked, choices, limits)


def cheapest_widths(
    curves: Mapping[UnitKey, Curve],
    choices: Mapping[UnitKey, Sequence[int]],
    limits: Limits,
    *,
    exchange: bool = True,
    equal: bool = False,
) -> dict[UnitKey, int]:
    """Return the widths of least total error within ``limits``, with q/k as wide as v if that costs little.

    A limit on time counts what unequal widths cost, so that there the least error alone decides. Layers whose
    q/k and v have other choices are never tied.

    Args:
        curves: error of every unit at each of its choices.
        choices: allowed widths per unit, ascending, the dense one last.
        limits: reachable with the least widths.
        exchange: whether steps may be exchanged to use up the limits, which takes seconds.
        equal: whether q/k must be as wide as v, whatever that costs; their choices must then be the same.
    """
    pairs = {qk: v for qk, v in qk_and_v(choices) if choices[qk] == choices[v]}
    if equal and pairs:
        return _solve_tied(curves, choices, limits, pairs, exchange)
    found = _solve(curves, choices, limits, exchange)
    if not pairs:
        return found
    tied = _solve_tied(curves, choices, limits, pairs, exchange)
    if any(limit.resource == "max_latency" for limit in limits):  # which counts what ties save
        some, plans = _worth_tying(curves, choices, limits, pairs, tied), [tied, found]
        if 0 < len(some) < len(pairs):
            plans.insert(1, _solve_tied(curves, choices, limits, some, exchange))
        return min(plans, key=lambda widths: total_error(curves, widths))  # the first of equals
    used = any(limit.cost(tied) >= min(limit.cost(found), NEAR * limit.most) for limit in limits)
    if not used:  # a budget is there to be used
        return found
    return tied if total_error(curves, tied) <= (1 + TIE) * total_error(curves, found) else found


def total_error(curves: Mapping[UnitKey, Curve], widths: Mapping[UnitKey, int]) -> float:
    """Return the sum of the curves at ``widths``."""
    return sum(curve[widths[key]] for key, curve in curves.items())


def _solve(
    curves: Mapping[UnitKey, Curve],
    choices: Mapping[UnitKey, Sequence[int]],
    limits: Limits,
    exchange: bool,
) -> dict[UnitKey, int]:
    """Solve with a multiplier for each of ``limits``."""
    prices = [_prices(choices, limit) for limit in limits]

    def solved(some: Limits, price: Mapping[UnitKey, float], exchange: bool) -> dict[UnitKey, int]:
        ranked = {key: _worth(curves[key], choices[key], price[key]) for key in curves}
        return fill_budget(ranked, choices, some, price, exchange=exchange)

    if len(limits) == 1:
        return solved(limits, prices[0], exchange)
    for limit, price in zip(limits, prices, strict=True):  # where it alone binds
        widths = solved((limit,), price, exchange)
        if keeps(limits, widths):
            return widths
    best: tuple[float, dict[UnitKey, float]] | None = None
    for multipliers in _multipliers(len(limits)):
        price = {
            key: sum(
                multiplier * each[key] / limit.most
                for multiplier, each, limit in zip(multipliers, prices, limits, strict=True)
            )
            for key in choices
        }
        error = total_error(curves, solved(limits, price, False))
        if best is None or error < best[0]:
            best = error, price
    assert best is not None
    return solved(limits, best[1], exchange)


def _multipliers(number: int) -> Iterator[tuple[float, ...]]:
    """Multipliers of sum 1, evenly spread."""
    parts = _RATIOS[number]

    def split(left: int, places: int) -> Iterator[tuple[int, ...]]:
        if places == 1:
            yield (left,)
            return
        for first in range(left + 1):
            for rest in split(left - first, places - 1):
                yield (first, *rest)

    for whole in split(parts, number):
        yield tuple(part / parts for part in whole)


def _prices(choices: Mapping[UnitKey, Sequence[int]], limit: Limit) -> dict[UnitKey, float]:
    """Cost per channel of every unit, while the other units keep all channels, and the fewest.

    The mean of both counts nothing of what unequal widths of q/k and v cost beside their channels.
    """
    most = {key: widths[-1] for key, widths in choices.items()}
    least = {key: widths[0] for key, widths in choices.items()}
    full, bare = limit.cost(most), limit.cost(least)
    prices = {}
    for key, widths in choices.items():
        cost = full - limit.cost({**most, key: widths[0]}) + limit.cost({**least, key: widths[-1]}) - bare
        prices[key] = cost / 2 / max(widths[-1] - widths[0], 1)
    return prices


def _solve_tied(
    curves: Mapping[UnitKey, Curve],
    choices: Mapping[UnitKey, Sequence[int]],
    limits: Limits,
    pairs: Mapping[UnitKey, UnitKey],
    exchange: bool,
) -> dict[UnitKey, int]:
    """Solve with each of ``pairs``, q/k and v of a layer, as one unit."""

    def apart(widths: Mapping[UnitKey, int]) -> dict[UnitKey, int]:
        return dict(widths) | {v: widths[qk] for qk, v in pairs.items() if qk in widths}

    def of_both(limit: Limit) -> Limit:
        return Limit(lambda widths: limit.cost(apart(widths)), limit.most, limit.resource)

    joint = {key: curve for key, curve in curves.items() if key not in pairs.values()}
    for qk, v in pairs.items():
        joint[qk] = {width: curves[qk][width] + curves[v][width] for width in choices[qk]}
    own = {key: choices[key] for key in joint}
    return apart(_solve(joint, own, [of_both(limit) for limit in limits], exchange))


def _worth_tying(
    curves: Mapping[UnitKey, Curve],
    choices: Mapping[UnitKey, Sequence[int]],
    limits: Limits,
    pairs: Mapping[UnitKey, UnitKey],
    tied: Mapping[UnitKey, int],
) -> dict[UnitKey, UnitKey]:
    """Return those of ``pairs`` that should stay tied: equal widths save more cost than unequal ones error.

    Costs are converted into errors at the price that the limits have around ``tied``.
    """
    error = total_error(curves, tied)
    prices = []
    for limit in limits:
        less = replace(limit, most=int((1 - _LESS) * limit.most))
        others = [each for each in limits if each is not limit]
        narrower = _solve_tied(curves, choices, [less, *others], pairs, False)
        saved = limit.cost(tied) - limit.cost(narrower)
        prices.append(max(total_error(curves, narrower) - error, 0.0) / saved if saved > 0 else 0.0)

    def loss(qk: UnitKey, widths: tuple[int, int]) -> float:
        own = dict(zip((qk, pairs[qk]), widths, strict=True))
        cost = sum(price * limit.cost({**tied, **own}) for price, limit in zip(prices, limits, strict=True))
        return cost + total_error({key: curves[key] for key in own}, own)

    found = {}
    for qk, v in pairs.items():
        allowed, at = choices[qk], choices[qk].index(tied[qk])
        tried = {
            *allowed[:: -(-len(allowed) // _PARTS)],
            allowed[-1],
            *allowed[max(0, at - REACH) : at + REACH + 1],
        }
        _, best = min((loss(qk, widths), widths) for widths in product(tried, tried))
        if best[0] == best[1]:
            found[qk] = v
    return found


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
