"""Sequential reconstruction: refit each output projection on its inputs in the already refitted cut model.

The repair before the cut sees the dense model's activations, one layer at a time. Here the linear output
projections of the cut model are refitted in the order in which it runs them, each by the ridge regression
that brings its output nearest to the dense model's. Ours; the order is that of GPTQ (Frantar et al. 2023).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial, reduce
from operator import add

import torch
from torch import Tensor, nn

from mhacut.pruning.calibrate import WITHOUT_GRADIENTS, Calibration, fewer
from mhacut.pruning.resumable import ResumableModel
from mhacut.runtime.progress import Reporter
from mhacut.surgery.find import PrunableLayers
from mhacut.surgery.hooks import captured_outputs

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Relative to the mean energy of the inputs."""
GUARD = 1.1
"""Ratio, after to before, below which the whole model's KL divergence on held-out images must stay. Above 1,
because these images already selected every projection's ridge and are too few for a finer comparison."""
MOST_IMAGES = 256
"""Bounds the memory: all images wait at each projection."""
MOST_BYTES = 2**30
"""Bounds the inputs and outputs of the widest projection, for all images in both models. The cached outputs
of other modules take several times as much."""
BATCHES = 8
"""Least number of batches in which many images are run."""
AT_ONCE = 2
"""Number of projections up to which the dense model runs at once, commonly those of a block: fewer stops take
less time, and more memory for the outputs."""


@torch.no_grad()
def sequentially_reconstructed(
    slim: nn.Module,
    prunable: PrunableLayers,
    dense: nn.Module,
    images: Tensor,
    calibration: Calibration,
    batch_size: int,
    reporter: Reporter,
) -> nn.Module:
    """Return a copy of ``slim`` with its output projections refitted, each on the refitted ones before it.

    Args:
        slim: cut from ``dense``, eval mode, float32; not modified.
        prunable: prunable layers of ``slim``.
        dense: eval mode, on the same device.
        images: [n, C, H, W], normalised, the held-out ones first, which choose the ridges. If there are more
            than :data:`MOST_IMAGES` or :data:`MOST_BYTES` allow, fewer are used, in the same proportion.
        calibration: of ``dense`` on these images: how many are held out, and how much each token counts.
        batch_size: images at a time where gradients are computed; here at most twice as many.
        reporter: advances with every projection.
    """
    refitted = copy.deepcopy(slim)
    device = next(dense.parameters()).device
    layers, bytes_per_image = _projections(refitted, prunable, dense, images[:1].to(device))
    most = min(MOST_IMAGES, max(2, MOST_BYTES // bytes_per_image))
    images, held = fewer(images, calibration.held, most)
    batches = images.to(device).split(min(WITHOUT_GRADIENTS * batch_size, math.ceil(len(images) / BATCHES)))
    names, done = list(layers), 0
    with ResumableModel(refitted, batches) as cut, ResumableModel(dense, batches) as whole:
        for group in (names[start : start + AT_ONCE] for start in range(0, len(names), AT_ONCE)):
            for name, aims in zip(group, whole.run_to(*group), strict=True):
                projection = refitted.get_submodule(name)
                assert isinstance(projection, nn.Linear)
                passes = zip(batches, *cut.run_to(name), aims, strict=True)
                importance = partial(calibration.fisher.token_importance, layers[name])
                sums = _sums(passes, held, importance, projection.bias is not None)
                if sums is not None and _refit(projection, *sums):
                    cut.repeat_target()
                done += 1
                reporter.advance(done, len(names))
    return refitted


def _projections(
    slim: nn.Module, prunable: PrunableLayers, dense: nn.Module, image: Tensor
) -> tuple[dict[str, str], int]:
    """Find the linear output projections that both models run once per pass.

    Returns:
        The layer of each, by its name and in the order in which ``slim`` runs them; and the bytes that input
        and output of the widest take for one image, in both models.
    """
    layers = {}
    for unit in prunable.units(("v", "hidden")):
        if unit.output_projection is not None and unit.output_norm is None:
            name = f"{unit.layer}.{unit.output_projection.tensor}".removesuffix(".weight")
            linear = all(type(model.get_submodule(name)) is nn.Linear for model in (slim, dense))
            if linear and unit.output_projection.dim == 1:
                layers[name] = unit.layer
    in_slim, in_dense = (_bytes_of_calls(model, layers, image) for model in (slim, dense))
    once = [name for name in in_slim if len(in_slim[name]) == len(in_dense.get(name, ())) == 1]
    widest = max((in_slim[name][0] + in_dense[name][0] for name in once), default=1)
    return {name: layers[name] for name in once}, widest


def _bytes_of_calls(model: nn.Module, names: Iterable[str], image: Tensor) -> Mapping[str, list[int]]:
    """Bytes of input and output at each call of these modules, in the order of their first calls."""
    with captured_outputs(model, names, lambda args, output: args[0].nbytes + output.nbytes) as calls:
        model(image)
    return calls


@dataclass(frozen=True)
class _Sums:
    """Weighted sums over rows, float64: all that ridge regression needs."""

    gram: Tensor
    """Products of inputs with inputs, [in, in]."""
    cross: Tensor
    """Products of inputs with targets, [in, out]."""
    energy: Tensor
    """Squares of the targets, a scalar."""

    @classmethod
    def of(cls, inputs: Tensor, targets: Tensor, weights: Tensor) -> _Sums:
        """Sum over [images, rows, in], [images, rows, out] and [images, rows, 1], in their precision."""
        weighted = (inputs * weights).flatten(0, 1).mT
        return cls(
            (weighted @ inputs.flatten(0, 1)).double(),
            (weighted @ targets.flatten(0, 1)).double(),
            (targets.double().square() * weights).sum(),
        )

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(self.gram + other.gram, self.cross + other.cross, self.energy + other.energy)

    def solver(self) -> Callable[[float], Tensor]:
        """Return the function from a relative ridge to the coefficients, [in, out]."""
        values, vectors = torch.linalg.eigh(self.gram)
        values, aim = values.clamp_min(0), vectors.mT @ self.cross
        mean = values.mean().clamp_min(torch.finfo(torch.float64).tiny)
        return lambda ridge: vectors @ (aim / (values + ridge * mean)[:, None])

    def error(self, coefficients: Tensor) -> float:
        """Squared error of the targets that ``coefficients`` leave."""
        return float(self.energy + (coefficients * (self.gram @ coefficients - 2 * self.cross)).sum())


def _sums(
    passes: Iterable[tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]],
    held: int,
    token_importance: Callable[[torch.Size, int], Tensor | None],
    biased: bool,
) -> tuple[_Sums, _Sums] | None:
    """Return the sums for a regression of the difference from the dense projection's output on the inputs.

    Args:
        passes: for each batch its images, and the projection's input and output in the cut and in the dense
            model.
        held: number of held-out images, the first ones.
        token_importance: how much each row counts, by the input's shape without channels and the images.
        biased: whether there is a bias to fit: an input that is always 1, the last one.

    Returns:
        Those of the images to fit and of the held-out ones; None where the models cannot be compared.
    """
    fit, unseen = [], []
    for images, (x, output), (_, aim) in passes:
        # Where rows do not lie image by image, they cannot be split. Where the cut model runs the projection
        # at other places than the dense model (VOLO's outlook, before it folds), there is nothing to aim at.
        if len(x) % len(images) or output.shape != aim.shape:
            return None
        inputs = x.reshape(len(images), -1, x.shape[-1])  # (B, rows, in)
        missing = (aim - output).reshape(len(images), -1, aim.shape[-1])  # (B, rows, out)
        ones = inputs.new_ones(*inputs.shape[:2], 1)
        weights = token_importance(x.shape[:-1], len(images))
        weights = ones if weights is None else weights.to(inputs).view(ones.shape)  # (B, rows, 1)
        if biased:
            inputs = torch.cat([inputs, ones], dim=-1)
        unseen.append(_Sums.of(inputs[:held], missing[:held], weights[:held]))
        fit.append(_Sums.of(inputs[held:], missing[held:], weights[held:]))
        held = max(held - len(images), 0)
    return reduce(add, fit), reduce(add, unseen)


def _refit(projection: nn.Linear, fit: _Sums, unseen: _Sums) -> bool:
    """Refit ``projection`` with the ridge of least ``unseen`` error; return whether the error fell."""
    solve = fit.solver()
    errors = {ridge: unseen.error(solve(ridge)) for ridge in RIDGES}
    ridge = min(errors, key=lambda choice: errors[choice])
    if errors[ridge] >= float(unseen.energy):
        return False
    move = (fit + unseen).solver()(ridge).to(projection.weight)
    projection.weight.add_(move[: projection.in_features].mT)
    if projection.bias is not None:
        projection.bias.add_(move[-1])
    return True
