"""Architecture and arguments of a checkpoint's timm model, checked as untrusted values."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mhacut.errors import CheckpointError
from mhacut.limits import is_int, too_large
from mhacut.runtime.files import plain_json

ARGUMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")

_ARCHITECTURE = re.compile(r"[A-Za-z0-9_]{1,128}")
# fmt: off
_RESERVED_ARGS = frozenset((
    "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "pretrained_model_args", "pretrained_strict",
    "pretrained_filter_fn", "pretrained_custom_load", "checkpoint_path", "cache_dir", "scriptable",
    "exportable", "no_jit", "features_only", "feature_cfg", "feature_cls", "out_indices", "kwargs_filter",
    "pruned", "model_name", "model_cls", "variant", "device", "dtype",
))
"""Forbidden arguments of ``timm.create_model``: they load weights, choose a device or wrap the model."""
_CFG_SIZES = frozenset({"input_size", "test_input_size", "min_input_size"})
_CFG_KEYS = _CFG_SIZES | frozenset((
    "num_classes", "pool_size", "test_pool_size", "first_conv", "classifier", "architecture", "tag",
    "custom_load", "fixed_input_size", "interpolation", "crop_pct", "test_crop_pct", "crop_mode", "mean",
    "std", "license", "origin_url", "paper_name", "paper_ids", "notes", "label_names", "label_descriptions",
))
# fmt: on
"""Keys of timm's pretrained_cfg that mhacut reads. Other keys are dropped, such as sources of weights."""
PROVENANCE_CFG_KEYS = frozenset({"tag", "license", "origin_url", "paper_name", "paper_ids", "notes"})
LABEL_CFG_KEYS = frozenset({"label_names", "label_descriptions"})
WEIGHTS_CFG_KEYS = PROVENANCE_CFG_KEYS | LABEL_CFG_KEYS
"""Keys of timm's pretrained_cfg that describe timm's own weights, such as their license and labels."""


@dataclass(frozen=True)
class ModelIdentity:
    """Arguments of ``timm.create_model`` that build the dense model, as JSON values."""

    architecture: str
    model_args: dict[str, Any] = field(default_factory=dict)
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    """Preprocessing, labels and license in timm's format. Keys that name a source of weights are dropped."""

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, str) or not _ARCHITECTURE.fullmatch(self.architecture):
            raise CheckpointError(
                f"architecture: expected the name of a timm model, found {self.architecture!r:.100}"
            )
        object.__setattr__(self, "model_args", checked_model_args(self.model_args))
        object.__setattr__(self, "pretrained_cfg", checked_pretrained_cfg(self.pretrained_cfg))


@dataclass(frozen=True)
class ModelHints:
    """User options that say which model a file holds. Fields that are None are inferred from the file."""

    model: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    num_classes: int | None = None
    part: str | None = None
    """Entry of a training checkpoint, or module inside the entry, that holds the model."""

    @property
    def all_args(self) -> dict[str, Any]:
        """Checked ``model_args``, with ``num_classes`` if the user gave it."""
        classes = {} if self.num_classes is None else {"num_classes": self.num_classes}
        return {**checked_model_args(self.model_args), **classes}


def checked_model_args(args: object) -> dict[str, Any]:
    """Return ``args`` as JSON values. Raise if an argument is not part of the architecture."""
    if not isinstance(args, Mapping):
        raise CheckpointError(f"model_args: expected an object, found {type(args).__name__}")
    for name in args:
        if not isinstance(name, str) or not ARGUMENT.fullmatch(name):
            raise CheckpointError(f"model_args: expected argument names, found {reprlib.repr(name):.100}")
        if name in _RESERVED_ARGS:
            raise CheckpointError(f"model_args: {name!r} is not allowed. Leave it out")
    checked: dict[str, Any] = plain_json(args)
    side = checked.get("img_size")
    # timm runs some stems at this size while it builds the model.
    _check_image([side, side] if is_int(side) else side, "model_args 'img_size'")
    return checked


def checked_pretrained_cfg(cfg: object) -> dict[str, Any]:
    if not isinstance(cfg, Mapping):
        raise CheckpointError(f"pretrained_cfg: expected an object, found {type(cfg).__name__}")
    # Sources of weights are dropped: a file must not make timm download others.
    kept: dict[str, Any] = plain_json(
        {name: value for name, value in cfg.items() if name in _CFG_KEYS and value is not None}
    )
    for name in kept.keys() & _CFG_SIZES:
        size, where = kept[name], f"pretrained_cfg {name!r}"
        if not isinstance(size, list) or len(size) != 3 or not all(is_int(n) and n > 0 for n in size):
            raise CheckpointError(f"{where}: expected [C, H, W], found {size!r:.100}")
        _check_image(size, where)
    return kept


def identity_of(model: Any, architecture: str, args: Mapping[str, Any]) -> ModelIdentity:
    num_classes = int(model.num_classes)
    cfg = {**checked_pretrained_cfg(model.pretrained_cfg), "num_classes": num_classes}
    return ModelIdentity(architecture, {**args, "num_classes": num_classes}, cfg)


def dense_args(identity: ModelIdentity) -> dict[str, Any]:
    """Return the ``model_args`` with which the dense original of a slim file can be opened."""
    return {name: value for name, value in identity.model_args.items() if name != "num_classes" or value == 0}


def _check_image(size: object, where: str) -> None:
    if isinstance(size, list) and len(size) in (2, 3) and all(map(is_int, size)):
        fault = too_large(size)
        if fault:
            raise CheckpointError(f"{where}: {fault}")
