"""Storage: parameters of a model and bytes of its tensors, as functions of its widths.

Fitted to counts of cut layers, as FLOPs are (:mod:`mhacut.surgery.costs`), or counted where no polynomial
fits; and compared with the whole model, dense and cut to the least widths on the meta device. They are exact
if neither heads nor layers share tensors. Otherwise they are never too small: copies that parts get when they
are cut are counted at all widths.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Layer, Unit
from mhacut.errors import UnsupportedModelError
from mhacut.plan import Plan, UnitKey, UnitKind, UnitPlan
from mhacut.surgery.costs import Cost, LayerCost, fit_polynomial
from mhacut.surgery.find import PrunableLayers
from mhacut.surgery.flops import count_parameters
from mhacut.surgery.slice import cut, slice_layer

Dtypes = Mapping[str, torch.dtype]
"""Dtype of each tensor in a file, by its name; tensors not named keep their own."""
Count = Callable[[nn.Module, str], int]
"""Amount that a module stores, whose tensors have names with a prefix in the model."""


@dataclass(frozen=True)
class StorageTable:
    """Parameters, or bytes, of a model at any widths of its units."""

    fixed: int
    """Amount that no width changes."""
    layers: tuple[LayerCost, ...]
    dense: int
    """Amount of the model as it stands."""

    def at(self, widths: Mapping[UnitKey, Any]) -> Any:
        """Total at ``widths`` (channels per head; units not named stay as they are)."""
        return self.fixed + sum(layer.at(widths) for layer in self.layers)


def stored_dtype(name: str, tensor: Tensor, dtypes: Dtypes) -> torch.dtype:
    """Return the dtype in which a tensor is stored: counters and index tables keep theirs."""
    return dtypes.get(name, tensor.dtype) if tensor.is_floating_point() else tensor.dtype


@torch.no_grad()
def round_to_stored(model: nn.Module, dtypes: Dtypes) -> None:
    """Round the tensors of ``model`` in place to what a file in ``dtypes`` holds of them."""
    for name, tensor in model.state_dict().items():
        tensor.copy_(tensor.to(stored_dtype(name, tensor, dtypes)))


def count_bytes(module: nn.Module, dtypes: Dtypes, prefix: str = "") -> int:
    """Return the bytes of the tensors of ``module`` in a file, without the file's header.

    Args:
        module: a model, or a part of one.
        dtypes: of the model's tensors in the file.
        prefix: of the names of the part's tensors in the model, with its dot.
    """
    return sum(
        tensor.numel() * stored_dtype(prefix + name, tensor, dtypes).itemsize
        for name, tensor in module.state_dict().items()
    )


def parameter_table(
    model: nn.Module, prunable: PrunableLayers, least: Mapping[UnitKey, int], *, copies: bool
) -> StorageTable:
    """Return the number of parameters at any widths.

    Args:
        model: as it is pruned.
        prunable: of ``model``.
        least: least width of every unit that may be cut.
        copies: whether each head gets a copy of the tensors that heads share.
    """

    def count(module: nn.Module, prefix: str) -> int:
        return count_parameters(module)

    return _table(model, prunable, least, count, "parameters", copies)


def byte_table(
    model: nn.Module, prunable: PrunableLayers, least: Mapping[UnitKey, int], dtypes: Dtypes, *, copies: bool
) -> StorageTable:
    """Return the bytes of the tensors at any widths, stored in ``dtypes``; see :func:`parameter_table`."""

    def count(module: nn.Module, prefix: str) -> int:
        return count_bytes(module, dtypes, prefix)

    return _table(model, prunable, least, count, "bytes", copies)


def _table(
    model: nn.Module,
    prunable: PrunableLayers,
    least: Mapping[UnitKey, int],
    count: Count,
    counted: str,
    copies: bool,
) -> StorageTable:
    outline = copy.deepcopy(model).to("meta")
    layers = []
    for layer in prunable.layers:
        kinds = {unit.kind: unit.width for unit in layer.units if unit.key in least}
        if kinds:
            module = outline.get_submodule(layer.name)
            name = f"{layer.name} ({type(module).__name__})"
            counter = _counter(module, layer, kinds, count, copies)
            cost: Cost
            try:
                cost = fit_polynomial(name, kinds, counter, counted)
            except UnsupportedModelError:  # such as a weight with room for the wider of q/k and v
                cost = _Counts(counter)
            layers.append(LayerCost(layer, (cost,)))
    smallest = copy.deepcopy(outline)
    units = [unit for unit in prunable.units() if unit.key in least]
    cut(smallest, Plan(tuple(_first(unit, least[unit.key], copies) for unit in units)), prunable=prunable)
    dense, whole = count(model, ""), {unit.key: unit.width for unit in units}
    rests = (
        amount - sum(int(layer.at(widths)) for layer in layers)
        for amount, widths in ((count(smallest, ""), least), (dense, whole))
    )
    return StorageTable(max(rests), tuple(layers), dense)


class _Counts:
    """Amount of a layer that is no polynomial of its widths: counted, at each of them once."""

    def __init__(self, count: Callable[[Mapping[UnitKind, int]], int]) -> None:
        self._count = count
        self._known: dict[tuple[tuple[UnitKind, int], ...], int] = {}

    def at(self, widths: Mapping[UnitKind, int]) -> int:
        key = tuple(widths.items())
        if key not in self._known:
            self._known[key] = self._count(widths)
        return self._known[key]


def _counter(
    outline: nn.Module, layer: Layer, kinds: Mapping[UnitKind, int], count: Count, copies: bool
) -> Callable[[Mapping[UnitKind, int]], int]:
    """Return the count of one layer at changed widths."""

    def at(changed: Mapping[UnitKind, int]) -> int:
        widths = {**kinds, **changed}
        slim = copy.deepcopy(outline)
        plans = {
            unit.kind: _first(unit, widths[unit.kind], copies) for unit in layer.units if unit.kind in widths
        }
        slice_layer(slim, layer, plans)
        return count(slim, f"{layer.name}.")

    return at


def _first(unit: Unit, width: int, copies: bool) -> UnitPlan:
    return unit.keep_first(width, unshared=copies and unit.sharing == "copied")
