"""Open and write folders of transformers models without converting the models to timm."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mhacut.checkpoint.checkpoint import Checkpoint, check_finite
from mhacut.checkpoint.files import read_file_header, safetensors_header
from mhacut.checkpoint.folder import PREPROCESSORS, PRUNED, preprocessor_of
from mhacut.checkpoint.foreign.config import Config, image_side, label_names, transformers_cfg
from mhacut.checkpoint.header import FileHeader
from mhacut.checkpoint.identity import ModelHints, ModelIdentity
from mhacut.checkpoint.part_file import REST, load_dense, load_pruned, pruned_part, write_pruned
from mhacut.checkpoint.record import SlimRecord
from mhacut.data import Preprocessing
from mhacut.errors import CheckpointError, UnsupportedModelError, option_name
from mhacut.plan import Plan
from mhacut.runtime.files import read_json, show


class ImageModel(nn.Module):
    """Wraps a transformers model: images [B, C, H, W] to logits, or to features without a classifier."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, size: tuple[int, ...]) -> None:
        """Run ``model`` on a zero image of ``size`` [C, H, W] to find the number of classes."""
        super().__init__()
        self.model = model
        try:
            device = next(model.parameters()).device
            logits = model(pixel_values=torch.zeros(1, *size, device=device)).get("logits")
        except Exception as error:  # the model's own
            raise UnsupportedModelError(
                f"{type(model).__name__} fails on pixel_values of shape {list(size)}: {error!s:.200}. "
                "Use mhacut.prune_ in Python, which prunes any model"
            ) from None
        self.num_classes = logits.shape[1] if logits is not None and logits.ndim == 2 else 0

    def forward(self, images: Tensor) -> Tensor:
        output: Any = self.model(pixel_values=images)
        first: Tensor = output.get("logits", tree_leaves(output)[0])
        return first


def _preprocessing_of(folder: Path, model: Any) -> Preprocessing:
    """Return the folder's preprocessing. If it has no image size, use the model's image size."""
    stated = preprocessor_of(folder)
    if stated is None:
        raise CheckpointError(
            f"{show(folder)}: expected preprocessor_config.json with image size, mean and std. Write the "
            "file: transformers.AutoImageProcessor.from_pretrained(NAME).save_pretrained(FOLDER)"
        )
    config = Config(model.config.to_dict(), show(folder / "config.json"))
    channels, processor = config.get("num_channels", 3), Config(stated, show(folder / PREPROCESSORS[0]))
    side = image_side(processor) or config.get("image_size", 224)
    return Preprocessing.resolve(transformers_cfg(processor, channels), (channels, side, side))


def is_pruned_folder(source: str | os.PathLike[str]) -> bool:
    return (Path(source) / PRUNED).is_file()


def is_huggingface(checkpoint: Checkpoint) -> bool:
    return isinstance(checkpoint.skeleton, ImageModel)


def open_huggingface(source: str | os.PathLike[str], hints: ModelHints | None = None) -> Checkpoint:
    folder, hints = Path(source), hints or ModelHints()
    pruned = is_pruned_folder(folder)
    if pruned:
        header, model = _pruned_header(folder), load_pruned(folder)
        dtype = next(tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point())
    else:
        header, (model, dtype) = read_file_header(folder), load_dense(folder)
    preprocessing = _preprocessing_of(folder, model)
    whole = ImageModel(model.float(), preprocessing.input_size).eval()
    check_finite(show(folder), whole)
    stated = hints.model or hints.model_args or hints.part
    if stated or hints.num_classes not in (None, whole.num_classes):
        options = ", ".join(map(option_name, ("model", "model_args", "part", "num_classes")))
        raise CheckpointError(
            f"{show(folder)}: config.json says {type(model).__name__} with {whole.num_classes} classes. "
            f"Leave out {options}"
        )
    cfg = {**preprocessing.to_json(), "num_classes": whole.num_classes}
    names = label_names(Config(header.config or {}, show(folder / "config.json")), whole.num_classes)
    cfg |= {} if names is None else {"label_names": names}
    identity = ModelIdentity(type(model).__name__, {"num_classes": whole.num_classes}, cfg)
    return Checkpoint.of_model(
        whole,
        identity,
        source=os.fspath(source),
        stem=folder.resolve().name,
        record=_record(model, identity, preprocessing) if pruned else None,
        header=header,
        dtypes={name: dtype for name, tensor in whole.state_dict().items() if tensor.is_floating_point()},
        notes=(f"{type(model).__name__} of transformers",),
        cfg_origin="file",
    )


def as_huggingface(checkpoint: Checkpoint) -> Checkpoint:
    """Reopen a converted transformers folder without the conversion. Return other checkpoints unchanged."""
    config = None if checkpoint.header is None else checkpoint.header.config
    converted = config is not None and "model_type" in config and not is_huggingface(checkpoint)
    return open_huggingface(checkpoint.source) if converted else checkpoint


def _pruned_header(folder: Path) -> FileHeader:
    files = [path for path in (folder / PRUNED, folder / REST) if path.is_file()]
    shards = {path: safetensors_header(path)[0] for path in files}
    tensors = {name: info for shard in shards.values() for name, info in shard.items()}
    config = read_json(folder / "config.json")
    return FileHeader(folder / PRUNED, "safetensors", tensors, config=config, shards=shards)


def _record(model: nn.Module, identity: ModelIdentity, preprocessing: Preprocessing) -> SlimRecord:
    name, record = pruned_part(model)
    plan = Plan.from_json(record["plan"], record.get("tokens"))
    inside = f"model.{name}." if name else "model."
    units = tuple(replace(unit, layer=inside + unit.layer) for unit in plan)
    history = tuple(record.get("history", ()))
    return SlimRecord(identity, Plan(units, plan.tokens), preprocessing.to_json(), history)


def write_huggingface(
    path: str | os.PathLike[str],
    model: nn.Module,
    history: Sequence[Mapping[str, Any]],
    *,
    dtype: torch.dtype,
    overwrite: bool,
    finish: Callable[[Path], object] | None = None,
) -> None:
    written = copy.deepcopy(model).to(dtype)
    pruned_part(written)[1]["history"] = list(history)
    write_pruned(written, path, overwrite=overwrite, finish=finish or (lambda folder: None))
