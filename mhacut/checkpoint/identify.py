"""Find the timm model of a checkpoint: by its metadata, configuration, training options or shapes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from mhacut.checkpoint.build import build_skeleton, known_model, unknown_model
from mhacut.checkpoint.foreign.recognise import Conversion, recognise
from mhacut.checkpoint.header import FileHeader
from mhacut.checkpoint.identity import (
    WEIGHTS_CFG_KEYS,
    ModelHints,
    ModelIdentity,
    checked_model_args,
    checked_pretrained_cfg,
)
from mhacut.checkpoint.infer import ResolvedModel, infer_from_shapes, position_shapes
from mhacut.checkpoint.mismatch import check_tensors
from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.search import search
from mhacut.checkpoint.timm_cfg import cfg_of_tag, completed_cfg, for_size, split_tag
from mhacut.checkpoint.training import POOLS, Training, read_training
from mhacut.errors import CheckpointError, MhacutError, option_name
from mhacut.runtime.files import show
from mhacut.surgery.slice import cut


def identify_slim(header: FileHeader, record: SlimRecord, hints: ModelHints) -> ResolvedModel:
    where = show(header.path)
    identity = record.identity
    try:
        _check_name(header, identity.architecture, "the file's metadata")
        skeleton = build_skeleton(identity, limit=header.tensors)
        _check_hints(where, identity, hints, skeleton)
        cut(skeleton, record.plan)
    except MhacutError as error:
        text = str(error)
        raise CheckpointError(text if text.startswith(where) else f"{where}: metadata: {text}") from error
    check_tensors(where, header.tensors, skeleton, identity, stated=True)
    notes = (f"architecture {identity.architecture}, from the file's metadata",)
    return ResolvedModel(identity, skeleton, header.tensors, notes)


def _check_hints(where: str, stated: ModelIdentity, hints: ModelHints, model: nn.Module) -> None:
    wrong = []
    if hints.model is not None and split_tag(hints.model)[0] != stated.architecture:
        wrong.append(f"{option_name('model', hints.model)} (it is {stated.architecture})")
    for name, value in hints.all_args.items():
        has = stated.model_args.get(name, getattr(model, name, None))
        if has != value:
            shown = has if isinstance(has, bool | int | float | str | list) else "timm's default"
            wrong.append(f"{name}={value!r:.60} (it has {shown!s:.60})")
    if wrong:
        raise CheckpointError(
            f"{where}: contradicts the metadata of the slim file. Leave out {', '.join(wrong)}"
        )


def identify_dense(header: FileHeader, hints: ModelHints) -> ResolvedModel:
    args = hints.all_args
    foreign = recognise(header, headless=args.get("num_classes") == 0, model=hints.model)
    if foreign is not None:
        model = _from_conversion(header, foreign, args, hints)
    elif header.config is not None:
        model = _from_config(header, args, hints)
    else:
        model = _from_file(header, args, hints)
    check_tensors(show(header.path), model.tensors, model.skeleton, model.identity)
    if foreign is None and position_shapes(model.tensors) != position_shapes(header.tensors):
        note = "position embeddings were resized to the model's image size"
        model = _with_notes(model, note)
    return model


def _with_notes(model: ResolvedModel, *last: str, first: str | None = None) -> ResolvedModel:
    return replace(model, notes=(*([] if first is None else [first]), *model.notes, *last))


def _from_config(header: FileHeader, args: Mapping[str, Any], hints: ModelHints) -> ResolvedModel:
    config = header.config or {}
    where = show(header.path.parent / "config.json")
    architecture = config.get("architecture")
    if not isinstance(architecture, str):
        raise CheckpointError(
            f"{where}: expected timm's config with an architecture, found keys {sorted(config)!r:.200}. "
            f"Give the weights file {header.path.name} and {option_name('model', 'NAME')}"
        )
    try:
        stated_args = checked_model_args(config.get("model_args") or {})
        cfg = checked_pretrained_cfg(config.get("pretrained_cfg", config))
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from None
    cfg |= {name: config[name] for name in ("label_names", "label_descriptions") if name in config}
    stated_args.pop("num_classes", None)  # the classifier's shape shows it
    name = split_tag(architecture)[0]
    _check_hint(header, name, hints)
    _check_name(header, name, "config.json")
    args = {**stated_args, **args}
    of_file = completed_cfg(name, cfg)
    model = infer_from_shapes(name, args, of_file, header.tensors, bounded=True)
    pool = config.get("global_pool")
    # timm writes the pooling that the model has, whether its arguments say so or not.
    if pool in POOLS and "global_pool" not in args and getattr(model.skeleton, "global_pool", pool) != pool:
        args["global_pool"] = pool
        model = infer_from_shapes(name, args, of_file, header.tensors, bounded=True)
    model = replace(model, cfg_origins=dict.fromkeys(cfg, "file"))
    return _with_notes(model, first=f"architecture {name}, from config.json")


def _check_hint(header: FileHeader, name: str, hints: ModelHints) -> None:
    if hints.model is not None and split_tag(hints.model)[0] != name:
        raise CheckpointError(
            f"{show(header.path.parent)}: config.json says {name}, not {option_name('model', hints.model)}. "
            f"Leave the option out, or give the weights file {header.path.name}"
        )


def _from_conversion(
    header: FileHeader, foreign: Conversion, args: Mapping[str, Any], hints: ModelHints
) -> ResolvedModel:
    spec = foreign.spec
    if spec is None:
        renamed = replace(header, tensors=foreign.tensors, config=None)
        try:
            model = _from_file(renamed, args, hints, foreign.cfg)
        except CheckpointError as error:
            advice = ". Give the folder with its configuration" if foreign.family.build else ""
            raise CheckpointError(f"{error} (converted from {foreign.family.title}){advice}") from None
    else:
        name = spec.architecture
        _check_hint(header, name, hints)
        cfg = completed_cfg(name, checked_pretrained_cfg(foreign.cfg))
        model = infer_from_shapes(name, {**spec.args, **args}, cfg, foreign.tensors, bounded=True)
        origins = dict.fromkeys(foreign.cfg, "file")
        model = replace(_without_claims(model, foreign.cfg), cfg_origins=origins)
        model = _with_notes(model, first=f"architecture {name}, from its configuration")
    note = f"converted from {foreign.family.title}; {'; '.join(foreign.notes)}".rstrip("; ")
    return replace(_with_notes(model, first=note), conversion=foreign)


def _from_file(
    header: FileHeader, args: Mapping[str, Any], hints: ModelHints, cfg: Mapping[str, Any] | None = None
) -> ResolvedModel:
    training = read_training(header.training)
    if training is None:
        return _from_names(header, args, hints, cfg)
    named, tag = split_tag(hints.model or "")
    stated = split_tag(training.model or "")[0]
    model: ResolvedModel | None = None
    notes: tuple[str, ...] = ()
    # --model wins. A tag means timm's own weights, about which the script knows nothing.
    if stated and not tag and named in ("", stated):
        try:
            model = _from_training(header, args, training, given=bool(named))
            model = _with_preprocessing(model, {**(cfg or {}), **training.implied}, of_library=True)
        except CheckpointError:
            # A script's own name, or the name in a converted file, may mean another model.
            if not training.implied and cfg is None:
                raise
            notes = (*notes, f"ignored {training.origin} {training.model}: its tensors do not fit")
    if model is None:
        model = _from_names(header, args, hints, cfg)
    if named and stated and stated != named:
        notes = (*notes, f"ignored {training.origin} {training.model} because of {option_name('model')}")
    model = _with_notes(model, *notes)
    return model if tag else _with_preprocessing(model, training.cfg)


def _from_training(
    header: FileHeader, args: Mapping[str, Any], training: Training, *, given: bool
) -> ResolvedModel:
    name, tag = split_tag(training.model or "")
    cfg = cfg_of_tag(name, tag)
    heads = {key: training.args[key] for key in ("num_heads",) if training.implied and key in training.args}
    with_size = {} if training.side is None else {"img_size": training.side}
    fault: CheckpointError | None = None
    for stated in ({**with_size, **training.args}, training.args):
        try:
            model = infer_from_shapes(name, {**stated, **args}, cfg, header.tensors, bounded=True)
            check_tensors(show(header.path), model.tensors, model.skeleton, model.identity)
        except CheckpointError as error:
            fault = fault or error
            continue
        model = replace(_without_claims(model), cfg_origins=dict.fromkeys(cfg, "file"))
        how = "as given" if given else f"from its {training.origin}"
        if heads.keys() - args.keys():
            how += f", with {heads['num_heads']} heads as in MoCo v3"
        return _with_notes(model, first=f"architecture {name}, {how}")
    raise CheckpointError(
        f"{fault}\n  {training.origin} in the file says {name}. If this is wrong, give "
        f"{option_name('model', 'NAME')}"
    )


def _from_names(
    header: FileHeader, args: Mapping[str, Any], hints: ModelHints, cfg: Mapping[str, Any] | None = None
) -> ResolvedModel:
    if hints.model is not None:
        name, tag = split_tag(hints.model)
        _check_name(header, name, option_name("model"))
        of_tag = cfg_of_tag(name, tag)
        if cfg and not tag:
            of_tag = completed_cfg(name, checked_pretrained_cfg(cfg))
        model = infer_from_shapes(name, args, of_tag, header.tensors)
        origins = dict.fromkeys(of_tag, "tag") if tag else dict.fromkeys(cfg or (), "library")
        model = replace(model if tag else _without_claims(model, cfg or ()), cfg_origins=origins)
        return _with_notes(model, first=f"architecture {name}, as given")
    model = _without_claims(search(header, args, normalised="mean" in (cfg or {})))
    name = model.identity.architecture
    if "_rope_ape_" in name:
        raise CheckpointError(
            f"{show(header.path)}: tensor names and shapes fit both {name} and DeiT III. Choose with "
            f"{option_name('model', 'NAME')}"
        )
    model = _with_preprocessing(model, cfg or {}, of_library=True)
    default = " (assumes the default number of heads, which shapes do not show)"
    heads = "" if "num_heads" in args else default
    return _with_notes(model, first=f"architecture {name}, from names and shapes{heads}")


def _without_claims(model: ResolvedModel, stated: Iterable[str] = ()) -> ResolvedModel:
    """Drop timm's default license, tag and labels from the model, except the keys in ``stated``."""
    dropped = WEIGHTS_CFG_KEYS - set(stated)
    cfg = {name: value for name, value in model.identity.pretrained_cfg.items() if name not in dropped}
    return replace(model, identity=replace(model.identity, pretrained_cfg=cfg))


def _with_preprocessing(
    model: ResolvedModel, stated: Mapping[str, Any], *, of_library: bool = False
) -> ResolvedModel:
    cfg = for_size(model.identity.pretrained_cfg, stated.get("input_size"))
    identity = replace(model.identity, pretrained_cfg={**cfg, **stated})
    origins = {**model.cfg_origins, **dict.fromkeys(stated, "library" if of_library else "file")}
    return replace(model, identity=identity, cfg_origins=origins)


def _check_name(header: FileHeader, name: str, origin: str) -> None:
    if not re.fullmatch(r"\w+", name) or not known_model(name):
        raise CheckpointError(f"{show(header.path)}: {origin}: {unknown_model(name)}")
