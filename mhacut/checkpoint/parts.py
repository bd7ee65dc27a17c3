"""Find the state dict in a training checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mhacut.checkpoint.wrapping import is_average
from mhacut.errors import CheckpointError

_ENTRIES = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema"),
    *("state_dict", "model", "teacher", "student"),
    *("model_state_dict", "model_state", "params", "weights"),
    *("module", "net", "network", "backbone", "encoder", "target_encoder"),
)
"""Entries that hold the weights of a network: averages first, then what timm's loader prefers."""
_MAX_NESTING = 4


def pick_part(
    where: str, checkpoint: object, asked: str | None = None
) -> tuple[str | None, Mapping[Any, Any]]:
    """Return the name of the entry of a checkpoint that is its state dict, and that state dict.

    Args:
        where: the file, for messages.
        checkpoint: content of the file.
        asked: entry that the user wants; if there is none of this name, it is a module of the state dict.

    Raises:
        CheckpointError: there is no state dict.
    """
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{where}: expected a dict of tensors, found {type(checkpoint).__name__}")
    path: list[str] = []
    found: Mapping[Any, Any] = checkpoint
    while len(path) < _MAX_NESTING:
        entry = asked if asked is not None and asked in found else _entry(found)
        if entry is None:
            break
        path.append(entry)
        inner = found[entry]
        if not isinstance(inner, Mapping):
            kind = "None" if inner is None else type(inner).__name__
            part = ".".join(path)
            raise CheckpointError(
                f"{where}: {part!r:.150} of the checkpoint: expected a dict of tensors, found {kind}"
            )
        found = inner
    return ".".join(path) or None, found


def other_parts(checkpoint: object, part: str | None) -> tuple[str, ...]:
    """Return entries beside ``part`` with weights of the network or its teacher, for the option ``part``."""
    if part is None or not isinstance(checkpoint, dict):
        return ()
    own = (part, part.partition(".")[0])
    return tuple(name for name in _ENTRIES if name not in own and _holds_weights(checkpoint.get(name)))


def _entry(checkpoint: Mapping[Any, Any]) -> str | None:
    """Return the entry with the state dict; None if the checkpoint itself is one."""
    if hasattr(checkpoint.get("config"), "of_yacs") and "model" in checkpoint:
        return "model"  # what these scripts evaluate, and publish the accuracy of
    known: dict[tuple[int, int], bool] = {}
    states = {
        name: state
        for name, state in checkpoint.items()
        if isinstance(name, str) and _holds_weights(state, known=known)
    }
    student, teacher = (_shapes(states.get(word, {})) for word in ("student", "teacher"))
    if student and teacher and not is_average(student, teacher, "teacher"):
        del states["teacher"]
    if any(name in states for name in _ENTRIES):
        return next(name for name in _ENTRIES if name in states)
    if len(states) == 1 and not any(isinstance(value, Tensor) for value in checkpoint.values()):
        return next(iter(states))
    named = [name for name in _ENTRIES if isinstance(checkpoint.get(name), Mapping) and checkpoint[name]]
    named += [name for name in ("state_dict", "model") if name in checkpoint]
    return named[0] if named else None


def _holds_weights(value: object, depth: int = 2, known: dict[tuple[int, int], bool] | None = None) -> bool:
    """Whether a value is a state dict, or holds one; the state of an optimiser has numbers for names.

    ``known`` has what was looked at, since entries of a pickle may share what they hold.
    """
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    known, key = {} if known is None else known, (id(value), depth)
    if key not in known:
        named = [name for name, item in value.items() if isinstance(item, Tensor) and "." in name]
        inner = value.values() if depth and len(named) < 2 else ()
        known[key] = len(named) > 1 or any(_holds_weights(item, depth - 1, known) for item in inner)
    return known[key]


def _shapes(state: Mapping[Any, Any], depth: int = 2) -> dict[str, tuple[int, ...]]:
    """Shapes of a state dict, and of those that it holds, whose names are then before theirs."""
    found: dict[str, tuple[int, ...]] = {}
    for name, item in state.items():
        if isinstance(item, Tensor):
            found[name] = tuple(item.shape)
        elif depth and isinstance(item, Mapping):
            found |= {f"{name}.{key}": shape for key, shape in _shapes(item, depth - 1).items()}
    return found
