"""Find the model in a training checkpoint: its entry, and the prefixes of its tensor names.

Only names and shapes are used, so torch and safetensors files are treated alike.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mhacut.checkpoint.fingerprints import CLASSIFIERS
from mhacut.errors import CheckpointError, option_name
from mhacut.text import listed

Shapes = Mapping[str, tuple[int, ...]]
_Group = Mapping[str, str]
"""Tensor names in the file, mapped to names inside one module."""

_AVERAGED = ("ema", "ema_model", "model_ema", "swa_model", "average_model", "teacher", "teacher_backbone")
"""Names of averaged (EMA) copies of a network."""
_TRAINED = (
    *("model", "online_model", "net", "network", "student", "student_backbone", "backbone"),
    *("module", "encoder"),
)
"""Names of trained networks."""
_WRAPPER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Prefixes inserted by torch.compile, FSDP and activation checkpointing."""
_LEADING = re.compile(r"^((module|_orig_mod)\.)+")
_FOR_TRAINING = re.compile(
    r"(\w+_)?(criterion|criteria|loss|losses|loss_fn|loss_fct)|((student|teacher)_)?(dino_head|ibot_head)"
    r"|(momentum_)?projector|predictor|(projection|prediction)_head|momentum_(backbone|classifier)"
)
"""Modules used in training only."""
_COUNTER = re.compile(r"n_averaged|num_updates|decay|steps?|epoch|global_step|initted|queue(_ptr)?|center")
"""Single tensors used in training only."""
_PROJECTION = re.compile(r"(.+\.)?(last_layer\d?|prototypes\d*)\..+")
"""Tensors of projection heads (DINO, iBOT, SwAV)."""
_CLASSIFIER = re.compile(
    r"heads?|classifier|fc|linear|(cls|class|linear|classification)_(head|classifier)|last_linear"
)
"""Names of a linear classifier next to a backbone."""
_LAYER = re.compile(
    rf"(?P<module>(?:(?:{_CLASSIFIER.pattern})\.){{1,2}})((?P<number>\d{{1,6}})\.)?(?P<kind>weight|bias)"
)
"""Tensors of a linear classifier, possibly inside a Sequential."""
_LINEAR = re.compile(r"(\d+\.)?(weight|bias)")
_KEPT = ("timm_model", "visual", "features", "body")
"""Prefixes that other libraries' formats or timm's own models need."""
_ENCODER_ITSELF = (
    {"blocks", "patch_embed"},
    {"blocks", "patch_embed", "norm"},
    {"blocks", "patch_embed", "pos_embed"},
)
"""Contents of ``encoder.`` in timm models that have a module of that name."""
_STEM = re.compile(r"(^|\.)(patch_embed|embeds|stem|embeddings|cls_token)")
"""Names that only a complete network has."""
_ENTRIES = (
    *("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema", "params_ema"),
    *("state_dict", "model", "teacher", "student"),
    *("model_state_dict", "model_state", "params", "weights"),
    *("module", "net", "network", "backbone", "encoder", "target_encoder"),
)
"""Entries with weights in order of preference: averages first, then timm's order."""
_MAX_NESTING = 4
_MAX_NAMES = 5


@dataclass(frozen=True)
class Naming:
    """Tensor names in the file and in the model."""

    names: Mapping[str, str]
    """Names in the file, mapped to names in the model. Other tensors are dropped."""
    prefixes: tuple[str, ...] = ()
    """Removed prefixes."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Dropped modules and their number of tensors."""
    others: tuple[str, ...] = ()
    """Other networks, selectable with ``--part``."""
    head: str | None = None
    """Module next to the backbone whose linear layer became ``head``."""
    backbone: str | None = None
    """Module that became the model, if ``head`` lies next to it."""

    def note(self, part: str | None, other_parts: tuple[str, ...] = ()) -> str | None:
        """Return the log line; None for a plain state dict."""
        others = (*other_parts, *self.others)
        notes = [] if part is None else [f"read the part {part!r:.150} of the checkpoint"]
        if self.prefixes:
            notes.append(f"removed the prefix {''.join(self.prefixes):.150} from the tensor names")
        if self.left_out:
            counts = [f"{name:.100} ({count})" for name, count in self.left_out.items()]
            notes.append(f"left out {listed(counts, _MAX_NAMES)}")
        if others:
            notes.append(f"{' or '.join(option_name('part', name) for name in others)} reads another part")
        return "; ".join(notes) or None


def unwrap(
    where: str,
    shapes: Shapes,
    *,
    part: str | None = None,
    parts: Iterable[str] = (),
    layers_only: bool = False,
) -> Naming:
    names, prefixes = _without_wrappers(where, shapes)
    # Level by level, as modules hold each other: model. -> backbone. -> the network.
    left_out: dict[str, int] = {}
    others: list[str] = []
    head_names: dict[str, str] = {}
    head: str | None = None
    backbone: str | None = None
    while not layers_only:
        groups = _grouped(names)
        for word in [word for word in groups if word != part and _is_for_training(word, groups[word])]:
            if len(groups) > 1:
                _leave_out(left_out, word, groups.pop(word))
                others += ["momentum_backbone"] if word == "momentum_backbone" else []
        requested = part is not None and part in groups and "" not in groups[part].values()
        chosen, classifier = (part, None) if requested else _network(where, groups, names.values(), shapes)
        if chosen is None:
            names = {file: name for file, name in names.items() if name.partition(".")[0] in groups}
            break
        network = groups.pop(chosen)
        if classifier is not None:
            if head is not None:  # two classifiers at different levels: unclear which is used
                raise CheckpointError(_ambiguous(where, backbone or "", head_names))
            head, backbone = classifier, chosen
            head_names = {file: f"head.{rest}" for file, rest in groups.pop(classifier).items()}
        part = None if requested else part
        for word, group in groups.items():
            _leave_out(left_out, word, group)
        others += [word for word in groups if word in (*_TRAINED, *_AVERAGED)]
        prefixes.append(f"{chosen}.")
        names = dict(network)
    if part is not None:
        known = [*parts, *(prefix[:-1] for prefix in prefixes), *others] or list(_grouped(names))
        choices = listed([f"{name!r:.100}" for name in dict.fromkeys(known)], _MAX_NAMES)
        raise CheckpointError(f"{where}: {option_name('part', part)}: no such part. Choose from {choices}")
    # If the network has its own classifier, it is unclear whether the head reads its logits or its features.
    if head_names and any(map(CLASSIFIERS.fullmatch, names.values())):
        raise CheckpointError(_ambiguous(where, backbone or "", head_names))
    _check_unique(where, names, prefixes)
    plain = _without_sequence({**names, **head_names}, shapes)
    return Naming(plain, tuple(prefixes), dict(sorted(left_out.items())), tuple(others), head, backbone)


def is_average(network: Shapes, other: Shapes, word: str, around: Iterable[str] = ()) -> bool:
    """Whether ``other`` is an average of ``network``.

    A ``teacher`` with a classifier and no projection head is a distillation teacher.
    """
    ours, theirs = _plain(network), _plain(other)
    classified = any(CLASSIFIERS.fullmatch(name) or _LAYER.fullmatch(name) for name in theirs)
    projected = any(map(_PROJECTION.fullmatch, (*theirs, *around)))
    return ours == theirs and (projected or not classified or word not in ("teacher", "teacher_backbone"))


def _plain(shapes: Shapes) -> Shapes:
    plain = {}
    for name, shape in shapes.items():
        words = _WRAPPER.sub("", name).split(".")
        while len(words) > 1 and words[0] in (*_TRAINED, *_AVERAGED):
            del words[0]
        if shape:
            plain[".".join(words)] = shape
    return plain


def _without_wrappers(where: str, shapes: Shapes) -> tuple[dict[str, str], list[str]]:
    names: dict[str, str] = {}
    prefix = ""
    for file in shapes:
        name = _LEADING.sub("", file)
        names[file] = _WRAPPER.sub("", name)
        prefix = max(prefix, file.removesuffix(name) or "_orig_mod." * (names[file] != name), key=len)
    prefixes = [prefix] if prefix else []
    _check_unique(where, names, prefixes)
    return names, prefixes


def _check_unique(where: str, names: _Group, prefixes: list[str]) -> None:
    if len(set(names.values())) != len(names):
        removed = " or ".join(prefixes)
        raise CheckpointError(f"{where}: two tensors have the same name without the prefix {removed:.150}")


def _grouped(names: _Group) -> dict[str, dict[str, str]]:
    """Group names by their first component."""
    groups: dict[str, dict[str, str]] = {}
    for file, name in names.items():
        word, _, rest = name.partition(".")
        groups.setdefault(word, {})[file] = rest
    return groups


def _network(
    where: str, groups: Mapping[str, _Group], names: Iterable[str], shapes: Shapes
) -> tuple[str | None, str | None]:
    """Return the module that holds the model (None for plain names), and the linear classifier next to it."""
    modules = {word: group for word, group in groups.items() if "" not in group.values()}
    trained = next((word for word in _TRAINED if word in modules), None)
    averaged = next((word for word in _AVERAGED if word in modules), None)
    chosen = averaged or trained
    if trained is not None and averaged is not None:
        student, teacher = (
            {rest: shapes[file] for file, rest in modules[word].items()} for word in (trained, averaged)
        )
        chosen = averaged if is_average(student, teacher, averaged, names) else trained
    if chosen is None:
        # A prefix that all tensors share is a wrapper, whatever its name.
        only = next(iter(modules)) if len(groups) == len(modules) == 1 else None
        return only if only not in (None, *_KEPT) and _is_nested(modules[only]) else None, None
    inside = modules[chosen].values()
    if chosen == "encoder" and (
        {rest.partition(".")[0] for rest in inside} in _ENCODER_ITSELF or not _is_nested(modules[chosen])
    ):
        return None, None
    rest = {word: group for word, group in groups.items() if word not in (trained, averaged)}
    whole, classified = any(map(_STEM.search, inside)), any(map(CLASSIFIERS.fullmatch, inside))
    if not rest:
        return chosen, None
    if len(rest) == 1 and whole and not classified:
        ((word, group),) = rest.items()
        if _CLASSIFIER.fullmatch(word) and _is_linear(group, shapes):
            return chosen, word
    if chosen == "encoder" or not whole:
        return None, None
    files = [file for group in rest.values() for file in group]
    raise CheckpointError(_ambiguous(where, chosen, files))


def _ambiguous(where: str, network: str, files: Iterable[str]) -> str:
    others = listed([f"{file!r:.150}" for file in files], _MAX_NAMES)
    return (
        f"{where}: found other tensors next to {network!r}: {others}. Use {option_name('part', network)} to "
        "ignore them"
    )


def _is_linear(group: _Group, shapes: Shapes) -> bool:
    tensors = {rest: shapes[file] for file, rest in group.items()}
    layers = {rest.rpartition(".")[0] for rest in tensors}
    weight = next((shape for rest, shape in tensors.items() if rest.endswith("weight")), ())
    return len(layers) == 1 and len(weight) == 2 and all(map(_LINEAR.fullmatch, tensors))


def _without_sequence(names: _Group, shapes: Shapes) -> dict[str, str]:
    """Rename the classifier ``head.1.weight`` of a Sequential to ``head.weight``."""
    plain = dict(names)
    layers = {file: match for file, name in names.items() if (match := _LAYER.fullmatch(name))}
    for module in {match["module"] for match in layers.values() if match["number"] is not None}:
        inside = {key: name.removeprefix(module) for key, name in names.items() if name.startswith(module)}
        if _is_linear(inside, shapes):
            for file in inside:
                plain[file] = module + layers[file]["kind"]
    return plain


def _is_nested(group: _Group) -> bool:
    return any("." in rest for rest in group.values())


def _leave_out(left_out: dict[str, int], word: str, group: _Group) -> None:
    left_out[word if "" in group.values() else f"{word}."] = len(group)


def _is_for_training(word: str, group: _Group) -> bool:
    if "" in group.values():
        return _COUNTER.fullmatch(word) is not None
    if re.fullmatch(r"((student|teacher)_)?head", word):
        return any(map(_PROJECTION.fullmatch, group.values()))
    return _FOR_TRAINING.fullmatch(word) is not None


def pick_part(
    where: str, checkpoint: object, requested: str | None = None
) -> tuple[str | None, Mapping[Any, Any]]:
    """Return the path of the entry with the state dict, and the state dict."""
    if not isinstance(checkpoint, dict):
        raise CheckpointError(f"{where}: expected a dict of tensors, found {type(checkpoint).__name__}")
    path: list[str] = []
    state: Mapping[Any, Any] = checkpoint
    while len(path) < _MAX_NESTING:
        entry = requested if requested is not None and requested in state else _entry(state)
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
    """Return further entries with weights, for ``--part``."""
    if part is None or not isinstance(checkpoint, dict):
        return ()
    own = (part, part.partition(".")[0])
    return tuple(name for name in _ENTRIES if name not in own and _holds_weights(checkpoint.get(name)))


def _entry(checkpoint: Mapping[Any, Any]) -> str | None:
    """Return the entry with the state dict; None if ``checkpoint`` is one."""
    if hasattr(checkpoint.get("config"), "of_yacs") and "model" in checkpoint:
        return "model"  # the entry that scripts with yacs (Swin) evaluate
    states = {
        name: state for name, state in checkpoint.items() if isinstance(name, str) and _holds_weights(state)
    }
    student, teacher = (_shapes(states.get(word, {})) for word in ("student", "teacher"))
    if student and teacher and not is_average(student, teacher, "teacher"):
        del states["teacher"]  # the network that was trained is then the student
    if any(name in states for name in _ENTRIES):
        return next(name for name in _ENTRIES if name in states)
    if len(states) == 1 and not any(isinstance(value, Tensor) for value in checkpoint.values()):
        return next(iter(states))
    named = [name for name in _ENTRIES if isinstance(checkpoint.get(name), Mapping) and checkpoint[name]]
    named += [name for name in ("state_dict", "model") if name in checkpoint]
    return named[0] if named else None


def _holds_weights(value: object, depth: int = 2) -> bool:
    """Whether ``value`` is or contains a state dict."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return False
    # Two names with dots: a single one may be an optimiser's, or a table beside the weights.
    named = [name for name, item in value.items() if isinstance(item, Tensor) and "." in name]
    inner = value.values() if depth and len(named) < 2 else ()
    return len(named) > 1 or any(_holds_weights(item, depth - 1) for item in inner)


def _shapes(state: Mapping[Any, Any], depth: int = 2) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name, item in state.items():
        if isinstance(item, Tensor):
            shapes[name] = tuple(item.shape)
        elif depth and isinstance(item, Mapping):
            shapes |= {f"{name}.{key}": shape for key, shape in _shapes(item, depth - 1).items()}
    return shapes
