"""What a slim file says about itself: one JSON document in its metadata. Read back as untrusted text."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from mhacut.checkpoint.untrusted_json import (
    MAX_NUMBER,
    bounded,
    kind_of,
    parse_json,
    plain_json,
)
from mhacut.errors import CheckpointError, PlanError
from mhacut.limits import MAX_CROP_PCT, is_int, is_number, too_large
from mhacut.plan import Plan

FORMAT_VERSION = 1


METADATA_KEY = "mhacut"
"""Under this key the document lies in the ``__metadata__`` of the safetensors file."""


MAX_RECORD_CHARS = 16 * 2**20
"""Kept channels of the largest timm ViT take about 2 MB."""


_ARCHITECTURE = re.compile(r"[A-Za-z0-9_]{1,128}")


_ARGUMENT = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")


_KEYS = {
    "format_version",
    "architecture",
    "model_args",
    "pretrained_cfg",
    "basis",
    "preprocessing",
    "layers",
    "plan",
    "history",
}


_PREPROCESSING_KEYS = {"input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode"}


_RESERVED_ARGS = frozenset(
    {
        "pretrained",
        "pretrained_cfg",
        "pretrained_cfg_overlay",
        "pretrained_model_args",
        "pretrained_strict",
        "pretrained_filter_fn",
        "pretrained_custom_load",
        "checkpoint_path",
        "cache_dir",
        "scriptable",
        "exportable",
        "no_jit",
        "features_only",
        "feature_cfg",
        "feature_cls",
        "out_indices",
        "kwargs_filter",
        "pruned",
        "model_name",
        "model_cls",
        "variant",
        "device",
        "dtype",
    }
)
"""Arguments of timm's factory that load, place or wrap a model instead of describing it."""


_CFG_KEYS = frozenset(
    {
        "architecture",
        "tag",
        "custom_load",
        "input_size",
        "test_input_size",
        "fixed_input_size",
        "min_input_size",
        "interpolation",
        "crop_pct",
        "test_crop_pct",
        "crop_mode",
        "mean",
        "std",
        "num_classes",
        "pool_size",
        "test_pool_size",
        "first_conv",
        "classifier",
        "license",
        "origin_url",
        "paper_name",
        "paper_ids",
        "notes",
        "label_names",
        "label_descriptions",
    }
)
"""What of a pretrained_cfg is kept: preprocessing, labels, provenance; never a source of weights."""


_CFG_BUILDS = frozenset(
    {
        "input_size",
        "test_input_size",
        "min_input_size",
        "num_classes",
        "pool_size",
        "test_pool_size",
        "first_conv",
        "classifier",
    }
)
"""What of it timm reads while it builds a model."""


@dataclass(frozen=True)
class ModelIdentity:
    """What ``timm.create_model`` needs to build the dense model, as plain JSON values."""

    architecture: str
    """Name in timm's registry, without a tag."""
    model_args: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments of ``timm.create_model``: ``num_classes`` always, ``img_size`` and others if set."""
    pretrained_cfg: dict[str, Any] = field(default_factory=dict)
    """timm's record of preprocessing, labels and license; never of where weights would come from."""

    def __post_init__(self) -> None:
        if not isinstance(self.architecture, str) or not _ARCHITECTURE.fullmatch(self.architecture):
            raise CheckpointError(
                f"architecture: expected the name of a timm model, found {self.architecture!r:.100}"
            )
        object.__setattr__(self, "model_args", checked_model_args(self.model_args))
        object.__setattr__(self, "pretrained_cfg", checked_pretrained_cfg(self.pretrained_cfg))


@dataclass(frozen=True)
class SlimRecord:
    """Everything a slim file states besides its tensors."""

    identity: ModelIdentity
    """Of the dense model."""
    plan: Plan
    """The whole cut, in the dense model's indices, however many commands it took."""
    preprocessing: dict[str, Any]
    """Resolved ``input_size``, ``mean``, ``std``, ``interpolation``, ``crop_pct``, ``crop_mode``."""
    history: tuple[dict[str, Any], ...]
    """One entry per command that made the file, oldest first: command, options, seed, budget, FLOPs before
    and after, sha256 of what it read, versions."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "preprocessing", _checked_preprocessing(self.preprocessing))
        object.__setattr__(self, "history", tuple(plain_json(entry) for entry in self.history))
        if not all(isinstance(entry, dict) for entry in self.history):
            raise CheckpointError("history: expected one object per command")

    def to_json(self) -> str:
        """One line of JSON that :meth:`from_json` reads back; ``layers`` is there for human readers."""
        document = {
            "format_version": FORMAT_VERSION,
            "architecture": self.identity.architecture,
            "model_args": self.identity.model_args,
            "pretrained_cfg": self.identity.pretrained_cfg,
            "basis": plan_basis(self.plan),
            "preprocessing": self.preprocessing,
            "layers": layer_widths(self.plan),
            "history": list(self.history),
            "plan": self.plan.to_json(),
        }
        return json.dumps(document, ensure_ascii=True, allow_nan=False, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> SlimRecord:
        """The record :meth:`to_json` wrote; the text may come from anyone.

        Raises:
            CheckpointError: it is too long, not such a document, or of a later format.
        """
        if len(text) > MAX_RECORD_CHARS:
            raise CheckpointError(
                f"metadata {METADATA_KEY!r}: at most {MAX_RECORD_CHARS} characters are allowed, "
                f"found {len(text)}"
            )
        document = parse_json(text, f"metadata {METADATA_KEY!r}")
        if not isinstance(document, dict):
            raise CheckpointError(f"metadata {METADATA_KEY!r}: expected an object, found {kind_of(document)}")
        version = document.get("format_version")
        if not is_int(version) or version < 1:
            raise CheckpointError(f"format_version: expected a whole number, found {version!r:.100}")
        if version > FORMAT_VERSION:
            raise CheckpointError(
                f"format_version: this mhacut reads up to {FORMAT_VERSION}, the file is of {version}; "
                "upgrade mhacut (pip install -U mhacut)"
            )
        if set(document) != _KEYS:
            missing, extra = sorted(_KEYS - set(document)), sorted(set(document) - _KEYS)
            raise CheckpointError(
                f"metadata {METADATA_KEY!r}: keys missing {missing!r:.200}, keys not known {extra!r:.200}"
            )
        try:
            plan = Plan.from_json(document["plan"])
        except PlanError as error:
            raise CheckpointError(f"metadata {METADATA_KEY!r}: {error}") from error
        if document["layers"] != layer_widths(plan):
            raise CheckpointError(f"metadata {METADATA_KEY!r}: the widths in layers and the plan disagree")
        if document["basis"] != plan_basis(plan):
            raise CheckpointError(
                f"metadata {METADATA_KEY!r}: basis {document['basis']!r:.100} and the plan disagree"
            )
        if not isinstance(document["history"], list):
            raise CheckpointError(f"history: expected a list, found {kind_of(document['history'])}")
        identity = ModelIdentity(document["architecture"], document["model_args"], document["pretrained_cfg"])
        return cls(identity, plan, document["preprocessing"], tuple(document["history"]))


def plan_basis(plan: Plan) -> str:
    """What the plan's indices count: ``channel``, ``principal``, or ``mixed`` where units differ."""
    found = {unit.basis for unit in plan if not unit.keeps_all}
    return "mixed" if len(found) > 1 else next(iter(found), "channel")


def layer_widths(plan: Plan) -> dict[str, dict[str, int]]:
    """Per layer of the plan its ``heads`` and the width of each unit.

    >>> from mhacut.plan import UnitPlan
    >>> layer_widths(Plan((UnitPlan("blocks.0.attn", "qk", 3, ((0, 2), (0, 1))),)))
    {'blocks.0.attn': {'heads': 2, 'qk_width': 2}}
    """
    layers: dict[str, dict[str, int]] = {}
    for unit in plan:
        widths = layers.setdefault(unit.layer, {})
        if unit.kind != "hidden":
            widths["heads"] = unit.heads
        widths[f"{unit.kind}_width"] = unit.width
    return layers


def checked_model_args(args: object) -> dict[str, Any]:
    """Arguments for ``timm.create_model`` that describe a model: plain_json, bounded, tuples as lists.

    Raises:
        CheckpointError: an argument loads or places something, or is no plain JSON value of sane size.
    """
    if not isinstance(args, Mapping):
        raise CheckpointError(f"model_args: expected an object, found {kind_of(args)}")
    checked: dict[str, Any] = {}
    for name, value in args.items():
        if not isinstance(name, str) or not _ARGUMENT.fullmatch(name):
            raise CheckpointError(f"model_args: {name!r:.100} is not an argument name")
        if name in _RESERVED_ARGS:
            raise CheckpointError(
                f"model_args: {name!r} does not describe a model; leave it out (checkpoints may not set it)"
            )
        checked[name] = bounded(plain_json(value), f"model_args {name!r}")
    side = checked.get("img_size")
    # timm runs some stems at this size to learn what comes out of them, before anybody else sees the model.
    _check_image([side, side] if is_int(side) else side, "model_args 'img_size'")
    return checked


def checked_pretrained_cfg(cfg: object) -> dict[str, Any]:
    """What of timm's pretrained_cfg is kept, as plain JSON values; sources of weights are dropped."""
    if not isinstance(cfg, Mapping):
        raise CheckpointError(f"pretrained_cfg: expected an object, found {kind_of(cfg)}")
    kept = {name: plain_json(value) for name, value in cfg.items() if name in _CFG_KEYS and value is not None}
    for name in kept.keys() & _CFG_BUILDS:
        bounded(kept[name], f"pretrained_cfg {name!r}")
    for name in kept.keys() & {"input_size", "test_input_size", "min_input_size"}:
        size = kept[name]
        if not isinstance(size, list) or len(size) != 3 or not all(is_int(n) and n > 0 for n in size):
            raise CheckpointError(
                f"pretrained_cfg {name!r}: expected channels, height, width, found {size!r:.100}"
            )
        _check_image(size, f"pretrained_cfg {name!r}")
    return kept


def _checked_preprocessing(preprocessing: object) -> dict[str, Any]:
    where = "preprocessing"
    if not isinstance(preprocessing, Mapping) or set(preprocessing) != _PREPROCESSING_KEYS:
        raise CheckpointError(f"{where}: expected exactly the keys {', '.join(sorted(_PREPROCESSING_KEYS))}")
    plain: dict[str, Any] = plain_json(preprocessing)
    size, mean, std = plain["input_size"], plain["mean"], plain["std"]
    if not isinstance(size, list) or len(size) != 3 or not all(is_int(n) and n > 0 for n in size):
        raise CheckpointError(f"{where}: input_size is channels, height, width, found {size!r:.100}")
    _check_image(size, f"{where}: input_size")
    for name, values, lowest in (("mean", mean, -MAX_NUMBER), ("std", std, 0.0)):
        numbers = isinstance(values, list) and len(values) in (1, size[0]) and all(map(is_number, values))
        if not numbers or not all(lowest <= value <= MAX_NUMBER for value in values):
            raise CheckpointError(f"{where}: {name} is 1 or {size[0]} numbers, found {values!r:.100}")
    if not all(value > 0 for value in std):
        raise CheckpointError(f"{where}: std is above 0, found {std!r:.100}")
    if not is_number(plain["crop_pct"]) or not 0 < plain["crop_pct"] <= MAX_CROP_PCT:
        raise CheckpointError(f"{where}: crop_pct is a fraction, found {plain['crop_pct']!r:.100}")
    for name in ("interpolation", "crop_mode"):
        if not isinstance(plain[name], str) or not _ARGUMENT.fullmatch(plain[name].replace("-", "_")):
            raise CheckpointError(f"{where}: {name} is a word, found {plain[name]!r:.100}")
    return plain


def _check_image(size: object, where: str) -> None:
    """Refuse an image size, [H, W] or [C, H, W], that no memory should be taken for."""
    if isinstance(size, list) and len(size) in (2, 3) and all(map(is_int, size)):
        fault = too_large(size)
        if fault:
            raise CheckpointError(f"{where}: {fault}")
