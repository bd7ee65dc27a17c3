"""Build a model with the arguments that the shapes in its file show."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from mhacut.checkpoint.build import build_skeleton
from mhacut.checkpoint.fingerprints import POSITIONS
from mhacut.checkpoint.foreign.recognise import Conversion
from mhacut.checkpoint.header import TensorInfo
from mhacut.checkpoint.identity import ModelIdentity, identity_of
from mhacut.checkpoint.mismatch import is_foreign
from mhacut.checkpoint.names import infos_by_model_names
from mhacut.checkpoint.visible_args import Shapes, Shown, visible_args
from mhacut.errors import CheckpointError
from mhacut.flatten import img_size_of


@dataclass(frozen=True)
class Identified:
    """The model of a checkpoint, without its weights."""

    identity: ModelIdentity
    """The dense model."""
    skeleton: nn.Module
    """The model on the meta device, cut if the file is slim."""
    tensors: Mapping[str, TensorInfo]
    """Tensors of the file, under the names they have in the model."""
    notes: tuple[str, ...]
    """Lines for the user: what was inferred, and from where."""
    cfg_origins: Mapping[str, str] = field(default_factory=dict)
    """Origin of values in the identity's pretrained_cfg, see :mod:`mhacut.checkpoint.provenance`; those
    without one are timm's default."""
    conversion: Conversion | None = None
    """Conversion of the tensors of another library's file."""
    inferred: frozenset[str] = frozenset()
    """Names of the arguments that the shapes showed."""


def infer_from_shapes(
    name: str,
    args: Mapping[str, Any],
    cfg: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    *,
    bounded: bool = False,
) -> Identified:
    """Build model ``name`` with the arguments that the shapes of its tensors show.

    Args:
        name: architecture in timm.
        args: arguments of ``timm.create_model``. ``num_classes`` and ``img_size`` are inferred where missing;
            unless ``bounded``, so are those of :func:`visible_args`.
        cfg: timm's pretrained_cfg of the weights.
        tensors: tensors of the file.
        bounded: the file itself states the model and its arguments, so that its tensors bound the model's
            size, see :func:`build_skeleton`.

    Raises:
        CheckpointError: timm cannot build it.
    """
    limit = tensors if bounded else None
    shapes = {key: info.shape for key, info in tensors.items()}
    args = dict(args)
    shown: list[Shown] = []
    if "img_size" not in args:
        # Before anything is built: not every argument goes with every size.
        patch_size = args.get("patch_size", 4)
        size = img_size_of(name, shapes, patch_size if isinstance(patch_size, int) else 4)
        if size is not None:
            args["img_size"] = size
            shown.append(Shown("img_size", size, "the shape of positional_encoding"))
    # The shapes of the file decide, whatever size the configuration was written for.
    if bounded:
        model = build_skeleton(ModelIdentity(name, args, dict(cfg)), limit)
    else:
        model, further = _with_visible_args(ModelIdentity(name, args, dict(cfg)), tensors)
        args |= {one.name: one.value for one in further}
        shown += further
    last = len(shown)
    if "num_classes" not in args:
        classes, origin = _classes(model, infos_by_model_names(tensors, model))
        shown.append(Shown("num_classes", classes, origin))
    if "img_size" not in args:
        size = _img_size(model, shapes)
        if size is not None:
            shown.append(Shown("img_size", size, "the shape of pos_embed"))
    args |= {one.name: one.value for one in shown[last:]}
    if any(one.value != getattr(model, one.name, None) for one in shown[last:]):
        model = build_skeleton(ModelIdentity(name, args, dict(cfg)), limit)
    return Identified(
        identity_of(model, name, args),
        model,
        infos_by_model_names(tensors, model),
        tuple(map(str, shown)),
        inferred=frozenset(one.name for one in shown),
    )


def _with_visible_args(
    identity: ModelIdentity, tensors: Mapping[str, TensorInfo]
) -> tuple[nn.Module, tuple[Shown, ...]]:
    """Return the model with the arguments that its tensors show, and these; as it is if timm refuses them."""
    fault: CheckpointError | None = None
    try:
        model = build_skeleton(identity)
    except CheckpointError as error:
        # The number of heads may divide the width of the file, and not the default one.
        args = {name: value for name, value in identity.model_args.items() if name != "num_heads"}
        if args == identity.model_args:
            raise
        model, fault = build_skeleton(dataclasses.replace(identity, model_args=args)), error
    shapes = {key: info.shape for key, info in infos_by_model_names(tensors, model).items()}
    foreign = is_foreign(model.state_dict(), shapes)
    shown = () if foreign else visible_args(model, shapes, identity.model_args)
    if shown:
        try:
            args = {**identity.model_args, **{one.name: one.value for one in shown}}
            return build_skeleton(dataclasses.replace(identity, model_args=args)), shown
        except CheckpointError:
            pass  # whoever compares the tensors says what differs
    if fault is not None:
        raise fault
    return model, ()


def position_shapes(tensors: Mapping[str, TensorInfo]) -> list[tuple[int, ...]]:
    """Return the shapes of the tables of positions, sorted; they depend on the image size."""
    return sorted(info.shape for name, info in tensors.items() if POSITIONS.search(name))


def _classes(model: Any, tensors: Mapping[str, TensorInfo]) -> tuple[int, str]:
    """Return the number of classes, 0 without a classifier, and what shows it."""
    classifier = model.pretrained_cfg.get("classifier") or ()
    for name in (classifier,) if isinstance(classifier, str) else tuple(classifier):
        weight = tensors.get(f"{name}.weight")
        if weight is not None and weight.shape:
            return weight.shape[0], f"the shape of {name}.weight"
    return 0, "the file, which has no classifier"


def _img_size(model: Any, shapes: Shapes) -> int | None:
    """Return the image side that explains a ``pos_embed`` of another length; None if there is none."""
    found = shapes.get("pos_embed")
    expected = getattr(model, "pos_embed", None)
    patch_embed = getattr(model, "patch_embed", None)
    patches, patch_size = getattr(patch_embed, "num_patches", None), getattr(patch_embed, "patch_size", None)
    if not isinstance(expected, Tensor) or found is None or tuple(expected.shape) == found:
        return None
    patches_found = shapes.get("patch_embed.proj.weight", ())[-1:]
    if patches_found and isinstance(patch_size, tuple) and patches_found != tuple(patch_size[-1:]):
        return None  # patches of another size: the grid would be misread
    if len(found) != 3 or expected.dim() != 3 or found[2] != expected.shape[2] or found[0] != 1:
        return None
    if not isinstance(patches, int) or not isinstance(patch_size, tuple) or patch_size[0] != patch_size[1]:
        return None
    prefix = expected.shape[1] - patches  # class and register tokens with a position of their own
    side = math.isqrt(max(found[1] - prefix, 0))
    return side * int(patch_size[0]) if side > 0 and side * side == found[1] - prefix else None
