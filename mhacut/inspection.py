"""What is in an opened checkpoint: its layers, what they cost, how it wants its images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mhacut.adapters.base import Layer
from mhacut.checkpoint.load import LoadedModel
from mhacut.cost import count_parameters, measure_flops_by_module
from mhacut.data import Preprocessing
from mhacut.errors import CheckpointError, UsageError
from mhacut.modelinfo import classifier_size, left_whole, model_input_size
from mhacut.options import PreprocessingOptions
from mhacut.plan import UnitKind
from mhacut.surgery import dissect


@dataclass(frozen=True)
class Width:
    """Channels per head of one unit (of the whole MLP for ``hidden``)."""

    now: int
    dense: int
    """Before any cut; equal to ``now`` in a dense file."""


@dataclass(frozen=True)
class LayerReport:
    """One attention or MLP that can be cut."""

    name: str
    """Module name, ``blocks.0.attn``."""
    module: str
    """Its class."""
    heads: int | None
    """None for an MLP."""
    widths: Mapping[UnitKind, Width]
    """Of its units that can be cut."""
    left_whole: Mapping[UnitKind, str]
    """Units that cannot, and why."""
    flops: int
    """Of the whole layer, as it stands."""
    share: float
    """Of the model's FLOPs, in 0..1."""


@dataclass(frozen=True)
class Inspection:
    """What is in a checkpoint."""

    source: str
    architecture: str
    input_size: tuple[int, int, int]
    """[C, H, W], for which FLOPs are counted."""
    classes: int
    """0 for a model that gives features."""
    flops: int
    parameters: int
    dtypes: tuple[str, ...]
    """Of the file's floating-point tensors."""
    layers: tuple[LayerReport, ...]
    left_whole: tuple[str, ...]
    """What could not be cut exactly, or is never touched, and why."""
    preprocessing: Preprocessing
    history: tuple[Mapping[str, Any], ...]
    """What a slim file says of the commands that made it, oldest first; untrusted. Empty for a dense file."""


def inspect_model(loaded: LoadedModel) -> Inspection:
    """Describe ``loaded``.

    Raises:
        UnsupportedModelError: it has no attention that can be cut, or one that is not known.
    """
    model = loaded.model
    anatomy = dissect(model)
    preprocessing = resolve_preprocessing(loaded, PreprocessingOptions())
    flops = measure_flops_by_module(model, preprocessing.input_size)
    dense = {} if loaded.record is None else {unit.key: unit.dense_width for unit in loaded.record.plan}
    layers = []
    for layer in anatomy.layers:
        module: Any = model.get_submodule(layer.name)
        is_attention = layer.adapter.family == "attention"
        own = flops.get(layer.name, 0)
        layers.append(
            LayerReport(
                name=layer.name,
                module=type(module).__name__,
                heads=_heads(layer, module) if is_attention else None,
                widths={
                    unit.kind: Width(unit.width, dense.get(unit.key, unit.width)) for unit in layer.units
                },
                left_whole=dict(layer.left_whole),
                flops=own,
                share=own / flops[""],
            )
        )
    return Inspection(
        source=loaded.source,
        architecture=loaded.identity.architecture,
        input_size=preprocessing.input_size,
        classes=classifier_size(model),
        flops=flops[""],
        parameters=count_parameters(model),
        dtypes=tuple(sorted({_name(dtype) for dtype in loaded.dtypes.values() if dtype.is_floating_point})),
        layers=tuple(layers),
        left_whole=left_whole(anatomy),
        preprocessing=preprocessing,
        history=() if loaded.record is None else loaded.record.history,
    )


def resolve_preprocessing(loaded: LoadedModel, override: PreprocessingOptions) -> Preprocessing:
    """What images go through: stated by the slim file or timm's pretrained_cfg, ``override`` on top.

    A slim file is read at the size it was cut for, which ``--img-size`` may have set, not at the size its
    model would have by itself.

    Raises:
        UsageError: an override makes no sense, or is an image size the model does not take.
        DataError: what the file states makes no sense.
        CheckpointError: a slim file states a size that its own model does not take.
    """
    built_for = model_input_size(loaded.model, loaded.identity.pretrained_cfg)
    patch_embed: Any = getattr(loaded.model, "patch_embed", None)
    strict = bool(getattr(patch_embed, "strict_img_size", False))
    stated = loaded.identity.pretrained_cfg
    if loaded.record is not None:
        stated = loaded.record.preprocessing
        channels, height, width = stated["input_size"]
        if channels != built_for[0] or (strict and (height, width) != built_for[1:]):
            raise CheckpointError(
                f"{loaded.source}: its metadata states images of {channels} channels, {height}x{width}; its "
                f"model takes {built_for[0]} channels, {built_for[1]}x{built_for[2]}: it was edited or "
                "damaged; prune the dense model again"
            )
        built_for = (channels, height, width)
    size = override.img_size
    if size is not None and strict and built_for[1:] != (size, size):
        raise UsageError(
            f"--img-size {size}: the model takes images of {built_for[1]}x{built_for[2]} only; "
            f"leave it out, or build the model for other sizes with --model-arg dynamic_img_size=True"
        )
    return Preprocessing.resolve(
        stated,
        built_for,
        mean=override.mean,
        std=override.std,
        crop_pct=override.crop_pct,
        interpolation=override.interpolation,
        img_size=size,
    )


def _heads(layer: Layer, module: Any) -> int | None:
    """Of an attention; what nothing can be cut of may not say."""
    if layer.units:
        return layer.units[0].heads
    return getattr(module, "num_heads", None)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
