"""Error curves: how far the model's answer moves when one unit alone is cut to each width (and repaired).

Ours. An error e of a layer's output moves the answer by a KL divergence of about 1/2 tr(S E[e e^T]), with S
the layer's fisher (:class:`mhacut.pruning.fisher.FisherInformation`). For v and hidden channels E[e e^T]
follows from the calibration's moments; what a cut of the logits does passes a softmax, and v channels may
feed others, so there the layer is run anew at every width. On a CIFAR-10 ViT the true divergence was 1.3 to
3 times the estimate in every unit (the errors of an image's tokens add up), which leaves the comparison of
units intact.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Layer, Unit
from mhacut.linalg.reconstruction import output_error, refit_linear, symmetric_root, weighed_by
from mhacut.linalg.selection import Removal
from mhacut.options.prune import Temperature
from mhacut.pruning.calibrate import Calibration, UnitMoments
from mhacut.pruning.candidates import Candidate, block_diagonal, few_rows, rotated
from mhacut.pruning.repair import shrink
from mhacut.surgery.find import PrunableLayers, UnitKey
from mhacut.surgery.output import effective_output_weights

Curve = Mapping[int, float]
"""Width to estimated KL divergence in nats; 0 at the dense width."""
MOST_WIDTHS = 8
"""Widths at which a layer is run; between them the logarithm of the error is taken to be linear."""


@torch.no_grad()
def sensitivity_curves(
    model: nn.Module,
    prunable: PrunableLayers,
    candidates: Mapping[UnitKey, Candidate],
    calibration: Calibration,
    choices: Mapping[UnitKey, Sequence[int]],
    images: Tensor,
    *,
    temperature: Temperature,
    refit: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> dict[UnitKey, Curve]:
    """The curve of every unit in ``candidates``.

    Args:
        model: dense, eval mode, float32, on the device to work on.
        prunable: of ``model``.
        candidates: how each unit would shrink.
        calibration: of ``model``, with sensitivities.
        choices: allowed widths per unit, ascending, the dense one last.
        images: a batch to run layers on where moments do not tell, [n, C, H, W], normalised.
        temperature: of the softmax, where refitting the logits does not help.
        refit: whether the cut will be repaired.
        progress: called with (layers done, layers in all).
    """
    curves: dict[UnitKey, Curve] = {}
    layers = [layer for layer in prunable.layers if any(unit.key in candidates for unit in layer.units)]
    for layer in layers:
        module = model.get_submodule(layer.name)
        for unit in layer.units:
            if unit.key in candidates and not _is_run(unit, candidates):
                fisher = calibration.fisher.matrices[layer.name]
                moments = calibration.moments[unit.key]
                curves[unit.key] = _output_curve(
                    module, candidates[unit.key], moments, fisher, choices[unit.key], refit
                )
    run_anew = [layer for layer in layers if any(_is_run(unit, candidates) for unit in layer.units)]
    done = 0

    def replay(layer: Layer) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            nonlocal done
            if module is not model.get_submodule(layer.name):
                return  # a copy made below, which took the hook along
            for unit in layer.units:
                if _is_run(unit, candidates):
                    curves[unit.key] = _curve_by_runs(
                        module,
                        layer,
                        candidates[unit.key],
                        calibration,
                        choices[unit.key],
                        temperature,
                        refit,
                        lambda: (args, kwargs),
                        output if not layer.result else _result(copy.deepcopy(module), layer, args, kwargs),
                        len(images),
                    )
            done += 1
            if progress is not None:
                progress(done, len(run_anew))

        return hook

    handles = [
        model.get_submodule(layer.name).register_forward_hook(replay(layer), with_kwargs=True)
        for layer in run_anew
    ]
    try:
        if run_anew:
            model(images.to(next(model.parameters()).device))
    finally:
        for handle in handles:
            handle.remove()
    return curves


def _is_run(unit: Unit, candidates: Mapping[UnitKey, Candidate]) -> bool:
    """Whether the curve of ``unit`` takes runs of its layer."""
    return (unit.kind == "qk" or unit.feeds) and unit.key in candidates


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
    if unit.heads == 1 and isinstance(ranking, Removal) and not few:
        return {width: float(ranking.error[width]) / 2 for width in choices}
    turned, columns = rotated(moments, unit, candidate.rotation), effective_output_weights(module, unit)
    if candidate.rotation is not None:
        columns = columns @ block_diagonal(candidate.rotation).mT
    seen, unseen, every = turned.fit[0], turned.held[0], turned.every[0]
    second = every.covariance if constant else every.energy
    weighed = weighed_by(symmetric_root(fisher), columns) if few else columns

    def error(width: int) -> float:
        kept = (ranking.kept(width) + heads).reshape(-1)
        if few and width < unit.width:
            return refit_linear(seen, unseen, kept, weighed, constant=constant).left
        return output_error(second, kept, columns, fisher, refit=refit)

    heads = unit.width * torch.arange(unit.heads, device=second.device)[:, None]
    return _interpolated({width: error(width) / 2 for width in sampled_widths(choices)}, choices)


def _curve_by_runs(
    module: nn.Module,
    layer: Layer,
    candidate: Candidate,
    calibration: Calibration,
    choices: Sequence[int],
    temperature: Temperature,
    refit: bool,
    inputs: Callable[[], tuple[Any, Any]],
    output: Tensor,
    images: int,
) -> Curve:
    unit, (args, kwargs) = candidate.unit, inputs()
    fisher, dense = calibration.fisher, output.movedim(layer.channel_dim, -1)
    matrix = fisher.matrices[layer.name]
    weights = fisher.token_importance(layer.name, dense.shape[:-1], images)
    sampled = {choices[-1]: 0.0}
    for width in sampled_widths(choices)[:-1]:
        smaller = copy.deepcopy(module)
        shrink(smaller, unit, candidate, width, calibration.moments[unit.key], temperature, refit=refit)
        found = _result(smaller, layer, args, kwargs).movedim(layer.channel_dim, -1)
        error = (found - dense).flatten(0, -2).double()
        weighed = error if weights is None else error * weights[:, None]
        sampled[width] = float((error @ matrix * weighed).sum() / len(error)) / 2
    return _interpolated(sampled, choices)


def _result(module: nn.Module, layer: Layer, args: Any, kwargs: Any) -> Tensor:
    """Run ``module``, as ``layer`` describes it; what its readouts give."""
    found: list[Tensor] = []
    submodule = module.get_submodule(layer.result)  # the module itself, by an empty name
    handle = submodule.register_forward_hook(lambda _, args, output: found.append(output))
    try:
        module(*args, **kwargs)
    finally:
        handle.remove()
    return found[-1]


def sampled_widths(choices: Sequence[int]) -> list[int]:
    """At most :data:`MOST_WIDTHS` of ``choices``, ascending, ends included, even in their logarithm."""
    if len(choices) <= MOST_WIDTHS:
        return list(choices)
    low, high = math.log(choices[0]), math.log(choices[-1])
    wanted = [math.exp(low + (high - low) * step / (MOST_WIDTHS - 1)) for step in range(MOST_WIDTHS)]
    return sorted({min(choices, key=lambda width: abs(width - target)) for target in wanted})


def _interpolated(sampled: Mapping[int, float], choices: Sequence[int]) -> Curve:
    """The errors at all ``choices``, never rising with the width."""
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
