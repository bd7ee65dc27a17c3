"""Softmax attention of timm, a row for each class; :class:`~mhacut.adapters.softmax.Softmax` has the columns.

A new class is a row here and a case in the tests.
"""

from __future__ import annotations

from typing import Any

from timm.layers import Attention, AttentionPoolLatent, DiffAttention, MultiQueryAttention2d
from timm.layers.attention import AttentionRope
from timm.layers.bottleneck_attn import BottleneckAttn
from timm.layers.halo_attn import HaloAttn
from timm.models import (
    beit,
    cait,
    convit,
    cpubone,
    crossvit,
    davit,
    efficientformer,
    efficientformer_v2,
    eva,
    fastvit,
    gcvit,
    hiera,
    hieradet_sam2,
    iformer,
    levit,
    lowformer,
    maxxvit,
    metaformer,
    nest,
    nextvit,
    pvt_v2,
    shvit,
    swin_transformer,
    swin_transformer_v2,
    swin_transformer_v2_cr,
    tiny_vit,
    tnt,
    twins,
    visformer,
    vision_transformer,
    vision_transformer_sam,
    volo,
)
from timm.models.vision_transformer_relpos import RelPosAttention

from mhacut.adapters import softmax_hooks as hooks
from mhacut.adapters.rope import Rope
from mhacut.adapters.softmax import FreshBiases, Softmax, Twin, to_map
from mhacut.adapters.softmax_special import (
    NO_PROJECTION,
    GlobalContext,
    Interleaved,
    MultiQuery,
    Parallel,
    ParallelTwin,
    PoolingHead,
    Positional,
    Sam,
)

NORM_WITHIN = "a norm before the projection runs over the v channels of a head"
Q_KV = {"q": "q", "kv": "kv"}
Q_K_V = {"q": "q", "k": "k", "v": "v"}


def equal(m: Any, qk: int, v: int) -> bool:
    """Whether timm's own forward, which has one width, computes the same."""
    return qk == v


def width_of_qk(heads: int, qk: int, v: int) -> int:
    return qk


def width_of_v(heads: int, qk: int, v: int) -> int:
    return v


def all_of_qk(heads: int, qk: int, v: int) -> int:
    return heads * qk


def all_of_v(heads: int, qk: int, v: int) -> int:
    return heads * v


VIT_SIZES = {"head_dim": width_of_qk, "attn_dim": all_of_v}
LEVIT_SIZES = {
    "key_dim": width_of_qk,
    "val_dim": width_of_v,
    "key_attn_dim": all_of_qk,
    "val_attn_dim": all_of_v,
    "out_dim": all_of_v,
}
V2_SIZES = {"key_dim": width_of_qk, "d": width_of_v, "dh": all_of_v}
LOWFORMER_SIZES = {"head_dim": width_of_qk, "o_proj_inpdim": all_of_v}

SOFTMAX = (
    Softmax(
        Attention,
        {"qkv": "qkv", "gate": "g"},
        logits=hooks.masked,
        finish=hooks.gated,
        fits=equal,
        attributes=VIT_SIZES,
        norm_behind="norm",
    ),
    Softmax(swin_transformer.WindowAttention, logits=hooks.swin, fits=equal),
    Softmax(
        swin_transformer_v2.WindowAttention,
        logits=hooks.cosine(hooks.swin_v2_positions),
        cosine=True,
        scaled=False,
        qk_mixing=lambda m: "select",
    ),
    Softmax(
        swin_transformer_v2_cr.WindowMultiHeadAttention,
        logits=hooks.cosine(lambda m: m._relative_positional_encodings()),
        cosine=True,
        scaled=False,
        qk_mixing=lambda m: "select",
    ),
    Softmax(pvt_v2.Attention, Q_KV, inputs=hooks.reduced),
    Softmax(metaformer.Attention),
    Softmax(convit.MHSA),
    Softmax(convit.GPSA, {"qk": "qk", "v": "v"}, weigh=hooks.content_and_place),
    Softmax(davit.WindowAttention),
    Softmax(cait.TalkingHeadAttn, weigh=hooks.talking_heads),
    Softmax(cait.ClassAttn, Q_K_V, inputs=hooks.class_token),
    Softmax(crossvit.CrossAttention, {"wq": "q", "wk": "k", "wv": "v"}, inputs=hooks.class_token),
    Softmax(beit.Attention, logits=hooks.beit_bias),
    Softmax(RelPosAttention, logits=hooks.rel_pos),
    Softmax(volo.Attention),
    Softmax(volo.ClassAttention, Q_KV, inputs=hooks.class_token),
    Softmax(visformer.Attention, finish=to_map),
    Softmax(fastvit.Attention, inputs=hooks.tokens_of_map, finish=hooks.tokens_to_map, channel_dim=1),
    Softmax(
        twins.LocallyGroupedAttn,
        inputs=hooks.windows,
        spread=lambda m, x: x.flatten(0, 2),
        finish=hooks.unwindowed,
    ),
    Softmax(twins.GlobalSubSampleAttn, Q_KV, inputs=hooks.reduced),
    Softmax(nextvit.EfficientAttention, Q_K_V, inputs=hooks.reduced),
    Softmax(
        tnt.Attention,
        {"qk": "qk", "v": "v"},
        mixins=(),
        attributes={"head_dim": width_of_qk, "hidden_dim": all_of_qk},
    ),
    Softmax(
        maxxvit.Attention2d,
        per_head=True,
        logits=hooks.rel_pos,
        finish=to_map,
        fits=equal,
        attributes={"dim_head": width_of_v},
    ),
    Softmax(
        maxxvit.AttentionCl,
        per_head=True,
        logits=hooks.rel_pos,
        fits=equal,
        attributes={"dim_head": width_of_v},
    ),
    Softmax(
        levit.Attention,
        per_head=True,
        read_by="proj.ln",
        mixins=(FreshBiases,),
        attributes=LEVIT_SIZES,
        v_mixing="refit",
    ),
    Softmax(
        levit.AttentionDownsample,
        {"q.ln": "q", "kv": "kv"},
        per_head=True,
        read_by="proj.ln",
        mixins=(FreshBiases,),
        attributes=LEVIT_SIZES,
        v_mixing="refit",
    ),
    Softmax(efficientformer.Attention, per_head=True, mixins=(FreshBiases,), attributes=LEVIT_SIZES),
    Softmax(
        efficientformer_v2.Attention2d,
        {**Q_K_V, "v_local": "g"},
        mixins=(FreshBiases,),
        attributes=V2_SIZES,
    ),
    Softmax(
        efficientformer_v2.Attention2dDownsample,
        {"q.proj": "q", "k": "k", "v": "v", "v_local": "g"},
        mixins=(FreshBiases,),
        attributes=V2_SIZES,
    ),
    Softmax(
        tiny_vit.Attention,
        per_head=True,
        inputs=hooks.normed,
        logits=hooks.cached_biases,
        mixins=(FreshBiases, Twin),
        attributes=LEVIT_SIZES,
    ),
    *(
        Softmax(
            cls,
            {"pwise": "qkv"},
            per_head=True,
            read_by=hooks.upsampling_reader,
            inputs=hooks.coarse,
            finish=hooks.upsampled,
            fits=equal,
            attributes=LOWFORMER_SIZES,
        )
        for cls in (lowformer.ConvAttention, cpubone.ConvAttention)
    ),
    Softmax(
        shvit.SHSA,
        read_by="proj.1",
        read_beside=lambda m: m.dim - m.pdim,
        inputs=hooks.attending,
        finish=hooks.beside_others,
        fits=lambda m, qk, v: v == m.pdim,
        attributes={"qk_dim": width_of_qk},
        v_mixing="refit",
    ),
    Softmax(iformer.SHMA, {"q": "q", "k": "k", "v_gate": "vg"}, mixins=()),
    Softmax(
        hiera.MaskUnitAttention,
        spread=hooks.mask_units,
        logits=hooks.pooled,
        finish=hooks.from_mask_units,
        qk_mixing=lambda m: "select" if m.q_stride > 1 else "rotate",
    ),
    Softmax(
        hieradet_sam2.MultiScaleAttention,
        logits=hooks.pooled_on_map,
        finish=hooks.to_pooled_map,
        qk_mixing=lambda m: "rotate" if m.q_pool is None else "select",
    ),
    Rope(AttentionRope),
    Rope(eva.EvaAttention),
    GlobalContext(gcvit.WindowAttentionGlobal, logits=hooks.global_queries),
    Sam(vision_transformer_sam.Attention, logits=hooks.tables, scaled=False),
    PoolingHead(
        AttentionPoolLatent, Q_KV, inputs=hooks.latents, logits=hooks.of_latent, finish=hooks.pooled_latents
    ),
    Interleaved(nest.Attention, spread=lambda m, x: x.flatten(0, 1), finish=hooks.heads_last),
    MultiQuery(
        MultiQueryAttention2d,
        {"query.proj": "q", "key.proj": "k", "value.proj": "v"},
        read_by="output.proj",
        mixins=(),
        attributes={"key_dim": width_of_qk, "value_dim": width_of_v},
    ),
    Softmax(
        DiffAttention,
        query_heads=2,
        logits=hooks.masked,
        weigh=hooks.difference,
        finish=hooks.gated,
        v_whole=NORM_WITHIN,
    ),
    Parallel(
        vision_transformer.ParallelScalingBlock,
        read_by=lambda m: "attn_out_proj" if m.out_proj is None else "out_proj",
        logits=hooks.masked,
        mixins=(ParallelTwin,),
    ),
    Parallel(
        vision_transformer.DiffParallelScalingBlock,
        query_heads=2,
        read_by="out_proj",
        logits=hooks.masked,
        weigh=hooks.difference,
        v_whole=NORM_WITHIN,
        mixins=(ParallelTwin,),
    ),
    *(
        Positional(
            cls,
            written_by,
            per_head=cls is HaloAttn,
            mixins=(),
            attributes={"dim_head_qk": width_of_qk, "dim_out_qk": all_of_qk},
            scaled=False,
            v_whole=NO_PROJECTION,
            channel_dim=1,
        )
        for cls, written_by in ((BottleneckAttn, {"qkv": "qkv"}), (HaloAttn, Q_KV))
    ),
)
