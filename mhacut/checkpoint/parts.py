"""Find the state dict in a training checkpoint."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mhacut.checkpoint.wrapping import check_teacher, same_network
from mhacut.errors import CheckpointError

_TIMM_AVERAGES = ("state_dict_ema", "model_ema")
_AVERAGES = ("ema_state_dict", "ema_model", "ema")
_TIMM_MODELS = ("state_dict", "model")
_MODELS = (
    *("model_state_dict", "model_state", "params_ema", "params", "weights"),
    *("module", "net", "network", "backbone", "encoder"),
)
_LIGHTNING = "pytorch-lightning_version"
_MAX_NESTING = 4

Entry = tuple[Any, ...]
"""Keys that lead to an entry, the outermost first."""


def pick_part(
    where: str, checkpoint: object, asked: str | None = None
) -> tuple[str | None, Mapping[Any, Any]]:
    """Return the name of the entry of a checkpoint that is its state dict, and that state dict.

    An average of the weights comes first, then what timm's loader prefers, then other scripts' names for it.

    Args:
        where: the file, for messages.
        checkpoint: what the file holds.
        asked: entry that the user wants; if there is none of this name, it is a module of the state dict.

    Raises:
        CheckpointError: there is no state dict.
    """
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{where}: expected a dict of tensors, found {type(checkpoint).__name__}")
    path: Entry = ()
    found: Mapping[Any, Any] = checkpoint
    while len(path) < _MAX_NESTING:
        entry = (asked,) if asked is not None and asked in found else _entry(where, found)
        if entry is None:
            break
        path += entry
        inner: object = found
        for key in entry:
            inner = inner[key] if isinstance(inner, Mapping) else None
        if not isinstance(inner, Mapping):
            kind = "None" if inner is None else type(inner).__name__
            raise CheckpointError(
                f"{where}: {_shown(path)!r:.150} of the checkpoint: expected a dict of tensors, found {kind}"
            )
        found = inner
    return _shown(path) or None, found


def other_parts(checkpoint: object, part: str | None) -> tuple[str, ...]:
    """Return entries beside ``part`` with weights of the network or its teacher, for the option ``part``."""
    if part is None or not isinstance(checkpoint, dict):
        return ()
    known = (*_TIMM_AVERAGES, *_AVERAGES, *_TIMM_MODELS, "teacher", "student", *_MODELS, "target_encoder")
    states = _States()
    own = part.partition(".")[0]
    return tuple(name for name in known if name not in (part, own) and checkpoint.get(name) in states)


def _entry(where: str, checkpoint: Mapping[Any, Any]) -> Entry | None:
    """Return the entry with the state dict; None if the checkpoint itself is one.

    Raises:
        CheckpointError: it may be either of two.
    """
    if hasattr(checkpoint.get("config"), "of_yacs") and "model" in checkpoint:
        return ("model",)  # what these scripts evaluate, and publish the accuracy of
    states = _States()
    average = _of_callback(checkpoint, states)
    if average is not None:
        return average
    for name in _TIMM_AVERAGES:
        if checkpoint.get(name) is not None:
            return (name,)
    for name in _AVERAGES:
        if checkpoint.get(name) in states:
            return (name,)
    for name in _TIMM_MODELS:
        if isinstance(checkpoint.get(name), Mapping):
            return (name,)
    student, teacher = (checkpoint.get(name) for name in ("student", "teacher"))
    if teacher in states and (student not in states or same_network(_shapes(teacher), _shapes(student))):
        if student in states:
            check_teacher(where, "student", "teacher", _shapes(teacher))
        return ("teacher",)
    if student in states:
        return ("student",)
    for name in _MODELS:
        if checkpoint.get(name) in states:
            return (name,)
    if not any(isinstance(value, Tensor) for value in checkpoint.values()):
        named = [name for name, value in checkpoint.items() if isinstance(name, str) and value in states]
        if len(named) == 1:
            return (named[0],)
    return next(((name,) for name in _TIMM_MODELS if name in checkpoint), None)


def _of_callback(checkpoint: Mapping[Any, Any], states: _States) -> Entry | None:
    """Return the average that a callback of Lightning keeps, if one does."""
    callbacks = checkpoint.get("callbacks") if _LIGHTNING in checkpoint else None
    if isinstance(callbacks, Mapping):
        for callback, state in callbacks.items():
            for name in (*_TIMM_AVERAGES, *_AVERAGES):
                if isinstance(state, Mapping) and state.get(name) in states:
                    return ("callbacks", callback, name)
    return None


class _States:
    """The values that are a state dict, or hold one; the state of an optimiser has numbers for names.

    Each is looked at once, since entries of a pickle may share what they hold. All must outlive this object.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], bool] = {}

    def __contains__(self, value: object) -> bool:
        return self._holds(value, 2)

    def _holds(self, value: object, depth: int) -> bool:
        if not isinstance(value, Mapping):
            return False
        key = id(value), depth
        if key not in self._known:
            self._known[key] = self._is_state(value, depth)
        return self._known[key]

    def _is_state(self, value: Mapping[Any, Any], depth: int) -> bool:
        if not all(isinstance(key, str) for key in value):
            return False
        named = [key for key, item in value.items() if isinstance(item, Tensor) and "." in key]
        return len(named) > 1 or (depth > 0 and any(self._holds(item, depth - 1) for item in value.values()))


def _shapes(state: Any, depth: int = 2) -> dict[str, tuple[int, ...]]:
    """Shapes of a state dict, or of the first one that it holds, whose name is then before theirs."""
    found = {name: tuple(item.shape) for name, item in state.items() if isinstance(item, Tensor)}
    states = _States()
    inner = next((name for name, item in state.items() if not found and depth and item in states), None)
    if inner is None:
        return found
    return {f"{inner}.{name}": shape for name, shape in _shapes(state[inner], depth - 1).items()}


def _shown(path: Entry) -> str:
    return ".".join(key if isinstance(key, str) else reprlib.repr(key) for key in path)
