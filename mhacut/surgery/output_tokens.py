"""Last blocks that compute only the tokens that the head reads.

A class-token classifier reads only the first tokens of the last block, so the queries, the output projection
and the MLP of that block need to run for those tokens only. The logits do not change. The dense model is
transformed before its channels are cut.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from timm.models import beit, eva, vision_transformer
from timm.models import vision_transformer_relpos as relpos
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from mhacut.adapters.base import mixed
from mhacut.adapters.registry import adapter_for
from mhacut.adapters.softmax import Softmax
from mhacut.adapters.softmax_special import OUTPUT_TOKENS
from mhacut.errors import PlanError, UnsupportedModelError, option_name


class OutputTokenBlock:
    """Mixin for a ViT block class: the block computes only the tokens that the head reads."""

    attn: Any

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        y = self.attn(self.norm1(x), *args, **options)  # (B, read, C)
        x = x[:, : self.attn.output_tokens] + self.drop_path1(scaled(self, 1, y))
        out: Tensor = x + self.drop_path2(scaled(self, 2, self.mlp(self.norm2(x))))
        return out


class OutputTokenBlockPostNorm(OutputTokenBlock):
    """Output token block for ViT classes with norms after attention and after the MLP."""

    def forward(self: Any, x: Tensor, *args: Any, **options: Any) -> Tensor:
        y = self.attn(x, *args, **options)  # (B, read, C)
        x = x[:, : self.attn.output_tokens] + self.drop_path1(self.norm1(y))
        out: Tensor = x + self.drop_path2(self.norm2(self.mlp(x)))
        return out


def scaled(block: Any, branch: int, y: Tensor) -> Tensor:
    """Multiply y by LayerScale 1 or 2 of the block, which is a module, a parameter or None."""
    layer_scale = getattr(block, f"ls{branch}", None)
    if layer_scale is not None:
        scaled: Tensor = layer_scale(y)
        return scaled
    gamma = getattr(block, f"gamma_{branch}")
    return y if gamma is None else gamma * y


class OutputTokenModel:
    """Mixin for timm's ViT classes: features that need tokens missing in the last block raise an error."""

    def forward_intermediates(
        self: Any, x: Tensor, indices: int | list[int] | None = None, *args: Any, **options: Any
    ) -> Any:
        self.check_features(indices)
        return super().forward_intermediates(x, indices, *args, **options)  # type: ignore[misc]

    def reset_classifier(
        self: Any, num_classes: int, global_pool: str | None = None, *args: Any, **options: Any
    ) -> None:
        if global_pool not in (None, self.global_pool):
            raise UnsupportedModelError(
                f"global_pool={global_pool!r}: this model computes only the tokens that global_pool="
                f"{self.global_pool!r} reads. Keep global_pool, or prune with "
                f"{option_name('keep_dead_tokens', True)}"
            )
        super().reset_classifier(num_classes, global_pool, *args, **options)  # type: ignore[misc]

    def check_features(self: Any, indices: int | list[int] | None) -> None:
        """Raise an error if a block in ``indices`` (timm's numbering) computes only output tokens."""
        taken, _ = feature_take_indices(len(self.blocks), indices)
        short = [index for index in taken if isinstance(self.blocks[index], OutputTokenBlock)]
        if short:
            keep = option_name("keep_dead_tokens", True)
            raise UnsupportedModelError(
                f"block {short[0]} of this model has no patch features: it computes only the tokens that the "
                f"classifier reads. Use earlier blocks, or prune with {keep}"
            )


OUTPUT_TOKEN_MODELS: Mapping[type[nn.Module], Any] = {
    cls: mixed("OutputToken", OutputTokenModel, cls)
    for cls in (
        vision_transformer.VisionTransformer,
        VisionTransformerDistilled,
        eva.Eva,
        beit.Beit,
        relpos.VisionTransformerRelPos,
    )
}
"""ViT classes whose heads read only pooled tokens, each mapped to its subclass whose last block computes only
these tokens."""
OUTPUT_TOKEN_BLOCKS: Mapping[type[nn.Module], Any] = {
    cls: mixed("OutputToken", mixin, cls)
    for mixin, classes in {
        OutputTokenBlock: (vision_transformer.Block, eva.EvaBlock, beit.Block, relpos.RelPosBlock),
        OutputTokenBlockPostNorm: (
            vision_transformer.ResPostBlock,
            eva.EvaBlockPostNorm,
            relpos.ResPostRelPosBlock,
        ),
    }.items()
    for cls in classes
}
"""ViT block classes, each mapped to its subclass that computes only the tokens that the head reads."""


def dense_class(model: nn.Module) -> type[nn.Module]:
    return next((dense for dense, few in OUTPUT_TOKEN_MODELS.items() if few is type(model)), type(model))


def output_tokens_of(model: nn.Module) -> int | None:
    """Number of tokens that the last block computes; None if it computes all tokens."""
    blocks: Any = getattr(model, "blocks", ())
    last = blocks[-1] if isinstance(model, OutputTokenModel) else None
    return last.attn.output_tokens if isinstance(last, OutputTokenBlock) else None


def tokens_read_by_head(model: nn.Module) -> int:
    """Number of first tokens of the last block that the head reads; an error if it reads all tokens."""
    if type(model) not in OUTPUT_TOKEN_MODELS and not isinstance(model, OutputTokenModel):
        raise UnsupportedModelError(f"cannot find the tokens that the head of {type(model).__name__} reads")
    head: Any = model
    if head.global_pool != "token" or getattr(head, "attn_pool", None) is not None:
        raise UnsupportedModelError(f"the head reads all tokens (global_pool={head.global_pool!r})")
    _check_last(head.blocks[-1])
    return 2 if isinstance(model, VisionTransformerDistilled) else 1


def _check_last(block: Any) -> None:
    if isinstance(block, OutputTokenBlock):
        return
    if type(block) not in OUTPUT_TOKEN_BLOCKS:
        raise UnsupportedModelError(
            f"blocks of class {type(block).__name__} cannot compute only the first tokens"
        )
    if _dense_class(block.attn) not in OUTPUT_TOKENS:
        raise UnsupportedModelError(
            f"attention of class {type(block.attn).__name__} cannot compute only the first tokens"
        )


def _dense_class(attention: nn.Module) -> Any:
    return getattr(adapter_for(attention), "cls", None)


def set_output_tokens(model: Any, count: int) -> None:
    """Make the last block of ``model`` compute only its first ``count`` tokens, in place."""
    expected = tokens_read_by_head(model)
    if count != expected:
        raise PlanError(f"token plan: the head reads {expected} tokens, the plan expects {count}")
    block = model.blocks[-1]
    attend_from_output_tokens(block.attn, count)
    block.__class__ = OUTPUT_TOKEN_BLOCKS[type(block)]
    model.__class__ = OUTPUT_TOKEN_MODELS[type(model)]


@torch.no_grad()
def attend_from_output_tokens(attention: Any, count: int) -> None:
    attention.__class__ = OUTPUT_TOKENS[_dense_class(attention)]
    attention.output_tokens = count
    adapter = adapter_for(attention)
    assert isinstance(adapter, Softmax)
    if attention.qkv is not None:
        _split(attention, adapter.written_by)
    adapter.resize(attention, {})


def _split(attention: Any, written_by: Mapping[str, str]) -> None:
    # q and k are equally wide; v is as wide as what the output projection reads.
    qkv, v_rows = attention.qkv, attention.proj.in_features
    q_rows = (qkv.out_features - v_rows) // 2
    rows, first = {"q": q_rows, "k": q_rows, "v": v_rows}, 0
    for name, letters in written_by.items():
        if letters == "g":
            continue
        last = first + sum(rows[letter] for letter in letters)
        projection = _rows(qkv, first, last)
        bias = getattr(attention, f"{letters}_bias", None)
        if bias is not None and letters != "k":  # that of k is a constant zero
            projection.bias = bias
        setattr(attention, name, projection)
        first = last
    attention.qkv = None
    if hasattr(attention, "q_bias"):
        attention.q_bias = attention.k_bias = attention.v_bias = None


def _rows(linear: nn.Linear, first: int, last: int) -> nn.Linear:
    part = nn.Linear(linear.in_features, last - first, bias=linear.bias is not None, device="meta")
    for name, parameter in linear.named_parameters():
        rows = nn.Parameter(parameter[first:last].clone(), requires_grad=parameter.requires_grad)
        setattr(part, name, rows)
    return part.train(linear.training)
