"""Cost tables: FLOPs, parameters or bytes of a model as functions of its widths, fitted to counts.

Bytes that fit no polynomial are counted width by width. Parameters and bytes are compared with the whole
model, dense and cut to the least widths on the meta device: they are exact if neither heads nor layers share
tensors. Otherwise they are never too small, since copies that parts get when they are cut are counted at all
widths.
"""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Layer, Unit
from mhacut.errors import UnsupportedModelError
from mhacut.plan import Plan, UnitKey, UnitKind, UnitPlan
from mhacut.surgery.find import PrunableLayers
from mhacut.surgery.flops import count_flops, count_parameters, measure_flops, take_weights
from mhacut.surgery.hooks import Call, Replay, cost_key, cut_to_widths, recorded_calls
from mhacut.surgery.slice import cut, slice_layer


@dataclass(frozen=True)
class Polynomial:
    """Cost of a layer (FLOPs of one run, parameters) that depends on its widths w, channels per head by kind.

    ``sum(per_channel[a] * w[a]) + sum(per_pair[a, b] * w[a] * w[b])``: exact for whole numbers, and
    differentiable for tensors.
    """

    per_channel: Mapping[UnitKind, int]
    per_pair: Mapping[tuple[UnitKind, UnitKind], int]

    def at(self, widths: Mapping[UnitKind, Any]) -> Any:
        total: Any = 0
        for kind, cost in self.per_channel.items():
            total = total + cost * widths[kind]
        for (first, second), cost in self.per_pair.items():
            total = total + cost * widths[first] * widths[second]
        return total


class Cost(Protocol):
    """Cost of a layer at widths, channels per head by kind."""

    def at(self, widths: Mapping[UnitKind, Any]) -> Any: ...


@dataclass(frozen=True)
class LayerCost:
    """Cost of one layer that depends on its widths."""

    layer: Layer
    runs: tuple[Cost, ...]
    """FLOPs of each run of the layer for one image; for storage, a single cost."""

    def at(self, widths: Mapping[UnitKey, Any]) -> Any:
        """Cost of all runs at ``widths`` (channels per head; units not named stay as they are)."""
        by_kind = {unit.kind: widths.get(unit.key, unit.width) for unit in self.layer.units}
        return sum(run.at(by_kind) for run in self.runs)


@dataclass(frozen=True)
class CostTable:
    """FLOPs of a model at any widths of its units."""

    fixed: int
    """FLOPs that no width changes."""
    layers: tuple[LayerCost, ...]
    """Layers that run, in the order of the model's modules."""
    dense: int
    """FLOPs of the model as it stands, counted by fvcore; in a job, those of the model with all tokens."""

    def flops(self, widths: Mapping[UnitKey, Any]) -> Any:
        """Total at ``widths`` (channels per head; units not named stay as they are)."""
        total: Any = self.fixed
        for layer in self.layers:
            total = total + layer.at(widths)
        return total

    def by_layer(self) -> dict[str, int]:
        """FLOPs that widths change, by layer, at the widths of the model as it stands."""
        return {cost.layer.name: int(cost.at({})) for cost in self.layers}


def build_cost_table(model: nn.Module, prunable: PrunableLayers, input_size: tuple[int, ...]) -> CostTable:
    """Count ``model`` once, and copies of its distinct layers at a few widths.

    A layer's FLOPs are a polynomial of degree 2 in its widths with whole coefficients, which a few counts
    determine; one more count at other widths checks them. Layers alike in shapes and inputs are counted once,
    also in later tables.

    Args:
        model: in eval mode.
        prunable: prunable layers of ``model``.
        input_size: [C, H, W].
    """
    with recorded_calls(model, [layer.name for layer in prunable.layers]) as calls:
        dense = measure_flops(model, input_size)
    costs: list[LayerCost] = []
    for layer in prunable.layers:
        module = model.get_submodule(layer.name)
        runs = tuple(_fitted(module, layer, call) for call in calls[layer.name])
        if runs:
            costs.append(LayerCost(layer, runs))
    return CostTable(dense - sum(int(cost.at({})) for cost in costs), tuple(costs), dense)


_FITTED: dict[tuple[Any, ...], Polynomial] = {}
"""Polynomials of layers that were counted, by everything that determines them."""


def _fitted(module: nn.Module, layer: Layer, call: Call) -> Polynomial:
    """FLOPs of one run of a layer; counted once for all that are alike."""
    meta = next(module.parameters()).is_meta
    key = (cost_key(module), repr(call), meta)
    if key not in _FITTED:
        outline = copy.deepcopy(module).to("meta")

        def count(widths: Mapping[UnitKind, int]) -> int:
            slim = cut_to_widths(outline, layer, widths)
            # Weights are not needed, but tracing a layer on the meta device fails in torch's own shape
            # checks. A model that is there already can be traced there, or it could not have been counted.
            if not meta:
                take_weights(slim)
            replay = Replay(slim, call).eval()
            return count_flops(replay, replay.zeros(torch.device("meta" if meta else "cpu")))[""]

        uncut = {unit.kind: unit.width for unit in layer.units}
        name = f"{layer.name} ({type(module).__name__})"
        _FITTED[key] = fit_polynomial(name, uncut, _Counts(uncut, count).at)
    return _FITTED[key]


class _Counts:
    """Cost of a layer that is counted at any widths, at each of them once."""

    def __init__(self, uncut: Mapping[UnitKind, int], count: Callable[[Mapping[UnitKind, int]], int]) -> None:
        self._uncut, self._count = uncut, count
        self._known: dict[tuple[int, ...], int] = {}

    def at(self, changed: Mapping[UnitKind, int]) -> int:
        """Return the cost at ``changed`` widths; kinds not named stay as they are."""
        widths = {**self._uncut, **changed}
        key = tuple(widths.values())
        if key not in self._known:
            self._known[key] = self._count(widths)
        return self._known[key]


def fit_polynomial(
    name: str,
    uncut: Mapping[UnitKind, int],
    count: Callable[[Mapping[UnitKind, int]], int],
    counted: str = "FLOPs",
) -> Polynomial:
    """Interpolate counts, without squares of widths if possible, and check the result at other widths."""
    chance = random.Random(0)
    # Below half the widths, where squares that were left out all add to the count.
    other: dict[UnitKind, int] = {
        kind: chance.choice([w for w in range(1, _half(width)) if w != _half(width) // 2] or [1])
        for kind, width in uncut.items()
    }
    # Squares (relative positions, gates of a width) are rare, and cost one more count for each kind.
    for squares in (False, True):
        polynomial = _interpolate(uncut, count, squares=squares)
        expected = count({}) + polynomial.at(other) - polynomial.at(uncut)
        if count(other) == expected:
            return polynomial
    at = ", ".join(f"{kind} {width} of {uncut[kind]}" for kind, width in other.items())
    raise UnsupportedModelError(
        f"{name}: its {counted} do not follow from its widths as those of other layers do (at {at} there are "
        f"{count(other)}, expected {expected}), so that no budget can be planned; this is a gap in "
        "mhacut: please report the architecture and its arguments"
    )


def _interpolate(
    uncut: Mapping[UnitKind, int], count: Callable[[Mapping[UnitKind, int]], int], *, squares: bool
) -> Polynomial:
    """Polynomial through counts at whole, half and (for ``squares``) quarter widths: divided differences."""
    # Newton's divided differences, in fractions: coefficients of counts are whole, and stay exact.
    dense = count({})
    near = {kind: _half(width) for kind, width in uncut.items() if width > 1}
    per_channel: dict[UnitKind, Fraction] = {}
    per_pair: dict[tuple[UnitKind, UnitKind], Fraction] = {}
    for kind, half in near.items():
        width, quarter = uncut[kind], half // 2
        slope = Fraction(count({kind: half}) - dense, half - width)
        curvature = Fraction(0)
        if squares and quarter:
            further = Fraction(count({kind: quarter}) - count({kind: half}), quarter - half)
            curvature = (further - slope) / (quarter - width)
        per_pair[kind, kind] = curvature
        per_channel[kind] = slope - curvature * (width + half)
    for first, second in itertools.combinations(near, 2):
        a, b = near[first], near[second]
        # Of all terms, this second difference leaves the product of both widths alone.
        both = count({first: a, second: b}) - count({first: a}) - count({second: b}) + dense
        per_pair[first, second] = Fraction(both, (a - uncut[first]) * (b - uncut[second]))
        per_channel[first] -= per_pair[first, second] * uncut[second]
        per_channel[second] -= per_pair[first, second] * uncut[first]
    return Polynomial(
        {kind: int(flops) for kind, flops in per_channel.items() if flops},
        {kinds: int(flops) for kinds, flops in per_pair.items() if flops},
    )


def _half(width: int) -> int:
    return (width + 1) // 2


Dtypes = Mapping[str, torch.dtype]
"""Dtype of each tensor in a file, by its name; tensors not named keep their own."""


def stored_dtype(name: str, tensor: Tensor, dtypes: Dtypes) -> torch.dtype:
    """Return the dtype in which a tensor is stored: counters and index tables keep theirs."""
    return dtypes.get(name, tensor.dtype) if tensor.is_floating_point() else tensor.dtype


@torch.no_grad()
def round_to_stored(model: nn.Module, dtypes: Dtypes) -> None:
    """Round the tensors of ``model`` in place to what a file in ``dtypes`` holds of them."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(tensor.to(stored_dtype(name, tensor, dtypes)))


def count_bytes(module: nn.Module, dtypes: Dtypes, prefix: str = "") -> int:
    """Return the bytes of the tensors of ``module`` in a file, without the file's header."""
    return sum(
        tensor.numel() * stored_dtype(prefix + name, tensor, dtypes).itemsize
        for name, tensor in module.state_dict().items()
    )


def storage_cost(
    model: nn.Module,
    prunable: PrunableLayers,
    least: Mapping[UnitKey, int],
    dtypes: Dtypes | None,
    *,
    copies: bool,
) -> Callable[[Mapping[UnitKey, int]], int]:
    """Return a function from widths to the number of parameters or file bytes."""

    def amount(module: nn.Module, prefix: str = "") -> int:
        return count_parameters(module) if dtypes is None else count_bytes(module, dtypes, prefix)

    def first(unit: Unit, width: int) -> UnitPlan:
        return unit.keep_first(width, unshared=copies and unit.sharing == "copied")

    def cost_of(layer: Layer, kinds: Mapping[UnitKind, int]) -> Cost:
        module = outline.get_submodule(layer.name)

        def count(widths: Mapping[UnitKind, int]) -> int:
            slim = copy.deepcopy(module)
            plans = {unit.kind: first(unit, widths[unit.kind]) for unit in layer.units if unit.kind in widths}
            slice_layer(slim, layer, plans)
            return amount(slim, f"{layer.name}.")

        counts = _Counts(kinds, count)
        try:
            return fit_polynomial(layer.name, kinds, counts.at, "parameters or bytes")
        except UnsupportedModelError:  # such as a weight with room for the wider of q/k and v
            return counts

    outline, units = copy.deepcopy(model).to("meta"), [unit for unit in prunable.units() if unit.key in least]
    layers = []
    for layer in prunable.layers:
        kinds = {unit.kind: unit.width for unit in layer.units if unit.key in least}
        if kinds:
            layers.append(LayerCost(layer, (cost_of(layer, kinds),)))
    smallest = copy.deepcopy(outline)
    cut(smallest, Plan(tuple(first(unit, least[unit.key]) for unit in units)), prunable=prunable)
    uncut = {unit.key: unit.width for unit in units}
    # The rest is the larger of two: copies that a cut makes are counted at all widths.
    rest = max(
        total - sum(int(layer.at(widths)) for layer in layers)
        for total, widths in ((amount(smallest), least), (amount(model), uncut))
    )
    return lambda widths: rest + sum(int(layer.at(widths)) for layer in layers)
