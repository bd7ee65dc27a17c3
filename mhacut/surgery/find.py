"""Image size, number of classes and prunable layers of a timm model."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from mhacut.adapters.base import Layer, Unit
from mhacut.adapters.mlp import Mlp
from mhacut.adapters.registry import (
    adapter_for,
    is_attention,
    is_pooling_head,
    is_position_bias,
    looks_like_attention,
    looks_like_mlp,
    why_not_cut,
)
from mhacut.adapters.structure import is_registered_library, mlp_of_block
from mhacut.errors import PlanError, UnsupportedModelError
from mhacut.plan import UNIT_KINDS, Plan, UnitKey, UnitKind
from mhacut.surgery.merging_blocks import MergingLayer


def model_input_size(
    model: nn.Module, pretrained_cfg: Mapping[str, Any], model_args: Mapping[str, Any] | None = None
) -> tuple[int, int, int]:
    """Return the image size [C, H, W] of ``model``, from its modules, its arguments or timm's record."""
    channels, height, width = pretrained_cfg.get("input_size", (3, 224, 224))
    size = getattr(patch_embedding(model), "img_size", None)
    if size is None and model_args is not None:
        size = model_args.get("img_size")
    if isinstance(size, int):
        size = (size, size)
    if size is not None:
        height, width = size
    # Not from the patch embedding: behind a convolutional stem it sees that stem's channels.
    return int(getattr(model, "in_chans", channels)), int(height), int(width)


def patch_embedding(model: nn.Module) -> Any:
    # CoaT's is the first of several. Visformer's first embeds the output of a stem.
    first: Any = getattr(model, "patch_embed1", None)
    sees_it = getattr(getattr(first, "proj", None), "in_channels", None) == getattr(model, "in_chans", None)
    return getattr(model, "patch_embed", first if sees_it else None)


def classifier_size(model: Any) -> int:
    """Return the number of classes; 0 for a model without a classifier."""
    return int(getattr(model, "num_classes", 0) or 0)


def gives_probabilities(model: Any) -> bool:
    # The softmax over a single class is always 1.
    return classifier_size(model) > 1


@dataclass(frozen=True)
class PrunableLayers:
    """Layers of a model that can be cut, and reasons why other layers are not cut."""

    layers: tuple[Layer, ...]
    """Prunable layers, in the order of the modules of the model."""
    skipped: tuple[str, ...]
    """Modules that are not cut: name, class and reason."""
    unknown: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """Attention classes of unknown structure, each with the names of its layers."""

    def units(self, kinds: Iterable[UnitKind] = UNIT_KINDS) -> tuple[Unit, ...]:
        wanted = set(kinds)
        return tuple(unit for layer in self.layers for unit in layer.units if unit.kind in wanted)

    def without(self, names: Collection[str], reason: str) -> PrunableLayers:
        layers = tuple(layer for layer in self.layers if layer.name not in names)
        return replace(self, layers=layers, skipped=(*self.skipped, *(f"{name}: {reason}" for name in names)))

    def unit(self, key: UnitKey) -> Unit:
        for unit in self.units():
            if unit.key == key:
                return unit
        raise PlanError(f"the model has no layer {key[0]!r} with {key[1]!r} channels")

    @property
    def not_prunable(self) -> tuple[str, ...]:
        """Lines of text, 1 per reason, with the layers or modules that are not cut for this reason."""
        layers: dict[str, list[str]] = {}
        for layer in self.layers:
            for kind, reason in layer.not_prunable.items():
                layers.setdefault(f"{kind}: {reason}", []).append(layer.name)
        lines = [
            f"{reason} ({names[0]})"
            if len(names) == 1
            else f"{reason} ({len(names)} layers, first {names[0]})"
            for reason, names in layers.items()
        ]
        return (*lines, *self.skipped)


def find_prunable_layers(model: nn.Module) -> PrunableLayers:
    walk = _Walk()
    walk.visit("", model)
    listed = ", ".join(f"{cls} (first at {names[0]})" for cls, names in walk.unknown.items())
    if listed and not walk.layers:
        raise UnsupportedModelError(
            f"attention class not supported: {listed}, and no MLP that can be cut. "
            "`mhacut models` lists the supported models"
        )
    # Of timm's convolutional networks, no MLP is cut either.
    of_timm = type(model).__module__.startswith("timm.")
    attention = any(layer.adapter.family == "attention" for layer in walk.layers)
    if not walk.layers or (of_timm and not attention and not listed):
        raise UnsupportedModelError(
            f"{type(model).__name__} has no attention layer that mhacut can cut. "
            "`mhacut models` lists the supported models"
        )
    for mlp, names in walk.unknown_mlps.items():
        of_several = f" ({len(names)} layers)" if len(names) > 1 else ""
        walk.skipped.append(f"{names[0]} ({mlp}): {why_not_cut(mlp)}{of_several}")
    for cls, names in walk.unknown.items():
        of_several = f" ({len(names)} layers)" if len(names) > 1 else ""
        walk.skipped.append(f"{names[0]} ({cls}): this attention class is not supported{of_several}")
    unknown = {cls: tuple(names) for cls, names in walk.unknown.items()}
    return PrunableLayers(tuple(walk.layers), tuple(walk.skipped), unknown)


class _Walk:
    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.skipped: list[str] = []
        self.unknown: dict[str, list[str]] = {}
        """Attention classes of unknown structure, each with the names of its layers."""
        self.unknown_mlps: dict[str, list[str]] = {}
        """MLP classes without an adapter, each with the names of its layers."""
        self._unknown_layers = 0
        self._names: dict[int, str] = {}

    def visit(self, name: str, module: nn.Module) -> None:
        adapter = adapter_for(module)
        if adapter is None and is_pooling_head(module):
            self.skipped.append(f"{name} ({type(module).__name__}): this pooling head is not pruned")
        elif is_position_bias(module):
            pass
        elif adapter is not None:
            earlier = self._names.setdefault(id(module), name)
            if earlier != name:
                raise UnsupportedModelError(
                    f"{name} and {earlier} are the same module; layers that share a module are not supported"
                )
            self.layers.append(adapter.describe(name, module))
        else:
            self._visit_children(name, module)

    def _visit_children(self, name: str, module: nn.Module) -> None:
        layers_before, unknown_before = len(self.layers), self._unknown_layers
        for child_name, child in module.named_children():
            self.visit(f"{name}.{child_name}" if name else child_name, child)
        families = {layer.adapter.family for layer in self.layers[layers_before:]}
        # An MLP inside does not make an attention known: position biases of windows come from one.
        holds_attention = "attention" in families or self._unknown_layers > unknown_before
        cls = type(module)
        if is_attention(module) or (looks_like_attention(module) and not holds_attention):
            self._unknown_layers += 1
            self.unknown.setdefault(f"{cls.__module__}.{cls.__qualname__}", []).append(name)
        elif "mlp" not in families and (mlp := self._mlp_of_block(name, module, layers_before)):
            self.layers.append(mlp)
        elif not families and looks_like_mlp(module):
            self.unknown_mlps.setdefault(cls.__name__, []).append(name)

    def _mlp_of_block(self, name: str, module: nn.Module, first: int) -> Layer | None:
        """Return the MLP whose linear layers are in different submodules of a block."""
        if isinstance(module, MergingLayer):
            return _of_block(module.branches.mlp, name, module)
        if isinstance(module, nn.ModuleList | nn.ModuleDict) or is_registered_library(module):
            return None
        known = [layer.name for layer in self.layers[first:] if layer.adapter.family == "attention"]
        unknown = [layer for names in self.unknown.values() for layer in names]
        prefix = f"{name}." if name else ""
        inside = [each.removeprefix(prefix) for each in (*known, *unknown) if each.startswith(prefix)]
        return _of_block(mlp_of_block(module, inside) if inside else None, name, module)


def _of_block(adapter: Mlp | None, name: str, module: nn.Module) -> Layer | None:
    return None if adapter is None else replace(adapter.describe(name, module), result=adapter.reader)


def check_plan(prunable: PrunableLayers, plan: Plan) -> None:
    """Raise a :class:`PlanError` if layers or channel counts in ``plan`` differ from those of the model."""
    for unit_plan in plan:
        unit = prunable.unit(unit_plan.key)
        if (unit.heads, unit.width) != (unit_plan.heads, unit_plan.dense_width):
            raise PlanError(
                f"plan of {unit.layer!r} ({unit.kind}): the model has {unit.heads} heads of {unit.width} "
                f"channels, the plan expects {unit_plan.heads} of {unit_plan.dense_width}"
            )
        shared = [axis.tensor for axis in unit.axes if axis.shared]
        if shared and not unit_plan.unshared and len(set(unit_plan.kept)) > 1:
            or_unshared = ", or set unshared" if unit.sharing == "copied" else ""
            raise PlanError(
                f"plan of {unit.layer!r} ({unit.kind}): its heads share {', '.join(shared)} but "
                f"keep different channels; keep the same ones{or_unshared}"
            )
        if unit_plan.unshared and unit.sharing != "copied":
            why = "tensors of its heads cannot be copied" if shared else "its heads share no tensor"
            raise PlanError(f"plan of {unit.layer!r} ({unit.kind}): unshared, but {why}")
