"""Common parts of the families: timm's record of a model, its registration, and official checkpoints."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import resample_abs_pos_embed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mhacut.flatten.attention import FocusedLinearAttention


def configs(variants: Mapping[str, Any], **values: Any) -> Any:
    """Return timm's ``default_cfgs`` for model names.

    Images are preprocessed as by the authors: a square of 256/224 of the image size, then a crop. FLatten-
    Swin-B at 384 pixels has no crop. No weights can be downloaded, and ``license`` is missing because the
    official repository states none.
    """
    large = {"input_size": (3, 384, 384), "pool_size": (12, 12)}
    return generate_default_cfgs(
        {
            f"{name}.untrained": {
                "url": "",
                "num_classes": 1000,
                "input_size": (3, 224, 224),
                "fixed_input_size": True,
                "pool_size": (7, 7),
                "crop_pct": 1.0 if name == "flatten_swin_base_384" else 224 / 256,
                "crop_mode": "squash",
                "interpolation": "bicubic",
                "mean": IMAGENET_DEFAULT_MEAN,
                "std": IMAGENET_DEFAULT_STD,
                "classifier": "head",
                "origin_url": "https://github.com/LeapLabTHU/FLatten-Transformer",
                "paper_name": "FLatten Transformer: Vision Transformer using Focused Linear Attention",
                "paper_ids": "arXiv:2308.00442",
                **(large if name.endswith("384") else {}),
                **values,
            }
            for name in variants
        }
    )


def register(
    model_class: type[nn.Module], variants: Mapping[str, Mapping[str, Any]], **feature_cfg: Any
) -> None:
    """Register the models of a family with timm, as functions in the module of ``model_class``."""
    # timm finds a model's default_cfgs in the module of its function, and lists models by that module.
    module: Any = sys.modules[model_class.__module__]

    def factory(name: str, defaults: Mapping[str, Any]) -> Any:
        def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
            args = {**feature_cfg, **defaults, **kwargs}
            features = {key: args.pop(key) for key in feature_cfg}
            model: nn.Module = build_model_with_cfg(
                model_class,
                name,
                pretrained,
                pretrained_filter_fn=module.checkpoint_filter_fn,
                feature_cfg=features,
                **args,
            )
            return model

        create.__name__ = create.__qualname__ = name
        create.__module__ = model_class.__module__
        return create

    for name, defaults in variants.items():
        setattr(module, name, register_model(factory(name, defaults)))


def unwrap(state_dict: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Return the state dict of a training checkpoint ``{"model": ...}``.

    A bare state dict stays unchanged.
    """
    inner = state_dict.get("model", state_dict)
    return inner if isinstance(inner, Mapping) else state_dict


def resize_encodings(state_dict: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Resize position tensors of a state dict to ``model`` by bicubic interpolation.

    The tensors are ``positional_encoding`` and ``pos_embed``, [1, N, C], and
    ``relative_position_bias_table``, [N, h]. If N is not a square number, the tensor stays unchanged, and
    ``load_state_dict`` raises an error.
    """
    wanted = model.state_dict()
    grids: dict[str, tuple[int, int]] = dict(getattr(model, "pos_embed_grids", {}))
    for name, module in model.named_modules():
        if isinstance(module, FocusedLinearAttention):
            grids[f"{name}.positional_encoding"] = module.grid_size
        elif "relative_position_bias_table" in module._parameters:
            # A row per offset of two tokens in a window: of n tokens a side, from 1 - n to n - 1.
            height, width = module.window_size
            grids[f"{name}.relative_position_bias_table"] = (2 * height - 1, 2 * width - 1)
    resized = dict(state_dict)
    for name, grid in grids.items():
        tensor = state_dict.get(name)
        if tensor is None or name not in wanted or tensor.shape == wanted[name].shape:
            continue
        tokens_first, shape = tensor.squeeze(0), wanted[name].shape
        # A file states no shape of its map, so that it must be a square one.
        side = math.isqrt(len(tokens_first)) if tokens_first.ndim == 2 else 0
        if side and side * side == len(tokens_first) and tokens_first.shape[-1] == shape[-1]:
            encoding = resample_abs_pos_embed(
                tokens_first.unsqueeze(0), grid, (side, side), num_prefix_tokens=0
            )
            resized[name] = encoding.reshape(shape)
    return resized


def encoded_img_size(shapes: Mapping[str, tuple[int, ...]], patch_size: int = 4) -> int | None:
    tokens = [
        shape[1]
        for name, shape in shapes.items()
        if name.endswith(".positional_encoding") and len(shape) == 3
    ]
    side = math.isqrt(max(tokens, default=0))
    return side * patch_size if side and side * side == max(tokens) else None
