"""Set a model's pretrained_cfg, from which timm works out the preprocessing of images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mhacut.checkpoint.identity import ModelIdentity
from mhacut.checkpoint.record import SlimRecord
from mhacut.data import Preprocessing
from mhacut.errors import CheckpointError, DataError
from mhacut.surgery.find import model_input_size


def set_resolved_preprocessing(model: Any, identity: ModelIdentity, where: str) -> None:
    """Give a dense model the preprocessing that commands work out for it, so that timm works out the same.

    Args:
        model: the model, changed in place.
        identity: its identity.
        where: the file, for messages.

    Raises:
        CheckpointError: its pretrained_cfg makes no sense.
    """
    cfg = identity.pretrained_cfg
    try:
        resolved = Preprocessing.resolve(cfg, model_input_size(model, cfg, identity.model_args))
    except DataError as error:
        raise CheckpointError(f"{where}: pretrained_cfg: {error}") from None
    _update_cfg(model, {**cfg, **resolved.to_json()})
    if list(resolved.input_size) != cfg.get("input_size"):
        _drop_test_sizes(model)


def set_recorded_preprocessing(model: Any, record: SlimRecord) -> None:
    """Give a slim model the preprocessing that it was cut for, and no recommendation of another."""
    _update_cfg(model, {**record.identity.pretrained_cfg, **record.preprocessing})
    _drop_test_sizes(model)


def _update_cfg(model: Any, cfg: Mapping[str, Any]) -> None:
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in cfg.items()}
    model.pretrained_cfg = {**model.pretrained_cfg, **tuples}
    if hasattr(model, "default_cfg"):
        model.default_cfg = model.pretrained_cfg  # timm's older name for it


def _drop_test_sizes(model: Any) -> None:
    """Drop what recommends evaluation at another size than the model's own."""
    for name in ("test_input_size", "test_crop_pct", "test_pool_size"):
        model.pretrained_cfg.pop(name, None)
