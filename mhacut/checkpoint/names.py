"""Translate names in files to those of a model, once it is known which model it is."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mhacut.checkpoint.header import TensorInfo
from mhacut.flatten import checkpoint_filter


def to_model_names(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a dense file under the names, and at the image size, of ``model``.

    FLatten models have other names in the files of their authors, and a linear classifier ``head`` has
    another name in some architectures; other tensors stay as they are.
    """
    convert = checkpoint_filter(model)
    named = dict(tensors) if convert is None else convert(tensors, model)
    own, classifier = model.state_dict(), getattr(model, "pretrained_cfg", {}).get("classifier")
    if not isinstance(classifier, str) or f"{classifier}.weight" in named or "head.weight" in own:
        return named
    translated = {f"head.{kind}": f"{classifier}.{kind}" for kind in ("weight", "bias")}
    return {translated.get(name, name): tensor for name, tensor in named.items()}


def infos_by_model_names(tensors: Mapping[str, TensorInfo], model: nn.Module) -> dict[str, TensorInfo]:
    """Return shapes and dtypes as :func:`to_model_names` leaves those of the tensors. Reads no weight."""
    announced = {
        name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in tensors.items()
    }
    return {
        name: TensorInfo(tuple(tensor.shape), tensor.dtype)
        for name, tensor in to_model_names(announced, model).items()
    }
