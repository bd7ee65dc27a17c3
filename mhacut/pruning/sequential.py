"""Repair once more, in order: what reads a cut layer is refitted on what the cut layers before it give. Ours.

The repair sees the dense model's activations, one layer at a time. Here the cut model runs beside
the dense one, and every linear readout is moved by the ridge regression that brings its output nearest to
the dense one's, before the model runs on. On two CIFAR-10 ViTs with 256 images (one seed, 2,000 validation
images) the divergence at 50, 25 and 12.5 % of the FLOPs went from .00020, .0175 and .087 to .00020, .0172
and .083, and from .0049, .124 and .363 to .0049, .122 and .336, in a third more time. To aim at what the
residual stream misses, not the layer's output alone, was no better.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhacut.pruning.distill import Distillation
from mhacut.pruning.fisher import FisherInformation
from mhacut.pruning.lockstep import run_in_lockstep
from mhacut.surgery.find import find_prunable_layers

RIDGES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Relative to the mean energy of the inputs."""
GUARD = 1.1
"""How much larger the divergence of the whole model may become on the images held out. Each readout is
judged by them already; of the whole model they are a coarse judge: 64 of them turned down what brought 2,000
others 2 to 3 % nearer. (With 8, 16 and 32 images and no veto it was within 1 % of what it had been.)"""
MOST_IMAGES = 256
"""So many of them wait at a readout with all that they are by then; more would fill the memory."""
MOST_BYTES = 2**30
"""That inputs and outputs of the widest readout may take, in both models, of all images. All that waits is
four times as much (measured: DeiT-S, 256 images, 0.6 GiB so counted, 2.5 GiB in truth)."""
BATCHES = 8
"""In which they run beside each other."""


@dataclass(frozen=True)
class RepairInOrder:
    """What it did."""

    model: nn.Module
    """Refitted; the one given, where that took it away."""
    before: float
    """Divergence (:class:`~.distill.Divergence`) from the dense model on the images held out."""
    after: float
    """The same of the refitted model, kept or not."""


def repair_in_order(
    slim: nn.Module,
    dense: nn.Module,
    images: Tensor,
    held: int,
    fisher: FisherInformation,
    judge: Distillation,
    *,
    progress: Callable[[int, int], None] | None = None,
) -> RepairInOrder:
    """Refit the readouts of ``slim`` one after the other, each on what those before it have become.

    Args:
        slim: cut from ``dense``, eval mode, float32; left as it is.
        dense: eval mode, on the same device.
        images: [n, C, H, W], normalised, the first ``held`` of them to choose ridges by. Of more than
            :data:`MOST_IMAGES`, or than :data:`MOST_BYTES` hold, so many are used, in that proportion.
        held: fewer than n, above 0.
        fisher: of ``dense``: how much each token counts.
        judge: the whole model, on images held out.
        progress: called after every readout with (done, readouts in all).
    """
    device = next(dense.parameters()).device
    refitted = copy.deepcopy(slim)
    once = [_readouts(model, images[:1].to(device)) for model in (refitted, dense)]
    # In both, so that they stop alike.
    readouts = {name: found.layer for name, found in once[0].items() if name in once[1]}
    each = max((sum(found[name].bytes_per_image for found in once) for name in readouts), default=1)
    most = min(MOST_IMAGES, max(2, MOST_BYTES // each))
    if len(images) > most:
        share = min(max(round(held * most / len(images)), 1), most - 1)
        images, held = torch.cat([images[:share], images[held:][: most - share]]), share
    done = 0

    def refit(name: str, inputs: list[list[Tensor]], outputs: list[list[Tensor]]) -> Collection[int]:
        nonlocal done
        moved = False
        given, answers, wanted = inputs[0], *outputs
        counts = [len(batch) for batch in batches]
        # One whose rows do not lie image by image tells no images apart; one that the cut model runs at other
        # places than the dense one (VOLO's outlook, before it folds) has nothing to be compared with.
        apart = all(len(rows) % count == 0 for rows, count in zip(given, counts, strict=True))
        alike = all(answer.shape == aim.shape for answer, aim in zip(answers, wanted, strict=True))
        if apart and alike:
            fit, unseen, left = _Sums(), _Sums(), held
            for part, answer, aim, count in zip(given, answers, wanted, counts, strict=True):
                weights = fisher.token_importance(readouts[name], part.shape[:-1], count)
                rows = _Rows.of(part, aim - answer, weights, count)
                judging = min(left, count)
                unseen.add(rows.of_images(slice(0, judging)))
                fit.add(rows.of_images(slice(judging, None)))
                left -= judging
            output_projection = refitted.get_submodule(name)
            assert isinstance(output_projection, nn.Linear)
            moved = _move(output_projection, fit, unseen)
        done += 1
        if progress is not None:
            progress(done, len(readouts))
        return (0,) if moved else ()

    batches = [batch.to(device) for batch in images.chunk(min(BATCHES, len(images)))]
    if readouts:
        run_in_lockstep((refitted, dense), batches, readouts, refit)
    before, after = judge.divergence_of(slim), judge.divergence_of(refitted)
    return RepairInOrder(refitted if after <= GUARD * before else slim, before, after)


@dataclass
class _Readout:
    """A linear module that reads v or hidden channels."""

    layer: str
    runs: int = 0
    """Per image."""
    bytes_per_image: int = 0
    """Of its input and output for one image."""


def _readouts(model: nn.Module, image: Tensor) -> dict[str, _Readout]:
    """Those that run once per image, by name."""
    found: dict[str, _Readout] = {}
    for unit in find_prunable_layers(model).units(("v", "hidden")):
        if unit.output_projection is None or unit.output_norm is not None:
            continue
        name = f"{unit.layer}.{unit.output_projection.tensor}".removesuffix(".weight")
        if type(model.get_submodule(name)) is nn.Linear and unit.output_projection.dim == 1:
            found[name] = _Readout(unit.layer)

    def counter(output_projection: _Readout) -> Callable[..., None]:
        def count(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output_projection.runs += 1
            output_projection.bytes_per_image = args[0].nbytes + output.nbytes

        return count

    handles = [
        model.get_submodule(name).register_forward_hook(counter(output_projection))
        for name, output_projection in found.items()
    ]
    try:
        with torch.no_grad():
            model(image)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: output_projection for name, output_projection in found.items() if output_projection.runs == 1
    }


@dataclass(frozen=True)
class _Rows:
    """What one readout gets and misses."""

    inputs: Tensor
    """[images, rows, in + 1], the last of them 1."""
    missing: Tensor
    """What its output lacks, [images, rows, out]."""
    weights: Tensor
    """[images, rows, 1]."""

    @classmethod
    def of(cls, inputs: Tensor, missing: Tensor, weights: Tensor | None, images: int) -> _Rows:
        """Of tensors [images * ..., channels]; without ``weights``, [all rows], rows count alike."""
        flat = inputs.reshape(images, -1, inputs.shape[-1])
        ones = flat.new_ones(*flat.shape[:2], 1)
        return cls(
            torch.cat([flat, ones], dim=-1),
            missing.reshape(images, -1, missing.shape[-1]),
            ones if weights is None else weights.to(flat).view(images, -1, 1),
        )

    def of_images(self, part: slice) -> _Rows:
        return _Rows(self.inputs[part], self.missing[part], self.weights[part])


class _Sums:
    """Sums over rows, float64, of a batch in the model's precision: all that ridge regression needs."""

    def __init__(self) -> None:
        self.gram: Tensor = torch.zeros((), dtype=torch.float64)
        """Of the inputs, [in + 1, in + 1]."""
        self.cross: Tensor = torch.zeros((), dtype=torch.float64)
        """Of inputs and what is missing, [in + 1, out]."""
        self.energy = 0.0
        """Of what is missing."""

    def add(self, rows: _Rows) -> None:
        inputs, missing = rows.inputs.flatten(0, 1), rows.missing.flatten(0, 1)
        weighed = (rows.inputs * rows.weights).flatten(0, 1)
        self.gram = self.gram + (weighed.mT @ inputs).double()
        self.cross = self.cross + (weighed.mT @ missing).double()
        self.energy += float((rows.missing.double().square() * rows.weights).sum())

    def __add__(self, other: _Sums) -> _Sums:
        both = _Sums()
        both.gram, both.cross = self.gram + other.gram, self.cross + other.cross
        both.energy = self.energy + other.energy
        return both

    def moves(self, biased: bool) -> Callable[[float], Tensor]:
        """The move of the weights, [in + 1, out], that each relative ridge gives."""
        size = len(self.gram) - (0 if biased else 1)
        values, vectors = torch.linalg.eigh(self.gram[:size, :size])
        values, aim = values.clamp_min(0), vectors.mT @ self.cross[:size]
        mean = values.mean().clamp_min(torch.finfo(torch.float64).tiny)
        rest = self.cross.new_zeros(len(self.gram) - size, self.cross.shape[1])
        return lambda ridge: torch.cat([vectors @ (aim / (values + ridge * mean)[:, None]), rest])

    def error(self, move: Tensor) -> float:
        """Squared error of the output after ``move``."""
        return self.energy + float((move * (self.gram @ move - 2 * self.cross)).sum())


def _move(output_projection: nn.Linear, fit: _Sums, unseen: _Sums) -> bool:
    """Move it at the ridge that leaves least of what is ``unseen``; not, where none leaves less."""
    moves = fit.moves(output_projection.bias is not None)
    errors = {ridge: unseen.error(moves(ridge)) for ridge in RIDGES}
    ridge = min(errors, key=lambda choice: errors[choice])
    if errors[ridge] >= unseen.energy:
        return False
    move = (fit + unseen).moves(output_projection.bias is not None)(ridge)
    output_projection.weight.add_(move[:-1].mT.to(output_projection.weight))
    if output_projection.bias is not None:
        output_projection.bias.add_(move[-1].to(output_projection.bias))
    return True
