"""Models that merge tokens: blocks that do so between attention and MLP, as the last change to a model.

The number of merges per block is fixed; no tensor of the model changes. Attention behind a merge adds the
logarithm of a token's size to its logits ("proportional attention", arXiv 2210.09461).
"""

from __future__ import annotations

from typing import Any

from timm.layers import Attention
from timm.models import vision_transformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from mhacut.adapters.read_attention import ReadAttention
from mhacut.adapters.registry import adapter_for
from mhacut.errors import PlanError, UnsupportedModelError, option_name
from mhacut.surgery.merge import Matcher, Sizes, merge
from mhacut.surgery.read import FewTokensDistilled, FewTokensViT, ReadBlock


class Merging:
    """Mixed into a block's class, in front of it: tokens have sizes, and the block may merge some."""

    before: Sizes | None
    """Sizes of the tokens that come in; None where each stands for one patch."""
    after: Sizes
    """Sizes of the tokens that go out."""


class MergingBlock(Merging, vision_transformer.Block):  # type: ignore[misc]
    """timm's block with a merge between attention and MLP."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map tokens [B, N, C] to [B, N - merged, C]."""
        _check_no_mask(attn_mask, is_causal)
        bias = None if self.before is None else self.before.as_bias()
        sizes = x.new_ones(*x.shape[:2], 1) if self.before is None else self.before.last()
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask=bias)))
        matcher = getattr(self.attn, "matcher", None)
        if matcher is not None:
            x, sizes = merge(x, sizes, matcher.take(), matcher.prefix)
        self.after.value = sizes
        out: Tensor = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return out


def _check_no_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise UnsupportedModelError("a model that merges tokens takes no attention mask")


class MergedReadBlock(Merging, ReadBlock):
    """A block of which only the first tokens are read, behind blocks that merge."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Map all tokens [B, N, C] to those that are read [B, read, C]."""
        _check_no_mask(attn_mask, is_causal)
        assert self.before is not None
        return super().forward(x, attn_mask=self.before.as_bias())


class MergedTokens:
    """Mixed into timm's model, in front of it: tokens have sizes, and few of them stand for a patch."""

    sizes: Sizes
    """Sizes of the last block's tokens."""

    def pool(self: Any, x: Tensor, pool_type: str | None = None) -> Tensor:
        """Pool tokens [B, N, C] to [B, C], in a mean each patch with the same weight."""
        if (self.global_pool if pool_type is None else pool_type) != "avg":
            pooled: Tensor = super().pool(x, pool_type)  # type: ignore[misc]
            return pooled
        first = 0 if self.pool_include_prefix else self.num_prefix_tokens
        sizes = self.sizes.last()[:, first:]  # (B, N, 1)
        mean: Tensor = (x[:, first:] * sizes).sum(1) / sizes.sum(1)
        return mean

    def forward_intermediates(self, *args: Any, **options: Any) -> Any:
        """Refuse.

        Raises:
            UnsupportedModelError: always: blocks give fewer tokens than there are patches.
        """
        raise UnsupportedModelError(
            "this model merges tokens, so that its blocks give no features of every patch; for those, prune "
            f"with a {option_name('scope')} without tokens"
        )


class MergedViT(MergedTokens, vision_transformer.VisionTransformer):  # type: ignore[misc]
    """timm's ViT that merges tokens."""


class MergedDistilled(MergedTokens, VisionTransformerDistilled):  # type: ignore[misc]
    """timm's distilled DeiT that merges tokens."""


class MergedFewTokensViT(MergedTokens, FewTokensViT):
    """timm's ViT that merges tokens and does not compute all of its last block."""


class MergedFewTokensDistilled(MergedTokens, FewTokensDistilled):
    """timm's distilled DeiT that merges tokens and does not compute all of its last block."""


_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    vision_transformer.Block: MergingBlock,
    ReadBlock: MergedReadBlock,
}
_MODELS: dict[type[nn.Module], type[nn.Module]] = {
    vision_transformer.VisionTransformer: MergedViT,
    VisionTransformerDistilled: MergedDistilled,
    FewTokensViT: MergedFewTokensViT,
    FewTokensDistilled: MergedFewTokensDistilled,
}
_UNMERGED = {merged: plain for plain, merged in (*_BLOCKS.items(), *_MODELS.items())}
_ATTENTION = (Attention, ReadAttention)


def why_not_merged(model: Any) -> str:
    """Return the reason why tokens of ``model`` cannot be merged; empty if they can."""
    if type(model) not in _MODELS and not isinstance(model, MergedTokens):
        return f"{type(model).__name__} is no plain ViT, whose blocks see all tokens alike"
    if model.global_pool not in ("token", "avg") or getattr(model, "attn_pool", None) is not None:
        return f"its outputs are not pooled by class token or mean (global_pool={model.global_pool!r})"
    for block in model.blocks:
        if type(block) not in _BLOCKS and not isinstance(block, Merging):
            return f"blocks of class {type(block).__name__} do not merge tokens"
        adapter = adapter_for(block.attn)
        if getattr(adapter, "cls", None) not in _ATTENTION:
            return f"attention of class {type(block.attn).__name__} does not merge tokens"
    return ""


def merged_of(model: nn.Module) -> tuple[int, ...]:
    """Return the number of tokens that each block of ``model`` merges; empty if none does."""
    blocks: Any = getattr(model, "blocks", ())
    if not any(isinstance(block, Merging) for block in blocks):
        return ()
    return tuple(_count(block) for block in blocks)


def set_merged(model: Any, merged: tuple[int, ...]) -> None:
    """Change ``model`` in place so that block i merges ``merged[i]`` tokens; empty for no merges.

    Args:
        model: a plain ViT of timm, on any device; it may merge already, and be cut.
        merged: one number per block.

    Raises:
        UnsupportedModelError: tokens of the model cannot be merged.
        PlanError: the numbers are not for this model.
    """
    if merged == merged_of(model):
        return
    _undo(model)
    if not any(merged):
        return
    reason = why_not_merged(model)
    if reason:
        raise UnsupportedModelError(f"tokens cannot be merged: {reason}")
    check_merges(model, merged)
    before: Sizes | None = None
    for block, count in zip(model.blocks, merged, strict=True):
        if before is None and not count:
            continue
        block.before, block.after = before, Sizes()
        before = block.after
        block.__class__ = _BLOCKS[type(block)]
        if count:
            block.attn.matcher = Matcher(count, model.num_prefix_tokens)
            block.attn.merged = count
            _settle(block.attn)
    model.sizes = before
    model.__class__ = _MODELS[type(model)]


def check_merges(model: Any, merged: tuple[int, ...]) -> None:
    """Check that each block has the tokens that it is to merge.

    Raises:
        PlanError: it does not, or the number of blocks is another.
    """
    if len(merged) != len(model.blocks):
        raise PlanError(f"plan of tokens: the model has {len(model.blocks)} blocks, the plan {len(merged)}")
    left = model.patch_embed.num_patches
    for number, (block, count) in enumerate(zip(model.blocks, merged, strict=True)):
        if count > left // 2:
            raise PlanError(
                f"plan of tokens: block {number} merges at most {left // 2} of the {left} patches left, "
                f"found {count}"
            )
        if count and isinstance(block, ReadBlock):
            raise PlanError(f"plan of tokens: block {number} computes no tokens that it could merge")
        left -= count


def _undo(model: Any) -> None:
    blocks: Any = getattr(model, "blocks", ())
    for block in blocks:
        if type(block) not in _UNMERGED:
            continue
        block.__class__ = _UNMERGED[type(block)]
        del block.before, block.after
        if _count(block):
            del block.attn.matcher, block.attn.merged
            _settle(block.attn)
    if type(model) in _UNMERGED:
        model.__class__ = _UNMERGED[type(model)]
        del model.sizes


def _count(block: Any) -> int:
    """Return the number of tokens that a block merges."""
    count: int = getattr(block.attn, "merged", 0)
    return count


def _settle(attention: Any) -> None:
    """Give an attention layer the forward pass that it now needs."""
    adapter = adapter_for(attention)
    assert adapter is not None
    adapter.resize(attention, {})
