"""Names, tags and default pretrained_cfg of timm's architectures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mhacut.checkpoint.identity import checked_pretrained_cfg
from mhacut.errors import CheckpointError

SIZE_DEPENDENT = frozenset({"crop_pct", "test_input_size", "test_crop_pct", "pool_size", "test_pool_size"})
"""Keys of a pretrained_cfg that go with its ``input_size`` and mean nothing for another."""
# fmt: off
_FROM_DEFAULT = SIZE_DEPENDENT | frozenset((
    "input_size", "fixed_input_size", "min_input_size", "interpolation", "crop_mode", "mean", "std",
    "first_conv", "classifier",
))
# fmt: on
"""Keys that timm's default for an architecture may add to a config.json: never labels, license or origin."""


def completed_cfg(architecture: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``stated``, completed by timm's default of the architecture for its build and preprocessing."""
    import timm

    registered = timm.get_pretrained_cfg(architecture)
    if registered is None:
        return dict(stated)
    default = checked_pretrained_cfg(registered.to_dict())
    names = set(_FROM_DEFAULT)
    if stated.get("input_size", default.get("input_size")) != default.get("input_size"):
        names -= SIZE_DEPENDENT
    return {**{name: value for name, value in default.items() if name in names}, **stated}


def split_tag(name: str) -> tuple[str, str]:
    """Return architecture and tag of ``architecture.tag``; an empty tag is timm's default."""
    architecture, _, tag = name.partition(".")
    return architecture, tag


def cfg_of_tag(name: str, tag: str) -> dict[str, Any]:
    """Return the pretrained_cfg of ``name.tag``; empty for the default tag."""
    if not tag:
        return {}
    from timm.models import get_arch_pretrained_cfgs

    cfgs = get_arch_pretrained_cfgs(name)
    known = {key.partition(".")[2]: cfg for key, cfg in cfgs.items()}
    if tag not in known:
        raise CheckpointError(
            f"{name} has no pretrained tag {tag!r:.100}; it has {', '.join(sorted(known)) or 'none'}"
        )
    return checked_pretrained_cfg(known[tag].to_dict())
