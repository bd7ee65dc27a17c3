"""Identify the model of a checkpoint: from what the file states, the user says, or the shapes show."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from torch import nn

from mhacut.checkpoint.architecture import SIZE_DEPENDENT, cfg_of_tag, completed_cfg, split_tag
from mhacut.checkpoint.build import build_skeleton, known_model, unknown_model
from mhacut.checkpoint.foreign.recognise import Conversion, namesakes, recognise
from mhacut.checkpoint.header import FileHeader
from mhacut.checkpoint.identity import (
    OF_WEIGHTS,
    ModelHints,
    ModelIdentity,
    checked_model_args,
    checked_pretrained_cfg,
)
from mhacut.checkpoint.infer import Identified, infer_from_shapes, position_shapes
from mhacut.checkpoint.mismatch import check_tensors
from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.search import search
from mhacut.checkpoint.training import POOLS, Training, read_training
from mhacut.checkpoint.wrapping import Naming
from mhacut.errors import CheckpointError, MhacutError, option_name
from mhacut.runtime.files import show
from mhacut.surgery.find import model_input_size, patch_embedding
from mhacut.surgery.slice import cut


def identify_slim(header: FileHeader, record: SlimRecord, hints: ModelHints) -> Identified:
    """Build the model that a slim file states, cut it by the plan and compare it with the file's tensors.

    Args:
        header: header of the file; bounds the size of what is built.
        record: what the file states.
        hints: what the user says, which may not contradict it.

    Raises:
        CheckpointError: the hints contradict the file, or timm cannot build the stated model, or it is far
            larger than the file, or its tensors are not those of the file.
    """
    where = show(header.path)
    identity = record.identity
    try:
        _check_name(header, identity.architecture, "the file's metadata")
        skeleton = build_skeleton(identity, limit=header.tensors)
        _check_hints(where, record, hints, skeleton)
        cut(skeleton, record.plan)
    except MhacutError as error:
        text = str(error)
        raise CheckpointError(text if text.startswith(where) else f"{where}: metadata: {text}") from error
    check_tensors(where, header.tensors, skeleton, identity, stated=True)
    notes = (f"architecture {identity.architecture}, from the file's metadata",)
    return Identified(identity, skeleton, header.tensors, notes)


def identify_dense(header: FileHeader, hints: ModelHints) -> Identified:
    """Build the model of a dense file: from its ``config.json``, else as named, else from names and shapes.

    Files of other libraries are converted to timm's names first.

    ``num_classes`` is inferred from the classifier's shape and ``img_size`` from a square ``pos_embed`` where
    nobody states them; the notes say so. 0 classes leave the file's classifier out.

    Raises:
        CheckpointError: no model, or more than one, fits the file.
    """
    args = checked_model_args(hints.model_args)
    if hints.num_classes is not None:
        args["num_classes"] = hints.num_classes
    try:
        foreign = recognise(
            header, headless=hints.num_classes == 0, given=hints.preprocessing, model=hints.model
        )
        if foreign is not None:
            found = _checked(header, _from_conversion(header, foreign, args, hints))
        elif args.get("num_classes") == 0:
            found = _from_headless(header, args, hints)
        else:
            found = _from_timm(header, args, hints)
    except CheckpointError as error:
        if header.naming.classifier is None:
            raise
        raise CheckpointError(f"{error}\n  {_beside(header.naming)} reads the network without it") from error
    if header.naming.classifier is not None and found.identity.model_args["num_classes"]:
        pool = getattr(found.skeleton, "global_pool", None)
        features = f" of its pooled features (global_pool={pool})" if isinstance(pool, str) else ""
        note = f"{_beside(header.naming, features)} leaves it out"
        found = dataclasses.replace(found, notes=(*found.notes, note))
    if foreign is None and position_shapes(found.tensors) != position_shapes(header.tensors):
        note = "position embeddings were for another image size; they were resized to the model's"
        found = dataclasses.replace(found, notes=(*found.notes, note))
    return found


def _checked(header: FileHeader, found: Identified) -> Identified:
    """Return ``found`` if its tensors are those of the file."""
    check_tensors(show(header.path), found.tensors, found.skeleton, found.identity)
    return found


def _from_timm(header: FileHeader, args: Mapping[str, Any], hints: ModelHints) -> Identified:
    """Build the model of a file with timm's names."""
    from_header = _from_file if header.config is None else _from_config
    return _checked(header, from_header(header, args, hints))


def _from_headless(header: FileHeader, args: Mapping[str, Any], hints: ModelHints) -> Identified:
    """Build the model of 0 classes of a file with timm's names, without the file's classifier."""
    with suppress(CheckpointError):
        return _from_timm(header, args, hints)
    found = _from_timm(header, {name: args[name] for name in args if name != "num_classes"}, hints)
    identity, classes = found.identity, found.identity.model_args["num_classes"]
    # A training script may have stated the size of its images, which timm would build for.
    size = model_input_size(found.skeleton, identity.pretrained_cfg, identity.model_args)
    cfg = {**identity.pretrained_cfg, "num_classes": 0}
    identity = dataclasses.replace(identity, model_args={**identity.model_args, "num_classes": 0})
    skeleton = build_skeleton(dataclasses.replace(identity, pretrained_cfg={**cfg, "input_size": list(size)}))
    own = skeleton.state_dict().keys()
    found = dataclasses.replace(
        found,
        identity=dataclasses.replace(identity, pretrained_cfg=cfg),
        skeleton=skeleton,
        tensors={name: info for name, info in found.tensors.items() if name in own},
        notes=(*found.notes, f"its classifier of {classes} classes is left out"),
    )
    return _checked(header, found)


def _beside(naming: Naming, features: str = "") -> str:
    """Return the note that a layer beside the network was read as its classifier."""
    part = option_name("part", naming.trunk)
    return f"{naming.classifier}. beside {naming.trunk}. was read as the classifier{features}; {part}"


def _without_claims(found: Identified, stated: Iterable[str] = ()) -> Identified:
    """Drop from timm's default for an architecture what describes timm's weights: license, tag, labels.

    What is ``stated`` for these weights stays.
    """
    identity, dropped = found.identity, OF_WEIGHTS - set(stated)
    cfg = {name: value for name, value in identity.pretrained_cfg.items() if name not in dropped}
    return dataclasses.replace(found, identity=dataclasses.replace(identity, pretrained_cfg=cfg))


def _from_names(
    header: FileHeader, args: Mapping[str, Any], hints: ModelHints, cfg: Mapping[str, Any] | None = None
) -> Identified:
    """Build the model of a file that states none: as named, else from names and shapes.

    ``cfg`` is what is known of its pretrained_cfg.
    """
    if hints.model is not None:
        name, tag = split_tag(hints.model)
        _check_name(header, name, option_name("model"))
        of_tag = cfg_of_tag(name, tag)
        if cfg and not tag:
            of_tag = completed_cfg(name, checked_pretrained_cfg(cfg))
        found = infer_from_shapes(name, args, of_tag, header.tensors)
        found = found if tag else _without_claims(found, cfg or ())
        found = dataclasses.replace(
            found, cfg_origins=dict.fromkeys(of_tag, "tag") if tag else _origins(header, cfg or ())
        )
        return _with_note(found, f"architecture {name}, as given")
    found = _without_claims(search(header, args, {*hints.preprocessing, *(cfg or ())}))
    _refuse_namesakes(header, args, found)
    if cfg:
        found = _with_preprocessing(found, cfg, of_library=header.config is None)
    default = " (the number of heads is that model's default; tensor shapes cannot show it)"
    heads = "" if "num_heads" in args else default
    return _with_note(found, f"architecture {found.identity.architecture}, from names and shapes{heads}")


def _refuse_namesakes(header: FileHeader, args: Mapping[str, Any], found: Identified) -> None:
    """Raise a :class:`CheckpointError` if another model has these tensors under its authors' names."""
    for renamed in namesakes(header):
        with suppress(MhacutError):
            other = search(renamed, args).identity.architecture
            break
    else:
        return
    raise CheckpointError(
        f"{show(header.path)}: the model cannot be identified from names and shapes: they are those of "
        f"{found.identity.architecture}, and of {other} in its authors' files; give "
        f"{option_name('model', 'NAME')}"
    )


def _from_file(
    header: FileHeader, args: Mapping[str, Any], hints: ModelHints, cfg: Mapping[str, Any] | None = None
) -> Identified:
    """Build the model of a bare file: from what the user or its training script says, or the shapes show.

    ``cfg`` is what its library implies of its pretrained_cfg.
    """
    training = read_training(header.training)
    if training is None:
        return _from_names(header, args, hints, cfg)
    named, tag = split_tag(hints.model or "")
    stated = split_tag(training.model or "")[0]
    found, notes = None, training.notes
    if stated and not tag and named in ("", stated):
        try:
            found = _from_training(header, args, training, given=bool(named))
            found = _with_preprocessing(found, {**(cfg or {}), **training.implied}, of_library=True)
        except CheckpointError:
            if not training.implied and cfg is None:
                raise
            if not training.implied:  # another part of a converted file, maybe
                notes = (*notes, f"its {training.origin} says {training.model}, which does not fit")
    if found is None:
        found = _from_names(header, args, hints, cfg)
        notes = (*training.unknown, *notes)
    if named and stated and stated != named:
        notes = (*notes, f"its {training.origin} says {training.model}; {option_name('model')} counts")
    found = dataclasses.replace(found, notes=(*found.notes, *notes))
    return found if tag else _with_preprocessing(found, training.cfg)


def _from_training(
    header: FileHeader, args: Mapping[str, Any], training: Training, *, given: bool
) -> Identified:
    """Build the model that the training script names, with its arguments as far as they fit the tensors."""
    assert training.model is not None
    name, tag = split_tag(training.model)
    cfg = cfg_of_tag(name, tag)
    with_size = {} if training.side is None else {"img_size": training.side}
    fault: CheckpointError | None = None
    heads = {
        name: training.args[name] for name in ("num_heads",) if training.implied and name in training.args
    }
    for stated in ({**with_size, **training.args}, training.args, heads):
        try:
            found = infer_from_shapes(name, {**stated, **args}, cfg, header.tensors, bounded=True)
            check_tensors(show(header.path), found.tensors, found.skeleton, found.identity)
        except CheckpointError as error:
            fault = fault or error
            continue
        found = dataclasses.replace(_without_claims(found), cfg_origins=dict.fromkeys(cfg, "file"))
        how = "as given" if given else f"from its {training.origin}"
        if heads.keys() - args.keys():
            how += (
                f", with {heads['num_heads']} heads as in MoCo v3; {option_name('model_args')} says another"
            )
        return _with_note(found, f"architecture {name}, {how}")
    model = option_name("model", "NAME")
    raise CheckpointError(
        f"{fault}\n  the file's {training.origin} says {name}; give {model} if it is another"
    )


def _with_preprocessing(
    found: Identified, stated: Mapping[str, Any], *, of_library: bool = False
) -> Identified:
    """Override the preprocessing of the architecture with what a script states, or its library implies."""
    cfg = found.identity.pretrained_cfg
    if stated.get("input_size", cfg.get("input_size")) != cfg.get("input_size"):
        cfg = {name: value for name, value in cfg.items() if name not in SIZE_DEPENDENT}
    identity = dataclasses.replace(found.identity, pretrained_cfg={**cfg, **stated})
    origins = {**found.cfg_origins, **dict.fromkeys(stated, "library" if of_library else "file")}
    return dataclasses.replace(found, identity=identity, cfg_origins=origins)


def _origins(header: FileHeader, names: Iterable[str]) -> dict[str, str]:
    """Return the origin of the preprocessing of another library's file; a bare file states none."""
    return dict.fromkeys(names, "library" if header.config is None else "file")


def _from_conversion(
    header: FileHeader, foreign: Conversion, args: Mapping[str, Any], hints: ModelHints
) -> Identified:
    """Build the timm model that another library's file is converted to."""
    built = foreign.built
    if header.config is not None and built is not None and hints.model not in (None, built.architecture):
        raise CheckpointError(
            f"{show(header.path.parent)}: its configuration describes {built.architecture}, but "
            f"{option_name('model')} says {hints.model}; leave it out, or give the weights file "
            f"{header.path.name} itself"
        )
    if built is None or (header.config is None and hints.model is not None):
        renamed = dataclasses.replace(header, tensors=foreign.tensors, config=None)
        # The names of a file may prove what those of timm's models do not show.
        proved = {} if built is None else {k: built.args[k] for k in ("act_layer",) if k in built.args}
        try:
            found = _from_file(renamed, {**proved, **args}, hints, foreign.cfg)
        except CheckpointError as error:
            folder = "; the folder with its configuration would tell more" if foreign.family.build else ""
            raise CheckpointError(f"{error} (converted from {foreign.family.title}{folder})") from None
    else:
        cfg = completed_cfg(built.architecture, checked_pretrained_cfg(foreign.cfg))
        found = infer_from_shapes(
            built.architecture, {**built.args, **args}, cfg, foreign.tensors, bounded=True
        )
        found = dataclasses.replace(
            _without_claims(found, foreign.cfg), cfg_origins=_origins(header, foreign.cfg)
        )
        origin = "its configuration" if header.config is not None else "names and shapes"
        found = _with_note(found, f"architecture {built.architecture}, from {origin}")
        training = read_training(header.training) if header.config is None else None
        if training is not None:
            found = _with_preprocessing(found, training.cfg)
    own = found.skeleton.state_dict()
    heads = {name: info for name, info in foreign.heads.items() if name in own}
    found = dataclasses.replace(found, tensors={**found.tensors, **heads})
    note = f"converted from {foreign.family.title}; {'; '.join(foreign.notes)}".rstrip("; ")
    return dataclasses.replace(_with_note(found, note), conversion=foreign)


def _with_note(found: Identified, first: str) -> Identified:
    return dataclasses.replace(found, notes=(first, *found.notes))


def _from_config(header: FileHeader, args: Mapping[str, Any], hints: ModelHints) -> Identified:
    stated, stated_args, cfg = _read_config(header)
    if hints.model is not None and split_tag(hints.model)[0] != stated:
        raise CheckpointError(
            f"{show(header.path.parent)}: its config.json says {stated}, {option_name('model')} says "
            f"{hints.model}; leave it out, or give the weights file {header.path.name} itself"
        )
    _check_name(header, stated, "config.json")
    args = {**stated_args, **args}
    of_file = completed_cfg(stated, cfg)
    found = infer_from_shapes(stated, args, of_file, header.tensors, bounded=True)
    pool = (header.config or {}).get("global_pool")
    # timm writes the pooling that the model has, whether its arguments say so or not.
    if pool in POOLS and "global_pool" not in args and getattr(found.skeleton, "global_pool", pool) != pool:
        found = infer_from_shapes(
            stated, {**args, "global_pool": pool}, of_file, header.tensors, bounded=True
        )
    found = dataclasses.replace(found, cfg_origins=dict.fromkeys(cfg, "file"))
    return _with_note(found, f"architecture {stated}, from config.json")


def _check_hints(where: str, record: SlimRecord, hints: ModelHints, model: nn.Module) -> None:
    """Raise a :class:`CheckpointError` if ``hints`` contradict a slim file of the dense ``model``."""
    stated = record.identity
    wrong = []
    if hints.model is not None and split_tag(hints.model)[0] != stated.architecture:
        wrong.append(f"{option_name('model', hints.model)} (it is {stated.architecture})")
    asked = checked_model_args(hints.model_args)
    if hints.num_classes is not None:
        asked["num_classes"] = hints.num_classes
    for name, value in asked.items():
        has = stated.model_args[name] if name in stated.model_args else _default(model, stated, name)
        if has != value:
            shown = "timm's default" if has is None else repr(has)
            wrong.append(f"{name}={value!r:.60} (it has {shown:.60})")
    if wrong:
        raise CheckpointError(
            f"{where}: a slim file states its own architecture and arguments; leave out {', '.join(wrong)}"
        )


def _default(model: nn.Module, identity: ModelIdentity, name: str) -> Any:
    """Return the value of an argument that ``identity`` leaves to timm; None if the model hides it."""
    if name == "img_size":
        _, height, width = model_input_size(model, identity.pretrained_cfg, identity.model_args)
        return height if height == width else [height, width]
    if name == "depth":
        blocks: Any = getattr(model, "blocks", None)
        return len(blocks) if isinstance(blocks, nn.ModuleList | nn.Sequential) else None
    value = getattr(model, name, getattr(patch_embedding(model), name, None))
    if isinstance(value, tuple) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return value if isinstance(value, bool | int | float | str) else None


def _read_config(header: FileHeader) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Return architecture, arguments and pretrained_cfg of a timm ``config.json``, new or old style."""
    config = header.config or {}
    where = show(header.path.parent / "config.json")
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(
            f"{where}: expected timm's config with an architecture, found keys {sorted(config)!r:.200}; "
            f"give the weights file {header.path.name} itself, and {option_name('model', 'NAME')}"
        )
    try:
        args = checked_model_args(config.get("model_args") or {})
        cfg = checked_pretrained_cfg(config.get("pretrained_cfg", config))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    for name in ("label_names", "label_descriptions"):
        if name in config:
            cfg[name] = config[name]
    # The classifier's shape shows it, and for these weights.
    args.pop("num_classes", None)
    return split_tag(architecture)[0], args, cfg


def _check_name(header: FileHeader, name: str, origin: str) -> None:
    if not re.fullmatch(r"\w+", name) or not known_model(name):
        raise CheckpointError(f"{show(header.path)}: {origin}: {unknown_model(name)}")
