"""Models of timm in other libraries' files, which put a prefix in front of timm's names."""

from __future__ import annotations

from typing import Any

from mhacut.checkpoint.build import known_model, unknown_model
from mhacut.checkpoint.foreign.config import Config
from mhacut.checkpoint.foreign.family import Built, Family, Shapes
from mhacut.checkpoint.foreign.open_clip import NOT_THE_TOWER
from mhacut.checkpoint.foreign.rename import Renaming
from mhacut.checkpoint.identity import checked_model_args, checked_pretrained_cfg
from mhacut.errors import CheckpointError

TRUNK = "visual.trunk."
"""Prefix of a model of timm in open_clip."""
WRAPPED = "timm_model."
"""Prefix of a model of timm in transformers."""
_POOLS = ("", "avg", "token", "map")
_PROJECTION = "the projection to the space of the texts"


def _trunk_renaming(shapes: Shapes) -> Renaming:
    modules = {name[len(TRUNK) :].partition(".")[0] for name in shapes if name.startswith(TRUNK)}
    return Renaming(
        {f"{TRUNK}{module}": module for module in modules},
        {**NOT_THE_TOWER, "visual.head.proj": _PROJECTION, "visual.head.mlp": _PROJECTION},
        {"visual.head.pool": "timm has no pooling of this kind"},
    )


def _build_trunk(config: Config, shapes: Shapes) -> Built:
    tower = config.part("vision_cfg")
    name, pool = tower.text("timm_model_name"), tower.text("timm_pool", "avg")
    architecture = name.partition(".")[0]
    if not known_model(architecture):
        raise CheckpointError(f"{tower.where}: timm_model_name: {unknown_model(architecture)}")
    if pool not in _POOLS:
        raise tower.fault("timm_pool", f"one of {', '.join(filter(None, _POOLS))}, which timm has")
    # The name states the image size, or the shape of the position embedding shows it.
    args: dict[str, Any] = {"num_classes": 0}
    if pool:
        args["global_pool"] = pool
    return Built(architecture, args)


OPEN_CLIP_TRUNK = Family(
    "image tower of timm in open_clip",
    (("visual.trunk.patch_embed.proj.weight",),),
    _trunk_renaming,
    _build_trunk,
)


def _wrapped_renaming(shapes: Shapes) -> Renaming:
    modules = {name[len(WRAPPED) :].partition(".")[0] for name in shapes if name.startswith(WRAPPED)}
    return Renaming({f"{WRAPPED}{module}": module for module in modules})


def _build_wrapped(config: Config, shapes: Shapes) -> Built:
    architecture = config.text("architecture").partition(".")[0]
    if not known_model(architecture):
        raise CheckpointError(f"{config.where}: architecture: {unknown_model(architecture)}")
    args = checked_model_args(config.raw("model_args") or {})
    args.pop("num_classes", None)
    return Built(architecture, args, cfg=checked_pretrained_cfg(config.raw("pretrained_cfg") or {}))


TIMM_WRAPPER = Family(
    "model of timm in transformers",
    (),
    _wrapped_renaming,
    _build_wrapped,
    model_types=("timm_wrapper",),
)
