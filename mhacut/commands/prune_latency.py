"""Budget of time of ``mhacut prune``: layer times that plans use, and times of cut models."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from mhacut.adapters.base import Layer
from mhacut.commands.prune_attempt import Attempt, TargetResult
from mhacut.commands.prune_targets import Amount, Cost
from mhacut.exporting.stopwatch import Stopwatch
from mhacut.measuring.latency import fixed_images
from mhacut.measuring.predicted_time import LayerTimes, Point, TimeCurve, TimeTable, points_to_measure
from mhacut.plan import Plan, UnitKey
from mhacut.pruning.choose_merges import with_all_merged
from mhacut.pruning.job import Job
from mhacut.pruning.planner import Planner
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.hooks import LayerInputs, Replay, cost_key, cut_to_widths, recorded_calls
from mhacut.surgery.slice import cut
from mhacut.surgery.tokens import tokens_of, with_tokens

_MODEL_SECONDS = 4.0
"""Seconds for timing complete models in turns, after the warm-up."""
_PRECISION = 0.005
"""Timing continues until the relative standard error of the times is at most this value, or for a maximum
time."""
_LAYER_SECONDS = 0.12
"""Seconds for timing a layer at 1 width, after the warm-up."""
_PLACES = (0.5, 0.0)
"""Relative positions in the ascending list of allowed widths of each layer. Models with these widths are
timed to correct the sum of layer times. Outside of eager mode, only the last position is used, because
compilation takes long."""


class Latency(Amount):
    """Budget of time per batch, in nanoseconds. Texts for users show milliseconds."""

    name = "max_latency"
    aim = 0.97  # in another process, times differ a little
    safety = 0.98
    advice = ". Times vary on a busy machine: try again or raise the limit a little"

    def prepare(self) -> None:
        self.stopwatch, job = self.inputs.source.stopwatch, self.job
        if self.stopwatch.latency_model is None:  # several files share them
            job.reporter.start("timing layers")
            self.stopwatch.latency_model = (curve_of if job.merges_tokens else table_of)(job, self.stopwatch)
        self.times = self.stopwatch.latency_model
        self._scale = 0
        """Nanoseconds of the dense model, by which ratios become times, once a cut model is measured."""
        super().prepare()
        if self.limit is not None and isinstance(self.times, TimeCurve):
            self.limit = replace(self.limit, curve=self.times)

    def dense_amount(self) -> int:
        return self.times.dense

    def cost(self) -> Cost:
        """Return a function that predicts nanoseconds per batch from the widths.

        For models that merge tokens, the function predicts the time without merging and with full merging,
        and returns the smaller time.
        """
        times, job = self.times, self.job
        if isinstance(times, TimeTable):
            return times.at
        assert job.all_merged_costs is not None
        tables = ((job.table, False), (job.all_merged_costs, True))
        return lambda widths: min(times.at(int(t.flops(widths)), merges=merges) for t, merges in tables)

    def lowest(self, cost: Cost) -> int:
        return math.ceil(super().lowest(cost) / self.aim)  # so that a new measurement meets it too

    def measure(self, attempt: Attempt, planner: Planner) -> TargetResult:
        reached = super().measure(attempt, planner)  # in nanoseconds
        measured = {
            "predicted": attempt.planned.time(self.times) / 1e6,
            "dense": self._scale / 1e6,
            "wall": self._wall,
            "corrections": attempt.number - 1,
            **self.stopwatch.conditions(),
        }
        return replace(reached, limit=self.most / 1e6, reached=reached.amount / 1e6, measured=measured)

    def count(self, attempt: Attempt) -> int:
        inputs, planned = self.inputs, attempt.planned
        inputs.job.reporter.start("timing")
        earlier = inputs.checkpoint.loaded.record
        record = inputs.record(planned.plan, planned.curves, self.job.table.dense)
        records = {
            "dense": replace(record, plan=Plan(()) if earlier is None else earlier.plan),
            "slim": record,
        }
        slim = with_tokens(attempt.model, planned.plan.tokens)
        comparison = self.stopwatch.compare_in_new_process(
            slim, records, seconds=_MODEL_SECONDS, precision=_PRECISION
        )
        self._wall = comparison.wall[1]
        # Ratios are steadier than milliseconds: every cut model is measured against the same dense time.
        # Milliseconds that a budget states are those of the process that measures first.
        if not self._scale:
            self._scale = self.dense if self.asked.relative else round(1e6 * comparison.milliseconds[0])
            self.most = self.asked.amount(self._scale)
        return round(comparison.ratios[1] * self._scale)


def curve_of(job: Job, stopwatch: Stopwatch) -> TimeCurve:
    """Time 4 models (all or fewest channels, with or without token merging) to relate time to FLOPs."""
    assert job.all_merged_costs is not None
    # Merging takes time that FLOPs do not show, so models that merge have a line of their own.
    least = job.least_widths
    models = [job.model, _cut(job.model, job, least)]
    models += [with_all_merged(model, job.input_size, job.unmerge) for model in models]
    comparison = stopwatch.compare(models, seconds=_MODEL_SECONDS)
    flops = [
        int(table.flops(widths)) for table in (job.table, job.all_merged_costs) for widths in ({}, least)
    ]
    times = list(zip(flops, comparison.ratios[1:], strict=True))
    cut_only = [time for time in times[:2] if time[0] < job.table.dense]
    dense = round(1e6 * comparison.milliseconds[0])
    return TimeCurve.through([*cut_only, (job.table.dense, 1.0)], times[2:], dense)


def table_of(job: Job, stopwatch: Stopwatch) -> TimeTable:
    """Measure the times of layers at a few widths, and of a few complete models.

    Layers of equal cost are timed once. Times are relative to the dense model's.
    """
    # Merges and dead tokens make layers faster: those of the model as it will be cut are timed.
    tokens = replace(tokens_of(job.model), merged=job.merged, unmerge=job.unmerge)
    counted = copy.deepcopy(with_tokens(job.model, tokens)).cpu()
    shorter = tokens != tokens_of(stopwatch.dense)
    eager = stopwatch.timing.runtime == "eager"
    plans = [
        {key: widths[int(place * (len(widths) - 1))] for key, widths in job.choices.items()}
        for place in (_PLACES if eager else _PLACES[-1:])
    ]
    # A layer alone is not exactly as fast as in the model: cut models say how much of its saving arrives.
    models = [counted] * shorter + [_cut(counted, job, widths) for widths in plans]
    calls = _layer_calls(job, stopwatch, counted)
    layers: dict[Any, _LayerCall] = {}
    for call in calls:
        layers.setdefault(call.key, call)
    parts = {key: stopwatch.as_run(layer.replay({})) for key, layer in layers.items()}
    comparison = stopwatch.compare(models, list(parts.values()), seconds=_MODEL_SECONDS)
    all_channels, *ratios = comparison.ratios[shorter:]  # the dense model's own ratio is 1
    shares = dict(zip(parts, ratios[len(plans) :], strict=True))
    times = []
    for done, (key, layer) in enumerate(layers.items(), 1):
        points = points_to_measure(layer.choices)
        # Ratios to the layer with all channels, whose share of the model was measured above.
        runs = [parts[key], *(stopwatch.as_run(layer.replay(widths)) for widths in points[1:])]
        relative = stopwatch.compare((), runs, seconds=_LAYER_SECONDS * len(points), dense=False).ratios
        first, *others = (
            Point(*each) for each in zip(points, (shares[key] * r for r in relative), strict=True)
        )
        times.append(LayerTimes(first, tuple(others)))
        stopwatch.reporter.advance(done, len(layers))
    numbers = {key: number for number, key in enumerate(layers)}
    runs_of_layers = tuple((call.layer.name, numbers[call.key]) for call in calls)
    dense = round(1e6 * comparison.milliseconds[0])
    table = TimeTable(runs_of_layers, tuple(times), all_channels, dense=dense)
    return table.with_anchors(list(zip(plans, ratios[: len(plans)], strict=True)))


class _LayerCall:
    """Recorded call of a layer in 1 forward pass of the model, which can be timed at other widths."""

    def __init__(
        self, model: nn.Module, layer: Layer, call: LayerInputs, choices: dict[str, tuple[int, ...]]
    ) -> None:
        self.module, self.layer, self.call = model.get_submodule(layer.name), layer, call
        self.choices = choices
        """Allowed widths by kind."""
        self.key = (cost_key(self.module), repr(call), tuple(choices.items()))
        """Equal for runs that cost the same."""

    def replay(self, widths: Mapping[str, int]) -> Replay:
        all_widths = {unit.kind: widths.get(unit.kind, unit.width) for unit in self.layer.units}
        return Replay(cut_to_widths(self.module, self.layer, all_widths), self.call).eval()


def _layer_calls(job: Job, stopwatch: Stopwatch, counted: nn.Module) -> list[_LayerCall]:
    """Return the calls of prunable layers in 1 forward pass of ``counted``, layer by layer."""
    choices: dict[str, dict[str, tuple[int, ...]]] = {}
    for (name, kind), widths in job.choices.items():
        choices.setdefault(name, {})[kind] = widths
    images = fixed_images(stopwatch.timing.latency_batch_size, stopwatch.size)
    with recorded_calls(counted, list(choices)) as recorded, torch.inference_mode():
        counted(images)
    return [
        _LayerCall(counted, layer, call, choices[layer.name])
        for layer in find_prunable_layers(counted).layers
        for call in recorded.get(layer.name, ())
    ]


def _cut(model: nn.Module, job: Job, widths: Mapping[UnitKey, int]) -> nn.Module:
    """Return a copy of ``model`` that keeps the first channels of each head, for timing only."""
    slim = copy.deepcopy(model)
    cut(slim, Plan(tuple(unit.keep_first(widths[unit.key]) for unit in job.units)))
    return slim
