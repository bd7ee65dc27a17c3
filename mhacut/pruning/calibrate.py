"""Calibration: one streaming pass of images through the dense model, which gathers what later stages need.

Of every unit, moments of its channels, apart for images to fit and for held-out images; of every layer, the
Fisher information of its output (:mod:`mhacut.pruning.fisher`), which also weights tokens in the moments;
and the model's outputs. All but the outputs takes as much memory for one image as for many.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Layer, Unit
from mhacut.errors import MhacutError, option_name
from mhacut.linalg.attention_difference import (
    linear_attention_energy,
    linear_contributions,
    logit_energy,
    output_energy,
)
from mhacut.linalg.moments import Moments
from mhacut.linalg.similarity import cosine_similarity, redundancy
from mhacut.plan import UnitKey
from mhacut.pruning.fisher import FisherInformation, FisherOptions, measure_fisher
from mhacut.pruning.preserve import ANSWERS, Preserved
from mhacut.runtime.distributed import Processes
from mhacut.runtime.progress import SILENT, Counter, Reporter
from mhacut.surgery.find import PrunableLayers
from mhacut.surgery.hooks import capturing
from mhacut.surgery.output import effective_output_weights

HELD_OUT = 0.25
"""Fraction of the images that judges what was fitted to the others."""


def held_out(images: int) -> int:
    """Number of held-out images among ``images``; 0 of a single one."""
    return max(1, round(HELD_OUT * images)) if images > 1 else 0


def fewer(images: Tensor, held: int, most: int) -> tuple[Tensor, int]:
    """Return at most ``most`` of ``images``, and how many of them are held out.

    Args:
        images: [n, C, H, W], the held-out ones first.
        held: their number.
        most: at least 2; both kinds are cut to the same fraction, but to no less than one image.
    """
    if len(images) <= most:
        return images, held
    share = min(max(round(held * most / len(images)), 1), most - 1)
    return torch.cat([images[:share], images[held:][: most - share]]), share


@dataclass(frozen=True)
class UnitMoments:
    """Moments of one unit's channels, as its output projection sees them.

    - qk: (query, key), [H, d] each, k centred over the keys of each image unless the unit only selects.
    - linear attention: (parts,), [H, d], what each channel adds to the layer's output.
    - v and hidden: (channels,), [H * d], all heads at once.

    Rows are weighted by token importance where it is known; but not keys, which serve all queries, nor rows
    of linear attention.
    """

    fit: tuple[Moments, ...]
    """On the images to fit."""
    held: tuple[Moments, ...]
    """On held-out images; the same as ``fit`` where there is a single image."""

    @property
    def every(self) -> tuple[Moments, ...]:
        """On all images."""
        return tuple(fit + held for fit, held in zip(self.fit, self.held, strict=True))


@dataclass(frozen=True)
class UnitStatistics:
    """Initial values of a unit's indicators follow from these.

    Tokens are weighted as in the moments for v's outputs and hidden channels.
    """

    redundancy: Tensor
    """Mean similarity of each channel to the others of its head, [H, d], in [0, 1]."""
    difference: Tensor
    """||A - A without the channel||_F, [H, d]: of the logits for qk, of the layer's output otherwise."""


@dataclass(frozen=True)
class Calibration:
    """Statistics from one pass over the calibration images."""

    held: int
    """Number of held-out images, the first ones; 0 with a single image, which then serves for both."""
    moments: Mapping[UnitKey, UnitMoments]
    statistics: Mapping[UnitKey, UnitStatistics]
    fisher: FisherInformation
    """Fisher information of each layer's output; empty when not asked for."""
    teacher: Tensor
    """Preserved outputs of the dense model, [images, classes] or as :meth:`Preserved.outputs` gives them."""
    preserved: Preserved = ANSWERS
    """Description of these outputs."""


class _Accumulator:
    """Sums over images for one unit, float64, on the model's device."""

    def __init__(self, unit: Unit, fisher: FisherInformation, output_gram: Tensor | None = None) -> None:
        """Start from nothing; ``output_gram``, [H, d_v, d_v], is needed for linear attention only."""
        self.unit, self.fisher, self.output_gram = unit, fisher, output_gram
        self.parts: dict[tuple[str, bool], Moments] = {}
        self.grams: dict[str, Tensor] = {}
        self.energy: Tensor | None = None
        self._waiting: dict[str, Tensor] = {}

    def feed(self, hook: str, channels: Tensor, images: int, held: bool) -> None:
        """Add one batch of so many images from one hook, [..., heads, width]."""
        if self.unit.linear:
            self._feed_linear(hook, channels.movedim(-2, 1).flatten(2, -2), held)  # (B, H, N, d)
            return
        weights = None
        if hook != "key":
            weights = self.fisher.token_importance(self.unit.layer, channels.shape[:-2], images)
        if self.unit.kind == "qk":
            x = channels.movedim(-2, 1).flatten(2, -2)  # (B, H, N, d)
            self._energy(hook, x)
            if hook == "key" and self.unit.mixing != "select":
                x = x - x.mean(dim=-2, keepdim=True)  # softmax ignores what is constant over the keys
            self._gram(hook, x.transpose(0, 1).flatten(1, 2))
            self._moments(hook, x.transpose(0, 1).flatten(1, 2), weights, held)  # (H, B * N, d)
            return
        if hook != "output":  # values, or hidden channels, which are what the output projection reads
            self._gram(hook, channels.flatten(0, -3).transpose(0, 1))  # (H, B * N, d)
        if hook != "value":
            self._moments(hook, channels.flatten(-2).flatten(0, -2), weights, held)  # (B * N, H * d)

    def _feed_linear(self, hook: str, x: Tensor, held: bool) -> None:
        """Add features or values, (B, H, N, d), once query, key and value of a batch are there."""
        self._waiting[hook] = x
        if hook != "value":
            self._gram(hook, x.transpose(0, 1).flatten(1, 2))
        if len(self._waiting) < 3:
            return
        query, key, value = (self._waiting.pop(name) for name in ("query", "key", "value"))
        energy = linear_attention_energy(query, key)
        self.energy = energy if self.energy is None else self.energy + energy
        assert self.output_gram is not None
        second = linear_contributions(query, key, value, self.output_gram)
        rows = query.shape[0] * query.shape[2]
        parts, place = Moments(rows, torch.zeros_like(energy), second), ("parts", held)
        self.parts[place] = self.parts[place] + parts if place in self.parts else parts

    def _moments(self, hook: str, rows: Tensor, weights: Tensor | None, held: bool) -> None:
        moments, key = Moments.of(rows, weights), (hook, held)
        if key in self.parts:
            self.parts[key] += moments
        else:
            self.parts[key] = moments

    def _gram(self, hook: str, rows: Tensor) -> None:
        """Add unweighted products of rows, [H, rows, d], for similarity; an MLP's moments serve for that."""
        if self.unit.kind == "hidden":
            return
        flat = rows.float()
        gram = (flat.mT @ flat).double()  # (H, d, d)
        self.grams[hook] = self.grams[hook] + gram if hook in self.grams else gram

    def _energy(self, hook: str, x: Tensor) -> None:
        self._waiting[hook] = x
        if len(self._waiting) == 2:
            query, key = self._waiting.pop("query").float(), self._waiting.pop("key").float()
            if len(query) < len(key):  # queries of an image that all its windows share
                query = query.repeat_interleave(len(key) // len(query), dim=0)
            energy = logit_energy(query, key, centre=self.unit.mixing != "select")
            self.energy = energy.double() if self.energy is None else self.energy + energy.double()

    def sums(self) -> dict[str, Tensor]:
        """Everything gathered so far, under names that are the same in every process."""
        found = {f"gram {hook}": gram for hook, gram in self.grams.items()}
        if self.energy is not None:
            found["energy"] = self.energy
        for (hook, held), part in self.parts.items():
            name = f"{hook} {'held' if held else 'fit'}"
            rows = torch.tensor(part.rows, dtype=torch.int64, device=part.total.device)
            found |= {f"rows {name}": rows, f"total {name}": part.total, f"second {name}": part.second}
        return found

    def take_sums(self, sums: Mapping[str, Tensor]) -> None:
        """Replace everything gathered by ``sums``; the inverse of :meth:`sums`."""
        self.energy = sums.get("energy")
        self.grams = {name[5:]: gram for name, gram in sums.items() if name.startswith("gram ")}
        self.parts = {
            (name.split()[1], name.endswith(" held")): Moments(
                int(rows), sums["total" + name[4:]], sums["second" + name[4:]]
            )
            for name, rows in sums.items()
            if name.startswith("rows ")
        }

    def moments(self) -> UnitMoments:
        """Moments of everything gathered so far."""
        hooks = {"qk": ("query", "key"), "v": ("output",), "hidden": ("hidden",)}[self.unit.kind]
        if self.unit.linear:
            hooks = ("parts",)
        fit, held = (
            tuple(self.parts[hook, part] for hook in hooks if (hook, part) in self.parts)
            for part in (False, True)
        )
        return UnitMoments(fit or held, held or fit)

    def statistics(self, module: nn.Module) -> UnitStatistics:
        """Statistics of everything gathered so far, on the CPU; ``module`` is the unit's layer."""
        unit, moments = self.unit, self.moments().every
        if unit.kind == "qk":
            assert self.energy is not None
            similar = redundancy(cosine_similarity(self.grams["query"]), cosine_similarity(self.grams["key"]))
            return UnitStatistics(similar.cpu(), self.energy.sqrt().cpu())
        second = moments[0].second
        gram = second[None] if unit.kind == "hidden" else self.grams["value"]
        columns = effective_output_weights(module, unit).view(-1, unit.heads, unit.width)  # (out, H, d)
        energy = output_energy(second.diagonal().view(unit.heads, unit.width), columns)
        return UnitStatistics(redundancy(cosine_similarity(gram)).cpu(), energy.sqrt().cpu())


class _Pass:
    """Sums and outputs that one pass gathers in this process."""

    def __init__(self, model: nn.Module, prunable: PrunableLayers, fisher: FisherInformation) -> None:
        self.accumulators = {
            unit.key: _Accumulator(unit, fisher, _output_gram(model, layer) if unit.linear else None)
            for layer in prunable.layers
            for unit in layer.units
        }
        self.outputs: Tensor | None = None
        """[images, classes], on the CPU; zeros for the images of other processes."""
        self._images, self._held = 0, False

    def start_batch(self, images: int, held: bool) -> None:
        """Expect so many images next, all of them held out or none."""
        self._images, self._held = images, held

    def feed(self, unit: Unit, hook: str, channels: Tensor) -> None:
        """Add the activation of one hook for the current batch."""
        self.accumulators[unit.key].feed(hook, channels, self._images, self._held)

    def add_outputs(self, start: int, outputs: Tensor, images: int) -> None:
        """Keep the outputs of the images from ``start`` on, of ``images`` in all."""
        if self.outputs is None:
            self.outputs = torch.zeros(images, *outputs.shape[1:])
        self.outputs[start : start + len(outputs)] = outputs.float().cpu()

    def share(self, processes: Processes) -> Tensor:
        """Add up, in place, what all processes gathered; return the outputs of all images."""
        sums = {
            f"{number} {name}": part
            for number, accumulator in enumerate(self.accumulators.values())
            for name, part in accumulator.sums().items()
        }
        if self.outputs is not None:
            sums["outputs"] = self.outputs
        sums = processes.summed(sums)
        for number, accumulator in enumerate(self.accumulators.values()):
            prefix = f"{number} "
            own = {name: part for name, part in sums.items() if name.startswith(prefix)}
            accumulator.take_sums({name.removeprefix(prefix): part for name, part in own.items()})
        return sums["outputs"].cpu()

    def moments(self) -> dict[UnitKey, UnitMoments]:
        return {key: accumulator.moments() for key, accumulator in self.accumulators.items()}

    def statistics(self, model: nn.Module) -> dict[UnitKey, UnitStatistics]:
        return {
            key: accumulator.statistics(model.get_submodule(accumulator.unit.layer))
            for key, accumulator in self.accumulators.items()
        }


@torch.no_grad()
def calibrate(
    model: nn.Module,
    prunable: PrunableLayers,
    images: Tensor,
    *,
    batch_size: int,
    fisher: FisherOptions | None = None,
    reporter: Reporter = SILENT,
    processes: Processes | None = None,
) -> Calibration:
    """Run ``images`` [n, C, H, W] through ``model`` and gather a :class:`Calibration`.

    Several processes take turns batch by batch and add up their sums: each returns the same as one process
    alone would, up to the rounding of sums.

    Args:
        model: dense, eval mode, float32, without gradients; images are moved to its device batch by batch.
        prunable: its prunable layers.
        images: normalised; all of them in every process.
        batch_size: images at a time.
        fisher: how to estimate the Fisher information first, and what outputs to gather; None leaves the
            former out and gathers what the model gives.
        reporter: advances with the images, those to differentiate counted twice.
        processes: those that share the images; None for this one alone.

    Raises:
        MhacutError: an output is not finite.
    """
    processes = processes or Processes(0, 1, images.device)
    count, held, device = len(images), held_out(len(images)), next(model.parameters()).device
    differentiated = images[held:][: 0 if fisher is None else fisher.images]
    counter = Counter(reporter, len(differentiated) + count)
    information, preserved = FisherInformation(), Preserved.outputs_of(model)
    if fisher is not None and fisher.preserved is not None:
        preserved = fisher.preserved.fitted(model, images[held:], batch_size, processes)
    if fisher is not None and len(differentiated) > 0:
        information = measure_fisher(
            model,
            prunable,
            differentiated,
            batch_size=batch_size,
            options=replace(fisher, preserved=preserved),
            counter=counter,
            processes=processes,
        )
    preserved = preserved.thinned(model, images[:1].to(device), count)
    gathered = _Pass(model, prunable, information)
    batches = [*_batches(held, count, batch_size), *_batches(0, held, batch_size)]
    with capturing(model, prunable.units(), gathered.feed):
        for number, (start, stop) in enumerate(batches):
            if number % processes.size == processes.rank:
                gathered.start_batch(stop - start, start < held)
                outputs = preserved.outputs(model, images[start:stop].to(device))
                gathered.add_outputs(start, outputs, count)
            counter.add(stop - start)
    outputs = _finite(gathered.share(processes))
    statistics = gathered.statistics(model)
    return Calibration(held, gathered.moments(), statistics, information, outputs, preserved)


def _finite(outputs: Tensor) -> Tensor:
    if not outputs.isfinite().all():
        raise MhacutError(
            "the model's outputs are not finite on the calibration images; check "
            f"{option_name('mean')}, {option_name('std')} and the file"
        )
    return outputs


def _output_gram(model: nn.Module, layer: Layer) -> Tensor:
    """W^T W of every head, with W the columns that read its values, [H, d_v, d_v], float64."""
    values = next(unit for unit in layer.units if unit.kind == "v")
    columns = effective_output_weights(model.get_submodule(layer.name), values).view(
        -1, values.heads, values.width
    )  # (out, H, d_v)
    return torch.einsum("ohi,ohj->hij", columns, columns)


def _batches(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last, size):
        yield start, min(start + size, last)
