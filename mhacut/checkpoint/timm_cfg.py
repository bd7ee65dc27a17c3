"""timm's pretrained_cfg, the source of the preprocessing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mhacut.checkpoint.identity import ModelIdentity, checked_pretrained_cfg
from mhacut.checkpoint.record import SlimRecord
from mhacut.data import Preprocessing
from mhacut.data.preprocessing import SMALL_IMAGE
from mhacut.errors import CheckpointError, DataError
from mhacut.surgery.find import model_input_size

_SIZE_DEPENDENT = frozenset({"crop_pct", "test_input_size", "test_crop_pct", "pool_size", "test_pool_size"})
"""Keys of timm's pretrained_cfg that are valid only for the image size in ``input_size``."""
# fmt: off
_FROM_DEFAULT = _SIZE_DEPENDENT | frozenset((
    "input_size", "fixed_input_size", "min_input_size", "interpolation", "crop_mode", "mean", "std",
    "first_conv", "classifier",
))
# fmt: on
"""Keys of timm's pretrained_cfg that may be completed from timm's default for the architecture."""


def completed_cfg(architecture: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    import timm

    registered = timm.get_pretrained_cfg(architecture)
    if registered is None:
        return dict(stated)
    default = checked_pretrained_cfg(registered.to_dict())
    kept = {name: value for name, value in default.items() if name in _FROM_DEFAULT}
    return {**for_size(kept, stated.get("input_size")), **stated}


def for_size(cfg: Mapping[str, Any], input_size: Sequence[int] | None) -> dict[str, Any]:
    """Return ``cfg`` without keys that are invalid for images of ``input_size`` [C, H, W]."""
    if input_size is None or list(input_size) == cfg.get("input_size"):
        return dict(cfg)
    # A crop for 224 pixels also suits 384, but small images fill their frame.
    lost = _SIZE_DEPENDENT - ({"crop_pct"} if max(input_size[1:]) > SMALL_IMAGE else set())
    return {name: value for name, value in cfg.items() if name not in lost}


def split_tag(name: str) -> tuple[str, str]:
    architecture, _, tag = name.partition(".")
    return architecture, tag


def cfg_of_tag(name: str, tag: str) -> dict[str, Any]:
    if not tag:
        return {}
    from timm.models import get_arch_pretrained_cfgs

    cfgs = get_arch_pretrained_cfgs(name)
    known = {key.partition(".")[2]: cfg for key, cfg in cfgs.items()}
    if tag not in known:
        raise CheckpointError(
            f"{name} has no pretrained tag {tag!r:.100}. Known tags: {', '.join(sorted(known)) or 'none'}"
        )
    return checked_pretrained_cfg(known[tag].to_dict())


def set_resolved_preprocessing(model: Any, identity: ModelIdentity, where: str) -> None:
    cfg = identity.pretrained_cfg
    try:
        resolved = Preprocessing.resolve(cfg, model_input_size(model, cfg, identity.model_args))
    except DataError as error:
        raise CheckpointError(f"{where}: pretrained_cfg: {error}") from None
    _update_cfg(model, {**cfg, **resolved.to_json()})
    # A size for tests is recommended for the original's images only.
    if list(resolved.input_size) != cfg.get("input_size"):
        _drop_test_sizes(model)


def set_recorded_preprocessing(model: Any, record: SlimRecord) -> None:
    _update_cfg(model, {**record.identity.pretrained_cfg, **record.preprocessing})
    _drop_test_sizes(model)


def _update_cfg(model: Any, cfg: Mapping[str, Any]) -> None:
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in cfg.items()}
    model.pretrained_cfg = {**model.pretrained_cfg, **tuples}
    if hasattr(model, "default_cfg"):
        model.default_cfg = model.pretrained_cfg  # timm's older name for it


def _drop_test_sizes(model: Any) -> None:
    for name in ("test_input_size", "test_crop_pct", "test_pool_size"):
        model.pretrained_cfg.pop(name, None)
