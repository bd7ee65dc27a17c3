"""Read what a training script states beside its weights: the model, its arguments, the preprocessing.

Scripts of timm and DeiT save their ``args``, Lightning its ``hyper_parameters``. Nothing in them is trusted:
what timm does not know, or makes no sense, is ignored, and a line says so.
"""

from __future__ import annotations

import argparse
import re
import reprlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mhacut.checkpoint.build import known_model
from mhacut.checkpoint.foreign.images import OF_IMAGENET, OF_INCEPTION
from mhacut.checkpoint.identity import checked_model_args
from mhacut.checkpoint.untrusted_json import plain_json
from mhacut.data import Preprocessing
from mhacut.errors import CheckpointError, DataError
from mhacut.limits import is_int, is_number, too_large

_ENTRIES = ("args", "hyper_parameters", "hparams", "config")
"""Entries of a checkpoint with options by their names."""
_MODEL_KEYS = (
    *("model", "model_name", "arch", "architecture", "timm_model", "timm_name", "name"),
    *("backbone", "backbone_name", "encoder", "encoder_name", "net", "variant"),
)
_PREFIX = re.compile(r"(hf[-_]hub:)?timm/|timm:")
_CLASSES = ("num_classes", "nb_classes")
_CROPS = ("crop_pct", "eval_crop_ratio")
_OF_SCRIPTS = re.compile(r"vit_(tiny|small|base|large|huge)(?:_patch(\d{1,2}))?", re.ASCII)
"""Names of models in the scripts of DINO, MAE, iBOT and MoCo v3."""
POOLS = ("avg", "token", "map", "max", "avgmax", "fast", "catavgmax")


@dataclass(frozen=True)
class Training:
    """Valid statements of a training script about its model."""

    model: str | None
    """timm's name, maybe with the tag of the weights that training began with."""
    origin: str
    """Option that names the model, for messages: ``args.model``."""
    args: dict[str, Any]
    """Further arguments of ``timm.create_model``."""
    side: int | list[int] | None
    """Image size, which the script may or may not have given to the model."""
    cfg: dict[str, Any]
    """Preprocessing of images, as timm's pretrained_cfg has it."""
    notes: tuple[str, ...]
    """Lines for the user: what was ignored."""
    implied: Mapping[str, Any] = field(default_factory=dict)
    """Preprocessing of the script's evaluation, where ``model`` follows from a name of its own."""
    unknown: tuple[str, ...] = ()
    """A line for the user if that model is not taken."""


def statements(checkpoint: Mapping[Any, Any]) -> dict[str, Any]:
    """Return the entries of a training checkpoint that :func:`read_training` reads, as plain dicts."""
    plain = {entry: _plain(checkpoint.get(entry), 4) for entry in _ENTRIES}
    found = {entry: options for entry, options in plain.items() if isinstance(options, dict)}
    if isinstance(checkpoint.get("arch"), str):
        found[""] = {"arch": checkpoint["arch"]}
    return found


def _plain(value: Any, depth: int) -> Any:
    """Return ``value`` with its containers, ``depth`` within each other, as dicts of names and lists."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict) and depth:
        return {key: _plain(item, depth - 1) for key, item in value.items() if isinstance(key, str)}
    return [_plain(item, depth - 1) for item in value] if isinstance(value, list | tuple) and depth else value


def read_training(stated: Mapping[str, Any]) -> Training | None:
    """Return the valid statements in ``stated``; None if there are none of use."""
    if not stated:
        return None
    notes: list[str] = []
    unknown: list[str] = []
    model, origin = _model(stated, unknown)
    options: dict[Any, Any] = {}
    for _, group in reversed(list(_groups(stated))):
        options.update(group)
    args = _args(options, notes)
    by_script = None if model else _of_script(stated)
    if by_script is not None:
        model, origin, heads = by_script
        pooled = {"global_pool": "avg"} if options.get("global_pool") is True else {}  # MAE's
        args = {**heads, **pooled, **args}
    else:
        notes = unknown + notes
    size = _input_size(options, args)
    cfg = _cfg(options, size, args.get("in_chans", 3), notes)
    side = None if size is None else (size[1] if size[1] == size[2] else size[1:])
    implied: dict[str, Any] = {}
    if by_script is not None:
        implied = dict(OF_IMAGENET)
        if side in (None, 224):
            implied["crop_pct"] = 0.875  # 224 of 256 pixels
    unread = tuple(unknown) if by_script is not None else ()
    found = Training(model, origin, args, side, cfg, tuple(notes), implied, unread)
    return found if model or cfg or notes else None


def _groups(stated: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[Any, Any]]]:
    """Yield dicts of options with their names for messages; those one level down (``model: {...}``) too."""
    for entry, options in stated.items():
        yield entry, options
        for key in ("model", "backbone", "data"):
            if isinstance(options.get(key), dict):
                yield f"{entry}.{key}", options[key]


def _model(stated: Mapping[str, Any], notes: list[str]) -> tuple[str | None, str]:
    """Return timm's name of the model and which option says so; the first that timm knows."""
    unknown: list[str] = []
    for entry, options in _groups(stated):
        for key in _MODEL_KEYS:
            value = options.get(key)
            if not isinstance(value, str) or not value or (key == "name" and "." not in entry):
                continue
            origin = f"{entry}.{key}".lstrip(".")
            name = _PREFIX.sub("", value, count=1) if _PREFIX.match(value) else value
            architecture, _, tag = name.partition(".")
            if re.fullmatch(r"\w{1,128}", architecture, re.ASCII) and known_model(architecture):
                return (f"{architecture}.{tag}" if _has_tag(architecture, tag) else architecture), origin
            unknown.append(f"its {origin} {value!r:.100} is not a timm model and was ignored")
    notes += unknown[:1]
    return None, ""


def _of_script(stated: Mapping[str, Any]) -> tuple[str, str, dict[str, int]] | None:
    """Return timm's name of a model that a script calls otherwise, the option, and arguments of the model."""
    for entry, options in _groups(stated):
        for key in ("model", "arch"):
            value = options.get(key)
            found = _OF_SCRIPTS.fullmatch(value) if isinstance(value, str) else None
            if found is None:
                continue
            patch = found[2] or options.get("patch_size")
            name = f"vit_{found[1]}_patch{patch if is_int(patch) or found[2] else 16}_224"
            if known_model(name):
                # MoCo v3, whose small model has heads of 32 channels, saves the name beside its args.
                heads = {"num_heads": 12} if (entry, value) == ("", "vit_small") else {}
                return name, f"{entry}.{key}".lstrip("."), heads
    return None


def _has_tag(architecture: str, tag: str) -> bool:
    from timm.models import get_arch_pretrained_cfgs

    return bool(tag) and f"{architecture}.{tag}" in get_arch_pretrained_cfgs(architecture)


def _args(options: Mapping[Any, Any], notes: list[str]) -> dict[str, Any]:
    """Return arguments of the model; the classes are left to the shape of the classifier."""
    args: dict[str, Any] = {}
    try:
        kwargs = options.get("model_kwargs")
        args = checked_model_args(kwargs if isinstance(kwargs, Mapping) else {})
    except CheckpointError as error:
        notes.append(f"its args.model_kwargs were ignored: {error}")
    for name in _CLASSES:
        args.pop(name, None)
    if is_int(options.get("in_chans")) and 0 < options["in_chans"] <= 4096 and options["in_chans"] != 3:
        args.setdefault("in_chans", options["in_chans"])
    pool = options.get("gp")
    if isinstance(pool, str) and pool in POOLS:
        args.setdefault("global_pool", pool)
    return args


def _input_size(options: Mapping[Any, Any], args: Mapping[str, Any]) -> list[int] | None:
    """Return [C, H, W] of images, from timm's ``input_size`` or ``img_size``, or DeiT's ``input_size``."""
    for value in (options.get("input_size"), options.get("img_size")):
        sides = [value, value] if is_int(value) else value
        if isinstance(sides, list) and len(sides) in (2, 3) and all(map(is_int, sides)):
            size = [args.get("in_chans", 3), *sides[-2:]]
            if all(number > 0 for number in size) and not too_large(size):
                return size
    return None


def _cfg(
    options: Mapping[Any, Any], size: list[int] | None, channels: int, notes: list[str]
) -> dict[str, Any]:
    """Return the preprocessing that is stated; each value that makes no sense is ignored."""
    crop = next((options[name] for name in _CROPS if is_number(options.get(name))), None)
    kinds = {"mean": list, "std": list, "interpolation": str, "crop_mode": str}
    stated = {name: options.get(name) for name in kinds}
    given = {name: value for name, value in stated.items() if isinstance(value, kinds[name]) and value}
    of_imagenet = options.get("imagenet_default_mean_and_std")  # BEiT's
    if isinstance(of_imagenet, bool) and not {"mean", "std"} & given.keys():
        given |= OF_IMAGENET if of_imagenet else OF_INCEPTION
    if len({"mean", "std"} & given.keys()) == 1:  # not those of images
        given = {name: value for name, value in given.items() if name not in ("mean", "std")}
    sane = Preprocessing((channels, 224, 224), (0.5,), (0.5,), "bicubic", 1.0, "center").to_json()
    cfg: dict[str, Any] = {} if size is None else {"input_size": size}
    for name, value in ({**given, "crop_pct": crop} if crop is not None else given).items():
        try:
            cfg[name] = plain_json(Preprocessing(**{**sane, name: value}).to_json())[name]
        except (DataError, TypeError, ValueError, OverflowError, RuntimeError):
            notes.append(f"its {name} {reprlib.repr(value):.60} is invalid and was ignored")
    return cfg
