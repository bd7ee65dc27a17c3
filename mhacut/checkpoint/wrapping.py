"""Find the model among the names in a training script's file: remove wrappers, leave out the rest.

Names and shapes alone decide, the same way for torch and safetensors files.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from mhacut.checkpoint.fingerprints import CLASSIFIERS
from mhacut.errors import CheckpointError, option_name

Shapes = Mapping[str, tuple[int, ...]]

_LEADING = ("module.", "_orig_mod.")
"""Prefixes of data parallel and compiled modules, which some of a file's names may have and others not."""
_INNER = re.compile(r"(?:(?<=\.)|^)(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""Wrappers of single layers, anywhere in a name."""
OWN = (
    *("model", "online_model", "net", "network", "student", "student_backbone", "backbone"),
    *("module", "encoder"),
)
"""Words for the network that is trained."""
AVERAGED = ("ema", "ema_model", "model_ema", "swa_model", "average_model", "teacher", "teacher_backbone")
"""Words for an average of it over training steps, which is what gets published."""
_TEACHERS = ("teacher", "teacher_backbone")
"""Those of them that may also be another network, from which this one learns."""
_MOMENTUM = ("momentum_backbone",)
"""Words for an average that is a target of the training only; a classifier belongs to the network itself."""
_TRAINING_ONLY = re.compile(r"(\w+_)?(criterion|criteria|loss|losses|loss_fn|loss_fct)|dino_head|ibot_head")
"""Modules that no model of timm has, and that only training needs."""
_BESIDE = re.compile(
    r"((student|teacher)_)?(dino_head|ibot_head)|(momentum_)?projector|predictor"
    r"|(projection|prediction)_head|momentum_(backbone|classifier)|queue|queue_ptr|center"
)
"""Modules that may lie beside a network without being part of it."""
_HEAD = re.compile(r"((student|teacher)_)?head")
"""Such a module if it is a projection head, and not a classifier."""
_CLASSIFIER = re.compile(
    r"heads?|classifier|fc|linear|(cls|class|linear|classification)_(head|classifier)|last_linear"
)
"""Words for a linear layer beside a network without classifier."""
_LAYER = re.compile(
    rf"(?P<module>(?:(?:{_CLASSIFIER.pattern})\.){{1,2}})((?P<number>\d{{1,6}})\.)?(?P<kind>weight|bias)"
)
"""Tensors of a classifier in its network, maybe in a sequence."""
_LINEAR = re.compile(r"(\d+\.)?(weight|bias)")
"""Tensors of such a layer, maybe with a dropout before it."""
_COUNTER = re.compile(r"n_averaged|num_updates|decay|steps?|epoch|global_step|initted")
"""Single numbers that weight averaging keeps."""
_PROJECTED = re.compile(r"(^|\.)(dino_head|ibot_head|last_layer\d?|prototypes\d*)\.")
"""Tensors that only projection heads have, those of DINO and its like."""
_PROJECTION = re.compile(r"(mlp|layers|last_layer\d?|prototypes\d*)\.")
"""All tensors of such a head."""
_KEPT = ("timm_model", "visual", "features", "body")
"""Prefixes by which files of other libraries are recognised, and those of models without classifier."""
_ENCODER_ITSELF = (
    {"blocks", "patch_embed"},
    {"blocks", "patch_embed", "norm"},
    {"blocks", "patch_embed", "pos_embed"},
)
"""Modules under ``encoder.`` of models that have this name in timm."""
_STEM = re.compile(r"(^|\.)(patch_embed|embeds|stem|embeddings|cls_token)")
"""Names that tell a whole network from a part of one."""
_MAX_NAMES = 5
_LONGEST_NAME = 1000


@dataclass(frozen=True)
class Naming:
    """Names of the model's tensors in the file and in the model."""

    names: Mapping[str, str]
    """Name in the file: name in the model. What is missing here is left out."""
    prefixes: tuple[str, ...] = ()
    """Prefixes that were taken off."""
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Number of tensors of each module that is not part of the model."""
    others: tuple[str, ...] = ()
    """Other networks, which the option ``part`` would select."""
    classifier: str | None = None
    """Linear layer beside the network that became its ``head``."""
    trunk: str | None = None
    """Module that it lay beside."""
    numbered: str | None = None
    """Layer of a sequence that became the classifier, as in the file, if others come before it."""

    def note(self, part: str | None, other_parts: tuple[str, ...] = ()) -> str | None:
        """Return the line for the user; None for a plain state dict.

        Args:
            part: entry of the checkpoint that holds the tensors.
            other_parts: entries with other weights of the network.
        """
        others = (*other_parts, *self.others)
        said = [] if part is None else [f"read the part {part!r:.150} of the checkpoint"]
        if self.prefixes:
            said.append(f"removed the prefix {''.join(self.prefixes):.150} from the tensor names")
        if self.left_out:
            listed = [f"{name:.100} ({count})" for name, count in list(self.left_out.items())[:_MAX_NAMES]]
            more = ", ..." if len(self.left_out) > _MAX_NAMES else ""
            said.append(f"left out {', '.join(listed)}{more}")
        if self.numbered is not None:
            before = "the layers before it have no weights and are taken for dropout"
            said.append(f"{self.numbered:.150} is the classifier: {before}")
        if others:
            said.append(f"{' or '.join(option_name('part', name) for name in others)} reads another part")
        return "; ".join(said) or None


def unwrap(
    where: str,
    shapes: Shapes,
    *,
    part: str | None = None,
    parts: Iterable[str] = (),
    layers_only: bool = False,
) -> Naming:
    """Return which of a file's tensors are the model's, and their names in it.

    Args:
        where: the file, for messages.
        shapes: shape of each tensor, by its name in the file.
        part: module that the user takes for the model.
        parts: what else the user could have named, for messages.
        layers_only: take off the wrappers of data parallel and compiled modules, and the number of a
            classifier that is alone in a sequence, and nothing else.

    Raises:
        CheckpointError: there is no such part, or a network among tensors that may belong to it, or two
            tensors with one name.
    """
    names, prefixes = _without_wrappers(where, shapes)
    left_out: dict[str, int] = {}
    others: list[str] = []
    head: dict[str, str] = {}
    layer: str | None = None
    trunk: str | None = None
    while not layers_only:
        groups = _grouped(names)
        if len(groups) > 1:
            for word in [word for word in groups if word != part and _is_for_training(word, groups, shapes)]:
                _leave_out(left_out, word, groups.pop(word))
        chosen = part if _is_module(groups, part) else _network(where, groups, shapes)
        if chosen is None:
            names = {file: name for file, name in names.items() if name.partition(".")[0] in groups}
            break
        classifier = None if part == chosen else _classifier(groups, chosen, shapes)
        if classifier is not None:
            if layer is not None:  # one beside a network, and one beside what holds it: nobody knows which
                raise CheckpointError(_may_belong(where, trunk or "", head))
            layer, trunk = classifier, chosen
            head = {file: f"head.{rest}" for file, rest in groups.pop(classifier).items()}
        part = None if part == chosen else part
        for word in groups.keys() - {chosen}:
            _leave_out(left_out, word, groups[word])
        others += [word for word in groups if word != chosen and word in (*OWN, *AVERAGED, *_MOMENTUM)]
        prefixes.append(f"{chosen}.")
        names = groups[chosen]
    if part is not None:
        there = [*parts, *(prefix[:-1] for prefix in prefixes), *others] or list(_grouped(names))
        listed = ", ".join(f"{name!r:.100}" for name in dict.fromkeys(there[:_MAX_NAMES]))
        asked_for = option_name("part", part)
        raise CheckpointError(f"{where}: {asked_for}: there is no such part; it has {listed}")
    if head and any(map(CLASSIFIERS.fullmatch, names.values())):
        raise CheckpointError(_may_belong(where, trunk or "", head))
    _check_unique(where, names, prefixes)
    left = dict(sorted(left_out.items()))
    plain, numbered = _without_sequence({**names, **head}, shapes)
    return Naming(plain, tuple(prefixes), left, tuple(others), layer, trunk, numbered)


def _check_names(where: str, names: Iterable[str]) -> None:
    """Refuse names that no file of a model has, and that others take long for or cannot write."""
    for name in names:
        is_text = name.isascii() or not re.search("[\ud800-\udfff]", name)
        if len(name) > _LONGEST_NAME or not is_text:
            raise CheckpointError(
                f"{where}: a tensor is named {name!r:.100}: expected at most {_LONGEST_NAME} characters "
                "of text"
            )


def same_network(one: Mapping[str, tuple[int, ...]], other: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether two state dicts are of one architecture, whatever wrappers and counters they have."""
    return _canonical(one) == _canonical(other)


def check_teacher(where: str, own: str, teacher: str, shapes: Shapes) -> None:
    """Refuse to take a teacher for the average of a network of the same shapes if it may be another network.

    A network that is its own teacher, as in DINO, has a projection head or none; others have a classifier.

    Args:
        where: the file, for messages.
        own: name of the network.
        teacher: name of what may be its average.
        shapes: tensors of both, and beside them, in whatever wrappers.

    Raises:
        CheckpointError: nobody knows which of the two was trained.
    """
    names = _canonical(shapes)
    classified = any(CLASSIFIERS.fullmatch(name) or _LAYER.fullmatch(name) for name in names)
    if teacher in _TEACHERS and classified and not any(map(_PROJECTED.search, names)):
        raise CheckpointError(
            f"{where}: {own!r} and {teacher!r} have the same shapes and a classifier, so either may be the "
            f"trained network; {option_name('part', own)} or {option_name('part', teacher)} reads one of them"
        )


def _canonical(shapes: Shapes) -> dict[str, tuple[int, ...]]:
    found = {}
    for name, shape in shapes.items():
        words = _INNER.sub("", name).split(".")
        while len(words) > 1 and words[0] in (*OWN, *AVERAGED):
            del words[0]
        if shape:
            found[".".join(words)] = shape
    return found


def _without_wrappers(where: str, shapes: Shapes) -> tuple[dict[str, str], list[str]]:
    """Return names without the prefixes of data parallelism and compilation, and the removed prefixes."""
    _check_names(where, shapes)
    names: dict[str, str] = {}
    prefixes: dict[str, None] = {}
    for file in shapes:
        name = file
        while name.startswith(_LEADING):
            word = name.partition(".")[0] + "."
            name = name.removeprefix(word)
            prefixes[word] = None
        names[file] = _INNER.sub("", name)
        if names[file] != name and not prefixes:
            prefixes["_orig_mod."] = None
    _check_unique(where, names, list(prefixes))
    return names, list(prefixes)


def _check_unique(where: str, names: Mapping[str, str], prefixes: list[str]) -> None:
    if len(set(names.values())) != len(names):
        off = " or ".join(prefixes)
        raise CheckpointError(f"{where}: two tensors have the same name once {off:.150} is taken off")


def _grouped(names: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Return the names by their first word, that word taken off."""
    groups: dict[str, dict[str, str]] = {}
    for file, name in names.items():
        word, _, rest = name.partition(".")
        groups.setdefault(word, {})[file] = rest
    return groups


def _network(where: str, groups: Mapping[str, Mapping[str, str]], shapes: Shapes) -> str | None:
    """Return the module that holds the whole model; None if the names are the model's own.

    Of a network and its average, the average is taken. A network with other shapes is not an average, but the
    teacher of the student.

    Raises:
        CheckpointError: it is a whole network, but there are tensors beside it that may belong to it.
    """
    modules = {word: group for word, group in groups.items() if "" not in group.values()}
    own = next((word for word in OWN if word in modules), None)
    average = next((word for word in AVERAGED if word in modules), None)
    if own is not None and average is not None:
        found, other = (
            {rest: shapes[file] for file, rest in modules[word].items()} for word in (own, average)
        )
        chosen: str | None = average if same_network(found, other) else own
        if chosen == average:
            level = {f"{word}.{rest}": shapes[file] for word in groups for file, rest in groups[word].items()}
            check_teacher(where, own, average, level)
    else:
        chosen = own or average
    if chosen is None:
        only = next(iter(modules)) if len(groups) == len(modules) == 1 else None
        return only if only not in (None, *_KEPT) and _is_nested(modules[only]) else None
    inside = {rest.partition(".")[0] for rest in modules[chosen].values()}
    if chosen == "encoder" and (inside in _ENCODER_ITSELF or not _is_nested(modules[chosen])):
        return None
    rest = [word for word in groups if word not in (own, average) and not _is_beside(word, groups[word])]
    if not rest or rest == [_classifier(groups, chosen, shapes)]:
        return chosen
    if chosen == "encoder" or not any(map(_STEM.search, modules[chosen].values())):
        return None
    why = ""
    if all(_CLASSIFIER.fullmatch(word) and not _is_linear(groups[word], shapes) for word in rest):
        why = "mhacut reads a classifier of one linear layer; "
    raise CheckpointError(_may_belong(where, chosen, [file for word in rest for file in groups[word]], why))


def _may_belong(where: str, network: str, files: Iterable[str], why: str = "") -> str:
    listed = ", ".join(f"{file!r:.150}" for file in list(files)[:_MAX_NAMES])
    return (
        f"{where}: beside the network {network!r} there are tensors that may belong to it: {listed}; "
        f"{why}{option_name('part', network)} reads the network alone"
    )


def _classifier(groups: Mapping[str, Mapping[str, str]], network: str, shapes: Shapes) -> str | None:
    """Return the linear layer beside a whole network without classifier; None if there is none, or two."""
    inside = groups[network].values()
    if any(map(CLASSIFIERS.fullmatch, inside)) or not any(map(_STEM.search, inside)):
        return None
    words = [word for word in groups if _CLASSIFIER.fullmatch(word) and _is_linear(groups[word], shapes)]
    return words[0] if len(words) == 1 else None


def _is_linear(group: Mapping[str, str], shapes: Shapes) -> bool:
    """Whether the tensors are the weight, and maybe the bias, of one linear layer."""
    layers = {rest.rpartition(".")[0] for rest in group.values()}
    if len(layers) > 1 or not all(map(_LINEAR.fullmatch, group.values())):
        return False
    found = {rest.rpartition(".")[2]: shapes[file] for file, rest in group.items()}
    weight = found.get("weight", ())
    return len(found) == len(group) and len(weight) == 2 and found.get("bias", weight[:1]) == weight[:1]


def _without_sequence(names: Mapping[str, str], shapes: Shapes) -> tuple[dict[str, str], str | None]:
    """Give the only layer of a sequence, which is linear, the name of the sequence if it is a classifier.

    Returns:
        The names, and the layer's name in the file if layers without weights come before it.
    """
    plain, numbered = dict(names), None
    layers = {file: found for file, name in names.items() if (found := _LAYER.fullmatch(name))}
    for module in {found["module"] for found in layers.values() if found["number"] is not None}:
        inside = {key: name.removeprefix(module) for key, name in names.items() if name.startswith(module)}
        if not _is_linear(inside, shapes):
            continue
        for file in inside:
            plain[file] = module + layers[file]["kind"]
            numbered = file.rpartition(".")[0] if int(layers[file]["number"] or 0) else numbered
    return plain, numbered


def _is_module(groups: Mapping[str, Mapping[str, str]], word: str | None) -> bool:
    return word is not None and word in groups and "" not in groups[word].values()


def _is_nested(group: Mapping[str, str]) -> bool:
    return any("." in rest for rest in group.values())


def _leave_out(left_out: dict[str, int], word: str, group: Mapping[str, str]) -> None:
    left_out[word if "" in group.values() else f"{word}."] = len(group)


def _is_for_training(word: str, groups: Mapping[str, Mapping[str, str]], shapes: Shapes) -> bool:
    """Whether these tensors belong to no model, whatever lies beside them."""
    files = [file for file, rest in groups[word].items() if not rest]
    if files:
        return _COUNTER.fullmatch(word) is not None and shapes[files[0]] in ((), (1,))
    return _TRAINING_ONLY.fullmatch(word) is not None


def _is_beside(word: str, group: Mapping[str, str]) -> bool:
    """Whether these tensors, beside a network, are not part of it."""
    if _HEAD.fullmatch(word):
        names = group.values()
        return all(map(_PROJECTION.match, names)) and any(map(_PROJECTED.match, names))
    return _BESIDE.fullmatch(word) is not None
