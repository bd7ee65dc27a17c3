"""Registry of adapters by module class, and recognition of other attention and MLP classes by name.

A new class of softmax attention needs an entry in :mod:`mhacut.adapters.softmax_table`, a new MLP class in
:mod:`mhacut.adapters.mlp`. Other attention needs an :class:`~mhacut.adapters.base.Adapter`.
"""

from __future__ import annotations

import re

from torch import nn

from mhacut.adapters.base import Adapter
from mhacut.adapters.flatten_attention import CswinAttentionAdapter, FocusedAttentionAdapter
from mhacut.adapters.huggingface import adapter_of
from mhacut.adapters.linear_attention import (
    AdditiveAdapter,
    FactorAttentionAdapter,
    LambdaAdapter,
    MultiScaleAdapter,
    SeparableAdapter,
)
from mhacut.adapters.mlp import MLPS
from mhacut.adapters.other_attention import (
    CHANNEL_ATTENTION,
    UNPRUNABLE,
    CascadedAdapter,
    OutlookAdapter,
)
from mhacut.adapters.softmax_table import SOFTMAX
from mhacut.adapters.structure import adapter_by_structure
from mhacut.adapters.torchvision_swin import torchvision_swin_adapter

ADAPTERS: tuple[Adapter, ...] = (
    *SOFTMAX,
    FocusedAttentionAdapter(),
    CswinAttentionAdapter(),
    MultiScaleAdapter(),
    CascadedAdapter(),
    AdditiveAdapter(),
    SeparableAdapter(),
    LambdaAdapter(),
    FactorAttentionAdapter(),
    OutlookAdapter(),
    *CHANNEL_ATTENTION,
    *UNPRUNABLE,
    *MLPS,
)

POOLING_HEADS = ("AttentionPoolLatent", "AttentionPool2d", "AttentionPoolPrr", "AttentionPoolingHead")
"""Endings of module names of attention that pools tokens after the last block. Such attention is skipped
unless an adapter exists for its class."""

POSITION_BIASES = ("RelPosMlp",)
"""Classes that compute position biases, equal for every image. Their MLPs are skipped, because they cost
almost nothing."""

_MLP_NAME = re.compile(r"mlp|ffn|feedforward", re.IGNORECASE)
_ATTENTION_NAME = re.compile(r"attn|attention", re.IGNORECASE)
# Attention by name, in convolutional networks, that weighs channels or places of a map by a small network.
_CHANNEL_GATES = frozenset(
    {"EcaModule", "CecaModule", "GlobalContext", "ChannelAttn", "LightChannelAttn", "SpatialAttn"}
    | {"LightSpatialAttn", "CbamModule", "LightCbamModule", "SplitAttn", "SelectiveKernelAttn"}
    | {"GatherExcite", "SqueezeExcite", "SEModule", "EffectiveSEModule"}
)
_NO_ATTENTION = frozenset({"ConvAttention"})
"""Classes with "attention" in the name that contain only convolutions (Next-ViT)."""

_BY_CLASS = {cls: adapter for adapter in ADAPTERS for cls in adapter.module_classes}
_KNOWN_ATTENTION = {
    cls.__name__
    for cls, adapter in _BY_CLASS.items()
    if adapter.family == "attention" and not _ATTENTION_NAME.search(cls.__name__)
}
"""Names of attention classes with an adapter but without "attention" in the name."""


def adapter_for(module: nn.Module) -> Adapter | None:
    """Return the adapter of the exact class of ``module``; None if the class is not supported."""
    # The exact class: a subclass may compute something else with the same tensors.
    adapter = _BY_CLASS.get(type(module)) or adapter_of(module) or torchvision_swin_adapter(module)
    adapter = adapter or adapter_by_structure(module)
    return adapter if adapter is not None and adapter.serves(module) else None


def is_pooling_head(module: nn.Module) -> bool:
    return type(module).__name__.endswith(POOLING_HEADS)


def is_position_bias(module: nn.Module) -> bool:
    return type(module).__name__ in POSITION_BIASES


def is_attention(module: nn.Module) -> bool:
    """Whether the class name says that ``module``, which has no adapter, computes attention."""
    return type(module).__name__ in _KNOWN_ATTENTION


def looks_like_attention(module: nn.Module) -> bool:
    name = type(module).__name__
    return name not in _CHANNEL_GATES | _NO_ATTENTION and _ATTENTION_NAME.search(name) is not None


def looks_like_mlp(module: nn.Module) -> bool:
    return _MLP_NAME.search(type(module).__name__) is not None


def why_not_cut(mlp: str) -> str:
    if mlp.endswith("Head"):  # timm replaces what is behind it, and knows its dense width
        return "the hidden channels of a classifier are not pruned"
    return "this MLP class is not supported"
