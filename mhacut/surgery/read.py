"""Tokens that no output reads are not computed: a transformation of the dense model, before it is cut.

A class-token classifier reads the first tokens of its last block. What that block writes into the others goes
nowhere, so that its queries, output projection and MLP need to run for the first tokens only. The logits stay
what they are.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import vision_transformer
from timm.models._features import feature_take_indices
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from mhacut.adapters.read_attention import ReadAttention
from mhacut.adapters.registry import adapter_for
from mhacut.errors import PlanError, UnsupportedModelError, option_name


class ReadBlock(vision_transformer.Block):  # type: ignore[misc]
    """timm's block, of which only the first tokens are read."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map all tokens [B, N, C] to those that are read [B, read, C]."""
        y = self.attn(self.norm1(x), attn_mask=attn_mask, is_causal=is_causal)  # (B, read, C)
        x = x[:, : self.attn.read] + self.drop_path1(self.ls1(y))
        out: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return out


class FewTokens:
    """Mixed into timm's model, in front of it: outputs that need tokens that are not there are refused."""

    def forward_intermediates(
        self: Any, x: Tensor, indices: int | list[int] | None = None, *args: Any, **options: Any
    ) -> Any:
        """Return what timm's model does, for blocks that compute all tokens.

        Raises:
            UnsupportedModelError: others are asked for.
        """
        self.check_features(indices)
        return super().forward_intermediates(x, indices, *args, **options)  # type: ignore[misc]

    def check_features(self: Any, indices: int | list[int] | None) -> None:
        """Check that blocks, as ``forward_intermediates`` numbers them, compute all tokens.

        Raises:
            UnsupportedModelError: one does not.
        """
        taken, _ = feature_take_indices(len(self.blocks), indices)
        short = [index for index in taken if isinstance(self.blocks[index], ReadBlock)]
        if short:
            keep = option_name("keep_dead_tokens", True)
            raise UnsupportedModelError(
                f"block {short[0]} of this model computes only the tokens that its classifier reads, not "
                f"those of patches; ask for earlier blocks, or prune with {keep}"
            )


class FewTokensViT(FewTokens, vision_transformer.VisionTransformer):  # type: ignore[misc]
    """timm's ViT that does not compute all tokens."""


class FewTokensDistilled(FewTokens, VisionTransformerDistilled):  # type: ignore[misc]
    """timm's distilled DeiT that does not compute all tokens."""


_MODELS: dict[type[nn.Module], type[nn.Module]] = {
    vision_transformer.VisionTransformer: FewTokensViT,
    VisionTransformerDistilled: FewTokensDistilled,
}
"""Models whose forward pass reads the last block only by its pooling, and their class with fewer tokens."""
_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {vision_transformer.Block: ReadBlock}
_ATTENTION: dict[type[nn.Module], type[nn.Module]] = {vision_transformer.Attention: ReadAttention}


def read_of(model: nn.Module) -> int | None:
    """Return the number of tokens that the last block of ``model`` computes; None for all."""
    blocks: Any = getattr(model, "blocks", ())
    last = blocks[-1] if isinstance(model, FewTokens) and len(blocks) else None
    return last.attn.read if isinstance(last, ReadBlock) else None


def tokens_read(model: nn.Module) -> int:
    """Return the number of first tokens of the last block that the head of ``model`` reads.

    Raises:
        UnsupportedModelError: it reads others too, or the model is none of which that is known.
    """
    if type(model) not in _MODELS and not isinstance(model, FewTokens):
        raise UnsupportedModelError(f"which tokens a {type(model).__name__} reads is not known")
    found: Any = model
    if found.global_pool != "token" or getattr(found, "attn_pool", None) is not None:
        raise UnsupportedModelError(f"the head reads all of them (global_pool={found.global_pool!r})")
    _check_last(found.blocks[-1])
    return 2 if isinstance(model, VisionTransformerDistilled) else 1


def _check_last(block: Any) -> None:
    if isinstance(block, ReadBlock):
        return
    if type(block) not in _BLOCKS:
        raise UnsupportedModelError(f"blocks of class {type(block).__name__} compute all")
    if _dense_class(block.attn) not in _ATTENTION:
        raise UnsupportedModelError(f"attention of class {type(block.attn).__name__} computes all")


def _dense_class(attention: nn.Module) -> Any:
    """Return timm's class of an attention layer that may be cut."""
    return getattr(adapter_for(attention), "cls", None)


def set_read(model: Any, read: int) -> None:
    """Change ``model`` in place so that its last block computes its first ``read`` tokens only.

    Raises:
        PlanError: the head reads others.
        UnsupportedModelError: not known of this model.
    """
    expected = tokens_read(model)
    if read != expected:
        raise PlanError(f"plan of tokens: the head reads {expected} tokens, the plan is for {read}")
    block = model.blocks[-1]
    read_first(block.attn, read)
    block.__class__ = _BLOCKS[type(block)]
    model.__class__ = _MODELS[type(model)]


@torch.no_grad()
def read_first(attention: Any, read: int) -> None:
    """Change an attention layer in place so that it computes its first ``read`` tokens only.

    ``qkv`` becomes ``q`` and ``kv``.
    """
    cls = _ATTENTION[_dense_class(attention)]
    qkv, v_rows = attention.qkv, attention.proj.in_features
    q_rows = (qkv.out_features - v_rows) // 2
    del attention.qkv
    attention.q = _rows(qkv, 0, q_rows)
    attention.kv = _rows(qkv, q_rows, qkv.out_features)
    attention.read = read
    attention.__class__ = cls
    adapter = adapter_for(attention)
    assert adapter is not None
    adapter.resize(attention, {})


def _rows(linear: nn.Linear, first: int, last: int) -> nn.Linear:
    """Return a linear layer of some of the rows of another."""
    part = nn.Linear(linear.in_features, last - first, bias=linear.bias is not None, device="meta")
    for name, parameter in linear.named_parameters():
        rows = nn.Parameter(parameter[first:last].clone(), requires_grad=parameter.requires_grad)
        setattr(part, name, rows)
    return part.train(linear.training)
