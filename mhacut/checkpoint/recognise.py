"""Which timm model a checkpoint is: as the file says, as the user says, or as names and shapes show."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.checkpoint.header import FileHeader, TensorInfo
from mhacut.checkpoint.misfit import check_fit
from mhacut.checkpoint.record import ModelIdentity, checked_model_args, checked_pretrained_cfg
from mhacut.errors import CheckpointError, MhacutError
from mhacut.flatten import checkpoint_filter, img_size_of
from mhacut.runtime.files import show

Shapes = Mapping[str, tuple[int, ...]]

SEARCHED_FAMILIES: dict[str, str | tuple[str, ...]] = {
    "vision_transformer": "blocks.",
    "deit": "blocks.",
    "vision_transformer_hybrid": "patch_embed.backbone.",
    "pit": "transformers.",
    "naflexvit": "embeds.",
    "flatten_cswin": ("stage1.0.attns.0.positional_encoding", "stage1.0.attn.attns.0.positional_encoding"),
    "flatten_deit": "blocks.0.attn.positional_encoding",
    "flatten_pvt": "block1.0.attn.positional_encoding",
    "flatten_pvt_v2": ("block1.0.attn.positional_encoding", "stages.0.blocks.0.attn.positional_encoding"),
    "flatten_swin": "layers.0.blocks.0.attn.positional_encoding",
}
"""timm modules searched when nobody says which model a file is, and how some name in any file of theirs
begins. Models of other modules need ``--model``."""

_DENSE_TO_FILE = 64
"""A file may not describe a dense model this many times its own size: no cut goes so deep."""
_OF_INPUT_SIZE = frozenset({"crop_pct", "test_input_size", "test_crop_pct", "pool_size", "test_pool_size"})
"""What of a pretrained_cfg goes with its ``input_size`` and says nothing of another."""
_FROM_DEFAULT = _OF_INPUT_SIZE | {
    "input_size",
    "fixed_input_size",
    "min_input_size",
    "interpolation",
    "crop_mode",
    "mean",
    "std",
    "first_conv",
    "classifier",
}
"""What timm's default for an architecture may add to a config.json: never labels, license or origin."""
_OF_POSITIONS = re.compile(r"(positional_encoding|pos_embed\d*|relative_position_bias_table)$")
_SPARE_PARAMETERS = 2**24
_SPARE_BUFFERS = 2**26


@dataclass(frozen=True)
class Recognised:
    """A checkpoint's dense model: who it is, and its skeleton without weights."""

    identity: ModelIdentity
    skeleton: nn.Module
    """The dense model on the meta device."""
    notes: tuple[str, ...]
    """What was inferred and from where."""


def recognise_stated(header: FileHeader, identity: ModelIdentity, origin: str) -> Recognised:
    """The model that the file itself names in full (a slim file); nothing is inferred.

    Args:
        header: of the file; bounds the size of what may be built.
        identity: what the file states.
        origin: where it states it, for messages.

    Raises:
        CheckpointError: timm knows no such model, cannot build it, or it is far larger than the file.
    """
    _check_name(header, identity.architecture, origin)
    skeleton = build_skeleton(identity, limit=header.tensors)
    return Recognised(identity, skeleton, (f"architecture {identity.architecture}, from {origin}",))


def recognise_dense(
    header: FileHeader,
    *,
    model: str | None,
    model_args: Mapping[str, Any],
    num_classes: int | None,
) -> Recognised:
    """The dense model of a file: from its ``config.json``, else as named, else from names and shapes.

    ``num_classes`` is read from the classifier's shape and ``img_size`` from a square ``pos_embed`` when
    nobody states them; both are told in the notes.

    Raises:
        CheckpointError: no model, or more than one, fits.
    """
    args = checked_model_args(model_args)
    if num_classes is not None:
        args["num_classes"] = num_classes
    shapes = header.shapes
    if header.config is not None:
        stated, stated_args, cfg = _read_config(header)
        if model is not None and _split_tag(model)[0] != stated:
            raise CheckpointError(
                f"{show(header.path.parent)}: its config.json says {stated}, --model says {model}; "
                f"leave --model out, or give the weights file {header.path.name} itself"
            )
        _check_name(header, stated, "config.json")
        args = {**stated_args, **args}
        fit = _fit(stated, args, _completed(stated, cfg), header, limit=header.tensors)
        notes = (f"architecture {stated}, from config.json", *fit.notes)
    elif model is not None:
        name, tag = _split_tag(model)
        _check_name(header, name, "--model")
        cfg = _cfg_of_tag(name, tag)
        fit = _fit(name, args, cfg, header, limit=None)
        notes = (f"architecture {name}, as given", *fit.notes)
    else:
        fit = _search(header, args, shapes)
        notes = (
            f"architecture {fit.identity.architecture}, from names and shapes "
            "(the number of heads is that model's own; shapes cannot show it)",
            *fit.notes,
        )
    converted = _converted(header, fit.skeleton)
    check_fit(converted, fit.skeleton, fit.identity)
    if _position_shapes(converted) != _position_shapes(header):
        notes = (*notes, "positions were of another image size; resized to the model's")
    return Recognised(fit.identity, fit.skeleton, notes)


def as_timm_has_it(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a dense file under the names, and at the resolution, of ``model``.

    Only our own models have other names in the files of their authors; tensors of others stay as they are.
    """
    convert = checkpoint_filter(model)
    return dict(tensors) if convert is None else convert(tensors, model)


def _position_shapes(header: FileHeader) -> list[tuple[int, ...]]:
    return sorted(shape for name, shape in header.shapes.items() if _OF_POSITIONS.search(name))


def _converted(header: FileHeader, model: nn.Module) -> FileHeader:
    """``header`` as the file's tensors will be once converted; works on shapes, no weight is read."""
    announced = {
        name: torch.empty(info.shape, dtype=info.dtype, device="meta")
        for name, info in header.tensors.items()
    }
    tensors = {
        name: TensorInfo(tuple(tensor.shape), tensor.dtype)
        for name, tensor in as_timm_has_it(announced, model).items()
    }
    return dataclasses.replace(header, tensors=tensors)


def build_skeleton(identity: ModelIdentity, limit: Mapping[str, TensorInfo] | None = None) -> nn.Module:
    """The dense model on the meta device: shapes, no memory.

    Args:
        identity: what to build.
        limit: tensors of the file that states the identity; building stops when it would be out of all
            proportion to them. None for a model the user named.
    """
    if limit is not None:
        _check_depth(identity, len(limit))
    with torch.device("meta"), _limited(identity.architecture, limit):
        model = _create(identity)
    if limit is not None:
        buffers = sum(buffer.numel() for buffer in model.buffers())
        parameters = sum(parameter.numel() for parameter in model.parameters())
        if buffers > 4 * parameters + _SPARE_BUFFERS:
            raise CheckpointError(_out_of_proportion(identity.architecture))
    return model


def build_model(identity: ModelIdentity) -> nn.Module:
    """The dense model with timm's random weights, on the CPU, in eval mode; the global seed is left alone."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        return _create(identity).eval()


def known_model(name: str) -> bool:
    """Whether timm has a model of this name."""
    import timm

    found: bool = timm.is_model(name)
    return found


def unknown_model(name: str) -> str:
    """The message for a name timm does not know, with the closest it does."""
    import timm

    names = timm.list_models()
    close = difflib.get_close_matches(name, names, n=5, cutoff=0.6)
    stems = {
        known[: len(name)]: known for known in reversed(names)
    }  # who leaves out `_patch16_224` means this
    begun = [stems[stem] for stem in difflib.get_close_matches(name, stems, n=2, cutoff=0.8)]
    close = list(dict.fromkeys([*begun, *close]))[:5]
    hint = f"did you mean {', '.join(close)}?" if close else "timm.list_models() names those it has"
    return f"timm has no model {name!r:.150}; {hint}"


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Name and shape of everything in the state dict of ``model``."""
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def _create(identity: ModelIdentity) -> nn.Module:
    """The dense model on the current default device, its ``pretrained_cfg`` set as the identity says."""
    import timm

    try:
        model: nn.Module = timm.create_model(
            identity.architecture,
            pretrained=False,
            pretrained_cfg=_as_timm_cfg(identity.pretrained_cfg) or None,
            **identity.model_args,
        )
    except MhacutError:
        raise
    except Exception as error:  # whatever the arguments make timm stumble over
        args = ", ".join(f"{name}={value!r:.60}" for name, value in identity.model_args.items())
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"timm cannot build {identity.architecture} with {args or 'its defaults'}: {reason:.300}"
        ) from error
    return model


def _as_timm_cfg(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """JSON back to what timm keeps: tuples, and only fields this timm knows."""
    import dataclasses

    from timm.models import PretrainedCfg

    known = {field.name for field in dataclasses.fields(PretrainedCfg)}
    return {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in cfg.items()
        if name in known
    }


def identity_of(model: nn.Module, architecture: str, args: Mapping[str, Any]) -> ModelIdentity:
    """The identity of a dense timm model that was built as ``architecture`` with ``args``.

    Its pretrained_cfg speaks of the weights: an ``input_size`` other than the model's is the one that the
    crop beside it was chosen for.
    """
    described: Any = model
    num_classes = int(described.num_classes)
    cfg = {**checked_pretrained_cfg(described.pretrained_cfg), "num_classes": num_classes}
    return ModelIdentity(architecture, {**args, "num_classes": num_classes}, cfg)


def _fit(
    name: str,
    args: Mapping[str, Any],
    cfg: Mapping[str, Any],
    header: FileHeader,
    *,
    limit: Mapping[str, TensorInfo] | None,
) -> Recognised:
    """Model ``name``, its classes and image size set to what the file's shapes show unless ``args`` says."""
    args = dict(args)
    notes: list[str] = []
    if "img_size" not in args:
        # Before anything is built: not every argument goes with every size.
        patch_size = args.get("patch_size", 4)
        size = img_size_of(name, header.shapes, patch_size if isinstance(patch_size, int) else 4)
        if size is not None:
            args["img_size"] = size
            notes.append(f"img_size {size}, from the shape of positional_encoding")
    # The shapes of the file decide, whatever size the configuration was written for.
    model = build_skeleton(ModelIdentity(name, args, dict(cfg)), limit)
    if "num_classes" not in args:
        classes, origin = _classes(model, _converted(header, model).shapes)
        args["num_classes"] = classes
        notes.append(f"num_classes {classes}, from {origin}")
        if classes != getattr(model, "num_classes", classes):
            model = build_skeleton(ModelIdentity(name, args, dict(cfg)), limit)
    if "img_size" not in args:
        size = _img_size(model, header.shapes)
        if size is not None:
            args["img_size"] = size
            notes.append(f"img_size {size}, from the shape of pos_embed")
            model = build_skeleton(ModelIdentity(name, args, dict(cfg)), limit)
    return Recognised(identity_of(model, name, args), model, tuple(notes))


def _classes(model: Any, shapes: Shapes) -> tuple[int, str]:
    """Classes of the file's classifier and the tensor that shows them; 0 where it has no classifier."""
    classifier = model.pretrained_cfg.get("classifier") or ()
    for name in (classifier,) if isinstance(classifier, str) else tuple(classifier):
        shape = shapes.get(f"{name}.weight")
        if shape:
            return shape[0], f"the shape of {name}.weight"
    return 0, "the file, which has no classifier"


def _img_size(model: Any, shapes: Shapes) -> int | None:
    """Image side that explains a ``pos_embed`` of another length; None if it fits, or nothing square does."""
    found = shapes.get("pos_embed")
    expected = getattr(model, "pos_embed", None)
    patch_embed = getattr(model, "patch_embed", None)
    patches, patch_size = getattr(patch_embed, "num_patches", None), getattr(patch_embed, "patch_size", None)
    if not isinstance(expected, Tensor) or found is None or tuple(expected.shape) == found:
        return None
    patches_found = shapes.get("patch_embed.proj.weight", ())[-1:]
    if patches_found and isinstance(patch_size, tuple) and patches_found != tuple(patch_size[-1:]):
        return None  # patches of another size: the grid would be misread
    if len(found) != 3 or expected.dim() != 3 or found[2] != expected.shape[2] or found[0] != 1:
        return None
    if not isinstance(patches, int) or not isinstance(patch_size, tuple) or patch_size[0] != patch_size[1]:
        return None
    prefix = expected.shape[1] - patches  # class and register tokens with a position of their own
    side = math.isqrt(max(found[1] - prefix, 0))
    return side * int(patch_size[0]) if side > 0 and side * side == found[1] - prefix else None


def _search(header: FileHeader, args: Mapping[str, Any], shapes: Shapes) -> Recognised:
    """The one model of :data:`SEARCHED_FAMILIES` whose names and shapes are those of the file."""
    exact: list[Recognised] = []
    resized: list[Recognised] = []
    for name in _plausible(shapes, args):
        try:
            fit = _fit(name, args, {}, header, limit=None)
        except MhacutError:
            continue  # does not take these arguments, or not at this image size
        converted = _converted(header, fit.skeleton)
        as_it_is = _position_shapes(converted) == _position_shapes(header)
        if as_it_is and shapes_of(fit.skeleton) == converted.shapes:
            inferred_size = "img_size" in fit.identity.model_args and "img_size" not in args
            (resized if inferred_size else exact).append(fit)
    fits = exact or resized
    where = show(header.path)
    if not fits:
        raise CheckpointError(
            f"{where}: which model this is cannot be told: no timm model of "
            f"{', '.join(SEARCHED_FAMILIES)} has exactly its {len(shapes)} tensors; say --model NAME "
            "(and --model-arg KEY=VALUE for what differs)"
        )
    if len(fits) > 1:
        names = ", ".join(fit.identity.architecture for fit in fits)
        raise CheckpointError(
            f"{where}: which model this is cannot be told from names and shapes, {len(fits)} fit: {names}; "
            "say --model NAME (they may differ in heads, activation or preprocessing)"
        )
    return fits[0]


def _plausible(shapes: Shapes, args: Mapping[str, Any]) -> Iterator[str]:
    """Models that agree with the file in everything one block shows; much cheaper than building them all."""
    import timm

    patch = shapes.get("patch_embed.proj.weight", shapes.get("embeds.proj.weight", (0,)))[-1]
    for family, telltale in SEARCHED_FAMILIES.items():
        if not any(name.startswith(telltale) for name in shapes):
            continue
        for name in timm.list_models(module=family):
            named_patch = re.search(r"patch(\d+)", name)
            if patch and "patch_size" not in args and named_patch and int(named_patch[1]) != patch:
                continue
            try:
                probe = build_skeleton(ModelIdentity(name, {"depth": 1, **args}))
            except MhacutError:
                yield name  # takes no depth
                continue
            if all(_agrees(key, shape, shapes) for key, shape in shapes_of(probe).items()):
                yield name


def _agrees(key: str, shape: tuple[int, ...], shapes: Shapes) -> bool:
    if key == "pos_embed" or key.startswith("head"):  # of the image size, of the classes
        return True
    return shapes.get(key) == shape


def _read_config(header: FileHeader) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Architecture, arguments and pretrained_cfg of a timm ``config.json``, new or old style."""
    config = header.config or {}
    where = show(header.path.parent / "config.json")
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(
            f"{where}: expected timm's config with an architecture, found keys {sorted(config)!r:.200}; "
            f"give the weights file {header.path.name} itself, and --model NAME"
        )
    try:
        args = checked_model_args(config.get("model_args") or {})
        cfg = checked_pretrained_cfg(config.get("pretrained_cfg", config))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    for name in ("label_names", "label_descriptions"):
        if name in config:
            cfg[name] = config[name]
    # The classifier's shape says it, and says it of these weights.
    args.pop("num_classes", None)
    return _split_tag(architecture)[0], args, cfg


def _completed(architecture: str, stated: Mapping[str, Any]) -> dict[str, Any]:
    """``stated``; what it leaves out of build and preprocessing is timm's default for the architecture."""
    import timm

    registered = timm.get_pretrained_cfg(architecture)
    if registered is None:
        return dict(stated)
    default = checked_pretrained_cfg(registered.to_dict())
    names = set(_FROM_DEFAULT)
    if stated.get("input_size", default.get("input_size")) != default.get("input_size"):
        names -= _OF_INPUT_SIZE
    return {**{name: value for name, value in default.items() if name in names}, **stated}


def _split_tag(name: str) -> tuple[str, str]:
    architecture, _, tag = name.partition(".")
    return architecture, tag


def _cfg_of_tag(name: str, tag: str) -> dict[str, Any]:
    """The pretrained_cfg of ``name.tag``; empty for the default tag."""
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


def _check_name(header: FileHeader, name: str, origin: str) -> None:
    if not re.fullmatch(r"\w+", name) or not known_model(name):
        raise CheckpointError(f"{show(header.path)}: {origin}: {unknown_model(name)}")


def _check_depth(identity: ModelIdentity, tensors: int) -> None:
    """A block has tensors; a depth beyond their number would keep timm busy before it built the first."""
    for name, value in identity.model_args.items():
        depths = value if isinstance(value, list) else [value]
        if name.startswith("depth") and any(isinstance(n, int) and n > tensors for n in depths):
            raise CheckpointError(_out_of_proportion(identity.architecture))


@contextmanager
def _limited(architecture: str, limit: Mapping[str, TensorInfo] | None) -> Iterator[None]:
    """Stops the construction of a model that has many times the tensors or parameters of the file."""
    if limit is None:
        yield
        return
    tensors_left = 4 * len(limit) + 100  # a cut takes no tensor away; some are registered twice
    parameters_left = (
        _DENSE_TO_FILE * sum(math.prod(info.shape) for info in limit.values()) + _SPARE_PARAMETERS
    )

    def count(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        nonlocal tensors_left, parameters_left
        if parameter is not None:
            tensors_left -= 1
            parameters_left -= parameter.numel()
        if tensors_left < 0 or parameters_left < 0:
            raise CheckpointError(_out_of_proportion(architecture))

    handle = nn.modules.module.register_module_parameter_registration_hook(count)
    try:
        yield
    finally:
        handle.remove()


def _out_of_proportion(architecture: str) -> str:
    return (
        f"the model the file describes ({architecture} with its model_args) is out of all "
        "proportion to the tensors in it; nothing was built"
    )
