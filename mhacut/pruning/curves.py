"""Sensitivity curves: how much the model's output changes when one unit alone is cut to each width. Ours.

An error e of a layer's output changes the model's output by a KL divergence of about 1/2 tr(F E[e e^T]), with
F the layer's Fisher information (:class:`mhacut.pruning.fisher.FisherInformation`). For v and hidden channels
E[e e^T] follows from the calibration's moments. The effect of a cut of the logits passes through a softmax,
and v channels may feed other channels, so in these cases the layer is run again at every width. The true
divergence is larger, because errors of an image's tokens add up, but by nearly the same factor in all units,
so units compare correctly (:func:`divergence_by_cut` for their sum).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Layer, Unit
from mhacut.linalg.reconstruction import LinearProblem, output_error, symmetric_root, weighed_by
from mhacut.linalg.selection import Removal
from mhacut.plan import UnitKey
from mhacut.pruning.calibrate import WITHOUT_GRADIENTS, Calibration
from mhacut.pruning.candidates import Candidate, few_rows
from mhacut.pruning.job import Job
from mhacut.pruning.repair import shrink
from mhacut.pruning.unit_moments import UnitMoments, block_diagonal, rotated
from mhacut.runtime.progress import Counter
from mhacut.surgery.channels import effective_output_weights
from mhacut.surgery.hooks import captured_outputs, registered

Curve = Mapping[int, float]
"""Estimated KL divergence in nats at each width; 0 at the dense width."""
MOST_WIDTHS = 8
"""Widths at which a layer is run; between them the logarithm of the error is interpolated."""
FEW_WIDTHS = 5
"""The same of more than :data:`WIDE` channels that were seen in few rows."""
WIDE = 2048
"""Channels above which each of these widths takes seconds."""
REPLAYED = 16
"""Calibration images on which layers are run again."""
CHANNEL_FACTOR, CHANNEL_POWER = 6.9, 1.22
"""Divergence of a model whose channels were cut and healed, as a function of the sum of its curves: that of
an ImageNet ViT-Ti. Errors of layers and tokens reinforce each other, which curves leave out."""


@torch.no_grad()
def sensitivity_curves(
    job: Job, calibration: Calibration, candidates: Mapping[UnitKey, Candidate]
) -> dict[UnitKey, Curve]:
    """Return the curve of every unit in ``candidates``, at the widths of :attr:`Job.choices`.

    Args:
        job: what is pruned.
        calibration: of its model, with Fisher information.
        candidates: how each unit would be cut.
    """
    curves: dict[UnitKey, Curve] = {}
    sums: dict[UnitKey, _Sums] = {}
    to_run = []
    counter = Counter(job.reporter, len(candidates))
    for layer in job.prunable.layers:
        module = job.model.get_submodule(layer.name)
        for unit in layer.units:
            if unit.key in candidates and not _is_run(unit):
                fisher, moments = calibration.fisher.matrices[layer.name], calibration.moments[unit.key]
                curves[unit.key] = _output_curve(
                    module, candidates[unit.key], moments, fisher, job.choices[unit.key], job.options.repair
                )
                counter.add(1)
        if any(_is_run(unit) and unit.key in candidates for unit in layer.units):
            to_run.append(layer)

    count = 0  # images that run at once

    def replay(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if module is not job.model.get_submodule(layer.name):
                return  # a copy made below, which took the hook along
            run = _Run(layer, module, args, kwargs, count)
            for unit in layer.units:
                if _is_run(unit) and unit.key in candidates:
                    dense = output if not layer.result else run.result(copy.deepcopy(module))
                    if unit.key not in sums:
                        sums[unit.key] = _Sums()
                        counter.add(1)
                    _add_runs(sums[unit.key], job, calibration, candidates[unit.key], run, dense)

        return hook

    with registered(
        job.model.get_submodule(layer.name).register_forward_hook(replay(layer), with_kwargs=True)
        for layer in to_run
    ):
        for images in (
            job.images[:REPLAYED].split(WITHOUT_GRADIENTS * job.options.batch_size) if to_run else ()
        ):
            count = len(images)
            job.model(images.to(job.device))
    return curves | {key: own.curve(job.choices[key]) for key, own in sums.items()}


def _is_run(unit: Unit) -> bool:
    """Whether the curve of ``unit`` requires runs of its layer."""
    return unit.kind == "qk" or unit.feeds


def _output_curve(
    module: nn.Module,
    candidate: Candidate,
    moments: UnitMoments,
    fisher: Tensor,
    choices: Sequence[int],
    refit: bool,
) -> Curve:
    """Curve of v or hidden channels, from their moments."""
    unit, ranking, constant = candidate.unit, candidate.ranking, candidate.unit.constants_pass and refit
    few = refit and few_rows(unit, moments)
    if unit.heads == 1 and isinstance(ranking, Removal) and not few:
        return {width: float(ranking.error[width]) / 2 for width in choices}
    in_basis, columns = rotated(moments, unit, candidate.rotation), effective_output_weights(module, unit)
    if candidate.rotation is not None:
        columns = columns @ block_diagonal(candidate.rotation).mT
    heads = unit.width * torch.arange(unit.heads, device=columns.device)[:, None]
    error: Callable[[Tensor], float]
    if few:
        weighed = weighed_by(symmetric_root(fisher), columns)
        error = LinearProblem(in_basis.fit[0], in_basis.held[0], weighed, constant=constant).error
    else:
        every = in_basis.every[0]
        second = every.covariance if constant else every.energy
        error = partial(output_error, second, columns=columns, fisher=fisher, refit=refit)
    sampled = {unit.width: 0.0}
    slow = few and unit.heads * unit.width > WIDE
    for width in sampled_widths(choices, FEW_WIDTHS if slow else MOST_WIDTHS):
        if width < unit.width:
            sampled[width] = error((ranking.kept(width) + heads).reshape(-1)) / 2
    return _interpolated(sampled, choices)


@dataclass(frozen=True)
class _Run:
    """One run of a layer of the dense model."""

    layer: Layer
    module: nn.Module
    args: Any
    kwargs: Any
    images: int
    """Number of images that run at once."""

    def result(self, module: nn.Module) -> Tensor:
        """Run ``module`` in place of the layer; return what its output projections give."""
        result = self.layer.result  # the module itself, by an empty name
        with captured_outputs(module, [result]) as found:
            module(*self.args, **self.kwargs)
        output: Tensor = found[result][-1]
        return output


@dataclass
class _Sums:
    """Errors of one unit, by width, over all rows of all batches."""

    errors: dict[int, Tensor] = field(default_factory=dict)
    rows: int = 0

    def curve(self, choices: Sequence[int]) -> Curve:
        """Return the curve at all ``choices``."""
        sampled = {width: float(error / self.rows) / 2 for width, error in self.errors.items()}
        return _interpolated({**sampled, choices[-1]: 0.0}, choices)


def _add_runs(
    sums: _Sums, job: Job, calibration: Calibration, candidate: Candidate, run: _Run, output: Tensor
) -> None:
    """Run a layer with ``candidate`` cut to several widths; ``output`` is the dense layer's."""
    unit, layer, choices = candidate.unit, run.layer, job.choices[candidate.unit.key]
    moments, options = calibration.moments[unit.key], job.options
    dense = output.movedim(layer.channel_dim, -1)  # (B, ..., out)
    fisher = calibration.fisher.matrices[layer.name]
    importance = calibration.fisher.token_importance(layer.name, dense.shape[:-1], run.images)
    for width in sampled_widths(choices)[:-1]:
        smaller = copy.deepcopy(run.module)
        shrink(smaller, unit, candidate, width, moments, options.temperature, refit=options.repair)
        error = (run.result(smaller).movedim(layer.channel_dim, -1) - dense).flatten(0, -2)
        weighed = error if importance is None else error * importance[:, None].to(error)  # (rows, out)
        found = (fisher * (error.mT @ weighed)).sum()
        sums.errors[width] = sums.errors[width] + found if width in sums.errors else found
    sums.rows += dense[..., 0].numel()


def divergence_by_cut(error: float) -> float:
    """Return the expected divergence in nats of a cut and healed model whose curves sum to ``error``."""
    return float(CHANNEL_FACTOR * max(error, 0.0) ** CHANNEL_POWER)  # rounding may leave less than nothing


def sampled_widths(choices: Sequence[int], most: int = MOST_WIDTHS) -> list[int]:
    """Return at most ``most`` of ``choices``, ascending, ends included, spread logarithmically."""
    if len(choices) <= most:
        return list(choices)
    low, high = math.log(choices[0]), math.log(choices[-1])
    wanted = [math.exp(low + (high - low) * step / (most - 1)) for step in range(most)]
    return sorted({min(choices, key=lambda width: abs(width - target)) for target in wanted})


def _interpolated(sampled: Mapping[int, float], choices: Sequence[int]) -> Curve:
    """Errors at all ``choices``, never rising with the width."""
    known = sorted(sampled)
    tiny = 1e-30
    curve: dict[int, float] = {}
    for width in choices:
        above = next(known_width for known_width in known if known_width >= width)
        if above == width:
            curve[width] = sampled[width]
            continue
        below = max(known_width for known_width in known if known_width < width)
        share = (width - below) / (above - below)
        if sampled[above] <= tiny:  # the dense width, where there is no logarithm
            curve[width] = sampled[below] * (1 - share)
        else:
            logs = math.log(max(sampled[below], tiny)), math.log(sampled[above])
            curve[width] = math.exp(logs[0] + share * (logs[1] - logs[0]))
    least = math.inf
    for width in choices:
        least = curve[width] = min(least, curve[width])
    return curve
