"""Table of the softmax attention classes of timm, with 1 entry per class.

A new class needs an entry here and a test case. :class:`~mhacut.adapters.softmax.Softmax` explains the
fields.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from timm import layers, models

from mhacut.adapters import softmax_hooks as hooks
from mhacut.adapters.attend import cls_attention
from mhacut.adapters.base import Mixing
from mhacut.adapters.softmax import FreshBiases, Softmax, Twin, to_map
from mhacut.adapters.softmax_special import (
    CLS_WEIGHTS,
    OUTPUT_TOKENS,
    GlobalContext,
    Interleaved,
    MultiQuery,
    Parallel,
    PoolingHead,
    Positional,
    Rope,
    Sam,
    rotated,
)

NORM_WITHIN = "a norm before the projection runs over the v channels of a head"
Q_KV = {"q": "q", "kv": "kv"}
Q_K_V = {"q": "q", "k": "k", "v": "v"}
LEVIT_SIZES = {
    "key_dim": "qk",
    "val_dim": "v",
    "key_attn_dim": "heads * qk",
    "val_attn_dim": "heads * v",
    "out_dim": "heads * v",
}
EFFICIENT_FORMER_V2_SIZES = {"key_dim": "qk", "d": "v", "dh": "heads * v"}


def equal(m: Any, qk: int, v: int) -> bool:
    """Whether q/k and v have the same width, so that a cut layer can keep timm's forward pass."""
    return qk == v


def select(m: Any) -> Mixing:
    return "select"


SWIN_V2 = partial(Softmax, cosine=True, scaled=False, qk_mixing=select)
MAXXVIT = partial(Softmax, per_head=True, logits=hooks.rel_pos, fits=equal, attributes={"dim_head": "v"})
LEVIT = partial(Softmax, per_head=True, mixins=(FreshBiases,), attributes=LEVIT_SIZES)
LOWFORMER = partial(
    Softmax,
    written_by={"pwise": "qkv"},
    per_head=True,
    read_by=hooks.upsampling_reader,
    inputs=hooks.coarse,
    finish=hooks.upsampled,
    fits=equal,
    attributes={"head_dim": "qk", "o_proj_inpdim": "heads * v"},
)
OF_OUTPUT_TOKENS = partial(Softmax, inputs=hooks.output_tokens)
WITH_CLS_WEIGHTS = partial(Softmax, weigh=cls_attention, result="proj")
ROPE_WITH_CLS_WEIGHTS = partial(Rope, weigh=cls_attention, result="proj")
ROPE_OF_OUTPUT_TOKENS = partial(
    Rope,
    written_by={"q_proj": "q", "k_proj": "k", "v_proj": "v", "gate": "g"},
    inputs=hooks.output_tokens,
    logits=hooks.of_output_tokens(rotated),
)
DIFFERENTIAL: dict[str, Any] = {"query_heads": 2, "weigh": hooks.difference, "v_refusal": NORM_WITHIN}

PLAIN: dict[str, Any] = {
    "finish": hooks.gated,
    "attributes": {"head_dim": "qk", "attn_dim": "heads * v"},
    "norm_behind": "norm",
}
QKV_GATE = {"qkv": "qkv", "gate": "g"}

SOFTMAX = (
    Softmax(layers.Attention, QKV_GATE, logits=hooks.masked, fits=equal, **PLAIN),
    WITH_CLS_WEIGHTS(CLS_WEIGHTS[layers.Attention], QKV_GATE, logits=hooks.masked, **PLAIN),
    OF_OUTPUT_TOKENS(
        OUTPUT_TOKENS[layers.Attention],
        {**Q_KV, "gate": "g"},
        logits=hooks.of_output_tokens(hooks.masked),
        **PLAIN,
    ),
    Rope(layers.attention.AttentionRope),
    ROPE_WITH_CLS_WEIGHTS(CLS_WEIGHTS[layers.attention.AttentionRope]),
    ROPE_OF_OUTPUT_TOKENS(OUTPUT_TOKENS[layers.attention.AttentionRope]),
    Rope(models.eva.EvaAttention),
    ROPE_WITH_CLS_WEIGHTS(CLS_WEIGHTS[models.eva.EvaAttention]),
    ROPE_OF_OUTPUT_TOKENS(OUTPUT_TOKENS[models.eva.EvaAttention]),
    Softmax(models.beit.Attention, logits=hooks.rel_pos),
    WITH_CLS_WEIGHTS(CLS_WEIGHTS[models.beit.Attention], logits=hooks.rel_pos),
    OF_OUTPUT_TOKENS(
        OUTPUT_TOKENS[models.beit.Attention], Q_K_V, logits=hooks.of_output_tokens(hooks.rel_pos)
    ),
    Softmax(models.cait.TalkingHeadAttn, logits=hooks.given, weigh=hooks.talking_heads),
    Softmax(models.cait.ClassAttn, Q_K_V, inputs=hooks.class_token, logits=hooks.given),
    Softmax(models.convit.MHSA),
    Softmax(models.convit.GPSA, {"qk": "qk", "v": "v"}, weigh=hooks.content_and_place),
    LOWFORMER(models.cpubone.ConvAttention),
    LOWFORMER(models.lowformer.ConvAttention),
    Softmax(models.crossvit.CrossAttention, {"wq": "q", "wk": "k", "wv": "v"}, inputs=hooks.class_token),
    Softmax(models.davit.WindowAttention),
    LEVIT(models.efficientformer.Attention),
    Softmax(
        models.efficientformer_v2.Attention2d,
        {**Q_K_V, "v_local": "g"},
        mixins=(FreshBiases,),
        attributes=EFFICIENT_FORMER_V2_SIZES,
    ),
    Softmax(
        models.efficientformer_v2.Attention2dDownsample,
        {"q.proj": "q", "k": "k", "v": "v", "v_local": "g"},
        mixins=(FreshBiases,),
        attributes=EFFICIENT_FORMER_V2_SIZES,
    ),
    Softmax(models.fastvit.Attention, inputs=hooks.tokens_of_map, finish=hooks.tokens_to_map, channel_dim=1),
    GlobalContext(models.gcvit.WindowAttentionGlobal, logits=hooks.global_queries),
    # Queries are pooled by a maximum over tokens, channel by channel: rotated ones would have other maxima.
    Softmax(
        models.hiera.MaskUnitAttention,
        spread=hooks.mask_units,
        logits=hooks.pooled,
        finish=hooks.from_mask_units,
        qk_mixing=lambda m: "select" if m.q_stride > 1 else "rotate",
    ),
    Softmax(
        models.hieradet_sam2.MultiScaleAttention,
        logits=hooks.pooled_on_map,
        finish=hooks.to_pooled_map,
        qk_mixing=lambda m: "rotate" if m.q_pool is None else "select",
    ),
    Softmax(models.iformer.SHMA, {"q": "q", "k": "k", "v_gate": "vg"}, mixins=()),
    # An activation before the projection acts on single channels of v.
    LEVIT(models.levit.Attention, read_by="proj.ln", v_mixing="refit"),
    LEVIT(models.levit.AttentionDownsample, {"q.ln": "q", "kv": "kv"}, read_by="proj.ln", v_mixing="refit"),
    MAXXVIT(models.maxxvit.Attention2d, finish=to_map),
    MAXXVIT(models.maxxvit.AttentionCl),
    Softmax(models.metaformer.Attention),
    Interleaved(models.nest.Attention, spread=lambda m, x: x.flatten(0, 1), finish=hooks.heads_last),
    Softmax(models.nextvit.EfficientAttention, Q_K_V, inputs=hooks.reduced),
    Softmax(models.pvt_v2.Attention, Q_KV, inputs=hooks.reduced),
    Softmax(
        models.shvit.SHSA,
        read_by="proj.1",  # behind an activation
        read_beside=lambda m: m.dim - m.pdim,  # channels that bypass attention
        inputs=hooks.attending,
        finish=hooks.with_others,
        fits=lambda m, qk, v: v == m.pdim,
        attributes={"qk_dim": "qk"},
        v_mixing="refit",
    ),
    Softmax(models.swin_transformer.WindowAttention, logits=hooks.swin, fits=equal),
    SWIN_V2(models.swin_transformer_v2.WindowAttention, logits=hooks.cosine(hooks.swin_v2_positions)),
    SWIN_V2(
        models.swin_transformer_v2_cr.WindowMultiHeadAttention,
        logits=hooks.cosine(lambda m: m._relative_positional_encodings()),
    ),
    LEVIT(
        models.tiny_vit.Attention,
        inputs=hooks.normed,
        logits=hooks.cached_biases,
        mixins=(FreshBiases, Twin),
    ),
    Softmax(
        models.tnt.Attention,
        {"qk": "qk", "v": "v"},
        mixins=(),
        attributes={"head_dim": "qk", "hidden_dim": "heads * qk"},
    ),
    Softmax(
        models.twins.LocallyGroupedAttn,
        inputs=hooks.windows,
        spread=lambda m, x: x.flatten(0, 2),
        finish=hooks.unwindowed,
    ),
    Softmax(models.twins.GlobalSubSampleAttn, Q_KV, inputs=hooks.reduced),
    Softmax(models.vision_transformer_relpos.RelPosAttention, logits=hooks.rel_pos),
    WITH_CLS_WEIGHTS(CLS_WEIGHTS[models.vision_transformer_relpos.RelPosAttention], logits=hooks.rel_pos),
    OF_OUTPUT_TOKENS(
        OUTPUT_TOKENS[models.vision_transformer_relpos.RelPosAttention],
        Q_KV,
        logits=hooks.of_output_tokens(hooks.rel_pos),
    ),
    Sam(models.vision_transformer_sam.Attention, logits=hooks.tables, scaled=False),
    Softmax(models.visformer.Attention, finish=to_map),
    Softmax(models.volo.Attention),
    Softmax(models.volo.ClassAttention, Q_KV, inputs=hooks.class_token),
    PoolingHead(
        layers.AttentionPoolLatent,
        Q_KV,
        inputs=hooks.latents,
        logits=hooks.masked,
        finish=hooks.pooled_latents,
        result="proj",
    ),
    MultiQuery(
        layers.MultiQueryAttention2d,
        {"query.proj": "q", "key.proj": "k", "value.proj": "v"},
        read_by="output.proj",
        mixins=(),
        attributes={"key_dim": "qk", "value_dim": "v"},
    ),
    Softmax(layers.DiffAttention, logits=hooks.masked, finish=hooks.gated, **DIFFERENTIAL),
    Parallel(
        models.vision_transformer.ParallelScalingBlock,
        read_by=lambda m: "attn_out_proj" if m.out_proj is None else "out_proj",
    ),
    Parallel(models.vision_transformer.DiffParallelScalingBlock, read_by="out_proj", **DIFFERENTIAL),
    Positional(layers.bottleneck_attn.BottleneckAttn),
    Positional(layers.halo_attn.HaloAttn, Q_KV, per_head=True),
)
