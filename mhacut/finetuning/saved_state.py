"""The state that an interrupted run saved, checked value by value before the run goes on with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from math import inf
from reprlib import repr as shown
from sys import float_info
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mhacut.checkpoint.untrusted_json import kind_of
from mhacut.errors import CheckpointError
from mhacut.finetuning.folder import RunFolder
from mhacut.finetuning.progress import Progress
from mhacut.finetuning.result import EpochSummary
from mhacut.finetuning.resuming import check_same
from mhacut.finetuning.training import Trainer
from mhacut.limits import is_int, is_number
from mhacut.measuring.accuracy import Evaluation
from mhacut.text import dtype_name

_MOST = 2**53
"""Largest whole number; larger ones are no floats."""
_VALIDATION = "validation images"


class _Unfit(Exception):
    """A value that this run would not have saved."""


def read_saved(
    folder: RunFolder, trainer: Trainer, inputs: Mapping[str, Any], steps: tuple[int, int]
) -> tuple[Progress, Mapping[str, Any]] | None:
    """Read the state of the run in ``folder``; None before the first was saved.

    Args:
        folder: the run's.
        trainer: its trainer, which is not modified.
        inputs: the run's inputs now, which must be those it began with.
        steps: numbers of steps of the run, and of an epoch.

    Returns:
        The progress, and the state of the trainer, for its two functions that restore it.

    Raises:
        CheckpointError: the state is damaged, gone or another run's, or the inputs have changed.
    """
    state = folder.read_state()
    if state is None:
        return None
    try:
        check_same(_inputs(state.get("began_with")), inputs, str(folder.path))
        _check_progress(state, steps, measured=inputs.get(_VALIDATION) is not None)
        return Progress.from_state(state), _of_trainer(state.get("trainer"), trainer)
    except _Unfit as error:
        raise unfit(folder, str(error)) from None


def unfit(folder: RunFolder, why: str) -> CheckpointError:
    """Return the error of a saved state that is not one of the run in ``folder``."""
    return folder.not_resumable(f"is not the state of this run ({why})")


def _inputs(value: object) -> dict[str, Any]:
    found = _dict(value, "began_with")
    for name, each in found.items():
        if not (each is None or is_int(each) or isinstance(each, str)):
            raise _Unfit(f"began_with: {shown(name):.50}: expected text or a number, found {kind_of(each)}")
    return found


def _dict(value: object, name: str) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise _Unfit(f"{name}: expected a dict, found {kind_of(value)}")
    return dict(dict.items(value))  # a pickle may have put anything in the place of an OrderedDict's methods


def _list(value: object, name: str) -> list[Any]:
    if not isinstance(value, list):
        raise _Unfit(f"{name}: expected a list, found {kind_of(value)}")
    return value


def _check_progress(state: Mapping[str, Any], steps: tuple[int, int], *, measured: bool) -> None:
    """Check what :meth:`Progress.to_state` gives."""
    total, of_epoch = steps
    step = _number(state, "step", whole=True, least=0, most=total)
    best = _number(state, "best", optional=True, least=0, most=100)
    if best is not None and not measured:
        raise _Unfit("best: expected none without validation images")
    _number(state, "epoch_loss", least=-float_info.max, most=float_info.max)
    _number(state, "epoch_images", whole=True, least=0)
    rows = _list(state.get("rows"), "rows")
    epochs = -(-step // of_epoch) if step == total else step // of_epoch
    if len(rows) != epochs:
        raise _Unfit(f"rows: expected {epochs} after step {step}, found {len(rows)}")
    for row in rows:
        _check_fields(row, EpochSummary, "rows")
    if "before" not in state:
        raise _Unfit("before: expected an evaluation or None, found nothing")
    if state["before"] is not None:
        _check_fields(state["before"], Evaluation, "before")
    if not all(isinstance(name, str) for name in _list(state.get("unreadable"), "unreadable")):
        raise _Unfit("unreadable: expected names of images")


def _check_fields(value: object, kind: type[EpochSummary | Evaluation], name: str) -> None:
    found = _dict(value, name)
    known = {field.name: field for field in fields(kind)}
    if not found.keys() <= known.keys():
        raise _Unfit(f"{name}: expected {', '.join(known)}, found {shown(list(found)):.100}")
    for field in known.values():
        if field.name in found or field.default is MISSING:
            optional, whole = "None" in str(field.type), field.type == "int"
            _number(found, field.name, name, optional=optional, whole=whole)


def _number(
    values: Mapping[str, Any],
    name: str,
    within: str = "",
    *,
    whole: bool = False,
    optional: bool = False,
    least: float = -inf,
    most: float = inf,
) -> Any:
    """Return the number of this name; NaN is none."""
    value, where = values.get(name), f"{within}: {name}" if within else name
    if value is None and optional and name in values:
        return None
    fits = is_number(value) and least <= value <= most and (isinstance(value, float) or abs(value) <= _MOST)
    if not fits or (whole and not is_int(value)):
        kind = "a whole number" if whole else "a number"
        bounds = f" of {least:g} to {most:g}" if most < inf else ""
        raise _Unfit(f"{where}: expected {kind}{bounds}, found {shown(value):.50}")
    return value


def _of_trainer(value: object, trainer: Trainer) -> dict[str, Any]:
    """Check what :meth:`Trainer.state` gives, against a trainer of the same run."""
    found = _dict(value, "trainer")
    state: dict[str, Any] = {"model": _tensors(found.get("model"), trainer.model, "model")}
    optimizer = _dict(found.get("optimizer"), "optimizer")
    _check_optimizer(optimizer, trainer.optimizer)
    scaler, own = _dict(found.get("scaler"), "scaler"), trainer.scaler.state_dict()
    if own and not (scaler.keys() == own.keys() and all(_alike(scaler[key], own[key]) for key in own)):
        raise _Unfit(f"scaler: expected numbers {', '.join(own)}, found {shown(scaler):.100}")
    state |= {"optimizer": optimizer, "scaler": scaler, "average": None}
    if trainer.average is not None:
        state["average"] = _tensors(found.get("average"), trainer.average.module, "average")
    return state


def _tensors(value: object, module: nn.Module, name: str) -> dict[str, Tensor]:
    """Check the state dict of ``module``, and return it."""
    found, own = _dict(value, name), module.state_dict()
    if found.keys() != own.keys():
        other = next(iter(found.keys() ^ own.keys()))
        why = "is missing" if other in own else "is no tensor of the model"
        raise _Unfit(f"{name}: {shown(other):.150} {why}")
    for key, tensor in own.items():
        each = found[key]
        _check_leaf(each, f"{name}: {key}")
        if not isinstance(each, Tensor) or (each.shape, each.dtype) != (tensor.shape, tensor.dtype):
            raise _Unfit(f"{name}: {key}: expected {_described(tensor)}, found {_described(each)}")
    return found


def _described(value: object) -> str:
    return f"{dtype_name(value.dtype)} {tuple(value.shape)}" if isinstance(value, Tensor) else kind_of(value)


def _check_leaf(value: object, name: str) -> None:
    """Raise :class:`_Unfit` where a tensor is not one of numbers in memory, or a number is NaN."""
    if isinstance(value, Tensor):
        dense = value.layout == torch.strided and not value.is_quantized and not value.is_nested
        if not dense or value.device.type != "cpu":
            raise _Unfit(f"{name}: expected a dense tensor")
        if bool(value.isnan().any()):
            raise _Unfit(f"{name}: {int(value.isnan().sum())} of {value.numel()} values are NaN")
    elif isinstance(value, float) and value != value:
        raise _Unfit(f"{name}: expected a number, found nan")


def _check_optimizer(state: Mapping[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Check the groups of parameters, and that no number is NaN.

    Which tensors an optimiser keeps, and of what shapes, it alone knows: its first step will show that.
    """
    groups, own = _list(state.get("param_groups"), "param_groups"), optimizer.state_dict()["param_groups"]
    if len(groups) != len(own):
        raise _Unfit(f"param_groups: expected {len(own)}, found {len(groups)}")
    for group, like in zip(groups, own, strict=True):
        found = _dict(group, "param_groups")
        # A newer torch may have options that the state lacks, and have a default for them.
        wrong = [name for name in like if name in found and not _alike(found[name], like[name])]
        wrong += [] if "params" in found else ["params"]
        if wrong:
            expected, given = shown(like[wrong[0]]), shown(found.get(wrong[0]))
            raise _Unfit(f"param_groups: {wrong[0]}: expected {expected:.50}, found {given:.50}")
    for leaf in tree_leaves(_dict(state.get("state"), "optimizer")):
        _check_leaf(leaf, "optimizer")


def _alike(value: object, own: object) -> bool:
    """Whether ``value`` may stand for ``own``, a value of a new optimiser: of its kind, and no NaN."""
    if isinstance(own, Sequence) and not isinstance(own, str):
        return isinstance(value, list | tuple) and len(value) == len(own) and all(map(_alike, value, own))
    if own is None:
        return value is None or isinstance(value, bool) or (is_number(value) and value == value)
    if is_number(own):
        return is_number(value) and value == value
    return isinstance(value, type(own))
