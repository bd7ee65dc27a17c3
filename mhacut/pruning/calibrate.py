"""Calibration: statistics of the dense model from one pass over the calibration images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Unit
from mhacut.plan import UnitKey
from mhacut.pruning.fisher import FisherInformation, check_outputs, measure_fisher
from mhacut.pruning.paper.statistics import UnitStatistics
from mhacut.pruning.preserve import ANSWERS, Preserved
from mhacut.pruning.unit_moments import UnitMoments, UnitSums, output_gram_of
from mhacut.runtime.distributed import Processes
from mhacut.runtime.progress import SILENT, Counter, Reporter
from mhacut.surgery.find import PrunableLayers
from mhacut.surgery.hooks import capturing

WITHOUT_GRADIENTS = 2
"""Batch size of passes without gradients, relative to the batch size of passes with gradients."""
HELD_OUT = 0.25
"""Fraction of the calibration images that is held out to measure errors of fits."""


def held_out_count(images: int) -> int:
    return max(1, round(HELD_OUT * images)) if images > 1 else 0


@dataclass(frozen=True)
class Calibration:
    """Statistics from one pass over the calibration images. Held-out images are the first ``held``."""

    held: int
    """Number of held-out images. If there is only 1 image, the number is 0, and fits are measured on the
    image they used."""
    moments: Mapping[UnitKey, UnitMoments]
    statistics: Mapping[UnitKey, UnitStatistics]
    fisher: FisherInformation
    teacher: Tensor
    """Outputs of the dense model to preserve, [images, ...], as returned by :meth:`Preserved.outputs`."""
    preserved: Preserved = ANSWERS


@torch.no_grad()
def calibrate(
    model: nn.Module,
    prunable: PrunableLayers,
    images: Tensor,
    *,
    batch_size: int,
    preserved: Preserved | None = None,
    fisher_images: int = 0,
    seed: int = 0,
    token_importance: bool = True,
    reporter: Reporter = SILENT,
    processes: Processes | None = None,
) -> Calibration:
    """Run ``images`` [n, C, H, W] through ``model`` and return the statistics.

    Gradients are computed for the first ``fisher_images`` images that are not held out. A pass with gradients
    takes about 3 times as long.
    """
    processes = processes or Processes(0, 1, images.device)
    count, held, device = len(images), held_out_count(len(images)), next(model.parameters()).device
    differentiated = images[held:][:fisher_images]
    counter = Counter(reporter, len(differentiated) + count)
    preserved = (preserved or Preserved.outputs_of(model)).fitted(model, images[held:], batch_size, processes)
    information = measure_fisher(
        model,
        prunable,
        differentiated,
        batch_size=batch_size,
        preserved=preserved,
        seed=seed,
        token_importance=token_importance,
        counter=counter,
        processes=processes,
    )
    preserved = preserved.thinned(model, images[:1].to(device), count)
    gathered = {
        unit.key: UnitSums(unit, information, output_gram_of(model, layer) if unit.linear else None)
        for layer in prunable.layers
        for unit in layer.units
    }
    size, held_batch = 0, False  # of the batch that runs
    sums: dict[str, Tensor] = {}

    def feed(unit: Unit, hook: str, channels: Tensor) -> None:
        gathered[unit.key].feed(hook, channels, size, held_batch)

    with capturing(model, prunable.units(), feed):
        for number, (start, stop) in enumerate(_batches(held, count, batch_size)):
            if number % processes.size == processes.rank:
                size, held_batch = stop - start, start < held
                outputs = preserved.outputs(model, images[start:stop].to(device)).float().cpu()
                if "outputs" not in sums:
                    sums["outputs"] = torch.zeros(count, *outputs.shape[1:])  # 0 where others have outputs
                sums["outputs"][start:stop] = outputs
            counter.add(stop - start)
    outputs = _sum_over_processes(gathered, sums, processes)
    check_outputs(outputs)
    statistics = {
        key: unit_sums.statistics(model.get_submodule(key[0])) for key, unit_sums in gathered.items()
    }
    moments = {key: unit_sums.moments() for key, unit_sums in gathered.items()}
    return Calibration(held, moments, statistics, information, outputs.cpu(), preserved)


def _batches(held: int, count: int, size: int) -> list[tuple[int, int]]:
    parts = (held, count), (0, held)
    return [(start, min(start + size, last)) for first, last in parts for start in range(first, last, size)]


def _sum_over_processes(
    gathered: Mapping[UnitKey, UnitSums], sums: dict[str, Tensor], processes: Processes
) -> Tensor:
    """Sum the statistics of all units over the processes, and return the outputs of all images."""
    for number, unit_sums in enumerate(gathered.values()):
        sums |= {f"{number} {name}": part for name, part in unit_sums.sums.items()}
    sums = processes.summed(sums)
    for number, unit_sums in enumerate(gathered.values()):
        prefix = f"{number} "
        unit_sums.sums = {
            name.removeprefix(prefix): part for name, part in sums.items() if name.startswith(prefix)
        }
    return sums["outputs"]
