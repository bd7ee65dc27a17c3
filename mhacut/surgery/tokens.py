"""Apply a token plan to a model: which tokens the last block computes, and how many tokens each block merges.

Only classes of modules change, never a tensor. The merging itself is in :mod:`mhacut.surgery.token_merging`,
the forward passes are in :mod:`mhacut.surgery.merging_blocks` and :mod:`mhacut.surgery.output_tokens`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from timm.layers import AttentionPoolLatent
from timm.models import beit, cait, eva, vision_transformer
from timm.models import vision_transformer_relpos as relpos
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer_sam import Attention as SamAttention
from timm.models.vision_transformer_sam import VisionTransformerSAM
from torch import nn

from mhacut.adapters.base import library_class, mixed
from mhacut.adapters.registry import adapter_for
from mhacut.adapters.softmax_special import CLS_WEIGHTS, OUTPUT_TOKENS
from mhacut.errors import PlanError, UnsupportedModelError
from mhacut.plan import TokenPlan, Unmerge
from mhacut.surgery.branches import block_width, branches_of, projections_of
from mhacut.surgery.grid_merging import Grid, GridMerger, sides_of
from mhacut.surgery.merging_blocks import (
    MERGING_BLOCKS,
    PREFIX_PARAMETERS,
    Matcher,
    MergedBiasTokens,
    MergedCaitTokens,
    MergedEvaTokens,
    MergedTokens,
    Merging,
    MergingLayer,
)
from mhacut.surgery.output_tokens import (
    OUTPUT_TOKEN_MODELS,
    OutputTokenBlock,
    dense_class,
    output_tokens_of,
    set_output_tokens,
)

_VITS = {
    vision_transformer.VisionTransformer: MergedTokens,
    VisionTransformerDistilled: MergedTokens,
    eva.Eva: MergedEvaTokens,
    beit.Beit: MergedBiasTokens,
    relpos.VisionTransformerRelPos: MergedBiasTokens,
    cait.Cait: MergedCaitTokens,
}
_MERGING_MODELS: dict[type[nn.Module], type[nn.Module]] = {
    cls: mixed("Merged", mixin, cls)
    for vit, mixin in _VITS.items()
    for cls in {vit, OUTPUT_TOKEN_MODELS.get(vit, vit)}
}
_PLAIN_CLASSES = {merging: plain for plain, merging in (*MERGING_BLOCKS.items(), *_MERGING_MODELS.items())}
_ATTENTION = {
    *CLS_WEIGHTS,
    *OUTPUT_TOKENS.values(),
    *CLS_WEIGHTS.values(),
    cait.TalkingHeadAttn,
    SamAttention,
}
"""timm attention classes of blocks that can merge tokens."""
_WITHOUT_BIAS = (beit.Attention, relpos.RelPosAttention, cait.TalkingHeadAttn, cait.ClassAttn)
"""timm attention classes whose forward pass takes no bias of merged tokens. The class of a cut layer does."""


class Stack(NamedTuple):
    """Blocks of the plain ViT in a model."""

    container: Any
    """Module that holds the blocks, directly or in chunks (DINOv2)."""
    names: tuple[str, ...]
    blocks: tuple[Any, ...]
    vit: Any
    """timm's ViT that contains the blocks; None for blocks of another library."""
    prefix: int
    """Number of tokens before the patches, such as class tokens. These tokens never merge."""
    width: int
    tokens_first: bool = False
    """Whether tokens have the shape [N, B, C] instead of [B, N, C]."""
    window: int = 0
    """Rows and columns of a window, if some blocks attend within windows. Tokens then have the shape
    [B, rows, columns, C], and merges leave a smaller grid. 0: every block attends to all tokens."""

    @property
    def grid(self) -> Grid:
        """Rows and columns of patches at the planned image size, of a model with windows."""
        grid: Grid = getattr(self.blocks[0], "grid", None) or self.vit.patch_embed.grid_size
        return grid

    def pairs(self, block: int, total: int) -> int:
        """Return how many pairs of query and key the unmerged block has, of ``total`` tokens."""
        if not (self.window and self.blocks[block].window_size):
            return total**2
        rows, columns = (-(-length // self.window) for length in self.grid)  # padded to whole windows
        return rows * columns * self.window**4

    def block_of(self, layer: str) -> int | None:
        return next((n for n, name in enumerate(self.names) if f"{layer}.".startswith(f"{name}.")), None)


def stack_of(model: nn.Module) -> Stack | None:
    """Return the blocks of the first plain ViT in ``model``; None without a plain ViT."""
    for name, module in model.named_modules():
        vit: Any = module
        windowed = type(vit) is VisionTransformerSAM and any(block.window_size for block in vit.blocks)
        if windowed or type(vit) in _MERGING_MODELS or isinstance(vit, MergedTokens):
            names, blocks = zip(*_blocks_in(f"{name}.blocks".lstrip("."), vit.blocks), strict=True)
            prefix = getattr(vit, "num_prefix_tokens", 0) if not isinstance(vit, cait.Cait) else 0
            window = max(block.window_size for block in blocks) if windowed else 0
            return Stack(vit.blocks, names, blocks, vit, prefix, vit.embed_dim, window=window)
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        names, blocks = zip(*_blocks_in(name, module), strict=True) if len(module) else ((), ())
        if len(blocks) < 2 or len({_PLAIN_CLASSES.get(type(block), type(block)) for block in blocks}) > 1:
            continue
        branches = branches_of(blocks[0])
        if branches is not None and all(branches_of(block) == branches for block in blocks):
            width, outside = block_width(blocks[0], branches), getattr(blocks[0], "outside", None)
            if outside is None:  # slim files from before `outside` existed
                prefix = [
                    p for key, p in model.named_parameters() if key.rpartition(".")[2] in PREFIX_PARAMETERS
                ]
                outside = sum(p.numel() for p in prefix) // width, 0
            return Stack(module, names, blocks, None, sum(outside), width, branches.tokens_first)
    return None


def _blocks_in(name: str, container: nn.Module) -> Iterator[tuple[str, Any]]:
    for key, part in container.named_children():
        within = f"{name}.{key}".lstrip(".")
        if isinstance(part, nn.ModuleList):  # DINOv2 has chunks, with an Identity for each block of another
            yield from _blocks_in(within, part)
        elif type(part) is not nn.Identity:
            yield within, part


def why_not_merged(model: Any, unmerge: Unmerge = False) -> str:
    """Return the reason why tokens of ``model`` cannot be merged; empty if they can."""
    stack = stack_of(model)
    if stack is None:
        cls = dense_class(getattr(model, "module", model))
        return f"{cls.__name__} is not a plain ViT, in which every block sees all tokens"
    if stack.vit is None:
        return ""
    vit = stack.vit
    if stack.window and vit.rope_window is not None:
        return "its windows have rotary positions"
    if not (unmerge or stack.window or _pools_by_size(vit) or _reads_class_token(vit)):
        return f"its head pools by global_pool={vit.global_pool!r}, not by class token, mean or attention"
    if len(vit.blocks) < 2:
        return "it has no block before its last"
    if getattr(vit, "rope_mixed", False):
        return "every block has rotary frequencies of its own (rope_type='mixed')"
    for block in vit.blocks:
        if type(block) not in MERGING_BLOCKS and not isinstance(block, Merging):
            return f"merging does not support blocks of class {type(block).__name__}"
        if getattr(adapter_for(block.attn), "cls", None) not in _ATTENTION:
            return f"merging does not support attention of class {type(block.attn).__name__}"
    return ""


def _pools_by_size(vit: Any) -> bool:
    pool = getattr(vit, "attn_pool", None)
    if pool is None:
        return bool(vit.global_pool == "avg")
    return library_class(pool) is AttentionPoolLatent and pool.pos_embed is None


def _reads_class_token(vit: Any) -> bool:
    return vit.global_pool == "token" and getattr(vit, "attn_pool", None) is None


def merged_of(model: nn.Module) -> tuple[int, ...]:
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
    """Make block i of ``model`` merge ``merged[i]`` tokens, in place. An empty ``merged`` ends merging."""
    _remove_merges(model)
    if not any(merged):
        return
    reason = why_not_merged(model, unmerge)
    if reason:
        raise UnsupportedModelError(f"tokens cannot be merged: {reason}")
    stack = stack_of(model)
    assert stack is not None
    if stack.window:
        _set_grid_merging(stack, merged)
        return
    check_merges(model, merged)
    vit, blocks = stack.vit, stack.blocks
    by_attention = not unmerge and (vit is None or _weighs_by_attention(vit))
    # Blocks before the first merge keep their class: all their tokens have size 1.
    first = next(number for number, count in enumerate(merged) if count)
    patches: int | None = getattr(blocks[0], "patches", None)
    left = patches or 0
    for block, count in [*zip(blocks, merged, strict=True)][first:]:
        left -= min(count, left // 2)
        planned = None if patches is None else (patches, left)
        _set_merging(block, Matcher(count, stack.prefix, planned) if count else None, unmerge)
        if isinstance(vit, beit.Beit | relpos.VisionTransformerRelPos):
            block.grid = vit.patch_embed.grid_size
        if count and by_attention and vit is not None:
            _set_attention_class(block.attn, CLS_WEIGHTS[library_class(block.attn)])
        elif by_attention and vit is None:
            block.projections = projections_of(block.get_submodule(block.branches.attention))
    takes_sizes = isinstance(vit, cait.Cait) or (vit is not None and _pools_by_size(vit))
    blocks[-1].gives_sizes = vit is not None and (unmerge or takes_sizes)
    if vit is not None:
        for part in filter(lambda part: type(part) in _WITHOUT_BIAS, vit.modules()):
            _set_attention_class(part, type(part))
        vit.__class__ = _MERGING_MODELS[type(vit)]


def _set_grid_merging(stack: Stack, merged: tuple[int, ...]) -> None:
    blocks = stack.blocks
    if len(merged) != len(blocks):
        raise PlanError(f"token plan: the model has {len(blocks)} blocks, the plan {len(merged)}")
    sides = sides_of(merged, stack.grid, stack.window)
    first = next(number for number, count in enumerate(merged) if count)
    for block, count, before, after in [*zip(blocks, merged, sides, sides[1:], strict=False)][first:]:
        block.__class__ = MERGING_BLOCKS[type(block)]
        block.matcher = GridMerger(count, stack.window, before, after) if count else None
        block.gives_sizes, block.unmerge = block is not blocks[-1], True
        block.window, block.side = stack.window, before
        _set_attention_class(block.attn, type(block.attn))


def _weighs_by_attention(vit: Any) -> bool:
    """Whether the class token's attention weighs tokens: the head reads it, and q and k have no norms."""
    if any(getattr(block.attn, "num_kv_groups", 1) > 1 for block in vit.blocks):
        return False  # several heads share their keys
    if isinstance(vit, cait.Cait):
        return False  # the class token joins behind the blocks
    norms = [getattr(block.attn, name, None) for block in vit.blocks for name in ("q_norm", "k_norm")]
    return _reads_class_token(vit) and all(isinstance(norm, nn.Identity | None) for norm in norms)


def _set_merging(block: Any, matcher: Matcher | None, unmerge: Unmerge) -> Any:
    plain = type(block)
    if plain not in MERGING_BLOCKS:  # a class of another library, met for the first time
        MERGING_BLOCKS[plain] = mixed("Merging", MergingLayer, plain)
        _PLAIN_CLASSES[MERGING_BLOCKS[plain]] = plain
    if issubclass(MERGING_BLOCKS[plain], MergingLayer):
        block.branches, block.projections = branches_of(block), None
        attention = block.get_submodule(block.branches.attention)
        adapter_for(attention).resize(attention, {})  # type: ignore[union-attr]
    block.__class__ = MERGING_BLOCKS[plain]
    block.matcher, block.gives_sizes, block.unmerge = matcher, True, unmerge
    return block


def check_merges(model: Any, merged: tuple[int, ...]) -> None:
    """Raise a :class:`PlanError` unless each block has enough tokens for its number of merges."""
    _, _, blocks, vit, *_ = stack_of(model) or Stack(None, (), (), None, 0, 0)
    if len(merged) != len(blocks):
        raise PlanError(f"token plan: the model has {len(blocks)} blocks, the plan {len(merged)}")
    if vit is None:
        return
    # A model without a fixed image size has no fixed number of patches: its matcher limits the count itself.
    # At other image sizes than the planned size, the matcher merges a share of the tokens.
    left = getattr(blocks[0], "patches", None) or vit.patch_embed.num_patches
    fixed = getattr(vit.patch_embed, "strict_img_size", True)
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
            for dense, cls in CLS_WEIGHTS.items():
                if isinstance(getattr(block, "attn", None), cls):
                    _set_attention_class(block.attn, dense)
    if stack is not None and type(stack.vit) in _PLAIN_CLASSES:
        stack.vit.__class__ = _PLAIN_CLASSES[type(stack.vit)]


def _set_attention_class(attention: nn.Module, cls: type[nn.Module]) -> None:
    attention.__class__ = cls
    # A cut layer needs the variant of the class that fits its widths.
    adapter_for(attention).resize(attention, {})  # type: ignore[union-attr]


def tokens_of(model: nn.Module) -> TokenPlan:
    stack = stack_of(model)
    first = None if stack is None else stack.blocks[0]
    outside, patches = getattr(first, "outside", None), getattr(first, "patches", None)
    grid = stack.grid if stack is not None and stack.window else None
    return TokenPlan(output_tokens_of(model), merged_of(model), unmerge_of(model), outside, patches, grid)


def with_tokens(model: nn.Module, tokens: TokenPlan) -> nn.Module:
    """Return a copy of ``model`` with the token plan applied; the copy shares its tensors."""
    applied = tokens_of(model)
    planned = (tokens.patches, tokens.grid) == (applied.patches, applied.grid)
    if tokens == applied and (not tokens.merged or planned):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    changed = copy.deepcopy(model, dict[int, Any](shared))
    apply_tokens(changed, tokens)
    return changed


@torch.no_grad()
def apply_tokens(model: nn.Module, tokens: TokenPlan) -> None:
    """Apply a token plan to ``model``, in place. ``model`` may be on the meta device or cut."""
    applied = tokens_of(model)
    if tokens.output_tokens != applied.output_tokens:
        if applied.output_tokens is not None or tokens.output_tokens is None:
            raise PlanError(
                f"token plan: the last block computes {applied.output_tokens or 'all'} tokens, the plan "
                f"expects {tokens.output_tokens or 'all'}"
            )
        set_merged(model, ())
        set_output_tokens(model, tokens.output_tokens)
    stack = stack_of(model)
    for block in () if stack is None or not tokens.merged else stack.blocks:
        if tokens.outside is not None:
            block.outside = tokens.outside
        block.patches = tokens.patches
        if tokens.grid is not None:
            block.grid = tokens.grid
    set_merged(model, tokens.merged, tokens.unmerge)
