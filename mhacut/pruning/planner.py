"""From a calibrated model to a plan ready to be cut: spread the budget, choose channels, compensate."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Unit
from mhacut.budget import format_flops
from mhacut.linalg.indicator import THRESHOLD
from mhacut.options.prune import SearchOptions
from mhacut.plan import Plan
from mhacut.pruning.allocate import cheapest_widths, uniform_widths
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.candidates import Candidate, exchanged, find_candidates
from mhacut.pruning.compensation import Compensation, Decision, compensate
from mhacut.pruning.curves import Curve, sensitivity_curves
from mhacut.pruning.distill import Distillation
from mhacut.pruning.indicators import SearchResult, SearchStep, search
from mhacut.pruning.widths import width_choices
from mhacut.surgery.costs import CostTable
from mhacut.surgery.find import PrunableLayers, UnitKey
from mhacut.surgery.mask import masked_tensors
from mhacut.surgery.rotate import rotate

REPLAYED = 32
"""Images on which layers are run anew to see what a cut of their logits does."""
_SPREAD = 0.1
"""How far from the threshold the best and the worst channel of a head start when a plan is refined."""

Widths = Mapping[UnitKey, int]
Ways = Mapping[UnitKey, tuple[Candidate, ...]]


@dataclass(frozen=True)
class Planned:
    """A plan, and how it came about."""

    ready: Compensation
    curves: Mapping[UnitKey, Curve]
    """Estimated KL divergence per width of every unit; empty where no curve was needed."""
    log: tuple[SearchStep, ...]
    """Of the indicators, where they were trained."""
    note: str | None
    """What was compared with what, in words."""


class Planner:
    """Makes one plan; holds everything it is made from."""

    def __init__(
        self,
        dense: nn.Module,
        prunable: PrunableLayers,
        units: Sequence[Unit],
        table: CostTable,
        calibration: Calibration,
        distillation: Distillation,
        *,
        budget: int,
        round_to: int,
        options: SearchOptions,
        start_stage: Callable[[str], None],
        progress: Callable[[int, int, str], None],
    ) -> None:
        """Prepare.

        Args:
            dense: eval mode, float32, on the device to work on; left as it is.
            prunable: of ``dense``.
            units: those that may be cut.
            table: costs of ``dense``.
            calibration: of ``dense``; with sensitivities where curves are wanted.
            distillation: what indicators are taught, on all calibration images; held-out ones are left out
            where
                they judge what was learned.
            budget: FLOPs; reachable (see :func:`mhacut.pruning.widths.lowest_flops`).
            round_to: widths are multiples of it, or the dense width.
            options: see :class:`SearchOptions`.
            start_stage: called with the name of each stage as it begins.
            progress: called with (done, in all, detail) during a stage.
        """
        self.dense, self.prunable, self.units, self.table = dense, prunable, tuple(units), table
        self.calibration, self.distillation, self.options = calibration, distillation, options
        self.budget, self.round_to = budget, round_to
        self.start_stage, self.progress = start_stage, progress
        self.choices = {unit.key: width_choices(unit.width, round_to) for unit in units}

    def plan(self) -> Planned:
        """The plan that ``options`` ask for."""
        spread = self.options.allocation
        if spread == "indicator":
            return self._by_indicators()
        candidates = self._ways()
        curves: Mapping[UnitKey, Curve] = {}
        widths: Widths
        if spread == "uniform":
            widths = uniform_widths(self.choices, self.table.flops, self.budget)
        else:
            curves = self._curves(candidates)
            widths = cheapest_widths(curves, self.choices, self.table.flops, self.budget)
        chosen = self._swapped(candidates, widths)
        ready = self._compensated(chosen, widths)
        if spread != "refined":
            return Planned(ready, curves, (), None)
        widths, log = self._refined(chosen, ready)
        refined = self._compensated(self._swapped(candidates, widths), widths)
        before, after = self.divergence(ready), self.divergence(refined)
        note = f"divergence on held-back images: {before:.4f} by curves, {after:.4f} refined by indicators"
        return Planned(refined if after < before else ready, curves, log, note)

    def divergence(self, ready: Compensation) -> float:
        """Of the cut model from the dense one, mean over the images held out.

        Those chose the ridges of the repair, which was then fitted to them too: it compares plans, and
        flatters both alike.
        """
        device = next(self.dense.parameters()).device
        channel_scales = {
            key: channel_scale.to(device) for key, channel_scale in ready.channel_scales.items()
        }
        judge = self.distillation.part(0, max(self.calibration.held, 1))
        return judge.divergence_of(ready.model, masked_tensors(ready.model, self.prunable, channel_scales))

    def _by_indicators(self) -> Planned:
        self.start_stage("searching")
        found = self._search(self.dense, self.distillation, None)
        decision = Decision(
            found.plan, channel_scales=found.channel_scales if self.options.reweight else None
        )
        if self.options.repair and self.options.selection == "repair":
            decision = replace(decision, candidates=self._swapped(self._ways(), found.plan.widths()))
        self.start_stage("repairing")
        ready = compensate(self.dense, self.prunable, decision, self.calibration, self.options)
        return Planned(ready, {}, found.log, None)

    def _ways(self) -> Ways:
        self.start_stage("ranking channels")
        found = {}
        for done, unit in enumerate(self.units):
            found[unit.key] = find_candidates(
                self.dense.get_submodule(unit.layer),
                unit,
                self.calibration.moments[unit.key],
                self.choices[unit.key][0],
                self.options.basis,
                self.calibration.fisher.matrices.get(unit.layer),
                self.options.positions,
                refit=self.options.repair,
            )
            self.progress(done + 1, len(self.units), "")
        return found

    def _swapped(self, candidates: Ways, widths: Widths) -> Ways:
        """``candidates``, with channels exchanged at ``widths`` where that is asked for."""
        if not self.options.swaps:
            return candidates
        self.start_stage("swapping channels")
        found = {}
        for done, (key, units_ways) in enumerate(candidates.items()):
            module, moments = self.dense.get_submodule(key[0]), self.calibration.moments[key]
            fisher = self.calibration.fisher.matrices.get(key[0])
            found[key] = tuple(
                exchanged(module, candidate, moments, widths[key], fisher) for candidate in units_ways
            )
            self.progress(done + 1, len(candidates), "")
        return found

    def _curves(self, candidates: Ways) -> Mapping[UnitKey, Curve]:
        self.start_stage("measuring error curves")
        return sensitivity_curves(
            self.dense,
            self.prunable,
            {key: by_likelihood[0] for key, by_likelihood in candidates.items()},
            self.calibration,
            self.choices,
            self.distillation.images[:REPLAYED],
            temperature=self.options.temperature,
            refit=self.options.repair,
            progress=lambda done, total: self.progress(done, total, ""),
        )

    def _compensated(self, candidates: Ways, widths: Widths) -> Compensation:
        self.start_stage("repairing")
        plan = Plan(tuple(candidates[unit.key][0].plan(widths[unit.key]) for unit in self.units))
        decision = Decision(plan, candidates)
        return compensate(self.dense, self.prunable, decision, self.calibration, self.options)

    def _refined(self, candidates: Ways, ready: Compensation) -> tuple[Widths, tuple[SearchStep, ...]]:
        """Widths that indicators move to from those of ``ready``, in its bases."""
        model = copy.deepcopy(self.dense)
        start, rotated = {}, []
        for unit_plan in ready.plan:
            unit = self.prunable.unit(unit_plan.key)
            # That of the plan; a unit that stays whole fits several.
            candidate = next(
                candidate
                for candidate in candidates[unit.key]
                if candidate.plan(unit_plan.width) == unit_plan
            )
            if candidate.rotation is not None:
                rotate(model.get_submodule(unit.layer), unit, candidate.rotation)
                rotated.append(unit.key)
            start[unit.key] = _scores(candidate.ranking.order.cpu(), unit_plan.width)
        self.start_stage("searching")
        found = self._search(model, self.distillation.part(self.calibration.held, None), start, rotated)
        return found.plan.widths(), found.log

    def _search(
        self,
        model: nn.Module,
        distillation: Distillation,
        start: Mapping[UnitKey, Tensor] | None,
        rotated: Collection[UnitKey] = (),
    ) -> SearchResult:
        return search(
            model,
            self.prunable,
            self.units,
            self.table,
            self.calibration,
            distillation,
            budget=self.budget,
            round_to=self.round_to,
            options=self.options,
            start=start,
            rotated=rotated,
            progress=lambda done, total, step: self.progress(
                done, total, f"loss {step.loss:.4f}, {format_flops(step.flops)}"
            ),
        )


def _scores(order: Tensor, width: int) -> Tensor:
    """Scores that keep the first ``width`` of ``order`` [H, d] and fall along it, [H, d]."""
    channels = order.shape[1]
    place = torch.arange(channels, dtype=torch.float64)
    above = (width - place - 0.5) / max(width, channels - width)
    return torch.zeros(order.shape, dtype=torch.float64).scatter(
        -1, order, (THRESHOLD + _SPREAD * above).expand(order.shape)
    )
