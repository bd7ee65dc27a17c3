"""Division of a budget between token merging and channel pruning.

The search tries a growing number of merges. Each has the best merging schedule for its FLOPs, and the
channels get the rest of the budget. The result is the combination of least predicted divergence. Costs are
estimated during the search and counted exactly for the result.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from functools import cache, cached_property
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from mhacut.plan import UnitKey, Unmerge
from mhacut.pruning.allocate import NEAR, job_widths, total_error
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.curves import Curve, divergence_by_cut
from mhacut.pruning.job import Job
from mhacut.pruning.limits import Limits, keeps, lowest_flops
from mhacut.pruning.merge_law import (
    MIN_KL,
    BlockCost,
    MergeLaw,
    Schedule,
    Tokens,
    between,
    cheapest_schedules,
    most_merged,
    trial_schedules,
)
from mhacut.surgery.costs import CostTable, LayerCost, Polynomial, build_cost_table
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.grid_merging import steps_of
from mhacut.surgery.hooks import registered
from mhacut.surgery.output_tokens import output_tokens_of
from mhacut.surgery.tokens import Stack, set_merged, stack_of

TRIED_IMAGES = (32, 64)
"""Minimum and maximum number of images for measuring merging schedules. Between both, 1/4 of the calibration
images is used. For dense features, the minimum is used, since each image gives many tokens."""
OVERHEAD = 0.07
"""Time of matching and averaging tokens, relative to the time of a block of a ViT-Ti (197 tokens, CPU)."""
LEAST_PRICE = 7_000_000
"""Minimum cost that the search adds for each merging block, in multiply-accumulates (MACs). A merge of few
tokens takes about 0.4 ms for 1 image on the CPU. In this time, a ViT-Ti does 7 to 9 million MACs."""
_PRICES = [10 ** (step / 8) for step in range(-96, 9)]
"""Prices of the dense model's FLOPs in nats. For each price, the schedule with the smallest sum of divergence
and priced FLOPs is found."""
_DENSE_SCALE = 100
"""Factor on prices for dense features, whose divergences in nats are larger than divergences of logits."""


class MergeChoice(NamedTuple):
    merged: Schedule
    table: CostTable
    """FLOPs of the model with ``merged`` tokens, as a function of the widths."""
    widths: Mapping[UnitKey, int]
    predicted: float

    def __str__(self) -> str:
        if not self.merged:
            return "no token merging: it saves no time, or does not lower the predicted divergence"
        counts = ", ".join(str(count) for count in self.merged)
        return (
            f"tokens merged per block: {counts} (total {sum(self.merged)}), "
            f"predicted divergence {self.predicted:.2g}"
        )


class MergeSearch:
    """Search for merging schedules of one model. One search serves all budgets."""

    def __init__(self, job: Job, calibration: Calibration, law: MergeLaw | None = None) -> None:
        self.job, self.tokens = job, tokens_of_model(job.model, job.input_size)
        self.last = merging_blocks(job.model, self.tokens)
        self.law = law or self._fitted_law(calibration)
        self._tables: dict[Schedule, CostTable] = {(): job.table}
        if job.all_merged_costs is not None:
            self._tables[most_merged(self.tokens, self.last)] = job.all_merged_costs

    @torch.no_grad()
    def _fitted_law(self, calibration: Calibration) -> MergeLaw:
        least, most = TRIED_IMAGES
        count = least if self.job.dense else min(max(len(self.job.images) // 4, least), most)
        tried = self.job.distillation(calibration).part(0, count)
        model, trials, measured = copy.deepcopy(self.job.model), trial_schedules(self.tokens, self.last), []
        for done, schedule in enumerate(trials, 1):
            set_merged(model, schedule, self.job.unmerge)
            measured.append(tried.divergence_of(model))
            self.job.reporter.advance(done, len(trials))
        return MergeLaw.fit(trials, measured, self.tokens)

    @cached_property
    def _costs(self) -> list[BlockCost]:
        return block_costs(self.job, self.tokens)

    @cached_property
    def schedules(self) -> list[Schedule]:
        """Merging schedules of least cost, ordered from no merging to maximum merging."""
        scale = _DENSE_SCALE if self.job.dense else 1
        prices = [scale * price / self.job.table.dense for price in _PRICES]
        cheapest = cheapest_schedules(self.law, self.tokens, self._costs, self.last, prices)
        return [(), *filter(any, cheapest), most_merged(self.tokens, self.last)]

    def table(self, schedule: Schedule) -> CostTable:
        if schedule not in self._tables:
            model = copy.deepcopy(self.job.model)
            set_merged(model, schedule, self.job.unmerge)
            prunable = find_prunable_layers(model)
            self._tables[schedule] = build_cost_table(model, prunable, self.job.input_size)
        return self._tables[schedule]

    def _estimate(self, schedule: Schedule) -> CostTable:
        """Estimate FLOPs of ``schedule`` as a function of the widths. An exact count takes 1 second."""
        if schedule in self._tables:
            return self._tables[schedule]
        job, total, stack = self.job, self.tokens.total, stack_of(self.job.model)
        assert stack is not None
        after = [total - merged for merged in accumulate(schedule)]
        before = [total, *after[:-1]]
        after[self.last :] = [total] * (len(after) - self.last)  # a block of the tokens read stays
        layers = []
        for cost in job.table.layers:
            block, attends = stack.block_of(cost.layer.name), cost.layer.adapter.family == "attention"
            if block is None:
                layers.append(cost)
                continue
            share = (before if attends else after)[block] / total
            # n x n logits take n^2 products per channel of q/k, and their use n^2 per channel of v.
            pairs = stack.pairs(block, total) if attends and block < self.last else 0
            flops = {}
            for unit in cost.layer.units:
                dense, squares = cost.at({}) - cost.at({unit.key: 0}), unit.heads * unit.width * pairs
                flops[unit.kind] = round(((dense - squares) * share + squares * share**2) / unit.width)
            layers.append(LayerCost(cost.layer, (Polynomial(flops, {}),)))
        halves = [(n - self.tokens.prefix) // 2 for n in before]
        # Both products of a merge, less the two norms of a block, which count 5 FLOPs per value.
        merging = sum(half * (half + count) for half, count in zip(halves, schedule, strict=True) if count)
        merging = 0 if stack.window else merging  # within lines, these products are few
        normed = sum(5 * (2 * total - n - left) for n, left in zip(before, after, strict=True))
        return CostTable(job.table.fixed + (merging - normed) * stack.width, tuple(layers), job.table.dense)

    def choose(
        self, limits: Limits, curves: Mapping[UnitKey, Curve], *, close_gap: bool = True
    ) -> MergeChoice:
        job, schedules = self.job, self.schedules

        def choice_of(schedule: Schedule, table: CostTable, widths: Mapping[UnitKey, int]) -> MergeChoice:
            predicted = divergence_by_cut(total_error(curves, widths), job.dense)
            if schedule:
                predicted += self.law.divergence(schedule, self.tokens)
            return MergeChoice(schedule, table, widths, predicted)

        def excess(table: CostTable) -> int:
            """Return the largest excess over a limit at the smallest allowed widths, at most 0 if all fit."""
            within = job.limits_on_widths(limits, table)
            return max(lowest_flops(job.allowed, limit.cost) - limit.most for limit in within)

        @cache
        def choice(index: int, counted: bool = False) -> MergeChoice | None:
            table = (self.table if counted else self._estimate)(schedules[index])
            if excess(table) > 0:
                return None
            widths = job_widths(job, limits, curves, table, close_gap=False)
            return choice_of(schedules[index], table, widths)

        def worth(index: int) -> float:
            at_index = choice(index)
            return math.inf if at_index is None else at_index.predicted

        # Too few merges cost channels, too many cost tokens: the cost has one valley, whose left side may be
        # infinite. It is searched by thirds.
        low, high = 0, len(schedules) - 1
        while high - low > 2:
            left, right = low + (high - low) // 3, high - (high - low) // 3
            if worth(left) == math.inf or worth(left) > worth(right):
                low = left + 1
            else:
                high = right - 1
        # No merges are no part of the valley where merging takes time that its FLOPs do not show.
        near = range(low, min(high + 2, len(schedules)))
        ranked = sorted({0, *near, len(schedules) - 1}, key=worth)
        chosen = next(filter(None, (choice(index, close_gap) for index in ranked)), None)
        alone = choice(0) if job.merges_must_pay else None
        if chosen is not None and alone is not None and not self._pays(chosen, alone, limits):
            chosen = alone
        if chosen is None:  # no choice keeps the limits: the narrowest layers, with what misses them least
            schedule = min((schedules[0], schedules[-1]), key=lambda candidate: excess(self.table(candidate)))
            return choice_of(schedule, self.table(schedule), job.least_widths)
        if not close_gap:
            return chosen
        widths = job_widths(job, limits, curves, chosen.table)
        schedule = self._filling(schedules.index(chosen.merged), widths, limits)
        return choice_of(schedule, self.table(schedule), widths)

    def _pays(self, choice: MergeChoice, alone: MergeChoice, limits: Limits) -> bool:
        """Whether ``choice`` lowers the divergence of channels ``alone``, and its merges save time."""
        if alone.predicted - choice.predicted <= MIN_KL:
            return False
        if any(limit.curve is not None for limit in limits):
            return True  # the limit counts the measured time of merges
        price = sum(cost.merge for cost, count in zip(self._costs, choice.merged, strict=False) if count)
        saved = int(self.job.table.flops(choice.widths) - choice.table.flops(choice.widths))
        return price < saved

    def _filling(self, index: int, widths: Mapping[UnitKey, int], limits: Limits) -> Schedule:
        """Return schedule number ``index``. If FLOPs are left over, return a schedule with fewer merges."""

        def within(schedule: Schedule) -> Limits:
            flops, merges = self.table(schedule).flops, bool(schedule)
            work = [limit for limit in limits if limit.resource == "flops" or limit.curve is not None]
            return [limit.with_merges_fixed(flops, merges=merges) for limit in work]

        few, many, schedule = 0.0, float(index), self.schedules[index]
        while many - few > 0.01 and all(limit.cost(widths) < NEAR * limit.most for limit in within(schedule)):
            middle = (few + many) / 2
            upper = math.ceil(middle)
            both = self.schedules[upper - 1], self.schedules[upper]
            fewer = between(*both, upper - middle, self.tokens)
            if keeps(within(fewer), widths):
                schedule, many = fewer, middle
            else:
                few = middle
        return schedule


def block_costs(job: Job, tokens: Tokens) -> list[BlockCost]:
    """Return the approximate FLOPs of each block as a function of its tokens.

    The time of a merge counts as FLOPs.
    """
    by_layer, count, stack = job.table.by_layer(), tokens.total, stack_of(job.model)
    assert stack is not None
    costs = []
    for block in range(tokens.depth):
        layers = [layer for layer in job.prunable.layers if stack.block_of(layer.name) == block]
        attention = [layer for layer in layers if layer.adapter.family == "attention"]
        # n x n logits take n^2 products per channel of q/k, and their use n^2 per channel of v.
        pair: float = sum(unit.heads * unit.width for layer in attention for unit in layer.units)
        pair *= stack.pairs(block, count) / count**2
        if block == tokens.depth - 1 and output_tokens_of(job.model) is not None:
            pair = 0  # its queries are few, whatever is merged before
        total = sum(by_layer[layer.name] for layer in attention)
        mlp = sum(by_layer[layer.name] for layer in layers if layer not in attention)
        price = max(OVERHEAD * (total + mlp), LEAST_PRICE if job.merges_must_pay else 0)
        costs.append(BlockCost(max(total - pair * count**2, 0) / count, pair, mlp / count, price))
    return costs


def with_all_merged(model: nn.Module, size: tuple[int, ...], unmerge: Unmerge = False) -> nn.Module:
    """Return a copy of a plain ViT with maximum merging; ``unmerge`` restores tokens at the output."""
    tokens, merging = tokens_of_model(model, size), copy.deepcopy(model)
    set_merged(merging, most_merged(tokens, merging_blocks(model, tokens)), unmerge)
    return merging


def merging_blocks(model: nn.Module, tokens: Tokens) -> int:
    # A last block that computes only the tokens the classifier reads cannot merge.
    return tokens.depth - (output_tokens_of(model) is not None)


@torch.no_grad()
def tokens_of_model(model: nn.Module, size: tuple[int, ...]) -> Tokens:
    stack = stack_of(model)
    assert stack is not None
    x, *_ = _inputs_of_blocks(model, stack, torch.zeros(1, *size))
    if stack.window:
        rows, columns = x.shape[1:3]
        return Tokens(rows * columns, 0, len(stack.blocks), steps_of((rows, columns), stack.window))
    return Tokens(x.shape[1], stack.prefix, len(stack.blocks))


@torch.no_grad()
def find_outside_tokens(model: nn.Module, size: tuple[int, ...]) -> str:
    """Count the tokens that never merge, such as class tokens, and store the counts in the blocks.

    Return the reason if the tokens cannot be counted, otherwise an empty text.
    """
    stack = stack_of(model)
    if stack is None:
        return ""
    if stack.vit is not None:
        x, *_ = _inputs_of_blocks(model, stack, torch.zeros(1, *size))
        for block in stack.blocks:
            block.patches = x.shape[1] - stack.prefix
            if stack.window:
                block.grid = tuple(x.shape[1:3])
                block.patches = math.prod(block.grid)
        return ""
    if len(size) != 3:
        return (
            "its inputs are tokens, so its class tokens are unknown; name a module around the patch embedding"
        )
    noise = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
    inputs = _inputs_of_blocks(model, stack, noise)
    if len(inputs) != 1 or inputs[0].ndim != 3 or len(inputs[0]) != 2:
        return "its blocks do not run once for each image"
    first, second = inputs[0]
    # Tokens of patches alone depend on the image.
    differs = ~torch.isclose(first, second, rtol=1e-4, atol=1e-5).all(-1)
    places = differs.nonzero().flatten().tolist()
    if not places or len(places) != places[-1] + 1 - places[0]:
        return "the tokens of its patches are not side by side"
    for block in stack.blocks:
        block.outside = places[0], len(differs) - 1 - places[-1]
        block.patches = len(places)
    return ""


def _inputs_of_blocks(model: nn.Module, stack: Stack, images: Tensor) -> list[Tensor]:
    """Run ``model``; return the tokens of each call of its first block, [B, N, C]."""
    inputs: list[Tensor] = []

    def take(module: nn.Module, args: Any, kwargs: Any) -> None:
        x = next(iter((*args, *kwargs.values())))
        inputs.append(x.transpose(0, 1) if stack.tokens_first else x)

    with registered([stack.blocks[0].register_forward_pre_hook(take, with_kwargs=True)]):
        model(images.to(next(model.parameters()).device))
    return inputs
