"""Budget of time of ``mhacut prune``: layer times that plans use, and times of cut models."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch
from torch import nn

from mhacut._version import __version__
from mhacut.adapters.base import Layer
from mhacut.budget import Budget, format_amount
from mhacut.checkpoint.record import SlimRecord
from mhacut.commands.fresh_timing import compare_afresh
from mhacut.commands.stopwatch import Stopwatch
from mhacut.errors import BudgetError, option_name
from mhacut.measuring.kept_times import kept_table
from mhacut.measuring.latency import Comparison, Run, fixed_images
from mhacut.measuring.layer_times import LayerTimes, Point, TimeTable, points_to_measure
from mhacut.measuring.time_curve import TimeCurve
from mhacut.plan import Plan, UnitKey
from mhacut.pruning.choose_merges import with_all_merged
from mhacut.pruning.job import Job
from mhacut.pruning.limits import lowest_flops
from mhacut.pruning.planner import Planned
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.hooks import Call, Replay, cost_key, cut_to_widths, recorded_calls
from mhacut.surgery.slice import cut
from mhacut.surgery.tokens import prefix_attended

AIM = 0.97
"""Fraction of the budget that a plan aims at: in another process, times differ a little."""
CORRECTIONS = 3
"""Largest number of plans after the first, each corrected by the time of the one before."""
_WHOLE_SECONDS = 4.0
"""Time to measure whole models in, after the warm-up."""
_PRECISION = 0.005
"""Relative standard error of the time of a cut model; a noisy machine is measured on for longer."""
_LAYER_SECONDS = 0.12
"""Time to measure one width of a layer in, after the warm-up."""
_CUTS = (0.5, 0.0)
"""Places, among the allowed widths of every unit, of cut models that are measured whole. If programs take
longer to build than to run, only the last one is measured."""
_PACKAGES = {"onnx": ("onnxruntime", "onnxscript"), "openvino": ("openvino", "onnxscript")}


@dataclass(frozen=True)
class TimedCut:
    """Time of a cut model, measured in turns with the dense one."""

    ratio: float
    """Time relative to the dense model's."""
    dense: int
    """Nanoseconds per batch of the dense model, as it was measured first."""
    most: int
    """Nanoseconds that the budget allows."""
    wall_ms: float
    """Wall time per batch of the cut model."""
    fresh: bool = False
    """Whether it was measured in a process of its own."""

    @property
    def nanoseconds(self) -> int:
        """Time per batch, scaled to the dense model's first measurement."""
        return round(self.ratio * self.dense)


def lowest_time(cost: Callable[[Mapping[UnitKey, int]], int], job: Job) -> int:
    """Return the least budget in nanoseconds that is accepted, so that a new measurement meets it too.

    Args:
        cost: nanoseconds at given widths.
        job: whose widths they are.
    """
    return math.ceil(lowest_flops(job.allowed, cost) / AIM)


class TimeTarget:
    """A budget of time per batch."""

    def __init__(self, asked: str, stopwatch: Stopwatch, before: Plan) -> None:
        """Take the text of the option, and what measures.

        Args:
            asked: the text.
            stopwatch: of the command.
            before: the cut that the dense model has already, if it is from a slim file.

        Raises:
            UsageError: the text is no budget.
        """
        self.budget, self.stopwatch, self.before = Budget.parse(asked, "max_latency"), stopwatch, before
        self.times: TimeTable | TimeCurve | None = None
        """Layer times that plans use, once they are measured; if tokens may be merged, times by FLOPs."""
        self._last: TimedCut | None = None
        self._fresh_dense: int | None = None
        """Nanoseconds per batch of the dense model, as a new process measured it first."""
        self._fresh = stopwatch.timing.runtime == "eager" and stopwatch.device.type == "cpu"
        """Whether new processes measure cut models."""

    def time(self, model: nn.Module, record: SlimRecord) -> TimedCut:
        """Time a cut model in turns with the dense one.

        Args:
            model: not changed.
            record: by which its file can be opened.
        """
        dense, found = self._known.dense, self._afresh(model, record)
        if found is not None:
            self._fresh_dense = self._fresh_dense or round(1e6 * found.milliseconds[0])
            dense = dense if self.budget.relative else self._fresh_dense
        here = found or self.stopwatch.beside([model], seconds=_WHOLE_SECONDS, precision=_PRECISION)
        fresh = found is not None
        self._last = TimedCut(here.ratios[1], dense, self.budget.amount(dense), here.wall[1], fresh)
        return self._last

    def _afresh(self, model: nn.Module, record: SlimRecord) -> Comparison | None:
        """Return times of another process; None where this one's are as good, or there are none."""
        if not self._fresh:
            return None
        how, records = self.stopwatch, {"dense": replace(record, plan=self.before), "slim": record}
        found = compare_afresh(how, records, model, seconds=_WHOLE_SECONDS, precision=_PRECISION)
        if found is None:
            self._fresh = False
            how.reporter.log(
                "no new process can time this model; it is timed in this one, where it may be faster or "
                "slower than where it is used"
            )
        else:
            how.log_busy(found)
        return found

    def foreseen(self, planned: Planned) -> int:
        """Return the nanoseconds that are predicted of the cut model."""
        return planned.time(self._known)

    @property
    def _known(self) -> TimeTable | TimeCurve:
        assert self.times is not None
        return self.times

    def reason_to_go_on(self, sure: float) -> str:
        """Return the line that says why another plan follows the model that was timed last.

        Args:
            sure: part of the budget up to which the model is likely to be within it when it is timed again.
        """
        assert self._last is not None
        amounts = self._last.nanoseconds, self._last.most
        found, most = (format_amount(amount, "max_latency") for amount in amounts)
        part = amounts[0] / amounts[1]
        why = "too much" if part > 1 else "too near to be sure" if part > sure else "less than it may"
        return f"this plan takes {found} of at most {most}, {why}: another is made"

    def missed(self) -> BudgetError:
        """Return the error that states by how much the budget was missed last."""
        assert self._last is not None
        amounts = self._last.nanoseconds, self._last.most
        found, most = (format_amount(amount, "max_latency") for amount in amounts)
        return BudgetError(
            f"{option_name('max_latency', self.budget.text)}: not met: after {CORRECTIONS} "
            f"corrections the pruned model takes {found}, expected at most {most}, timed beside the dense "
            "one. Times vary on a busy machine: try again, or allow a little more"
        )

    def table(self, job: Job, counted: nn.Module) -> TimeTable:
        """Return the times of the job's layers, measured or saved, with the current time of the dense model.

        Args:
            job: what is to be cut.
            counted: its model with all that the slim model leaves out or merges.
        """

        def today(kept: TimeTable) -> TimeTable | None:
            dense = self.stopwatch.beside([], seconds=1.0).milliseconds[0]
            kept = replace(kept, dense=round(1e6 * dense))
            return kept if lowest_time(kept.at, job) <= self.budget.amount(kept.dense) else None

        key, log = self._key(job, counted), self.stopwatch.reporter.log
        table = kept_table(key, lambda: self._measured(job, counted), log, today)
        self.times = table
        return table

    def curve(self, job: Job) -> TimeCurve:
        """Return times by FLOPs: of models with all channels and with the narrowest layers, merging or not.

        Args:
            job: what is to be cut, where tokens may be merged.
        """
        assert job.fewest is not None
        self.stopwatch.start("timing layers")
        least = {key: widths[0] for key, widths in job.allowed.items()}
        alone = [job.model, _cut(job.model, job, least)]
        alone += [with_all_merged(model, job.input_size) for model in alone]
        found = self.stopwatch.beside(alone, seconds=_WHOLE_SECONDS)
        flops = [int(table.flops(widths)) for table in (job.table, job.fewest) for widths in ({}, least)]
        models = list(zip(flops, found.ratios[1:], strict=True))
        dense = round(1e6 * found.milliseconds[0])
        cut = [model for model in models[:2] if model[0] < job.table.dense]
        curve = TimeCurve.through([*cut, (job.table.dense, 1.0)], models[2:], dense)
        self.times = curve
        return curve

    def _key(self, job: Job, counted: nn.Module) -> dict[str, Any]:
        """Everything that the times depend on."""
        packages = ("torch", "timm", *_PACKAGES.get(self.stopwatch.timing.runtime, ()))
        parts = [cost_key(self.stopwatch.dense), cost_key(counted), sorted(job.choices.items())]
        return {
            **self.stopwatch.conditions(),
            "image": list(self.stopwatch.size),
            "versions": {"mhacut": __version__, **{name: _version(name) for name in packages}},
            "matmul_precision": torch.get_float32_matmul_precision(),
            # Some modules hold objects whose text names their address.
            "model": re.sub(r" at 0x[0-9a-f]+", "", repr(parts)),
        }

    def _measured(self, job: Job, counted: nn.Module) -> TimeTable:
        self.stopwatch.start("timing layers")
        shorter = counted is not self.stopwatch.dense
        counted = copy.deepcopy(counted).cpu()
        calls, distinct = self._distinct(job, counted)
        plans = [
            {key: widths[int(place * (len(widths) - 1))] for key, widths in job.choices.items()}
            for place in (_CUTS if self.stopwatch.timing.runtime == "eager" else _CUTS[-1:])
        ]
        models = [counted] * shorter + [_cut(counted, job, widths) for widths in plans]
        parts = [self.stopwatch.ready(layer.replay(layer.points[0])) for layer in distinct]
        found = self.stopwatch.beside(models, parts, seconds=_WHOLE_SECONDS)
        whole, *ratios = found.ratios[shorter:]  # the dense model's own ratio is 1
        layers, steady = [], found.steady
        for layer, part, share in zip(distinct, parts, ratios[len(plans) :], strict=True):
            times, still = self._times(layer, part, share)
            layers.append(times)
            steady &= still
            self.stopwatch.reporter.advance(len(layers), len(distinct))
        dense = round(1e6 * found.milliseconds[0])
        table = TimeTable(calls, tuple(layers), whole, dense=dense, steady=steady)
        return table.with_anchors(list(zip(plans, ratios[: len(plans)], strict=True)))

    def _distinct(self, job: Job, counted: nn.Module) -> tuple[tuple[tuple[str, int], ...], list[_Distinct]]:
        """Return the runs of layers in one pass, and the layers that differ in shapes or inputs."""
        by_name: dict[str, dict[str, tuple[int, ...]]] = {}
        for (name, kind), widths in job.choices.items():
            by_name.setdefault(name, {})[kind] = widths
        images = fixed_images(self.stopwatch.timing.latency_batch_size, self.stopwatch.size)
        with recorded_calls(counted, list(by_name)) as recorded, torch.inference_mode():
            counted(images)
        places: dict[Any, int] = {}
        found: list[_Distinct] = []
        calls = []
        for layer in find_prunable_layers(counted).layers:
            for call in recorded.get(layer.name, ()):
                module, prefix = counted.get_submodule(layer.name), prefix_attended(counted, layer.name)
                own = by_name[layer.name]
                key = (cost_key(module), repr(call), prefix, tuple(own.items()))
                if key not in places:
                    places[key] = len(found)
                    found.append(_Distinct(module, layer, call, prefix, points_to_measure(own)))
                calls.append((layer.name, places[key]))
        return tuple(calls), found

    def _times(self, layer: _Distinct, whole: Run, share: float) -> tuple[LayerTimes, bool]:
        """Time one layer, whose time with all channels is known, at all its points, in turns.

        Returns:
            The times, and whether they are steady.
        """
        cut_parts = [self.stopwatch.ready(layer.replay(widths)) for widths in layer.points[1:]]
        found = self.stopwatch.parts([whole, *cut_parts], seconds=_LAYER_SECONDS * len(layer.points))
        points = [
            Point(widths, share * ratio) for widths, ratio in zip(layer.points, found.ratios, strict=True)
        ]
        return LayerTimes(points[0], tuple(points[1:])), found.steady


def _version(module: str) -> str:
    """Return the version that a module states; its package may have another name, as onnxruntime-gpu has."""
    return str(getattr(import_module(module), "__version__", "unknown"))


@dataclass(frozen=True)
class _Distinct:
    """A layer that represents all layers with the same shapes and inputs."""

    module: nn.Module
    layer: Layer
    call: Call
    prefix: int | None
    points: list[dict[str, int]]
    """Widths to measure, all channels first."""

    def replay(self, widths: Mapping[str, int]) -> Replay:
        """Return a cut copy, to run alone."""
        own = {unit.kind: widths.get(unit.kind, unit.width) for unit in self.layer.units}
        return Replay(cut_to_widths(self.module, self.layer, own), self.call, self.prefix).eval()


def _cut(model: nn.Module, job: Job, widths: Mapping[UnitKey, int]) -> nn.Module:
    """Return a copy of ``model`` with the first channels of each head; what it computes means nothing."""
    slim = copy.deepcopy(model)
    cut(slim, Plan(tuple(unit.keep_first(widths[unit.key]) for unit in job.units)))
    return slim
