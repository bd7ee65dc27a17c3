"""Opening a checkpoint, dense or slim, as an ordinary timm module."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.checkpoint.files import read_file_header, read_tensors, sha256_of
from mhacut.checkpoint.header import FileHeader
from mhacut.checkpoint.misfit import check_fit
from mhacut.checkpoint.recognise import (
    Recognised,
    as_timm_has_it,
    build_model,
    build_skeleton,
    identity_of,
    known_model,
    recognise_dense,
    recognise_stated,
    unknown_model,
)
from mhacut.checkpoint.record import METADATA_KEY, ModelIdentity, SlimRecord, checked_model_args
from mhacut.data import Preprocessing
from mhacut.errors import CheckpointError, DataError, MhacutError
from mhacut.options.base import CheckpointOptions
from mhacut.runtime.files import show
from mhacut.runtime.progress import Reporter
from mhacut.surgery.info import model_input_size
from mhacut.surgery.slice import cut

TIMM_PREFIX = "timm:"
_TOLD = 5


@dataclass(frozen=True)
class LoadedModel:
    """A checkpoint opened in full."""

    model: nn.Module
    """In eval mode, float32, on the CPU, whatever the file's dtypes; already cut if the file is slim."""
    identity: ModelIdentity
    """Of the dense model."""
    dtypes: dict[str, torch.dtype]
    """Per tensor, as the file has it, so that a later file can be written alike."""
    record: SlimRecord | None
    """What a slim file states about itself; None for a dense one."""
    sha256: str
    """Of the file's bytes; for ``timm:NAME`` of names, shapes, dtypes and bytes of its tensors."""
    source: str
    """What was asked for: a path, or ``timm:NAME``."""
    stem: str
    """For default output names."""
    notes: tuple[str, ...]
    """Lines worth telling: what was inferred, which part of a file was used."""
    path: Path | None
    """The file that holds the weights; None for ``timm:NAME``."""


@dataclass(frozen=True)
class Header:
    """What a checkpoint holds and states, its weights not read and its model not built."""

    file: FileHeader
    record: SlimRecord | None
    """What a slim file states about itself; None for a dense one."""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Per tensor name."""
        return self.file.shapes

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Per tensor name."""
        return {name: info.dtype for name, info in self.file.tensors.items()}

    @property
    def metadata(self) -> Mapping[str, str]:
        """Of a safetensors file; untrusted text."""
        return self.file.metadata


@dataclass(frozen=True)
class Outline:
    """A checkpoint recognised and checked, its weights not read."""

    header: FileHeader
    identity: ModelIdentity
    record: SlimRecord | None
    skeleton: nn.Module
    """The model (cut if the file is slim) on the meta device: shapes, no numbers."""
    notes: tuple[str, ...]
    stem: str
    source: str
    """What was asked for."""

    @property
    def model(self) -> nn.Module:
        """The skeleton, under the name that a loaded checkpoint has its model by."""
        return self.skeleton

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Per tensor, as the file has it."""
        return {name: info.dtype for name, info in self.header.tensors.items()}

    @property
    def path(self) -> Path:
        """The file that holds the weights."""
        return self.header.path


def read_header(source: str | os.PathLike[str]) -> Header:
    """What a checkpoint holds and, if it is slim, states about itself; weights are not read.

    Raises:
        CheckpointError: not a readable checkpoint, or what it states makes no sense.
    """
    header = read_file_header(source)
    text = header.metadata.get(METADATA_KEY)
    if text is None:
        return Header(header, None)
    try:
        return Header(header, SlimRecord.from_json(text))
    except CheckpointError as error:
        raise CheckpointError(f"{show(header.path)}: {error}") from None


def read_outline(
    source: str | os.PathLike[str],
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
) -> Outline:
    """The checkpoint recognised, its names, shapes and dtypes checked against the model; weights unread.

    Arguments and errors as for :func:`read_model`; ``timm:NAME`` has no file and is not accepted.
    """
    read = read_header(source)
    header, record = read.file, read.record
    notes = list(_file_notes(header))
    if record is None:
        known = recognise_dense(header, model=model, model_args=model_args or {}, num_classes=num_classes)
    else:
        _check_slim_arguments(header, record, model, model_args, num_classes)
        known = _recognise_slim(header, record)
        notes.append(f"slim file, written by mhacut in {len(record.history)} step(s)")
    stem = Path(source).resolve().name if header.config is not None else header.path.stem
    told = (*known.notes, *notes)
    return Outline(header, known.identity, record, known.skeleton, told, stem, os.fspath(source))


def read_model(
    source: str | os.PathLike[str],
    *,
    model: str | None = None,
    model_args: Mapping[str, Any] | None = None,
    num_classes: int | None = None,
) -> LoadedModel:
    """The model in a checkpoint, dense or slim.

    Args:
        source: a safetensors or torch file, a timm folder, or ``timm:NAME`` for timm's pretrained weights
            from cache or hub. Content decides the format, not the suffix.
        model: timm's name of the architecture, for files that do not say.
        model_args: further arguments of ``timm.create_model``, ``{"img_size": 32}``.
        num_classes: of the classifier; read from its shape if None.

    Raises:
        CheckpointError: the file cannot be read, recognised or trusted; nothing was run from it.
    """
    if isinstance(source, str) and source.startswith(TIMM_PREFIX):
        if model is not None:
            raise CheckpointError(f"{source}: names its model already; leave --model out")
        return _read_timm(source, model_args or {}, num_classes)
    outline = read_outline(source, model=model, model_args=model_args, num_classes=num_classes)
    header = outline.header
    # Shapes are known to fit; only now is memory taken.
    built = build_model(outline.identity)
    if outline.record is not None:
        cut(built, outline.record.plan)
        _set_preprocessing(built, outline.record)
    else:
        _set_resolved(built, outline.identity, show(header.path))
    tensors = read_tensors(header)
    if outline.record is None:
        tensors = as_timm_has_it(tensors, built)
    built.load_state_dict(_as_float32(show(header.path), tensors), strict=True)
    return LoadedModel(
        model=built.eval(),
        identity=outline.identity,
        dtypes={name: tensor.dtype for name, tensor in tensors.items()},
        record=outline.record,
        sha256=sha256_of(header.path),
        source=os.fspath(source),
        stem=outline.stem,
        notes=outline.notes,
        path=header.path,
    )


def read_as_told(options: CheckpointOptions, reporter: Reporter) -> LoadedModel:
    """The checkpoint a command was given, by :func:`read_model`; what was inferred goes to ``reporter``."""
    loaded = read_model(
        options.checkpoint,
        model=options.model,
        model_args=options.model_args or None,
        num_classes=options.num_classes,
    )
    for note in loaded.notes:
        reporter.log(note)
    return loaded


def load_model(path: str | os.PathLike[str] | None, model: str | None = None, **model_args: Any) -> nn.Module:
    """The model in a dense or slim checkpoint as a timm module in eval mode, float32, on the CPU.

    timm's ``forward_features``, ``get_classifier``, ``reset_classifier`` and
    ``timm.data.resolve_data_config(model=...)`` work on it. float16 and bfloat16 files are widened: call
    ``.half()`` on the result for the file's own precision.

    Args:
        path: whatever ``mhacut prune`` reads: safetensors, ``.pth``, a timm folder, ``timm:NAME``. None, the
            output of a dry run, is refused.
        model: timm's name of the architecture, for dense files that do not say.
        model_args: further arguments of ``timm.create_model``, ``img_size=32``.

    Raises:
        CheckpointError: there is no file, or it cannot be read, recognised or trusted.
    """
    if path is None:
        raise CheckpointError("there is no file to load; a dry run of prune writes none")
    num_classes = model_args.pop("num_classes", None)
    return read_model(path, model=model, model_args=model_args, num_classes=num_classes).model


def _recognise_slim(header: FileHeader, record: SlimRecord) -> Recognised:
    """The skeleton of a slim file, cut by its plan and compared with its tensors."""
    try:
        known = recognise_stated(header, record.identity, "the file's metadata")
        cut(known.skeleton, record.plan)
    except MhacutError as error:
        text = str(error)
        where = show(header.path)
        raise CheckpointError(text if text.startswith(where) else f"{where}: metadata: {text}") from error
    check_fit(header, known.skeleton, known.identity, stated=True)
    return known


def _check_slim_arguments(
    header: FileHeader,
    record: SlimRecord,
    model: str | None,
    model_args: Mapping[str, Any] | None,
    num_classes: int | None,
) -> None:
    stated = record.identity
    wrong = []
    if model is not None and model.partition(".")[0] != stated.architecture:
        wrong.append(f"--model {model} (it is {stated.architecture})")
    asked = checked_model_args({**(model_args or {})})
    if num_classes is not None:
        asked["num_classes"] = num_classes
    wrong += [
        f"{name}={value!r:.60} (it has {stated.model_args.get(name, 'the default')!r:.60})"
        for name, value in asked.items()
        if stated.model_args.get(name) != value
    ]
    if wrong:
        raise CheckpointError(
            f"{show(header.path)}: a slim file says itself which model it is; leave out {', '.join(wrong)}"
        )


def _file_notes(header: FileHeader) -> list[str]:
    notes = []
    if header.part is not None:
        notes.append(f"read the part {header.part!r} of the checkpoint")
    if header.prefix_stripped:
        notes.append("took the prefix module. or _orig_mod. off the tensor names")
    suffix = header.path.suffix.lower()
    if header.format == "torch" and suffix == ".safetensors":
        notes.append("content is a torch file, in spite of its name")
    if header.format == "safetensors" and suffix in (".pth", ".pt", ".bin", ".ckpt", ".tar"):
        notes.append("content is safetensors, in spite of its name")
    dtypes = sorted(
        {
            str(info.dtype).removeprefix("torch.")
            for info in header.tensors.values()
            if info.dtype.is_floating_point
        }
    )
    if dtypes not in ([], ["float32"]):
        notes.append(f"weights are {' and '.join(dtypes)}; computed in float32")
    return notes


def _as_float32(where: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Float tensors widened to float32, all of them finite; integer buffers as they are."""
    widened: dict[str, Tensor] = {}
    bad: list[tuple[str, int, int]] = []
    for name, tensor in tensors.items():
        if tensor.is_floating_point():
            tensor = tensor.float()
            finite = int(torch.isfinite(tensor).sum())
            if finite != tensor.numel():
                bad.append((name, tensor.numel() - finite, tensor.numel()))
        widened[name] = tensor
    if bad:
        shown = ", ".join(f"{name!r:.150} ({count} of {total})" for name, count, total in bad[:_TOLD])
        raise CheckpointError(
            f"{where}: {len(bad)} tensors hold NaN or infinite values: {shown}"
            f"{', ...' if len(bad) > _TOLD else ''}; "
            "the training that made them diverged, take an earlier checkpoint"
        )
    return widened


def _set_cfg(model: Any, cfg: Mapping[str, Any]) -> None:
    """Lay ``cfg`` over the model's ``pretrained_cfg``, where timm looks for preprocessing and classifier."""
    tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in cfg.items()}
    model.pretrained_cfg = {**model.pretrained_cfg, **tuples}
    if hasattr(model, "default_cfg"):
        model.default_cfg = model.pretrained_cfg  # timm's older name for it


def _set_resolved(model: Any, identity: ModelIdentity, where: str) -> None:
    """The preprocessing that commands work out for a dense model, so that timm works out the same."""
    cfg = identity.pretrained_cfg
    try:
        resolved = Preprocessing.resolve(cfg, model_input_size(model, cfg))
    except DataError as error:
        raise CheckpointError(f"{where}: pretrained_cfg: {error}") from None
    _set_cfg(model, {**cfg, **resolved.to_json()})
    if list(resolved.input_size) != cfg.get("input_size"):
        _drop_test_sizes(model)


def _set_preprocessing(model: Any, record: SlimRecord) -> None:
    """The preprocessing the cut was made for, over the dense model's own; nothing recommends another."""
    _set_cfg(model, {**record.identity.pretrained_cfg, **record.preprocessing})
    _drop_test_sizes(model)


def _drop_test_sizes(model: Any) -> None:
    """What recommends evaluation at another size than the model's own."""
    for name in ("test_input_size", "test_crop_pct", "test_pool_size"):
        model.pretrained_cfg.pop(name, None)


def _read_timm(source: str, model_args: Mapping[str, Any], num_classes: int | None) -> LoadedModel:
    """Pretrained weights of timm, from its cache or the hub."""
    import timm

    name = source.removeprefix(TIMM_PREFIX)
    architecture = name.partition(".")[0]
    if not known_model(architecture):
        raise CheckpointError(f"{source}: {unknown_model(architecture)}")
    args = checked_model_args(model_args)
    if name != architecture and name not in timm.list_pretrained():
        tags = [tag for tag in timm.list_pretrained() if tag.partition(".")[0] == architecture]
        raise CheckpointError(
            f"{source}: no such pretrained weights; timm has {', '.join(tags) or 'none of this model'}"
        )
    if not timm.models.is_model_pretrained(architecture):
        raise CheckpointError(
            f"{source}: timm has no pretrained weights of this model; give a file and --model"
        )
    if num_classes is not None:
        args["num_classes"] = num_classes
    build_skeleton(ModelIdentity(architecture, args))  # arguments that do not fit fail here, by name
    try:
        with torch.random.fork_rng(devices=[]):
            built: Any = timm.create_model(name, pretrained=True, **args)
    except Exception as error:  # the hub, the network and the cache fail in types of their own libraries
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise CheckpointError(
            f"{source}: its weights are not in the cache and could not be downloaded ({reason:.200}); "
            "go online once, or give a file and --model"
        ) from error
    pretrained_classes = built.pretrained_cfg.get("num_classes")
    if num_classes not in (None, 0, pretrained_classes):
        raise CheckpointError(
            f"{source}: its classifier has {pretrained_classes} classes; one of {num_classes} would be "
            "random: leave --num-classes out, or fine-tune first and give that file"
        )
    identity = identity_of(built, architecture, args)
    _set_resolved(built, identity, source)
    tensors = built.state_dict()
    built.load_state_dict(_as_float32(source, tensors), strict=True)
    return LoadedModel(
        model=built.eval(),
        identity=identity,
        dtypes={key: tensor.dtype for key, tensor in tensors.items()},
        record=None,
        sha256=_sha256_of_tensors(tensors),
        source=source,
        stem=name,
        notes=(f"pretrained weights of timm, {name}", f"num_classes {built.num_classes}, from the weights"),
        path=None,
    )


def _sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {sys.byteorder}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
