"""Checkpoints of timm modules in memory."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mhacut.checkpoint.build import allocate, build_skeleton, known_model, unknown_model
from mhacut.checkpoint.checkpoint import Checkpoint, check_finite
from mhacut.checkpoint.header import infos
from mhacut.checkpoint.identity import (
    PROVENANCE_CFG_KEYS,
    ModelHints,
    ModelIdentity,
    checked_model_args,
    checked_pretrained_cfg,
    identity_of,
)
from mhacut.checkpoint.infer import infer_from_shapes
from mhacut.checkpoint.mismatch import check_tensors
from mhacut.checkpoint.timm_cfg import set_resolved_preprocessing
from mhacut.errors import CheckpointError, option_name
from mhacut.surgery.find import classifier_size, model_input_size, patch_embedding

_ARGS = "mhacut_model_args"
"""Attribute of a loaded module that stores its ``timm.create_model`` arguments."""
_WRAPPED = {"OptimizedModule": "_orig_mod", "DataParallel": "module", "DistributedDataParallel": "module"}
"""Wrapper classes of torch, mapped to the attribute that holds the model."""
_SAME = 1e-5
"""Largest relative output difference at which a rebuilt module counts as equal to the original."""


def with_args(module: nn.Module, identity: ModelIdentity) -> nn.Module:
    module.__dict__[_ARGS] = {
        # The module itself shows these, also after timm's reset_classifier and set_input_size.
        name: value
        for name, value in identity.model_args.items()
        if name not in ("num_classes", "img_size")
    }
    return module


def copy_of_module(module: nn.Module, hints: ModelHints | None = None) -> Checkpoint:
    module, hints = unwrapped(module), hints or ModelHints()
    architecture, _ = _stated(module, hints)
    source = f"{architecture} in memory"
    _check_classes(module, hints, source)
    model = _as_loaded(module)
    check_finite(source, model)
    identity = identity_of(model, architecture, checked_model_args(hints.model_args))
    return Checkpoint.of_model(
        model, identity, source=source, stem=architecture, dtypes=_dtypes(module), cfg_origin="module"
    )


def rebuilt_module(module: nn.Module, hints: ModelHints | None = None) -> Checkpoint:
    """Rebuild a dense timm module from its architecture and arguments. Return the copy as a checkpoint."""
    module, hints = unwrapped(module), hints or ModelHints()
    architecture, cfg = _stated(module, hints)
    source = f"{architecture} in memory"
    args = checked_model_args({**getattr(module, _ARGS, {}), **hints.model_args})
    args["num_classes"] = _check_classes(module, hints, source)
    # Only if it differs, so that the file lists no default values.
    size = _image_size(module)
    if "img_size" not in args and size != _image_size(build_skeleton(ModelIdentity(architecture, args, cfg))):
        args["img_size"] = size
    tensors = infos(module.state_dict())
    resolved = infer_from_shapes(architecture, args, cfg, tensors)
    model, identity = resolved.skeleton, resolved.identity
    try:
        check_tensors(source, tensors, model, identity)
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}\n  The module is rebuilt from its architecture and arguments: give all non-default "
            f"arguments in {option_name('model_args')}. For a slim model, give its file"
        ) from None
    set_resolved_preprocessing(model, identity, source)
    allocate(model)
    # Arguments without effect on shapes, such as num_heads, still change the outputs.
    original = _as_loaded(module)
    model.load_state_dict(original.state_dict(), strict=True)
    check_finite(source, model.eval())
    shape = model_input_size(model, identity.pretrained_cfg, identity.model_args)
    images = torch.randn(2, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        outputs, wanted = model(images), original(images)
    if outputs.shape != wanted.shape or (outputs - wanted).abs().max() > _SAME * wanted.abs().max():
        stated = ", ".join(f"{name}={value!r:.60}" for name, value in identity.model_args.items())
        raise CheckpointError(
            f"{source}: {architecture} rebuilt with {stated} has other outputs than the module. Give all "
            f"arguments of the module in {option_name('model_args')}"
        )
    return Checkpoint.of_model(
        model,
        identity,
        source=source,
        stem=architecture,
        dtypes=_dtypes(module),
        notes=(f"architecture {architecture}, of the module", *resolved.notes),
        cfg_origin="module",
    )


def unwrapped(module: nn.Module) -> nn.Module:
    while type(module).__name__ in _WRAPPED:
        module = getattr(module, _WRAPPED[type(module).__name__])
    return module


def _stated(module: nn.Module, hints: ModelHints) -> tuple[str, dict[str, Any]]:
    stated: Any = getattr(module, "pretrained_cfg", None) or getattr(module, "default_cfg", None)
    stated = stated if isinstance(stated, Mapping) else {}
    architecture = (hints.model or str(stated.get("architecture", ""))).partition(".")[0]
    if not architecture or not hasattr(module, "forward_features"):
        raise CheckpointError(
            f"expected a model of timm.create_model or a checkpoint file, found a {type(module).__name__}"
        )
    if not known_model(architecture):
        raise CheckpointError(unknown_model(architecture))
    # The weights may have changed since timm loaded them.
    known = {name: value for name, value in stated.items() if name not in PROVENANCE_CFG_KEYS}
    return architecture, checked_pretrained_cfg(known)


def _check_classes(module: nn.Module, hints: ModelHints, source: str) -> int:
    classes = classifier_size(module)
    if hints.num_classes not in (None, classes):
        raise CheckpointError(
            f"{source}: expected {option_name('num_classes', hints.num_classes)}, found {classes}"
        )
    return classes


def _image_size(model: nn.Module) -> int | list[int] | None:
    size = getattr(patch_embedding(model), "img_size", None)
    if size is None or isinstance(size, int):
        return size
    height, width = map(int, size)
    return height if height == width else [height, width]


def _as_loaded(module: nn.Module) -> nn.Module:
    return copy.deepcopy(module).cpu().float().eval().requires_grad_(False)


def _dtypes(module: nn.Module) -> dict[str, torch.dtype]:
    return {name: tensor.dtype for name, tensor in module.state_dict().items()}
