"""Apply a token plan to a model: which tokens the last block computes, and how many tokens each block merges.

Only classes of modules change, never a tensor. The merging itself is in :mod:`mhacut.surgery.token_merging`,
the forward passes are in :mod:`mhacut.surgery.merging_blocks` and :mod:`mhacut.surgery.output_tokens`.
"""

from __future__ import annotations

import copy
from typing import Any, NamedTuple

import torch
from timm.layers import Attention
from timm.models import vision_transformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from mhacut.adapters.base import mixed
from mhacut.adapters.huggingface import is_old
from mhacut.adapters.registry import adapter_for
from mhacut.adapters.softmax_special import CLS_WEIGHTS, OUTPUT_TOKENS
from mhacut.errors import PlanError, UnsupportedModelError
from mhacut.plan import TokenPlan, Unmerge
from mhacut.surgery.merging_blocks import (
    PREFIX_PARAMETERS,
    Matcher,
    MergedOutputTokenBlock,
    MergedTokens,
    Merging,
    MergingBlock,
    MergingLayer,
    is_global_layer,
    layer_width,
)
from mhacut.surgery.output_tokens import (
    OUTPUT_TOKEN_BLOCKS,
    OUTPUT_TOKEN_MODELS,
    OutputTokenBlock,
    dense_class,
    output_tokens_of,
    set_output_tokens,
)

_MERGING_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    vision_transformer.Block: MergingBlock,
    OUTPUT_TOKEN_BLOCKS[vision_transformer.Block]: MergedOutputTokenBlock,
}
_VITS = (vision_transformer.VisionTransformer, VisionTransformerDistilled)
_MERGING_MODELS: dict[type[nn.Module], type[nn.Module]] = {
    cls: mixed("Merged", MergedTokens, cls) for cls in (*_VITS, *map(OUTPUT_TOKEN_MODELS.__getitem__, _VITS))
}
_PLAIN_CLASSES = {merging: plain for plain, merging in (*_MERGING_BLOCKS.items(), *_MERGING_MODELS.items())}
_ATTENTION = (Attention, OUTPUT_TOKENS[Attention], CLS_WEIGHTS[Attention])
"""Attention classes of timm whose layers can follow a merge."""


class Stack(NamedTuple):
    """Blocks of the plain ViT in a model."""

    name: str
    """Name of the module that holds the blocks: ``blocks``, ``module.encoder.layer``."""
    blocks: Any
    vit: Any
    """timm's model; None for layers of transformers."""
    prefix: int
    """Number of tokens before the patches."""
    width: int
    """Channels of a token."""

    def block_of(self, layer: str) -> int | None:
        """Return the number of the block that contains the module ``layer``; None if it is outside."""
        if not layer.startswith(f"{self.name}."):
            return None
        return int(layer.removeprefix(f"{self.name}.").partition(".")[0])


def stack_of(model: nn.Module) -> Stack | None:
    """Return the blocks of the first plain ViT in ``model``, or of ``model``."""
    for name, module in model.named_modules():
        vit: Any = module
        if type(vit) in _MERGING_MODELS or isinstance(vit, MergedTokens):
            return Stack(f"{name}.blocks".lstrip("."), vit.blocks, vit, vit.num_prefix_tokens, vit.embed_dim)
        if isinstance(module, nn.ModuleList) and len(module) and all(map(is_global_layer, module)):
            width = layer_width(module[0])
            prefix = [p for key, p in model.named_parameters() if key.rpartition(".")[2] in PREFIX_PARAMETERS]
            return Stack(name, module, None, sum(p.numel() for p in prefix) // width, width)
    return None


def why_not_merged(model: Any, unmerge: Unmerge = False) -> str:
    """Return the reason why tokens of ``model`` cannot be merged, for a message; empty if they can."""
    stack = stack_of(model)
    if stack is None:
        cls = dense_class(getattr(model, "module", model))
        return f"{cls.__name__} is not a plain ViT, in which every block sees all tokens"
    if stack.vit is None:
        return _why_not_merged_in_transformers(model, stack, unmerge)
    vit = stack.vit
    pooled = vit.global_pool in ("token", "avg") and getattr(vit, "attn_pool", None) is None
    if not (unmerge or pooled):
        return f"its head pools neither by class token nor by mean (global_pool={vit.global_pool!r})"
    if len(vit.blocks) < 2:
        return "it has no block before its last"
    for block in vit.blocks:
        if type(block) not in _MERGING_BLOCKS and not isinstance(block, Merging):
            return f"merging does not support blocks of class {type(block).__name__}"
        if getattr(adapter_for(block.attn), "cls", None) not in _ATTENTION:
            return f"merging does not support attention of class {type(block.attn).__name__}"
    return ""


def _why_not_merged_in_transformers(model: Any, stack: Stack, unmerge: Unmerge) -> str:
    if is_old():
        return "token merging in transformers models needs transformers 5"
    if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
        return "it has no patch embedding, so its prefix tokens are unknown; name a module around both"
    layer = stack.blocks[0]
    if not _computes_attention_then_mlp(layer):
        return f"layers of class {type(layer).__name__} compute more than attention followed by an MLP"
    return "" if unmerge and len(stack.blocks) > 1 else "it has no block before its last"


@torch.no_grad()
def _computes_attention_then_mlp(layer: Any) -> bool:
    """Whether a transformers layer gives the same output as :class:`MergingLayer` without a merge."""
    weight = next(layer.parameters())
    if weight.is_meta or isinstance(layer, Merging):
        return True
    x = torch.linspace(0, 9, 4 * layer_width(layer)).sin().view(1, 4, -1).to(weight)
    plain, merging = copy.deepcopy(layer).eval(), copy.deepcopy(layer).eval()
    _set_merging(merging, None, True).gives_sizes = False
    expected, actual = plain(x, None), merging(x, None)
    return isinstance(expected, Tensor) and torch.allclose(actual, expected, rtol=1e-2, atol=1e-2)


def merged_of(model: nn.Module) -> tuple[int, ...]:
    """Return the number of tokens that each block merges; empty if no block merges."""
    stack = stack_of(model)
    if stack is None or not any(isinstance(block, Merging) for block in stack.blocks):
        return ()
    matchers = [getattr(block, "matcher", None) for block in stack.blocks]
    return tuple(0 if matcher is None else matcher.count for matcher in matchers)


def unmerge_of(model: nn.Module) -> Unmerge:
    stack = stack_of(model)
    unmerge: Unmerge = stack is not None and getattr(stack.blocks[-1], "unmerge", False)
    return unmerge


def set_merged(model: Any, merged: tuple[int, ...], unmerge: Unmerge = False) -> None:
    """Make block i of ``model`` merge ``merged[i]`` tokens, in place; empty removes all merges."""
    if (merged, unmerge) == (merged_of(model), unmerge_of(model)):
        return
    _remove_merges(model)
    if not any(merged):
        return
    reason = why_not_merged(model, unmerge)
    if reason:
        raise UnsupportedModelError(f"tokens cannot be merged: {reason}")
    check_merges(model, merged)
    stack = stack_of(model)
    assert stack is not None
    vit, blocks = stack.vit, stack.blocks
    by_attention = vit is not None and not unmerge and _weighs_by_attention(vit)
    # Blocks before the first merge keep their class: all their tokens have size 1.
    first = next(number for number, count in enumerate(merged) if count)
    for block, count in [*zip(blocks, merged, strict=True)][first:]:
        _set_merging(block, Matcher(count, stack.prefix) if count else None, unmerge)
        if count and by_attention:
            _set_attention_class(block.attn, CLS_WEIGHTS[Attention])
    blocks[-1].gives_sizes = vit is not None and (unmerge or vit.global_pool == "avg")
    if vit is not None:
        vit.__class__ = _MERGING_MODELS[type(vit)]


def _weighs_by_attention(vit: Any) -> bool:
    """Whether the class token's attention serves as weight: the head reads it, q and k have no norms."""
    norms = [norm for block in vit.blocks for norm in (block.attn.q_norm, block.attn.k_norm)]
    return vit.global_pool == "token" and all(isinstance(norm, nn.Identity) for norm in norms)


def _set_merging(block: Any, matcher: Matcher | None, unmerge: Unmerge) -> Any:
    plain = type(block)
    if plain not in _MERGING_BLOCKS:  # a layer class of transformers, met for the first time
        _MERGING_BLOCKS[plain] = mixed("Merging", MergingLayer, plain)
        _PLAIN_CLASSES[_MERGING_BLOCKS[plain]] = plain
    block.__class__ = _MERGING_BLOCKS[plain]
    block.matcher, block.gives_sizes, block.unmerge = matcher, True, unmerge
    return block


def check_merges(model: Any, merged: tuple[int, ...]) -> None:
    """Raise a :class:`PlanError` if a block has too few tokens for ``merged``, or the block count differs."""
    _, blocks, vit, *_ = stack_of(model) or Stack("", (), None, 0, 0)
    if len(merged) != len(blocks):
        raise PlanError(f"token plan: the model has {len(blocks)} blocks, the plan {len(merged)}")
    if vit is None:
        return
    # A model without a fixed image size has no fixed number of patches: its matcher limits the count itself.
    left, fixed = vit.patch_embed.num_patches, getattr(vit.patch_embed, "strict_img_size", True)
    for number, (block, count) in enumerate(zip(blocks, merged, strict=True)):
        if fixed and count > left // 2:
            raise PlanError(
                f"token plan: block {number} has {left} patches and merges at most {left // 2}, found {count}"
            )
        if count and isinstance(block, OutputTokenBlock):
            raise PlanError(f"token plan: block {number} computes no patches, so it cannot merge {count}")
        left -= count


def _remove_merges(model: nn.Module) -> None:
    stack = stack_of(model)
    for block in () if stack is None else stack.blocks:
        if type(block) in _PLAIN_CLASSES:
            block.__class__ = _PLAIN_CLASSES[type(block)]
            del block.matcher, block.gives_sizes, block.unmerge
            if isinstance(getattr(block, "attn", None), CLS_WEIGHTS[Attention]):
                _set_attention_class(block.attn, Attention)
    if stack is not None and type(stack.vit) in _PLAIN_CLASSES:
        stack.vit.__class__ = _PLAIN_CLASSES[type(stack.vit)]


def _set_attention_class(attention: nn.Module, cls: type[nn.Module]) -> None:
    attention.__class__ = cls
    # A cut layer needs the variant of the class that fits its widths.
    adapter_for(attention).resize(attention, {})  # type: ignore[union-attr]


def tokens_of(model: nn.Module) -> TokenPlan:
    """Return the token plan that was applied to ``model``."""
    return TokenPlan(output_tokens_of(model), merged_of(model), unmerge_of(model))


def with_tokens(model: nn.Module, tokens: TokenPlan) -> nn.Module:
    """Return ``model``, or a copy that shares its tensors, with the token plan applied."""
    if tokens == tokens_of(model):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    changed = copy.deepcopy(model, dict[int, Any](shared))
    apply_tokens(changed, tokens)
    return changed


@torch.no_grad()
def apply_tokens(model: nn.Module, tokens: TokenPlan) -> None:
    """Apply a token plan to ``model`` in place. The model may be on the meta device, and cut already."""
    applied = tokens_of(model)
    if tokens == applied:
        return
    if tokens.output_tokens != applied.output_tokens:
        if applied.output_tokens is not None or tokens.output_tokens is None:
            raise PlanError(
                f"token plan: the last block computes {applied.output_tokens or 'all'} tokens, the plan "
                f"expects {tokens.output_tokens or 'all'}"
            )
        set_merged(model, ())
        set_output_tokens(model, tokens.output_tokens)
    set_merged(model, tokens.merged, tokens.unmerge)
