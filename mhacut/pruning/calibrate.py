"""Streaming passes of images through the dense model: everything later steps know of its activations.

Per unit, moments of its channels, apart for images to fit and images held out; per layer, how sharply the
model's answer reacts to an error of the layer's output (:mod:`mhacut.pruning.fisher`), which also says
how much each token counts in the moments; and the answers themselves. But for the answers, all of it is
as large for one image as for many; the images are the caller's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Layer, Unit
from mhacut.errors import MhacutError
from mhacut.linalg.attention_difference import (
    linear_attention_energy,
    linear_contributions,
    logit_energy,
    output_energy,
)
from mhacut.linalg.moments import Moments
from mhacut.linalg.similarity import cosine_similarity, redundancy
from mhacut.pruning.fisher import FisherInformation, measure_fisher
from mhacut.runtime.distributed import Processes
from mhacut.surgery.find import PrunableLayers, UnitKey
from mhacut.surgery.hooks import capturing
from mhacut.surgery.output import effective_output_weights

Progress = Callable[[int, int], None]
HELD_OUT = 0.25
"""Share of the images that judges what the others were fitted to."""


def held_out(images: int) -> int:
    """How many of so many images judge what the others were fitted to; 0 of a single one."""
    return max(1, round(HELD_OUT * images)) if images > 1 else 0


@dataclass(frozen=True)
class UnitMoments:
    """Moments of one unit's channels, as its readout sees them.

    (query, key), [H, d] each, for qk, k centred over the keys of each image unless ``select``; of linear
    attention (parts,), [H, d], of what each channel adds to the layer's output; otherwise (channels,) over
    all heads at once, [H * d]. Tokens count as much as they influence the answer, where that is known; not
    keys, which serve all queries, nor those of linear attention.
    """

    fit: tuple[Moments, ...]
    held: tuple[Moments, ...]
    """The same as ``fit`` where there is a single image."""

    @property
    def every(self) -> tuple[Moments, ...]:
        """Of all images."""
        return tuple(fit + held for fit, held in zip(self.fit, self.held, strict=True))


@dataclass(frozen=True)
class UnitStatistics:
    """Where a unit's indicators start from.

    Those of v's outputs and of hidden channels count tokens as the moments do.
    """

    redundancy: Tensor
    """Mean similarity of each channel to the others of its head, [H, d], in [0, 1]."""
    difference: Tensor
    """||A - A without the channel||_F, [H, d]: of the logits for qk, of the layer's output otherwise."""


@dataclass(frozen=True)
class Calibration:
    """What one pass learned."""

    held: int
    """The first so many images are the ones held out; 0 with a single image, which then serves for both."""
    moments: Mapping[UnitKey, UnitMoments]
    statistics: Mapping[UnitKey, UnitStatistics]
    fisher: FisherInformation
    """Of the answer to errors of each layer's output; empty when not asked for."""
    teacher: Tensor
    """Dense outputs, [images, classes]."""


class _Accumulator:
    """Sums over images for one unit, float64, on the model's device."""

    def __init__(self, unit: Unit, fisher: FisherInformation, output_gram: Tensor | None = None) -> None:
        """Start from nothing; ``output_gram``, [H, d_v, d_v], is of what heads of linear attention give."""
        self.unit, self.fisher, self.output_gram = unit, fisher, output_gram
        self.parts: dict[tuple[str, bool], Moments] = {}
        self.grams: dict[str, Tensor] = {}
        self.energy: Tensor | None = None
        self._waiting: dict[str, Tensor] = {}

    def feed(self, hook: str, channels: Tensor, images: int, held: bool) -> None:
        """Take one batch of so many images of one tap, [..., heads, width]."""
        if self.unit.linear:
            self._feed_linear(hook, channels.movedim(-2, 1).flatten(2, -2), held)
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
        if hook != "output":  # the values, or hidden channels, which are what the readout reads
            self._gram(hook, channels.flatten(0, -3).transpose(0, 1))
        if hook != "value":
            self._moments(hook, channels.flatten(-2).flatten(0, -2), weights, held)  # (rows, H * d)

    def _feed_linear(self, hook: str, x: Tensor, held: bool) -> None:
        """Take features or values, (B, H, N, d); they mean something together only."""
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
        self.parts[key] = self.parts[key] + moments if key in self.parts else moments

    def _gram(self, hook: str, rows: Tensor) -> None:
        """Of rows as they are, [H, d, d], for similarity; of an MLP the moments say it already."""
        if self.unit.kind == "hidden":
            return
        flat = rows.float()
        gram = (flat.mT @ flat).double()
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
        """Everything gathered so far, by names that are alike in every process."""
        found = {f"gram {hook}": gram for hook, gram in self.grams.items()}
        if self.energy is not None:
            found["energy"] = self.energy
        for (hook, held), part in self.parts.items():
            name = f"{hook} {'held' if held else 'fit'}"
            rows = torch.tensor(part.rows, dtype=torch.int64, device=part.total.device)
            found |= {f"rows {name}": rows, f"total {name}": part.total, f"second {name}": part.second}
        return found

    def take_sums(self, sums: Mapping[str, Tensor]) -> None:
        """The inverse of :meth:`sums`."""
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
        """Of what was fed so far."""
        hooks = {"qk": ("query", "key"), "v": ("output",), "hidden": ("hidden",)}[self.unit.kind]
        if self.unit.linear:
            hooks = ("parts",)
        fit, held = (
            tuple(self.parts[hook, part] for hook in hooks if (hook, part) in self.parts)
            for part in (False, True)
        )
        return UnitMoments(fit or held, held or fit)

    def statistics(self, module: nn.Module) -> UnitStatistics:
        """Of what was fed so far, on the CPU; ``module`` is the unit's layer."""
        unit, moments = self.unit, self.moments().every
        if unit.kind == "qk":
            assert self.energy is not None
            similar = redundancy(cosine_similarity(self.grams["query"]), cosine_similarity(self.grams["key"]))
            return UnitStatistics(similar.cpu(), self.energy.sqrt().cpu())
        second = moments[0].second
        gram = second[None] if unit.kind == "hidden" else self.grams["value"]
        columns = effective_output_weights(module, unit).view(-1, unit.heads, unit.width)
        energy = output_energy(second.diagonal().view(unit.heads, unit.width), columns)
        return UnitStatistics(redundancy(cosine_similarity(gram)).cpu(), energy.sqrt().cpu())


@torch.no_grad()
def calibrate(
    model: nn.Module,
    prunable: PrunableLayers,
    images: Tensor,
    *,
    batch_size: int,
    fisher_images: int = 0,
    token_weights: bool = True,
    seed: int = 0,
    classifier: bool = True,
    progress: Progress | None = None,
    processes: Processes | None = None,
) -> Calibration:
    """Run ``images`` [n, C, H, W] through ``model`` and gather :class:`Calibration`.

    Several processes take turns batch by batch, and add up what they found: every one of them is given the
    same as one alone would be, up to the rounding of sums.

    Args:
        model: dense, eval mode, float32, without gradients; images are moved to its device batch by batch.
        prunable: of ``model``.
        images: normalised.
        batch_size: images at a time.
        fisher_images: how many of those to fit are differentiated first, for the layers' fisher;
            each costs about three times an image that is not.
        token_weights: whether tokens count as much as those images say they influence the answer.
        seed: of the random projections that estimate it.
        classifier: whether outputs are class logits.
        progress: called with (images done, images in all), those differentiated counted twice.
        processes: that share the images, each of which it was given all of; None for this one alone.

    Raises:
        MhacutError: an answer is not finite.
    """
    processes = processes or Processes(0, 1, images.device)
    count = len(images)
    held = held_out(count)
    fitted = images[held:][:fisher_images]
    done = 0

    def advance(by: int) -> None:
        nonlocal done
        done += by
        if progress is not None:
            progress(done, len(fitted) + count)

    fisher = FisherInformation()
    if len(fitted) > 0:
        fisher = measure_fisher(
            model,
            prunable,
            fitted,
            batch_size=batch_size,
            seed=seed,
            classifier=classifier,
            progress=advance,
            processes=processes,
        )
        if not token_weights:
            fisher = FisherInformation(fisher.matrices)
    accumulators = {
        unit.key: _Accumulator(unit, fisher, _output_gram(model, layer) if unit.linear else None)
        for layer in prunable.layers
        for unit in layer.units
    }
    device = next(model.parameters()).device
    answers: Tensor | None = None  # where other processes have theirs, zeros
    start = stop = 0

    def listen(unit: Unit, hook: str, channels: Tensor) -> None:
        accumulators[unit.key].feed(hook, channels, stop - start, held=start < held)

    with capturing(model, prunable.units(), listen):
        batches = [*_batches(held, count, batch_size), *_batches(0, held, batch_size)]
        for number, (start, stop) in enumerate(batches):
            if number % processes.size == processes.rank:
                outputs: Tensor = model(images[start:stop].to(device))
                if answers is None:
                    answers = torch.zeros(count, *outputs.shape[1:])
                answers[start:stop] = outputs.float().cpu()
            advance(stop - start)
    answers = _shared(processes, accumulators, answers)
    if not answers.isfinite().all():
        raise MhacutError(
            "the model's outputs are not finite on the calibration images; check --mean, --std and the file"
        )
    return Calibration(
        held,
        {key: accumulator.moments() for key, accumulator in accumulators.items()},
        {
            unit.key: accumulators[unit.key].statistics(model.get_submodule(unit.layer))
            for unit in prunable.units()
        },
        fisher,
        answers,
    )


def _shared(
    processes: Processes,
    accumulators: Mapping[UnitKey, _Accumulator],
    answers: Tensor | None,
) -> Tensor:
    """Add up, in place, what the processes gathered; gives the answers of all."""
    sums = {
        f"{number} {name}": part
        for number, accumulator in enumerate(accumulators.values())
        for name, part in accumulator.sums().items()
    }
    if answers is not None:
        sums["answers"] = answers
    sums = processes.summed(sums)
    for number, accumulator in enumerate(accumulators.values()):
        accumulator.take_sums(_under(f"{number} ", sums))
    return sums["answers"].cpu()


def _under(prefix: str, sums: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): part for name, part in sums.items() if name.startswith(prefix)}


def _output_gram(model: nn.Module, layer: Layer) -> Tensor:
    """W^T W of every head, with W the columns that read its values, [H, d_v, d_v], float64."""
    values = next(unit for unit in layer.units if unit.kind == "v")
    columns = effective_output_weights(model.get_submodule(layer.name), values).view(
        -1, values.heads, values.width
    )
    return torch.einsum("ohi,ohj->hij", columns, columns)


def _batches(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    for start in range(first, last, size):
        yield start, min(start + size, last)
