"""Find the model in a training checkpoint: its entry, and the prefixes of its tensor names.

Only names and shapes are used, so torch and safetensors files are treated alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from mhacut.errors import CheckpointError, option_name
from mhacut.text import listed

Shapes = Mapping[str, tuple[int, ...]]
_Group = Mapping[str, str]
"""Tensors of one module: name in the file, mapped to the name without the module's prefix."""

_NETWORKS = (
    *("ema", "ema_model", "model_ema", "swa_model", "average_model"),
    *("model", "online_model", "net", "network", "student", "student_backbone"),
    *("teacher", "teacher_backbone", "backbone", "module", "encoder"),
)
"""Names of modules that may hold the network, by preference. Weight averages (EMA) come first."""
_TEACHERS = ("teacher", "teacher_backbone")
"""Names of teacher networks. If the file also has a student, the user must choose with ``--part``."""
_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Pattern for prefixes of tensor names that torch.compile, FSDP and activation checkpointing add."""
_LEADING = re.compile(r"^((module|_orig_mod)\.)+")
_FOR_TRAINING = re.compile(
    r"(\w+_)?(criterion|criteria|loss|losses|loss_fn|loss_fct)|((student|teacher)_)?(dino_head|ibot_head)"
    r"|(momentum_)?projector|predictor|(projection|prediction)_head|momentum_(backbone|classifier)"
)
_COUNTER = re.compile(r"n_averaged|num_updates|decay|steps?|epoch|global_step|initted|queue(_ptr)?|center")
_PROJECTION = re.compile(r"(.+\.)?(last_layer\d?|prototypes\d*)\..+")
_KEPT = ("timm_model", "visual", "features", "body")
"""Prefixes of tensor names that are not removed: timm's models or other libraries' formats use them."""
_ENCODER_ITSELF = (
    {"blocks", "patch_embed"},
    {"blocks", "patch_embed", "norm"},
    {"blocks", "patch_embed", "pos_embed"},
)
"""If the names inside ``encoder.`` equal one of these sets, ``encoder`` is a module of a timm model."""
_STEM = re.compile(r"(^|\.)(patch_embed|embeds|stem|embeddings|cls_token)")
"""Pattern for tensor names that only a complete network has: a stem or class token."""
_ENTRIES = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema"),
    *("state_dict", "model", "teacher", "student"),
    *("model_state_dict", "model_state", "params", "weights"),
    *("module", "net", "network", "backbone", "encoder", "target_encoder"),
)
"""Names of checkpoint entries that may hold the weights, by preference. Weight averages come first."""
_MAX_NESTING = 4
_MAX_NAMES = 5


def unwrap(
    where: str, shapes: Shapes, *, part: str | None = None, parts: Sequence[str] = ()
) -> tuple[dict[str, str], str | None]:
    """Return {tensor name in the file: name in the model}, and a line for the log.

    ``parts``: the entry that was read, and other entries with weights. Tensors outside the model are dropped.
    """
    names, prefixes = _without_wrappers(where, shapes)
    # Level by level, as modules hold each other: model. -> backbone. -> the network.
    left_out: list[str] = []
    others: list[str] = []
    while True:
        groups = _grouped(names)
        for word in [word for word in groups if word != part and _is_for_training(word, groups[word])]:
            if len(groups) > 1:
                del groups[word]
                left_out.append(word)
                others += ["momentum_backbone"] if word == "momentum_backbone" else []
        requested = part is not None and part in groups and "" not in groups[part].values()
        chosen = part if requested else _network(where, groups)
        if chosen is None:
            names = {file: name for file, name in names.items() if name.partition(".")[0] in groups}
            break
        names = groups.pop(chosen)
        part = None if requested else part
        left_out += groups
        others += [word for word in groups if word in _NETWORKS]
        prefixes.append(f"{chosen}.")
    if part is not None:
        known = [*parts, *(prefix[:-1] for prefix in prefixes), *others] or list(_grouped(names))
        choices = listed([f"{name!r:.100}" for name in dict.fromkeys(known)], _MAX_NAMES)
        raise CheckpointError(f"{where}: {option_name('part', part)}: no such part. Choose from {choices}")
    return names, _note(parts[:1], prefixes, left_out, [*parts[1:], *others])


def _note(
    read: Iterable[str], prefixes: Iterable[str], left_out: Iterable[str], others: Iterable[str]
) -> str | None:
    notes = [f"read the part {part!r:.150} of the checkpoint" for part in read]
    if removed := "".join(prefixes):
        notes.append(f"removed the prefix {removed:.150} from the tensor names")
    if names := [f"{name:.100}" for name in sorted(left_out)]:
        notes.append(f"left out {listed(names, _MAX_NAMES)}")
    if options := " or ".join(option_name("part", name) for name in others):
        notes.append(f"{options} reads another part")
    return "; ".join(notes) or None


def _without_wrappers(where: str, shapes: Shapes) -> tuple[dict[str, str], list[str]]:
    names: dict[str, str] = {}
    prefix = ""
    for file in shapes:
        name = _LEADING.sub("", file)
        names[file] = _WRAPPER.sub("", name)
        prefix = max(prefix, file.removesuffix(name) or "_orig_mod." * (names[file] != name), key=len)
    if len(set(names.values())) != len(names):
        raise CheckpointError(f"{where}: 2 tensors have the same name without prefix {prefix:.150}")
    return names, [prefix] if prefix else []


def _grouped(names: _Group) -> dict[str, dict[str, str]]:
    groups: dict[str, dict[str, str]] = {}
    for file, name in names.items():
        word, _, rest = name.partition(".")
        groups.setdefault(word, {})[file] = rest
    return groups


def _network(where: str, groups: Mapping[str, _Group]) -> str | None:
    """Return the module name that prefixes the model's tensors; None if there is no prefix to remove."""
    modules = {word: group for word, group in groups.items() if "" not in group.values()}
    networks = [word for word in _NETWORKS if word in modules]
    if not networks:
        # A prefix that all tensors share is a wrapper, whatever its name.
        only = next(iter(modules)) if len(groups) == len(modules) == 1 else None
        return only if only not in (None, *_KEPT) and _is_nested(modules[only]) else None
    _check_one_network(where, networks)
    chosen = networks[0]
    inside = modules[chosen].values()
    if chosen == "encoder" and (
        {rest.partition(".")[0] for rest in inside} in _ENCODER_ITSELF or not _is_nested(modules[chosen])
    ):
        return None
    files = [file for word, group in groups.items() if word not in networks for file in group]
    if not files:
        return chosen
    if not any(map(_STEM.search, inside)):
        return None
    raise CheckpointError(
        f"{where}: found other tensors next to {chosen!r}: "
        f"{listed([f'{file!r:.150}' for file in files], _MAX_NAMES)}. Use {option_name('part', chosen)} to "
        "ignore them"
    )


def _check_one_network(where: str, networks: Sequence[str]) -> None:
    if len(networks) > 1 and set(networks) & set(_TEACHERS):
        options = " or ".join(option_name("part", word) for word in networks)
        raise CheckpointError(f"{where}: found {len(networks)} networks. Choose with {options}")


def _is_nested(group: _Group) -> bool:
    return any("." in rest for rest in group.values())


def _is_for_training(word: str, group: _Group) -> bool:
    if "" in group.values():
        return _COUNTER.fullmatch(word) is not None
    if re.fullmatch(r"((student|teacher)_)?head", word):
        return any(map(_PROJECTION.fullmatch, group.values()))
    return _FOR_TRAINING.fullmatch(word) is not None


def pick_part(
    where: str, checkpoint: object, requested: str | None = None
) -> tuple[str | None, Mapping[Any, Any]]:
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{where}: expected a dict of tensors, found {type(checkpoint).__name__}")
    path: list[str] = []
    state: Mapping[Any, Any] = checkpoint
    while len(path) < _MAX_NESTING:
        entry = requested if requested is not None and requested in state else _entry(where, state)
        if entry is None:
            break
        path.append(entry)
        inner = state[entry]
        if not isinstance(inner, Mapping):
            kind = "None" if inner is None else type(inner).__name__
            part = ".".join(path)
            raise CheckpointError(f"{where}: {part!r:.150}: expected a dict of tensors, found {kind}")
        state = inner
    return ".".join(path) or None, state


def other_parts(checkpoint: object, part: str | None) -> tuple[str, ...]:
    if part is None or not isinstance(checkpoint, dict):
        return ()
    own = (part, part.partition(".")[0])
    return tuple(name for name in _ENTRIES if name not in own and _holds_weights(checkpoint.get(name)))


def _entry(where: str, checkpoint: Mapping[Any, Any]) -> str | None:
    """Return the name of the entry with the state dict; None if ``checkpoint`` is the state dict."""
    states = {
        name: state for name, state in checkpoint.items() if isinstance(name, str) and _holds_weights(state)
    }
    _check_one_network(where, [word for word in ("student", "teacher") if word in states])
    if any(name in states for name in _ENTRIES):
        return next(name for name in _ENTRIES if name in states)
    if len(states) == 1 and not any(isinstance(value, Tensor) for value in checkpoint.values()):
        return next(iter(states))
    named = [name for name in _ENTRIES if isinstance(checkpoint.get(name), Mapping) and checkpoint[name]]
    named += [name for name in ("state_dict", "model") if name in checkpoint]
    return named[0] if named else None


def _holds_weights(value: object, depth: int = 2) -> bool:
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    # Two names with dots: a single one may be an optimiser's, or a table beside the weights.
    named = [name for name, item in value.items() if isinstance(item, Tensor) and "." in name]
    inner = value.values() if depth and len(named) < 2 else ()
    return len(named) > 1 or any(_holds_weights(item, depth - 1) for item in inner)
