"""Build a model with the arguments inferred from the shapes in its file."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mhacut.checkpoint.build import build_skeleton
from mhacut.checkpoint.fingerprints import POSITIONS
from mhacut.checkpoint.foreign.recognise import Conversion
from mhacut.checkpoint.header import TensorInfo, infos, on_meta
from mhacut.checkpoint.identity import ModelIdentity, identity_of
from mhacut.checkpoint.visible_args import InferredArg, visible_args, visible_classes, visible_img_size
from mhacut.errors import CheckpointError
from mhacut.flatten import checkpoint_filter, img_size_of

Tensors = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class ResolvedModel:
    identity: ModelIdentity
    skeleton: nn.Module
    tensors: Tensors
    """Shape and dtype of each tensor in the file, by the tensor's name in the model."""
    notes: tuple[str, ...]
    cfg_origins: Mapping[str, str] = field(default_factory=dict)
    """Origin of each pretrained_cfg value, for example ``file``. Missing keys are timm's defaults."""
    conversion: Conversion | None = None
    inferred: frozenset[str] = frozenset()


def infer_from_shapes(
    name: str, args: Mapping[str, Any], cfg: Mapping[str, Any], tensors: Tensors, *, bounded: bool = False
) -> ResolvedModel:
    """Build timm model ``name``. Arguments that are missing in ``args`` are inferred from ``tensors``."""
    limit = tensors if bounded else None
    shapes = {key: info.shape for key, info in tensors.items()}
    args = dict(args)
    headless = args.get("num_classes") == 0
    inferred: list[InferredArg] = []
    if "img_size" not in args:
        # Before anything is built: not every argument goes with every size.
        patch_size = args.get("patch_size", 4)
        size = img_size_of(name, shapes, patch_size if isinstance(patch_size, int) else 4)
        if size is not None:
            inferred.append(("img_size", size, "the shape of positional_encoding"))
            args["img_size"] = size
    if bounded:
        model = build_skeleton(ModelIdentity(name, args, dict(cfg)), limit)
    else:
        model, further = _with_visible_args(ModelIdentity(name, args, dict(cfg)), tensors)
        args |= {arg: value for arg, value, _ in further}
        inferred += further
    # The shapes of the file decide, whatever size the configuration was written for.
    last = [] if "num_classes" in args else [visible_classes(model, _shapes_for(model, tensors))]
    size_shown = None if "img_size" in args else visible_img_size(model, shapes)
    last += [] if size_shown is None else [size_shown]
    args |= {arg: value for arg, value, _ in last}
    # A second build only if an argument differs: a model takes a tenth of a second.
    if any(value != getattr(model, arg, None) for arg, value, _ in last):
        model = build_skeleton(ModelIdentity(name, args, dict(cfg)), limit)
    inferred += last
    named = infos_by_model_names(tensors, model)
    notes = [f"{arg} {value}, from {origin}" for arg, value, origin in inferred]
    if headless:
        named, left_out = _without_classifier(named, model)
        notes += left_out
    identity = identity_of(model, name, args)
    if cfg and "crop_pct" not in cfg:
        identity.pretrained_cfg.pop("crop_pct", None)  # timm's fallback, not this model's
    return ResolvedModel(identity, model, named, tuple(notes), inferred=frozenset(arg[0] for arg in inferred))


def _without_classifier(tensors: Tensors, model: Any) -> tuple[dict[str, TensorInfo], list[str]]:
    classifier = model.pretrained_cfg.get("classifier") or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    heads = tuple(f"{name.partition('.')[0]}." for name in names)
    own = model.state_dict()
    kept = {name: info for name, info in tensors.items() if name in own or not name.startswith(heads)}
    shapes = {name: info.shape for name, info in tensors.items()}
    _, classes, _ = visible_classes(model, shapes)
    return kept, [f"its classifier of {classes} classes is left out"] if classes else []


def _with_visible_args(
    identity: ModelIdentity, tensors: Tensors
) -> tuple[nn.Module, tuple[InferredArg, ...]]:
    given = args = identity.model_args
    try:
        model = build_skeleton(identity)
    except CheckpointError:
        # The given num_heads may divide the file's width but not the default width.
        args = {name: value for name, value in given.items() if name != "num_heads"}
        if args == given:
            raise
        model = build_skeleton(dataclasses.replace(identity, model_args=args))
    inferred = visible_args(model, _shapes_for(model, tensors), given)
    further = {**given, **{name: value for name, value, _ in inferred}}
    if further == args:
        return model, ()
    try:
        return build_skeleton(dataclasses.replace(identity, model_args=further)), inferred
    except CheckpointError:
        if args != given:
            raise
        return model, ()  # the comparison of tensors says what differs


def position_shapes(tensors: Tensors) -> list[tuple[int, ...]]:
    return sorted(info.shape for name, info in tensors.items() if POSITIONS.search(name))


def to_model_names(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Rename a dense file's tensors to the timm model's names, and resize FLatten's position tables."""
    convert = checkpoint_filter(model)
    named = dict(tensors) if convert is None else convert(tensors, model)
    own, classifier = model.state_dict(), getattr(model, "pretrained_cfg", {}).get("classifier")
    if not isinstance(classifier, str) or f"{classifier}.weight" in named or "head.weight" in own:
        return named
    translated = {f"head.{kind}": f"{classifier}.{kind}" for kind in ("weight", "bias")}
    return {translated.get(name, name): tensor for name, tensor in named.items()}


def infos_by_model_names(tensors: Tensors, model: nn.Module) -> dict[str, TensorInfo]:
    return infos(to_model_names(on_meta(tensors), model))


def _shapes_for(model: nn.Module, tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in infos_by_model_names(tensors, model).items()}
