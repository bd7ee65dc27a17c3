"""Sensitivity curves: effect on the model's output when a single unit is cut to each width.

An error e of a layer's output raises the KL divergence of the model's output by about 1/2 tr(F E[e e^T]),
where F is the layer's Fisher information. For v and hidden channels, E[e e^T] follows from the moments. For
q/k channels, and for v channels that feed other channels, the layer runs at each width.

The true divergence is larger, because errors of tokens add up. The factor is nearly the same for all units
(:func:`divergence_by_cut`).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Layer, Unit
from mhacut.linalg.reconstruction import linear_error, output_error, symmetric_root, weighed_by
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
"""Estimated KL divergence in nats, by width of the unit; 0 at the dense width."""
MAX_WIDTHS = 8
"""Maximum number of widths that are measured per unit. The logarithm of the error is interpolated between
measured widths."""
CHANNEL_FACTOR, CHANNEL_POWER = 6.9, 1.22
"""Factor and exponent that turn the sum of all curves into the divergence of a pruned and healed ImageNet
ViT-Ti. Curves leave out interactions between layers and tokens."""
DENSE_FACTOR = 3.5
"""Factor that turns the sum of all curves into the divergence of dense features
(docs/explanation/choices.md)."""


@torch.no_grad()
def sensitivity_curves(
    job: Job, calibration: Calibration, candidates: Mapping[UnitKey, Candidate]
) -> dict[UnitKey, Curve]:
    curves: dict[UnitKey, Curve] = {}
    counter = Counter(job.reporter, len(candidates))
    for layer in job.prunable.layers:
        module = job.model.get_submodule(layer.name)
        for unit in layer.units:
            if unit.key in candidates and not _needs_runs(unit):
                fisher, moments = calibration.fisher.matrices[layer.name], calibration.moments[unit.key]
                curves[unit.key] = _output_curve(
                    module, candidates[unit.key], moments, fisher, job.choices[unit.key], job.options.repair
                )
                counter.add(1)
    return curves | _curves_by_runs(job, calibration, candidates, counter)


def _needs_runs(unit: Unit) -> bool:
    return unit.kind == "qk" or unit.feeds


def _output_curve(
    module: nn.Module,
    candidate: Candidate,
    moments: UnitMoments,
    fisher: Tensor,
    choices: Sequence[int],
    refit: bool,
) -> Curve:
    unit, ranking, constant = candidate.unit, candidate.ranking, candidate.unit.constants_pass and refit
    few = refit and few_rows(unit, moments)
    if unit.heads == 1 and ranking.error is not None and not few:
        return {width: float(ranking.error[width]) / 2 for width in choices}
    in_basis, columns = rotated(moments, unit, candidate.rotation), effective_output_weights(module, unit)
    if candidate.rotation is not None:
        columns = columns @ block_diagonal(candidate.rotation).mT
    heads = unit.width * torch.arange(unit.heads, device=columns.device)[:, None]
    error: Callable[[Tensor], float]
    if few:
        weighed = weighed_by(symmetric_root(fisher), columns)
        error = linear_error(in_basis.fit[0], in_basis.held[0], weighed, constant=constant)
    else:
        second = in_basis.every[0].covariance if constant else in_basis.every[0].energy
        error = partial(output_error, second, columns=columns, fisher=fisher, refit=refit)
    # To second order, a divergence is half the error weighed by the Fisher information.
    sampled = {unit.width: 0.0}
    for width in sampled_widths(choices):
        if width < unit.width:
            sampled[width] = error((ranking.kept(width) + heads).reshape(-1)) / 2
    return _interpolated(sampled, choices)


def _curves_by_runs(
    job: Job, calibration: Calibration, candidates: Mapping[UnitKey, Candidate], counter: Counter
) -> dict[UnitKey, Curve]:
    errors: dict[UnitKey, dict[int, float | Tensor]] = {}  # by width, over all rows
    rows: dict[UnitKey, int] = {}
    count = 0  # images that run at once

    def replay(layer: Layer, units: Sequence[Unit]) -> Callable[..., None]:
        fisher = calibration.fisher.matrices[layer.name]

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if module is not job.model.get_submodule(layer.name):
                return  # a copy made below, which took the hook along

            def result(of: nn.Module) -> Tensor:
                with captured_outputs(of, [layer.result]) as outputs:  # the module's own, by an empty name
                    of(*args, **kwargs)
                given: Tensor = outputs[layer.result][-1].movedim(layer.channel_dim, -1)
                return given

            dense = result(copy.deepcopy(module)) if layer.result else output.movedim(layer.channel_dim, -1)
            importance = calibration.fisher.token_importance(layer.name, dense.shape[:-1], count)
            for unit in units:
                if unit.key not in errors:
                    errors[unit.key] = {}
                    counter.add(1)
                moments, candidate = calibration.moments[unit.key], candidates[unit.key]
                for width in sampled_widths(job.choices[unit.key])[:-1]:
                    smaller = copy.deepcopy(module)
                    shrink(smaller, unit, candidate, width, moments, refit=job.options.repair)
                    error = (result(smaller) - dense).flatten(0, -2)
                    weighed = error if importance is None else error * importance[:, None].to(error)
                    of_width = (fisher * (error.mT @ weighed)).sum()
                    errors[unit.key][width] = errors[unit.key].get(width, 0.0) + of_width
                rows[unit.key] = rows.get(unit.key, 0) + dense[..., 0].numel()

        return hook

    hooks = []
    for layer in job.prunable.layers:
        units = [unit for unit in layer.units if _needs_runs(unit) and unit.key in candidates]
        if units:
            module = job.model.get_submodule(layer.name)
            hooks.append(module.register_forward_hook(replay(layer, units), with_kwargs=True))
    with registered(hooks):
        replayed = job.images[: job.options.work.replayed_images]
        for images in replayed.split(WITHOUT_GRADIENTS * job.options.batch_size):
            count = len(images)
            if hooks:
                job.model(images.to(job.device))
    curves = {}
    for key, of_unit in errors.items():
        sampled = {width: float(error / rows[key]) / 2 for width, error in of_unit.items()}
        curves[key] = _interpolated({**sampled, job.choices[key][-1]: 0.0}, job.choices[key])
    return curves


def divergence_by_cut(error: float, dense: bool) -> float:
    """Return the expected divergence (nats) after pruning and healing. ``error`` is the sum of all curves."""
    error = max(error, 0.0)  # rounding may leave less than nothing
    return float(DENSE_FACTOR * error if dense else CHANNEL_FACTOR * error**CHANNEL_POWER)


def sampled_widths(choices: Sequence[int], most: int = MAX_WIDTHS) -> list[int]:
    """Return at most ``most`` of the widths ``choices``, spread logarithmically, with both ends."""
    if len(choices) <= most:
        return list(choices)
    low, high = math.log(choices[0]), math.log(choices[-1])
    wanted = [math.exp(low + (high - low) * step / (most - 1)) for step in range(most)]
    return sorted({min(choices, key=lambda width: abs(width - target)) for target in wanted})


def _interpolated(sampled: Mapping[int, float], choices: Sequence[int]) -> Curve:
    """Return errors at all widths in ``choices``. Errors never rise with the width."""
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
    # Kept channels of a smaller width are kept at a larger one too: a rise is noise of the estimate.
    least = math.inf
    for width in choices:
        least = curve[width] = min(least, curve[width])
    return curve
