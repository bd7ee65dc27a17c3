"""A checkpoint whose parts are read on first use."""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from mhacut.checkpoint.build import allocate
from mhacut.checkpoint.files import read_file_header, read_tensors, sha256_of_file
from mhacut.checkpoint.header import FileHeader, TensorInfo, infos
from mhacut.checkpoint.identify import identify_dense, identify_slim
from mhacut.checkpoint.identity import ModelHints, ModelIdentity
from mhacut.checkpoint.infer import ResolvedModel, to_model_names
from mhacut.checkpoint.record import METADATA_KEY, PART_KEY, SlimRecord
from mhacut.checkpoint.timm_cfg import set_recorded_preprocessing, set_resolved_preprocessing
from mhacut.errors import CheckpointError
from mhacut.runtime.files import show, stem_of
from mhacut.surgery.find import model_input_size
from mhacut.text import dtype_name, listed


@dataclass(eq=False)
class Checkpoint:
    """A timm model, dense or slim, with its file. Properties read the file on first use."""

    source: str
    """Path or ``timm:NAME``; for a model in memory, a name for messages."""
    stem: str
    record: SlimRecord | None
    header: FileHeader | None = None
    """Header of the checkpoint file; None for a model in memory."""
    hints: ModelHints = field(default_factory=ModelHints)
    has_weights: bool = False
    _resolved: ResolvedModel | None = None
    _sha256: str | None = None

    @classmethod
    def open(cls, source: str | os.PathLike[str], hints: ModelHints | None = None) -> Checkpoint:
        hints = hints or ModelHints()
        header = read_file_header(source, hints.part)
        of_folder = header.config is not None or bool(header.shards)
        stem = Path(source).resolve().name if of_folder else stem_of(header.path)
        return cls(os.fspath(source), stem, _record_of(header), header, hints)

    @classmethod
    def of_model(
        cls,
        model: nn.Module,
        identity: ModelIdentity,
        *,
        source: str,
        stem: str = "model",
        record: SlimRecord | None = None,
        header: FileHeader | None = None,
        dtypes: Mapping[str, torch.dtype] | None = None,
        sha256: str | None = None,
        notes: Sequence[str] = (),
        cfg_origin: str = "default",
    ) -> Checkpoint:
        tensors = infos(model.state_dict())
        if dtypes is not None:
            tensors = {
                name: TensorInfo(info.shape, dtypes.get(name, info.dtype)) for name, info in tensors.items()
            }
        origins = dict.fromkeys(identity.pretrained_cfg, cfg_origin)
        resolved = ResolvedModel(identity, model, tensors, tuple(notes), origins)
        return cls(source, stem, record, header, has_weights=True, _resolved=resolved, _sha256=sha256)

    @property
    def path(self) -> Path | None:
        return None if self.header is None else self.header.path

    @property
    def identity(self) -> ModelIdentity:
        return self._resolve().identity

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Size of an input image, (channels, height, width)."""
        identity = self.identity
        return model_input_size(self.skeleton, identity.pretrained_cfg, identity.model_args)

    @property
    def cfg_origins(self) -> Mapping[str, str]:
        return self._resolve().cfg_origins

    @property
    def skeleton(self) -> nn.Module:
        """The timm model, cut if the file is slim. It is on the meta device until the weights are read."""
        return self._resolve().skeleton

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        return {name: info.dtype for name, info in self._resolve().tensors.items()}

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines for the log: how the model was identified, and the entry of the file that was read."""
        notes, header = list(self._resolve().notes), self.header
        if header is None:
            return tuple(notes)
        notes += [] if header.note is None else [header.note]
        dtypes = sorted({dtype_name(dtype) for dtype in header.dtypes.values() if dtype.is_floating_point})
        if dtypes not in ([], ["float32"]):
            notes.append(f"weights are {' and '.join(dtypes)}; mhacut computes in float32")
        if self.record is not None:
            notes.append(f"slim file, written by mhacut in {len(self.record.history)} step(s)")
        return tuple(notes)

    @property
    def model(self) -> nn.Module:
        """The model with weights, in eval mode, float32, on the CPU."""
        if not self.has_weights:
            self._read_weights()
        return self.skeleton

    @property
    def sha256(self) -> str:
        if self._sha256 is None and self.header is not None:
            self._sha256 = sha256_of_file(self.header)
        elif self._sha256 is None:
            self._sha256 = sha256_of_tensors(self.model.state_dict())
        return self._sha256

    def read_tensors(self) -> dict[str, Tensor]:
        """Read the file's tensors in their stored dtypes, by their names in the timm model."""
        assert self.header is not None
        resolved, tensors = self._resolve(), read_tensors(self.header)
        # Another library's tensors are renamed, split and joined; a slim file has the model's names.
        if resolved.conversion is not None:
            tensors = resolved.conversion.apply(tensors)
        if self.record is not None:
            return tensors
        named = to_model_names(tensors, resolved.skeleton)
        return {name: tensor for name, tensor in named.items() if name in resolved.tensors}  # no classifier

    def _resolve(self) -> ResolvedModel:
        if self._resolved is None:
            assert self.header is not None
            self._resolved = (
                identify_dense(self.header, self.hints)
                if self.record is None
                else identify_slim(self.header, self.record, self.hints)
            )
        return self._resolved

    def _read_weights(self) -> None:
        assert self.header is not None
        model, where = self.skeleton, show(self.header.path)
        tensors = self.read_tensors()
        if self.record is None:
            set_resolved_preprocessing(model, self.identity, where)
        else:
            set_recorded_preprocessing(model, self.record)
        allocate(model)
        # Strict: a tensor that is not filled would hold arbitrary values.
        model.load_state_dict(tensors, strict=True)
        check_finite(where, model)
        self._sha256 = sha256_of_file(self.header)  # now: the file may change later
        model.eval()
        self.has_weights = True


def check_finite(where: str, model: nn.Module) -> None:
    bad: list[str] = []
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            wrong = int((~torch.isfinite(tensor)).sum())
            if wrong:
                bad.append(f"{name!r:.150} ({wrong} of {tensor.numel()})")
    if bad:
        raise CheckpointError(
            f"{where}: {len(bad)} tensors hold NaN or infinite values: {listed(bad, 5)}. Use an earlier "
            "checkpoint of the training"
        )


def sha256_of_tensors(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {sys.byteorder}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _record_of(header: FileHeader) -> SlimRecord | None:
    text = header.metadata.get(METADATA_KEY)
    if PART_KEY in header.metadata:
        raise CheckpointError(
            f"{show(header.path)}: holds a pruned submodule. Build the dense model, and call "
            "mhacut.apply_pruned"
        )
    if text is None:
        return None
    try:
        return SlimRecord.from_json(text)
    except CheckpointError as error:
        raise CheckpointError(f"{show(header.path)}: {error}") from None
