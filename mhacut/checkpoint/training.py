"""Model, image size, mean and std in the options that training scripts save next to the weights.

timm and DeiT save ``args``, Lightning saves ``hyper_parameters``. All values are untrusted; invalid ones are
ignored.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from mhacut.checkpoint.build import known_model
from mhacut.checkpoint.foreign.config import IMAGENET_CFG
from mhacut.checkpoint.identity import checked_model_args
from mhacut.data import Preprocessing
from mhacut.errors import CheckpointError, DataError
from mhacut.limits import is_int, too_large
from mhacut.runtime.files import plain_json

_ENTRIES = ("args", "hyper_parameters", "hparams", "config")
_MODEL_KEYS = (
    *("model", "model_name", "arch", "architecture", "timm_model", "timm_name", "name"),
    *("backbone", "backbone_name", "encoder", "encoder_name", "net", "variant"),
)
_PREFIX = re.compile(r"(hf[-_]hub:)?timm/|timm:")
_OF_SCRIPTS = re.compile(r"vit_(tiny|small|base|large|huge)(?:_patch(\d{1,2}))?", re.ASCII)
"""Pattern for model names in the training scripts of DINO, MAE, iBOT and MoCo v3."""
POOLS = ("avg", "token", "map", "max", "avgmax", "fast", "catavgmax")


class Training(NamedTuple):
    model: str | None
    """timm's model name, with the tag of the initial weights if the options state one."""
    origin: str
    args: dict[str, Any]
    side: int | list[int] | None
    """Side, or [H, W], of the training images. The model may have been built for another size."""
    cfg: dict[str, Any]
    implied: dict[str, Any]
    """Preprocessing of the training script's evaluation. Empty if ``model`` is a timm name."""


def statements(checkpoint: Mapping[Any, Any]) -> dict[str, Any]:
    plain = {entry: _plain(checkpoint.get(entry), 4) for entry in _ENTRIES}
    entries = {entry: options for entry, options in plain.items() if isinstance(options, dict)}
    if isinstance(checkpoint.get("arch"), str):
        entries[""] = {"arch": checkpoint["arch"]}
    return entries


def _plain(value: Any, depth: int) -> Any:
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    if isinstance(value, dict) and depth:
        return {key: _plain(item, depth - 1) for key, item in value.items() if isinstance(key, str)}
    return [_plain(item, depth - 1) for item in value] if isinstance(value, list | tuple) and depth else value


def read_training(stated: Mapping[str, Any]) -> Training | None:
    options: dict[str, Any] = {}
    # The first group that states an option counts.
    for _, group in reversed(list(_groups(stated))):
        options.update(group)
    args = _args(options)
    size = _input_size(options, args)
    side = None if size is None else (size[1] if size[1] == size[2] else size[1:])
    cfg = _cfg(options, size, args.get("in_chans", 3))
    model, origin, further = _model(stated)
    implied: dict[str, Any] = {}
    if further is not None:
        args = {**further, **args}
        # These scripts resize to 256 pixels and crop 224.
        implied = {**IMAGENET_CFG, **({"crop_pct": 0.875} if side in (None, 224) else {})}
    return Training(model, origin, args, side, cfg, implied) if model or cfg else None


def _groups(stated: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for entry, options in stated.items():
        yield entry, options
        for key in ("model", "backbone", "data"):
            if isinstance(options.get(key), dict):
                yield f"{entry}.{key}", options[key]


def _model(stated: Mapping[str, Any]) -> tuple[str | None, str, dict[str, Any] | None]:
    from timm.models import get_arch_pretrained_cfgs

    of_script: tuple[str, str, dict[str, Any]] | None = None
    for entry, options in _groups(stated):
        for key in _MODEL_KEYS:
            value = options.get(key)
            if not isinstance(value, str) or not value or (key == "name" and "." not in entry):
                continue
            origin = f"{entry}.{key}".lstrip(".")
            architecture, _, tag = _PREFIX.sub("", value, count=1).partition(".")
            if re.fullmatch(r"\w{1,128}", architecture, re.ASCII) and known_model(architecture):
                tagged = f"{architecture}.{tag}"
                has_tag = bool(tag) and tagged in get_arch_pretrained_cfgs(architecture)
                return tagged if has_tag else architecture, origin, None
            named = _OF_SCRIPTS.fullmatch(value)
            patch = (named[2] or options.get("patch_size", 16)) if named else None
            if named and of_script is None and known_model(f"vit_{named[1]}_patch{patch}_224"):
                # MoCo v3's vit_small has 12 heads. Its checkpoints have arch outside args.
                further = {"num_heads": 12} if (entry, value) == ("", "vit_small") else {}
                pooled = {"global_pool": "avg"} if options.get("global_pool") is True else {}  # MAE's
                of_script = f"vit_{named[1]}_patch{patch}_224", origin, {**further, **pooled}
    return of_script or (None, "", None)


def _args(options: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = options.get("model_kwargs")
    try:
        args = checked_model_args(kwargs if isinstance(kwargs, Mapping) else {})
    except CheckpointError as error:  # without these arguments, another model might be built
        raise CheckpointError(f"args.model_kwargs: {error}. Save only the state dict") from None
    args.pop("num_classes", None)
    channels, pool = options.get("in_chans"), options.get("gp")
    if isinstance(pool, str) and pool in POOLS:
        args.setdefault("global_pool", pool)
    if is_int(channels) and 0 < channels <= 4096 and channels != 3:
        args.setdefault("in_chans", channels)
    return args


def _input_size(options: Mapping[str, Any], args: Mapping[str, Any]) -> list[int] | None:
    for value in (options.get("input_size"), options.get("img_size")):
        sides = [value, value] if is_int(value) else value
        if isinstance(sides, list) and len(sides) in (2, 3) and all(map(is_int, sides)):
            size = [args.get("in_chans", 3), *sides[-2:]]
            if all(number > 0 for number in size) and not too_large(size):
                return size
    return None


def _cfg(options: Mapping[str, Any], size: list[int] | None, channels: int) -> dict[str, Any]:
    cfg: dict[str, Any] = {} if size is None else {"input_size": size}
    lists = {name: options[name] for name in ("mean", "std") if isinstance(options.get(name), list)}
    if len(lists) < 2 or not all(lists.values()):
        return cfg
    with suppress(DataError, CheckpointError, TypeError, ValueError, OverflowError, RuntimeError):
        stated = Preprocessing((channels, 224, 224), lists["mean"], lists["std"], "bicubic", 1.0, "center")
        cfg |= {name: plain_json(stated.to_json())[name] for name in lists}
    return cfg
