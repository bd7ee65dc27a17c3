"""Check that budgets can be reached, before the work; the refusal names the nearest budget that can."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

from mhacut.budget import NOUNS, Budget, Resource, Targets, format_amount
from mhacut.errors import BudgetError, option_name


def reachable_amounts(
    asked: Targets, dense: Mapping[Resource, int], lowest: Mapping[Resource, int], options: Sequence[str]
) -> dict[Resource, int]:
    """Return the amount that each budget allows.

    Costs grow with every width (times nearly so: see :class:`mhacut.pruning.limits.Limit`), so that budgets
    which can each be reached can be reached together.

    Args:
        asked: as the user wrote them; none where a bound on the loss decides.
        dense: amounts of the model as it was read.
        lowest: amounts at the least widths, with all mergeable tokens merged if merging is asked for.
        options: those that decide how low a budget may be, for errors.

    Raises:
        BudgetError: the model already meets all of them, or exceeds one even at the least widths; without
            budgets, no model has fewer FLOPs.
    """
    if not asked.budgets:
        if lowest["flops"] >= dense["flops"]:
            have = f"the model's {format_amount(dense['flops'], 'flops')} FLOPs"
            raise BudgetError(f"nothing to prune with {_listed(options)}: {have} are the lowest")
        return {}
    amounts = {budget.resource: budget.amount(dense[budget.resource]) for budget in asked.budgets}
    if all(amount >= dense[resource] for resource, amount in amounts.items()):
        within = " and ".join(
            f"{format_amount(dense[budget.resource], budget.resource)} {NOUNS[budget.resource]}".rstrip()
            + f" are already within {budget.text}"
            for budget in asked.budgets
        )
        raise BudgetError(f"nothing to prune: the model's {within}")
    missed = [budget for budget in asked.budgets if amounts[budget.resource] < lowest[budget.resource]]
    if missed:
        refusals = [_out_of_reach(each, dense[each.resource], lowest[each.resource]) for each in missed]
        questions = "".join(map(_meant, missed))
        raise BudgetError(f"{'; '.join(refusals)} with {_listed(options)}{questions}")
    return amounts


def _out_of_reach(asked: Budget, dense: int, lowest: int) -> str:
    return (
        f"{option_name(asked.resource, asked.text)} is out of reach: the lowest is "
        f"{format_amount(lowest, asked.resource, up=True)} ({math.ceil(1000 * lowest / dense) / 10}% of "
        f"{format_amount(dense, asked.resource)})"
    )


def _meant(asked: Budget) -> str:
    """Return a question if ``asked`` may be a percentage without its sign."""
    if not re.fullmatch(r"\d{1,2}|0?\.\d+", asked.text):
        return ""
    percent = f"{100 * asked.value if asked.value < 1 else asked.value:g}%"
    return f"; did you mean {option_name(asked.resource, percent)}?"


def _listed(options: Sequence[str]) -> str:
    return f"{', '.join(options[:-1])} and {options[-1]}"
