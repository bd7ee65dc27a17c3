"""What several cases are made of: reasons, and models that timm's own names do not let one make small."""

from __future__ import annotations

from typing import Any

from timm.models import metaformer, register_model
from timm.models._builder import build_model_with_cfg
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.gcvit import GlobalContextVit
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.nest import Nest
from timm.models.volo import VOLO
from torch import nn

QK_NORMALISED = {"qk": "q and k are normalised over the channels of a head"}
ALL_NORMALISED = dict.fromkeys(("qk", "v"), "q, k and v are normalised over the channels of a head")
V_NORMALISED = {"v": "a norm before the projection runs over the v channels of a head"}
NORMS_WITHIN = {
    "v": "a norm before the projection runs over all v channels",
    "hidden": "a norm runs over all hidden channels",
}
POOLING_MLP = {"hidden": "in a pooling head it costs next to nothing"}
SHARED_KEYS = {"qk": "several heads share their keys"}
SINGLE_CHANNEL = dict.fromkeys(("qk", "v"), "q, k and v are a single channel")
NOT_PROJECTED = {"v": "no projection of the layer reads it"}
SOFTMAX_OVER_CHANNELS = {
    "qk": "a softmax runs over these channels: without one of them the others would weigh more"
}


@register_model
def small_volo(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(VOLO, "small_volo", pretrained, **kwargs)


@register_model
def small_nest(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(Nest, "small_nest", pretrained, **kwargs)


@register_model
def small_gcvit(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return build_model_with_cfg(GlobalContextVit, "small_gcvit", pretrained, **kwargs)


@register_model
def small_caformer(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    mixers = [metaformer.SepConv, metaformer.SepConv, metaformer.Attention, metaformer.Attention]
    norms = [metaformer.LayerNorm2dNoBias] * 2 + [metaformer.LayerNormNoBias] * 2
    return build_model_with_cfg(
        metaformer.MetaFormer, "small_caformer", pretrained, token_mixers=mixers, norm_layers=norms, **kwargs
    )


@register_model
def small_multi_query(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    definition = [
        ["er_r1_k3_s2_e4_c24"],
        ["mqa_r1_k3_h3_s1_v2_d16_c24", "mqa_r1_k3_h2_s1_d8_c24"],
        ["cn_r1_k1_s1_c32"],
    ]
    return build_model_with_cfg(
        MobileNetV3,
        "small_multi_query",
        pretrained,
        block_args=decode_arch_def(definition),
        stem_size=8,
        num_features=32,
        **kwargs,
    )


@register_model
def small_mvitv2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    cfg = MultiScaleVitCfg(depths=(1, 1), embed_dim=(16, 32), num_heads=(1, 2))
    return build_model_with_cfg(MultiScaleVit, "small_mvitv2", pretrained, model_cfg=cfg, **kwargs)


def clip(module: nn.Module) -> nn.Module:
    """Set the clamps of ``module`` so that they bite."""
    for name, buffer in module.named_buffers():
        if name.endswith(("_min", "_max")):
            buffer.fill_(-0.7 if name.endswith("min") else 0.8)
    return module
