"""Translate the names in authors' files of our own models to those of the models."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mhacut.checkpoint.header import TensorInfo
from mhacut.flatten import checkpoint_filter


def to_model_names(tensors: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a dense file under the names, and at the image size, of ``model``.

    Only FLatten models have other names in the files of their authors; other tensors stay as they are.
    """
    convert = checkpoint_filter(model)
    return dict(tensors) if convert is None else convert(tensors, model)


def infos_by_model_names(tensors: Mapping[str, TensorInfo], model: nn.Module) -> dict[str, TensorInfo]:
    """Return shapes and dtypes as :func:`to_model_names` leaves those of the tensors. Reads no weight."""
    announced = {
        name: torch.empty(info.shape, dtype=info.dtype, device="meta") for name, info in tensors.items()
    }
    return {
        name: TensorInfo(tuple(tensor.shape), tensor.dtype)
        for name, tensor in to_model_names(announced, model).items()
    }
