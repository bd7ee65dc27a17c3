"""Moments of the channels of each unit, summed over calibration images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mhacut.adapters.base import ChannelAxis, Layer, Unit
from mhacut.linalg.moments import Moments, linear_attention_energy, linear_contributions
from mhacut.pruning.fisher import FisherInformation
from mhacut.pruning.paper.statistics import (
    UnitStatistics,
    cosine_similarity,
    logit_energy,
    output_energy,
    redundancy,
)
from mhacut.surgery.channels import channels_of, effective_output_weights


@dataclass(frozen=True)
class UnitMoments:
    """Moments of a unit's channels on the images for fitting and on held-out images.

    - qk: (query, key), [H, d] each. Keys are centred over each image unless ``mixing`` is "select".
    - linear attention: (parts,), [H, d], contributions to the layer's output.
    - v and hidden: (channels,), [H * d], all heads together.

    Tokens are weighted by importance if known. Keys and tokens of linear attention have equal weights.
    """

    fit: tuple[Moments, ...]
    held: tuple[Moments, ...]
    """Moments on held-out images. With a single image, equal to ``fit``."""

    @property
    def every(self) -> tuple[Moments, ...]:
        return tuple(fit + held for fit, held in zip(self.fit, self.held, strict=True))


def rotated(moments: UnitMoments, unit: Unit, rotation: Tensor | None) -> UnitMoments:
    """Return the moments after :func:`mhacut.surgery.channels.rotate` of the layer."""
    if rotation is None:
        return moments
    inverse = torch.linalg.inv(rotation).mT
    matrices = (rotation, inverse) if unit.kind == "qk" else (block_diagonal(inverse),)

    def transformed(part: tuple[Moments, ...]) -> tuple[Moments, ...]:
        return tuple(side.transformed(matrix) for side, matrix in zip(part, matrices, strict=True))

    return UnitMoments(transformed(moments.fit), transformed(moments.held))


def block_diagonal(blocks: Tensor) -> Tensor:
    """Return blocks [H, d, d] as a block-diagonal matrix [H * d, H * d]."""
    matrix: Tensor = torch.block_diag(*blocks)
    return matrix


class UnitSums:
    """Sums over images for a unit, by name, float64, on the model's device.

    Sums ``rows``, ``total`` and ``second`` give the moments of a hook, separately for held-out images. Sums
    ``gram`` and ``energy`` over all images give :class:`UnitStatistics`.
    """

    def __init__(self, unit: Unit, fisher: FisherInformation, output_gram: Tensor | None = None) -> None:
        self.unit, self.fisher, self.output_gram = unit, fisher, output_gram
        self.sums: dict[str, Tensor] = {}
        self._waiting: dict[str, Tensor] = {}

    def feed(self, hook: str, channels: Tensor, images: int, held: bool) -> None:
        """Add a batch of ``images`` images from a hook, [..., heads, width]."""
        unit = self.unit
        if unit.linear:
            self._feed_linear(hook, channels.movedim(-2, 1).flatten(2, -2), held)  # (B, H, N, d)
            return
        weights = None
        if hook != "key":
            weights = self.fisher.token_importance(unit.layer, channels.shape[:-2], images)
        if unit.kind == "qk":
            x = channels.movedim(-2, 1).flatten(2, -2)  # (B, H, N, d)
            self._add_logit_energy(hook, x)
            if hook == "key" and unit.mixing != "select":
                x = x - x.mean(dim=-2, keepdim=True)  # softmax ignores what is constant over the keys
            rows = x.transpose(0, 1).flatten(1, 2)  # (H, B * N, d)
            self._add_gram(hook, rows)
            self._add_moments(hook, Moments.of(rows, weights), held)
            return
        if hook == "value":  # before attention; similarity alone needs it
            self._add_gram(hook, channels.flatten(0, -3).transpose(0, 1))  # (H, B * N, d)
        else:
            self._add_moments(hook, Moments.of(channels.flatten(-2).flatten(0, -2), weights), held)

    def _feed_linear(self, hook: str, x: Tensor, held: bool) -> None:
        """Add features or values (B, H, N, d) after query, key and value of a batch have arrived."""
        self._waiting[hook] = x
        if hook != "value":
            self._add_gram(hook, x.transpose(0, 1).flatten(1, 2))
        if len(self._waiting) < 3:
            return
        query, key, value = (self._waiting.pop(name) for name in ("query", "key", "value"))
        energy = linear_attention_energy(query, key)
        assert self.output_gram is not None
        second = linear_contributions(query, key, value, self.output_gram)
        rows = query.shape[0] * query.shape[2]
        self._add_moments("parts", Moments(rows, torch.zeros_like(energy), second), held)
        self._add("energy", energy)

    def _add_logit_energy(self, hook: str, x: Tensor) -> None:
        """Add the logit energy of a batch after its queries and keys (B, H, N, d) have arrived."""
        self._waiting[hook] = x
        if len(self._waiting) == 2:
            query, key = self._waiting.pop("query").float(), self._waiting.pop("key").float()
            if len(query) < len(key):  # queries of an image that all its windows share
                query = query.repeat_interleave(len(key) // len(query), dim=0)
            self._add("energy", logit_energy(query, key, centre=self.unit.mixing != "select").double())

    def _add_gram(self, hook: str, rows: Tensor) -> None:
        flat = rows.float()
        self._add(f"gram {hook}", (flat.mT @ flat).double())  # (H, d, d)

    def _add_moments(self, hook: str, moments: Moments, held: bool) -> None:
        name = f"{hook} {'held' if held else 'fit'}"
        self._add(f"rows {name}", torch.tensor(moments.rows, device=moments.total.device))
        self._add(f"total {name}", moments.total)
        self._add(f"second {name}", moments.second)

    def _add(self, name: str, value: Tensor) -> None:
        if name in self.sums:
            self.sums[name] += value  # in place, which for wide layers saves much copying
        else:
            self.sums[name] = value

    def moments(self) -> UnitMoments:
        hooks = {"qk": ("query", "key"), "v": ("output",), "hidden": ("hidden",)}[self.unit.kind]
        if self.unit.linear:
            hooks = ("parts",)
        fit, held = (
            tuple(
                Moments(
                    int(self.sums[f"rows {name}"]), self.sums[f"total {name}"], self.sums[f"second {name}"]
                )
                for name in (f"{hook} {part}" for hook in hooks)
                if f"rows {name}" in self.sums
            )
            for part in ("fit", "held")
        )
        return UnitMoments(fit or held, held or fit)

    def statistics(self, module: nn.Module) -> UnitStatistics:
        unit = self.unit
        if unit.kind == "qk":
            grams, energy = [self.sums["gram query"], self.sums["gram key"]], self.sums["energy"]
        else:
            second = self.moments().every[0].second
            grams = [second[None] if unit.kind == "hidden" else self.sums["gram value"]]
            columns = effective_output_weights(module, unit).view(-1, unit.heads, unit.width)  # (out, H, d)
            energy = output_energy(second.diagonal().view(unit.heads, unit.width), columns)
        return UnitStatistics(redundancy(*map(cosine_similarity, grams)).cpu(), energy.sqrt().cpu())


def output_gram_of(model: nn.Module, layer: Layer) -> Tensor:
    """Return W^T W per head, where W reads the head's values, [H, d_v, d_v], float64."""
    values = next(unit for unit in layer.units if unit.kind == "v")
    columns = effective_output_weights(model.get_submodule(layer.name), values).view(
        -1, values.heads, values.width
    )  # (out, H, d_v)
    return torch.einsum("ohi,ohj->hij", columns, columns)


def white_moments(module: nn.Module, unit: Unit) -> tuple[UnitMoments, Tensor] | None:
    """Return second moments of a unit's channels for white inputs (identity covariance), and similarities.

    The similarity of a channel, [H, d], is the mean over the other channels of its head. Heads count as
    independent, and operations after the projections, such as q/k norms, are ignored. Returns None unless
    each channel is an output row of a linear layer that reads the layer's input.
    """

    def projects(axis: ChannelAxis) -> bool:
        owner = module.get_submodule(axis.tensor.rpartition(".")[0])
        pixelwise = isinstance(owner, nn.Conv2d) and owner.kernel_size == (1, 1) and owner.groups == 1
        rows = axis.dim == 0 and axis.tensor.endswith("weight")
        return rows and (isinstance(owner, nn.Linear) or pixelwise)

    weights, sides = [*filter(projects, unit.axes)], 2 if unit.kind == "qk" else 1
    if not unit.white_inputs or len(weights) < sides or any(axis.shared or axis.heads for axis in weights):
        return None
    rows = [channels_of(module, unit, axis).flatten(2).double() for axis in weights[:sides]]  # (H, d, in)
    grams = [row @ row.mT for row in rows]
    if unit.kind == "qk":  # keys are centred, so that their bias has no effect
        name, offset = weights[0].tensor.removesuffix("weight") + "bias", weights[0].offset
        for axis in unit.axes:
            if axis.tensor == name and axis.offset == offset:
                bias = channels_of(module, unit, axis).double()  # (H, d, copies)
                grams[0] = grams[0] + bias @ bias.mT
    similarity = redundancy(*map(cosine_similarity, grams))
    if unit.linear:
        grams = [grams[0] * grams[1]]  # of independent features, as products of q, k and v are
    elif unit.kind == "v":
        grams = [block_diagonal(grams[0])]
    moments = tuple(Moments(1, gram.new_zeros(gram.shape[:-1]), gram) for gram in grams)
    return UnitMoments(moments, moments), similarity
