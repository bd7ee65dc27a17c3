"""A small model for each attention class of timm and each of its options, nothing dead by accident."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
from timm.models import metaformer, register_model
from timm.models._builder import build_model_with_cfg
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.gcvit import GlobalContextVit
from timm.models.mobilenetv3 import MobileNetV3
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from timm.models.nest import Nest
from timm.models.volo import VOLO
from torch import Tensor, nn


@dataclass(frozen=True)
class Case:
    """One timm architecture at test size."""

    architecture: str
    args: dict[str, Any] = field(default_factory=dict)
    size: int = 32
    whole: frozenset[str] = frozenset()
    """Kinds that some layer must leave whole."""
    share: int = 80
    """Per cent of the FLOPs that a cut can reach."""


# What timm's own names do not let one make small.


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


def _eva(
    architecture: str, size: int = 32, whole: frozenset[str] = frozenset(), share: int = 80, **args: Any
) -> Case:
    small = {"depth": 2, "img_size": size, "embed_dim": 48, "num_heads": 3, **args}
    return Case(architecture, small, size, whole, share)


def _sam(size: int, whole: frozenset[str] = frozenset(), **args: Any) -> Case:
    small = {"depth": 1, "embed_dim": 48, "num_heads": 3, "window_size": 4, "neck_chans": 16}
    return Case("samvit_base_patch16", {"img_size": size, **small, **args}, size, whole)


CASES = {
    "rope interleaved": _eva("vit_small_patch16_rope_224"),
    "rope mixed": _eva("vit_small_patch16_rope_mixed_ape_224"),
    "rope half": _eva("vit_small_patch16_rope_224", rope_rotate_half=True),
    "rope normalised": _eva("vit_small_patch16_rope_224", qk_norm=True, whole=frozenset({"qk"})),
    "rope shared keys": _eva(
        "vit_small_patch16_rope_224",
        qkv_fused=False,
        num_kv_heads=1,
        whole=frozenset({"qk"}),
    ),
    "rope groups of heads": _eva(
        "vit_small_patch16_rope_224",
        qkv_fused=False,
        num_heads=4,
        num_kv_heads=2,
        whole=frozenset({"qk"}),
    ),
    "eva biases in parts": _eva("eva02_tiny_patch14_224", size=42),
    "eva separate": _eva("eva02_base_patch14_224", size=42, scale_mlp=False),
    "eva norm behind": _eva("eva02_base_patch16_clip_224", whole=frozenset({"v", "hidden"}), share=95),
    "eva half": _eva("vit_small_patch16_dinov3"),
    "eva bias": _eva("vit_small_patch16_dinov3_qkvb"),
    "pooling head": _eva("vit_base_patch16_siglip_224", whole=frozenset({"hidden"})),
    "pooling head of eva": _eva("vit_small_patch16_rope_224", global_pool="map", whole=frozenset({"hidden"})),
    "metaformer": Case("small_caformer", {"depths": (1, 1, 1, 2), "dims": (16, 16, 32, 64)}, 64),
    "fastvit": Case("fastvit_sa12", {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 16, 64)}, 64, share=98),
    "beit": _eva("beit_base_patch16_224"),
    "beit shared positions": _eva(
        "beit_base_patch16_224", use_rel_pos_bias=False, use_shared_rel_pos_bias=True, init_values=None
    ),
    "beit without biases": _eva("beit_base_patch16_224", qkv_bias=False),
    "relpos mlp": _eva("vit_relpos_small_patch16_224"),
    "relpos bias": _eva("vit_relpos_base_patch32_plus_rpn_256", size=64, rel_pos_type="bias"),
    "relpos shared": _eva("vit_srelpos_small_patch16_224"),
    "relpos normalised": _eva("vit_relpos_small_patch16_224", qk_norm=True, whole=frozenset({"qk"})),
    "volo": Case(
        "small_volo",
        {
            "img_size": 32,
            "layers": (1, 1, 1, 1),
            "embed_dims": (16, 32, 32, 32),
            "num_heads": (2, 2, 2, 4),
            "outlook_attention": (False, False, False, False),
            "post_layers": (),
            "global_pool": "avg",
            "use_aux_head": False,
            "stem_hidden_dim": 8,
        },
        share=90,
    ),
    "visformer": Case(
        "visformer_tiny",
        {"img_size": 64, "depth": (0, 1, 1), "embed_dim": 48, "num_heads": 3},
        64,
        share=95,
    ),
    "nest": Case(
        "small_nest",
        {"img_size": 32, "embed_dims": (16, 32, 48), "num_heads": (2, 4, 3), "depths": (1, 1, 1)},
    ),
    "davit window": Case(
        "davit_tiny",
        {
            "depths": (1, 1),
            "embed_dims": (16, 32),
            "num_heads": (2, 4),
            "window_size": 3,
            "attn_types": ("spatial",),
        },
    ),
    "twins window": Case(
        "twins_svt_small",
        {
            "img_size": 32,
            "depths": (1, 1, 1, 1),
            "embed_dims": (16, 24, 32, 32),
            "num_heads": (1, 2, 4, 4),
            "wss": (3, 3, 3, 2),
        },
    ),
    "cait": Case(
        "cait_xxs24_224",
        {
            "img_size": 32,
            "depth": 2,
            "embed_dim": 48,
            "num_heads": 4,
            "depth_token_only": 0,
            "global_pool": "avg",
        },
    ),
    "convit": Case(
        "convit_tiny",
        {"img_size": 32, "depth": 2, "embed_dim": 48, "num_heads": 4, "local_up_to_layer": 0},
    ),
    "gcvit": Case(
        "small_gcvit",
        {
            "img_size": 64,
            "depths": (2, 2),
            "num_heads": (2, 4),
            "window_ratio": (32, 16),
            "embed_dim": 16,
        },
        64,
    ),
    "hiera": Case(
        "hiera_tiny_224",
        {
            "img_size": 64,
            "embed_dim": 16,
            "num_heads": 2,
            "stages": (1, 1, 2),
            "q_pool": 2,
            "mask_unit_attn": (True, True, False),
            "mask_unit_size": (4, 4),
        },
        64,
    ),
    "sam2": Case(
        "sam2_hiera_tiny",
        {
            "embed_dim": 16,
            "num_heads": 2,
            "stages": (1, 2, 2),
            "q_pool": 2,
            "window_spec": (4, 2, 2),
            "global_att_blocks": (4,),
        },
        64,
    ),
    "swin v2": Case(
        "swinv2_tiny_window8_256",
        {"img_size": 64, "embed_dim": 24, "depths": (2, 1), "num_heads": (3, 4), "window_size": 4},
        64,
    ),
    "swin v2 without biases": Case(
        "swinv2_tiny_window8_256",
        {
            "img_size": 64,
            "embed_dim": 24,
            "depths": (1, 1),
            "num_heads": (3, 4),
            "window_size": 8,
            "qkv_bias": False,
        },
        64,
    ),
    "swin v2 cr": Case(
        "swinv2_cr_tiny_224",
        {"img_size": 64, "embed_dim": 24, "depths": (2, 1), "num_heads": (3, 4), "window_size": 4},
        64,
    ),
    "sam": _sam(96, depth=2, global_attn_indexes=(1,)),
    "sam without positions": _sam(64, use_rel_pos=False),
    "sam turned": _sam(64, frozenset({"qk"}), use_rel_pos=False, use_rope=True, global_attn_indexes=(0,)),
    "multi query": Case("small_multi_query", {}, 64),
    "mvit v2": Case("small_mvitv2", {"img_size": 64}, 64, whole=frozenset({"qk", "v"})),
    "coat": Case(
        "coat_lite_tiny",
        {"img_size": 64, "embed_dims": (16, 24, 32, 48), "serial_depths": (1, 1, 1, 2)},
        64,
    ),
    "coat parallel": Case(
        "coat_tiny",
        {"img_size": 64, "embed_dims": (16, 16, 16, 16), "serial_depths": (2, 1, 1, 1), "parallel_depth": 1},
        64,
    ),
}


_BUILT: dict[str, nn.Module] = {}


def build(case: Case, *, dtype: torch.dtype = torch.float64) -> nn.Module:
    """In eval mode, far from its initial values and its initial statistics, so that every channel matters."""
    key = repr(case)
    if key not in _BUILT:
        _BUILT[key] = _build(case)
    return copy.deepcopy(_BUILT[key]).to(dtype)


def _build(case: Case, seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = timm.create_model(case.architecture, num_classes=5, **case.args).double().eval()
    with torch.no_grad():
        for key, tensor in model.state_dict().items():
            if not tensor.is_floating_point():
                continue
            noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
            if key.endswith("running_var"):
                tensor.mul_(1 + 0.5 * noise.tanh())
            elif tensor.dim() in (2, 4) and key.endswith("weight"):
                tensor.copy_(noise / tensor[0].numel() ** 0.5)
            else:
                tensor.add_(0.2 * noise)
    return model


def image(case: Case, *, batch: int = 2, dtype: torch.dtype = torch.float64, seed: int = 1) -> Tensor:
    """[batch, 3, size, size], unit variance."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, case.size, case.size, generator=generator, dtype=torch.float64).to(dtype)
