"""One pass of images through the dense model: what the indicators need, and the teacher's answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Unit
from mhacut.surgery import Anatomy, UnitKey
from mhacut.taps import listening
from mhacut.tensor.attention_difference import logit_energy, output_energy
from mhacut.tensor.similarity import cosine_similarity, redundancy

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class UnitStatistics:
    """What the calibration pass learned of one unit."""

    redundancy: Tensor
    """Mean similarity of each channel to the others of its head, [H, d], in [0, 1]."""
    difference: Tensor
    """||A - A without the channel||_F, [H, d]: of the logits for qk, of the layer's output otherwise."""


@dataclass(frozen=True)
class Calibration:
    """Statistics of every unit, and the dense model's outputs for the same images."""

    statistics: Mapping[UnitKey, UnitStatistics]
    teacher: Tensor
    """Dense outputs, [images, classes]."""


class _Accumulator:
    """Sums over images for one unit, float64, on the model's device; as large for one image as for many."""

    def __init__(self, unit: Unit) -> None:
        self.unit = unit
        self.grams: dict[str, Tensor] = {}
        self.energy: Tensor | None = None
        self._waiting: dict[str, Tensor] = {}

    def feed(self, tap: str, channels: Tensor) -> None:
        """Take one batch of one tap, [..., heads, width]."""
        flat = channels.flatten(0, -3).transpose(0, 1).float()  # (H, rows, d)
        gram = (flat.transpose(-2, -1) @ flat).double()
        self.grams[tap] = self.grams[tap] + gram if tap in self.grams else gram
        if self.unit.kind == "qk":
            self._waiting[tap] = channels
            if len(self._waiting) == 2:
                query, key = (
                    self._waiting.pop(name).movedim(-2, 1).flatten(2, -2) for name in ("query", "key")
                )
                energy = logit_energy(query.double(), key.double())
                self.energy = energy if self.energy is None else self.energy + energy

    def finish(self, module: nn.Module) -> UnitStatistics:
        unit = self.unit
        if unit.kind == "qk":
            assert self.energy is not None
            similar = redundancy(cosine_similarity(self.grams["query"]), cosine_similarity(self.grams["key"]))
            return UnitStatistics(similar.cpu(), self.energy.sqrt().cpu())
        assert unit.readout is not None
        inside = "value" if unit.kind == "v" else "hidden"
        leaving = "output" if unit.kind == "v" else "hidden"
        columns = module.get_parameter(unit.readout.tensor).detach().double().movedim(unit.readout.dim, -1)
        columns = columns.reshape(-1, columns.shape[-1])  # (out, offset + H * d + ...)
        columns = columns[:, unit.readout.offset : unit.readout.offset + unit.heads * unit.width]
        second_moment = self.grams[leaving].diagonal(dim1=-2, dim2=-1)
        energy = output_energy(second_moment, columns.reshape(-1, unit.heads, unit.width))
        return UnitStatistics(redundancy(cosine_similarity(self.grams[inside])).cpu(), energy.sqrt().cpu())


@torch.no_grad()
def calibrate(
    model: nn.Module,
    anatomy: Anatomy,
    images: Tensor,
    *,
    batch_size: int,
    progress: Progress | None = None,
) -> Calibration:
    """Run ``images`` [n, C, H, W] through ``model`` once and gather :class:`Calibration`.

    Args:
        model: dense, eval mode, float32; images are moved to its device batch by batch.
        anatomy: of ``model``.
        images: normalised.
        batch_size: images at a time.
        progress: called with (images done, images in all).
    """
    accumulators = {unit.key: _Accumulator(unit) for unit in anatomy.units()}
    device = next(model.parameters()).device
    teacher = []
    with listening(model, anatomy.units(), lambda unit, tap, x: accumulators[unit.key].feed(tap, x)):
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            teacher.append(model(batch.to(device)).float().cpu())
            if progress is not None:
                progress(start + len(batch), len(images))
    statistics = {
        unit.key: accumulators[unit.key].finish(model.get_submodule(unit.layer)) for unit in anatomy.units()
    }
    return Calibration(statistics, torch.cat(teacher))
