"""Find the prunable layers of a model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from mhacut.adapters.base import Layer, Unit
from mhacut.adapters.registry import (
    adapter_for,
    is_attention,
    is_pooling_head,
    is_position_bias,
    looks_like_attention,
    looks_like_mlp,
    why_not_cut,
)
from mhacut.errors import PlanError, UnsupportedModelError
from mhacut.plan import Plan, UnitKind

UnitKey = tuple[str, UnitKind]


@dataclass(frozen=True)
class PrunableLayers:
    """What of a model can be cut."""

    layers: tuple[Layer, ...]
    """In the order of the model's modules."""
    skipped: tuple[str, ...]
    """Modules outside these layers that hold channels but are not cut: name, class and reason."""

    def units(self, kinds: Iterable[UnitKind] = ("qk", "v", "hidden")) -> tuple[Unit, ...]:
        wanted = set(kinds)
        return tuple(unit for layer in self.layers for unit in layer.units if unit.kind in wanted)

    def unit(self, key: UnitKey) -> Unit:
        """The unit named ``key``; a :class:`PlanError` when the model has none."""
        for unit in self.units():
            if unit.key == key:
                return unit
        raise PlanError(f"the model has no unit {key[1]!r} in a layer {key[0]!r}")


def find_prunable_layers(model: nn.Module) -> PrunableLayers:
    """The layers of ``model`` that can be cut, as their adapters describe them.

    Raises:
        UnsupportedModelError: the model holds an attention class that is not registered, or no attention.
    """
    layers: list[Layer] = []
    skipped: list[str] = []
    refused: list[str] = []
    unknown: dict[str, str] = {}
    unknown_mlps: dict[str, list[str]] = {}
    seen: dict[int, str] = {}

    def walk(name: str, module: nn.Module) -> None:
        cls = type(module)
        adapter = adapter_for(module)
        if adapter is None and is_pooling_head(module):
            skipped.append(f"{name} ({cls.__name__}): a pooling head is left alone")
            return
        if is_position_bias(module):
            return
        if adapter is not None:
            if id(module) in seen:
                raise UnsupportedModelError(
                    f"{name} and {seen[id(module)]} are one shared module; not supported"
                )
            seen[id(module)] = name
            layers.append(adapter.describe(name, module))
            return
        before, refused_before = len(layers), len(refused)
        for child_name, child in module.named_children():
            walk(f"{name}.{child_name}" if name else child_name, child)
        families = {layer.adapter.family for layer in layers[before:]}
        # An MLP inside does not make an attention known: position biases of windows come from one.
        holds_one = "attention" in families or len(refused) > refused_before
        if is_attention(module) or (looks_like_attention(module) and not holds_one):
            refused.append(name)
            unknown.setdefault(f"{cls.__module__}.{cls.__qualname__}", name)
        elif not families and looks_like_mlp(module):
            unknown_mlps.setdefault(cls.__name__, []).append(name)

    walk("", model)
    if unknown:
        found = ", ".join(f"{cls} (first at {name})" for cls, name in unknown.items())
        raise UnsupportedModelError(
            f"attention class not supported: {found}; nothing is cut beside attention that mhacut does not "
            "know. `mhacut models` lists what can be cut"
        )
    if not any(layer.adapter.family == "attention" for layer in layers):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention layer mhacut can cut; "
            "`mhacut models` lists what can be cut"
        )
    for mlp, names in unknown_mlps.items():
        of_several = f" ({len(names)} layers)" if len(names) > 1 else ""
        skipped.append(f"{names[0]} ({mlp}): {why_not_cut(mlp)}{of_several}")
    return PrunableLayers(tuple(layers), tuple(skipped))


def check_plan(prunable: PrunableLayers, plan: Plan) -> None:
    """Raise a :class:`PlanError` unless every unit of ``plan`` is a unit of the model, of the same size."""
    for unit_plan in plan:
        unit = prunable.unit(unit_plan.key)
        if (unit.heads, unit.width) != (unit_plan.heads, unit_plan.dense_width):
            raise PlanError(
                f"plan of {unit.layer!r} ({unit.kind}): the model has {unit.heads} heads of {unit.width} "
                f"channels, the plan is for {unit_plan.heads} of {unit_plan.dense_width}"
            )
        shared = [axis.tensor for axis in unit.axes if axis.shared]
        if shared and not unit_plan.unshared and len(set(unit_plan.kept)) > 1:
            or_unshared = ", or the plan says unshared" if unit.sharing == "copied" else ""
            raise PlanError(
                f"plan of {unit.layer!r} ({unit.kind}): its heads share {', '.join(shared)}: they keep the "
                f"same channels{or_unshared}; found different ones"
            )
        if unit_plan.unshared and unit.sharing != "copied":
            why = "what its heads share cannot be copied" if shared else "its heads share nothing"
            raise PlanError(f"plan of {unit.layer!r} ({unit.kind}): unshared, but {why}")
