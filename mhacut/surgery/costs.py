"""Cost tables: FLOPs, parameters or bytes of a model as a function of its channels per head."""

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
from mhacut.surgery.hooks import LayerInputs, Replay, cost_key, cut_to_widths, recorded_calls
from mhacut.surgery.slice import cut, slice_layer


@dataclass(frozen=True)
class Polynomial:
    """Cost of a layer as a quadratic polynomial of its q/k and v channels per head and hidden channels."""

    # sum(per_channel[a] * w[a]) + sum(per_pair[a, b] * w[a] * w[b]): exact for int, tensors get gradients.
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
    def at(self, widths: Mapping[UnitKind, Any]) -> Any: ...


@dataclass(frozen=True)
class LayerCost:
    layer: Layer
    runs: tuple[Cost, ...]
    """Cost of each run of the layer in a forward pass. Parameters and bytes count once."""

    def at(self, widths: Mapping[UnitKey, Any]) -> Any:
        by_kind = {unit.kind: widths.get(unit.key, unit.width) for unit in self.layer.units}
        return sum(run.at(by_kind) for run in self.runs)


@dataclass(frozen=True)
class CostTable:
    """FLOPs of a model as a function of the channels per head in each layer."""

    fixed: int
    """FLOPs of the model that do not depend on the numbers of channels."""
    layers: tuple[LayerCost, ...]
    dense: int
    """FLOPs of the uncut model with all tokens, counted by fvcore."""

    def flops(self, widths: Mapping[UnitKey, Any]) -> Any:
        """Return the FLOPs at ``widths`` (channels per head). Channels without an entry are uncut."""
        total: Any = self.fixed
        for layer in self.layers:
            total = total + layer.at(widths)
        return total

    def by_layer(self) -> dict[str, int]:
        return {cost.layer.name: int(cost.at({})) for cost in self.layers}


def build_cost_table(model: nn.Module, prunable: PrunableLayers, input_size: tuple[int, ...]) -> CostTable:
    """Count the FLOPs of ``model`` once, and of each distinct layer at a few widths."""
    # FLOPs of a layer are a quadratic polynomial of its widths with integer coefficients: a few counts
    # determine it, and one more count checks it.
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
"""Cache of fitted polynomials, by module, inputs and device."""


def _fitted(module: nn.Module, layer: Layer, call: LayerInputs) -> Polynomial:
    """Return the FLOPs of a layer call as a polynomial. Layers with equal shapes are counted once."""
    meta = next(module.parameters()).is_meta
    key = (cost_key(module), repr(call), meta)
    if key not in _FITTED:
        outline = copy.deepcopy(module).to("meta")

        def count(widths: Mapping[UnitKind, int]) -> int:
            if layer.adapter.equal_widths_only and len(set(widths.values())) > 1:
                # Widths are equal in every plan. Half of the FLOPs that depend on them count for each kind.
                equal = [count(dict.fromkeys(widths, width)) for width in widths.values()]
                return sum(equal) // len(equal)
            slim = cut_to_widths(outline, layer, widths)
            # Tracing on the meta device fails in shape checks of torch for some layers, so the layer moves to
            # the CPU without weights. A model that is on the meta device has been traced there before.
            if not meta:
                take_weights(slim)
            replay = Replay(slim, call).eval()
            return count_flops(replay, replay.zeros(torch.device("meta" if meta else "cpu")))[""]

        uncut = {unit.kind: unit.width for unit in layer.units}
        name = f"{layer.name} ({type(module).__name__})"
        _FITTED[key] = fit_polynomial(name, uncut, _Counts(uncut, count).at)
    return _FITTED[key]


class _Counts:
    def __init__(self, uncut: Mapping[UnitKind, int], count: Callable[[Mapping[UnitKind, int]], int]) -> None:
        self._uncut, self._count = uncut, count
        self._known: dict[tuple[int, ...], int] = {}

    def at(self, changed: Mapping[UnitKind, int]) -> int:
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
    """Fit a polynomial of the widths to costs that ``count`` returns, and check it at other widths."""
    chance = random.Random(0)
    # Below half the widths, missing squares change the count in one direction and cannot cancel out.
    other: dict[UnitKind, int] = {
        kind: chance.choice([w for w in range(1, _half(width)) if w != _half(width) // 2] or [1])
        for kind, width in uncut.items()
    }
    # Squares are rare (relative positions, quadratic gates) and need one more count per kind.
    for squares in (False, True):
        polynomial = _interpolate(uncut, count, squares=squares)
        expected = count({}) + polynomial.at(other) - polynomial.at(uncut)
        if count(other) == expected:
            return polynomial
    at = ", ".join(f"{kind} {width} of {uncut[kind]}" for kind, width in other.items())
    raise UnsupportedModelError(
        f"{name}: its {counted} are not a quadratic polynomial of its widths (at {at}: expected "
        f"{expected}, found {count(other)}), so no budget can be planned. "
        "Please report the architecture and its arguments"
    )


def _interpolate(
    uncut: Mapping[UnitKind, int], count: Callable[[Mapping[UnitKind, int]], int], *, squares: bool
) -> Polynomial:
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
        # This second difference cancels all terms except the product of both widths.
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
"""Dtype of each tensor in a file, by tensor name. Tensors without an entry keep their dtype."""


def stored_dtype(name: str, tensor: Tensor, dtypes: Dtypes) -> torch.dtype:
    # Counters and index tables keep their integer dtype.
    return dtypes.get(name, tensor.dtype) if tensor.is_floating_point() else tensor.dtype


@torch.no_grad()
def round_to_stored(model: nn.Module, dtypes: Dtypes) -> None:
    """Round the tensors of ``model``, in place, to values that the file dtypes ``dtypes`` can represent."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(tensor.to(stored_dtype(name, tensor, dtypes)))


def count_bytes(module: nn.Module, dtypes: Dtypes, prefix: str = "") -> int:
    """Return the bytes of the tensors of ``module`` in a file, without the file header."""
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
    """Return a function from widths to the number of parameters, or to bytes if ``dtypes`` is given."""

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
        except UnsupportedModelError:  # for example a weight as wide as the wider of q/k and v
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
    # A cut may copy tensors that heads or layers share. The larger rest counts the copies at all widths, so
    # the cost is never too small.
    rest = max(
        total - sum(int(layer.at(widths)) for layer in layers)
        for total, widths in ((amount(smallest), least), (amount(model), uncut))
    )
    return lambda widths: rest + sum(int(layer.at(widths)) for layer in layers)
