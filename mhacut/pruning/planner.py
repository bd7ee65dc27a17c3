"""From a calibrated model to a model ready to be cut: divide the budget, choose channels, reconstruct."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import nn

from mhacut.measuring.predicted_time import TimeCurve, TimeTable
from mhacut.plan import Plan, UnitKey, Unmerge
from mhacut.pruning.allocate import job_widths, total_error, uniform_widths
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.candidates import Candidate, find_candidates
from mhacut.pruning.choose_merges import MergeSearch
from mhacut.pruning.curves import Curve, divergence_by_cut, sensitivity_curves
from mhacut.pruning.job import Job
from mhacut.pruning.limits import Limit, Limits
from mhacut.pruning.merge_law import Schedule
from mhacut.pruning.paper.indicators import SearchStep, search
from mhacut.pruning.repair import ReconstructedModel, reconstruct
from mhacut.surgery.costs import CostTable

Candidates = Mapping[UnitKey, tuple[Candidate, ...]]


@dataclass(frozen=True)
class Planned:
    """A plan, the model to cut, and how the plan was found."""

    ready: ReconstructedModel
    curves: Mapping[UnitKey, Curve]
    """Estimated KL divergence in nats at each width, by unit. Empty if the widths were chosen without
    curves."""
    log: tuple[SearchStep, ...]
    table: CostTable
    """FLOPs as a function of widths, with the plan's token merging."""
    merged: Schedule = ()
    unmerge: Unmerge = False
    """Whether the slim model copies each merged token back to its patches in the features it returns."""

    @property
    def plan(self) -> Plan:
        """Plan of the whole model, as stored in the slim file."""
        tokens = replace(self.ready.plan.tokens, merged=self.merged, unmerge=self.unmerge)
        return Plan(self.ready.plan.units, tokens)

    def cost(self, limit: Limit) -> int:
        """Return the predicted cost of the cut model in the resource of ``limit``."""
        return int(limit.cost(self.plan.widths())) if limit.curve is None else self.time(limit.curve)

    def time(self, times: TimeTable | TimeCurve) -> int:
        if isinstance(times, TimeTable):
            return times.at(self.plan.widths())
        return times.at(self.flops, merges=any(self.merged))

    @property
    def flops(self) -> int:
        return int(self.table.flops(self.plan.widths()))

    def corrected(self, limit: Limit, asked: Limit, found: int) -> Limit:
        """Correct ``limit`` for a planning error: the model cut for ``asked`` costs ``found``."""
        if limit.curve is None:
            return replace(limit, most=asked.most + self.cost(limit) - found)
        return replace(limit, curve=limit.curve.with_measured(self.flops, found, merges=any(self.merged)))

    def without_model(self) -> Planned:
        """Return a copy without the model, to free memory after the cut."""
        return replace(self, ready=replace(self.ready, model=nn.Module()))


class Planner:
    def __init__(self, job: Job, calibration: Calibration) -> None:
        self.job, self.calibration = job, calibration
        self.options, self.reporter = job.options, job.reporter

    def plan(self, limits: Limits) -> Planned:
        """Return the plan within ``limits`` by the method in the options, on a model ready to be cut."""
        job = self.job
        if self.options.allocation == "indicator":
            return self._by_indicators(limits)
        curves: Mapping[UnitKey, Curve] = {}
        widths: Mapping[UnitKey, int]
        table: CostTable = job.table
        merged: Schedule = job.merged
        if self.options.allocation == "uniform":
            widths = uniform_widths(job.allowed, job.limits_on_widths(limits))
        else:
            curves = self.curves
            if job.merges_tokens:
                self.reporter.start("choosing merges")
                choice = self._merge_search.choose(limits, curves)
                widths, table, merged = choice.widths, choice.table, choice.merged
                self.reporter.log(str(choice))
            else:
                widths = job_widths(job, limits, curves)
        candidates = self.candidates
        self.reporter.start("repairing")
        plan = Plan(tuple(candidates[unit.key][0].plan(widths[unit.key]) for unit in job.units))
        ready = reconstruct(job, self.calibration, plan, candidates)
        return Planned(ready, curves, (), table, merged, job.unmerge)

    def expected_divergence(self, limits: Limits) -> float:
        if self.job.merges_tokens:
            return self._merge_search.choose(limits, self.curves, close_gap=False).predicted
        widths = job_widths(self.job, limits, self.curves, close_gap=False)
        return divergence_by_cut(total_error(self.curves, widths), self.job.dense)

    def _by_indicators(self, limits: Limits) -> Planned:
        self.reporter.start("searching")
        distillation = self.job.distillation(self.calibration)
        plan, trained_scales, log = search(self.job, limits, self.calibration, distillation)
        by_repair = self.options.repair and self.options.selection == "repair"
        candidates = self.candidates if by_repair else None
        self.reporter.start("repairing")
        scales = trained_scales if self.options.reweight else None
        ready = reconstruct(self.job, self.calibration, plan, candidates, scales)
        return Planned(ready, {}, log, self.job.table, self.job.merged, self.job.unmerge)

    @cached_property
    def candidates(self) -> Candidates:
        self.reporter.start("ranking channels")
        candidates = {}
        for done, unit in enumerate(self.job.units, 1):
            candidates[unit.key] = find_candidates(
                self.job.model.get_submodule(unit.layer),
                unit,
                self.calibration.moments[unit.key],
                self.job.choices[unit.key][0],
                self.options,
                self.calibration.fisher.matrices.get(unit.layer),
            )
            self.reporter.advance(done, len(self.job.units))
        return candidates

    @cached_property
    def _merge_search(self) -> MergeSearch:
        return MergeSearch(self.job, self.calibration)

    @cached_property
    def curves(self) -> Mapping[UnitKey, Curve]:
        candidates = self.candidates
        self.reporter.start("measuring sensitivity curves")
        # One candidate a unit: curves of all would take twice the time, to decide no more than widths.
        most_promising = {key: of_unit[0] for key, of_unit in candidates.items()}
        return sensitivity_curves(self.job, self.calibration, most_promising)
