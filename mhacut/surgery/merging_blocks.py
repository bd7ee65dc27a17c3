"""Forward passes of blocks and models that merge tokens, for timm's ViTs and for blocks of any class.

Each block merges between attention and MLP. Token sizes travel from block to block with the tokens, so a
forward pass leaves no state behind. :mod:`mhacut.surgery.tokens` sets these classes on existing modules.
"""

from __future__ import annotations

import copy
from operator import attrgetter
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.models import beit, cait, checkpoint_seq, eva, vision_transformer, vision_transformer_sam
from timm.models import vision_transformer_relpos as relpos
from timm.models._manipulate import checkpoint
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mhacut.adapters.attend import graph_is_recorded
from mhacut.adapters.base import mixed
from mhacut.adapters.mlp import Mlp
from mhacut.adapters.softmax_hooks import CompleteBias, position_bias
from mhacut.errors import UnsupportedModelError, option_name
from mhacut.plan import Unmerge
from mhacut.surgery.grid_merging import GridMerging
from mhacut.surgery.output_tokens import OUTPUT_TOKEN_BLOCKS, scaled
from mhacut.surgery.token_merging import (
    Match,
    SizedTokens,
    bias_between,
    checkerboard_order,
    match,
    merge,
    weigh,
)


class Matcher(nn.Module):
    """Module that chooses the tokens to merge in a block. Hooks can read and replace the chosen pairs."""

    def __init__(self, count: int, prefix: int, planned: tuple[int, int] | None = None) -> None:
        super().__init__()
        self.count, self.prefix = count, prefix
        self.planned = planned
        """Numbers of patches in the model and of tokens behind this block, at the planned image size. None if
        the same number of tokens merges at all sizes."""

    def forward(self, tokens: SizedTokens, cls_weights: Tensor | None) -> Match:
        """Match tokens, weighted by the class token's attention [B, H, N]."""
        x, sizes, *_, first = tokens
        weights = weigh(sizes, None if cls_weights is None else cls_weights.detach(), self.prefix)
        if self.planned is None or first is None:
            # A small image may have too few patches: at most half of them merge.
            count = min(self.count, (int(x.shape[1]) - self.prefix) // 2)
        else:
            # From the tokens of the first block, so that rounding errors of blocks do not add up. Rounded up,
            # because at most half of the tokens of a block can merge.
            patches, left = self.planned
            # No negative number is divided: Python rounds down, ONNX towards 0.
            left = ((first.shape[1] - self.prefix) * left + patches - 1) // patches
            count = x.shape[1] - self.prefix - left
            # torch.jit.trace, which counts FLOPs, gives a tensor.
            count = int(count) if isinstance(count, Tensor) else count
        return match(x.detach(), weights, count, self.prefix)


class Merging:
    """Mixin for a block class that merges tokens and tracks the number of patches per token."""

    matcher: Matcher | None
    """Module that chooses the tokens to merge; None if the block merges no tokens."""
    gives_sizes: bool
    """Whether the block returns :class:`SizedTokens` instead of a tensor."""
    patches: int | None
    """Number of patches in the model at the image size that the merges were planned for."""
    unmerge: Unmerge
    """Whether the output features of the model have a token for every patch."""


class _TimmMerging(Merging):
    """Mixin for timm's ViT blocks: token merging between attention and MLP."""

    def forward(
        self: Any,
        x: Tensor | SizedTokens,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        rope: Tensor | None = None,
    ) -> Tensor | SizedTokens:
        """Compute the block; ``rope`` holds the sines and cosines of all patches [N, 2 * d]."""
        _check_no_mask(attn_mask, is_causal)
        tokens, bias = _with_sizes(x, self, rope)
        return self.merged(tokens, attn_mask=bias, **_rotation(tokens, self.attn))

    def merged(self: Any, tokens: SizedTokens, *args: Any, **options: Any) -> Tensor | SizedTokens:
        """Compute the block; further arguments are those of the attention."""
        y, cls_weights = self.attn(self.normed(1, tokens.x), *args, **options), None
        if isinstance(y, tuple):
            y, cls_weights = y
        tokens = tokens._replace(x=tokens.x + self.branch(1, y))
        if self.matcher is not None:
            tokens = merge(tokens, self.matcher(tokens, cls_weights), self.matcher.prefix)
        y = tokens.x + self.branch(2, self.mlp(self.normed(2, tokens.x)))
        return tokens._replace(x=y) if self.gives_sizes else y

    def normed(self, number: int, x: Tensor) -> Any:
        return getattr(self, f"norm{number}")(x)

    def branch(self, number: int, y: Tensor) -> Any:
        """Return what attention (1) or MLP (2) with output ``y`` add to the tokens."""
        drop_path = getattr(self, f"drop_path{number}", None) or self.drop_path  # type: ignore[attr-defined]
        return drop_path(scaled(self, number, y))


class _PostNorm:
    """Mixin for blocks with norms after attention and MLP."""

    def normed(self, number: int, x: Tensor) -> Any:
        return x

    def branch(self, number: int, y: Tensor) -> Any:
        return getattr(self, f"drop_path{number}")(getattr(self, f"norm{number}")(y))


class _TimmMergedOutputTokens(Merging):
    """Mixin for the last block of a ViT with token merging that computes only the tokens the head reads."""

    def forward(
        self: Any,
        x: Tensor | SizedTokens,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        *,
        rope: Tensor | None = None,
    ) -> Tensor:
        _check_no_mask(attn_mask, is_causal)
        tokens, bias = _with_sizes(x, self, rope)
        y: Tensor = super().forward(tokens.x, attn_mask=bias, **_rotation(tokens, self.attn))  # type: ignore[misc]
        return y


class MergingBlock(_TimmMerging, vision_transformer.Block):  # type: ignore[misc]
    pass


class _BiasMerging(_TimmMerging):
    """Mixin for timm's ViT blocks whose attention adds relative position biases."""

    grid: tuple[int, int]
    """Rows and columns of patches in the image."""

    def forward(self: Any, x: Tensor | SizedTokens, *args: Any, **options: Any) -> Tensor | SizedTokens:
        """Compute the block; the further argument is the position bias of all blocks or None."""
        tokens, bias = _with_position_bias(x, self, *args, *options.values())
        return self.merged(tokens, bias)


class _BiasMergedOutputTokens(Merging):
    """Mixin for the last block that computes only the tokens the head reads, with position biases."""

    def forward(self: Any, x: Tensor | SizedTokens, *args: Any, **options: Any) -> Tensor:
        tokens, bias = _with_position_bias(x, self, *args, *options.values())
        y: Tensor = super().forward(tokens.x, bias)  # type: ignore[misc]
        return y


class _TalkingMerging(_TimmMerging):
    """Mixin for CaiT's blocks, whose talking heads take sizes in place of their logarithms."""

    def forward(self: Any, x: Tensor | SizedTokens, *_: Any, **__: Any) -> Tensor | SizedTokens:
        tokens, bias = _with_sizes(x, self)
        return self.merged(tokens, None if bias is None else tokens.sizes)


MERGING_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    vision_transformer.Block: MergingBlock,
    cait.LayerScaleBlock: mixed("Merging", _TalkingMerging, cait.LayerScaleBlock),
    vision_transformer_sam.Block: mixed("Merging", GridMerging, Merging, vision_transformer_sam.Block),
}
"""Block classes of timm, each mapped to its subclass that merges tokens."""
for post_norm, merging, last, classes in (
    ((), _TimmMerging, _TimmMergedOutputTokens, (vision_transformer.Block, eva.EvaBlock)),
    (
        (_PostNorm,),
        _TimmMerging,
        _TimmMergedOutputTokens,
        (vision_transformer.ResPostBlock, eva.EvaBlockPostNorm),
    ),
    ((), _BiasMerging, _BiasMergedOutputTokens, (beit.Block, relpos.RelPosBlock)),
    ((_PostNorm,), _BiasMerging, _BiasMergedOutputTokens, (relpos.ResPostRelPosBlock,)),
):
    for cls in classes:
        MERGING_BLOCKS.setdefault(cls, mixed("Merging", *post_norm, merging, cls))
        MERGING_BLOCKS[OUTPUT_TOKEN_BLOCKS[cls]] = mixed("Merging", last, OUTPUT_TOKEN_BLOCKS[cls])


def _with_position_bias(
    x: Tensor | SizedTokens, block: Any, shared: Tensor | None = None
) -> tuple[SizedTokens, CompleteBias]:
    """Return tokens with sizes, and the attention bias of mean positions and sizes.

    ``shared`` is the position bias of all blocks.
    """
    bias = position_bias(block.attn, shared)  # (1, H, N of the first block, N of the first block)
    if bias is None:
        tokens, size_bias = _with_sizes(x, block)
        return tokens, CompleteBias(size_bias)
    rows, columns = block.grid
    patch = torch.arange(rows * columns, device=bias.device)
    # bfloat16 would round mean positions.
    positions = torch.stack((patch // columns, patch % columns), -1).to(
        torch.promote_types(bias.dtype, torch.float32)
    )
    tokens, size_bias = _with_sizes(x, block, positions)
    assert tokens.positions is not None
    bias = bias_between(bias.reshape(1, *bias.shape[-3:]), tokens.positions, block.grid)
    return tokens, CompleteBias(bias if size_bias is None else bias + size_bias)


def _rotation(tokens: SizedTokens, attention: Any) -> dict[str, Tensor]:
    if tokens.positions is None:
        return {}
    rope = tokens.positions[..., attention.num_prefix_tokens :, :]
    return {"rope": rope if rope.dim() == 2 else rope[:, None]}  # the same for all heads


class Branches(NamedTuple):
    """Names of the submodules of a block up to each residual addition, in the order of execution."""

    first: tuple[str, ...]
    """Names of the submodules before the first residual addition, including the attention."""
    second: tuple[str, ...]
    attention: str
    mask_name: str
    """Name of the attention argument that is a bias on the logits."""
    tokens_first: bool
    """Whether tokens have the shape [N, B, C] instead of [B, N, C]."""
    mlp: Mlp | None
    """Adapter of the MLP if its linear layers are in different submodules; else None."""


class Projections(NamedTuple):
    """Weights of an attention layer that compute q and k."""

    query: str
    """Name of the weight that computes q. Equal to ``key`` for a weight with the rows [q | k | v]."""
    key: str
    """Name of the weight that computes k, in its first rows unless the weight computes q too."""
    reader: str
    """Name of the output projection."""
    heads: int


def apply_part(part: Any, x: Tensor) -> Any:
    return part * x if isinstance(part, nn.Parameter) else part(x)


class MergingLayer(Merging):
    """Mixin for a transformer block of any class: token merging between attention and MLP.

    The last block copies merged tokens back to their patches, because the code after it expects a token for
    every patch.
    """

    branches: Branches
    outside: tuple[int, int]
    """Numbers of tokens before and after the patches, such as class tokens. These tokens never merge."""
    projections: Projections | None
    """Weights that compute the class token's attention, which weighs tokens. None: sizes weigh tokens."""

    def forward(self, *args: Any, **options: Any) -> Tensor | SizedTokens:
        options.pop("num_items_in_batch", None)  # a tensor that transformers' Trainer passes to all layers
        x, *others = (*args, *options.values())
        # transformers passes a mask of ones instead of None while a graph is recorded.
        if not graph_is_recorded():
            masks = [leaf for leaf in tree_leaves(others) if isinstance(leaf, Tensor)]
            _check_no_mask(masks[0] if masks else None, bool(options.get("is_causal")))
        tokens, bias = _with_sizes(self.laid_out(x) if isinstance(x, Tensor) else x, self)
        y, cls_weights = tokens.x, None
        for name in self.branches.first:
            part = attrgetter(name)(self)
            if name != self.branches.attention:
                y = apply_part(part, y)
                continue
            if self.matcher is not None and self.projections is not None:
                cls_weights = _cls_weights(part, self.projections, y, bias)
            y = self._attend(part, y, bias)
        tokens = tokens._replace(x=tokens.x + y)
        if self.matcher is not None:
            tokens = merge(tokens, self.matcher(tokens, cls_weights), self.matcher.prefix)
        y = tokens.x
        for name in self.branches.second:
            y = apply_part(attrgetter(name)(self), y)
        tokens = tokens._replace(x=tokens.x + y)
        return tokens if self.gives_sizes else self.laid_out(tokens.unmerge())

    def _attend(self, attention: Any, x: Tensor, bias: Tensor | None) -> Tensor:
        options: dict[str, Any] = {self.branches.mask_name: bias}
        if isinstance(attention, nn.MultiheadAttention):
            x = self.laid_out(x)
            return self.laid_out(attention(x, x, x, need_weights=False, **options)[0])
        y = attention(x, **options)
        return y[0] if isinstance(y, tuple) else y

    def laid_out(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1) if self.branches.tokens_first else x


def _cls_weights(attention: Any, projections: Projections, x: Tensor, bias: Tensor | None) -> Tensor:
    """Return the class token's attention weights [B, H, N] on tokens [B, N, C], from q and k weights.

    q k^T = (q W_k) x^T up to a constant, which the softmax removes. This takes N * H * C products, far fewer
    than k.
    """
    query, key, reader, heads = projections
    weight, key_weight = attention.get_parameter(query), attention.get_parameter(key)
    owner, _, name = query.rpartition(".")
    q_bias = getattr(attention.get_submodule(owner), name.replace("weight", "bias"), None)
    rows = len(weight)
    if query == key:
        rows = (rows - attention.get_submodule(reader).in_features) // 2
        key_weight = key_weight[rows:]
    q = F.linear(x[:, 0], weight[:rows], None if q_bias is None else q_bias[:rows]).unflatten(-1, (heads, -1))
    read = torch.einsum("bhd,hdc->bhc", q, key_weight[:rows].unflatten(0, (heads, -1)))
    logits = read @ x.mT * q.shape[-1] ** -0.5
    return (logits if bias is None else logits + bias[:, 0]).softmax(-1)


PREFIX_PARAMETERS = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
"""Names of the parameters that transformers puts as tokens before the patches."""


def _with_sizes(
    x: Tensor | SizedTokens, block: Merging, positions: Tensor | None = None
) -> tuple[SizedTokens, Tensor | None]:
    """Return tokens with their numbers of patches, and the attention bias (None before the first merge)."""
    if not isinstance(x, Tensor):
        return x, x.bias()
    if positions is not None:
        positions = F.pad(positions, (0, 0, x.shape[1] - positions.shape[-2], 0))
    token_of_patch = None
    if block.unmerge:
        token_of_patch = torch.arange(x.shape[1], device=x.device)
        # "rows" marks slim files from before the checkerboard order existed.
        if block.unmerge is True and block.matcher is not None:
            order = checkerboard_order(token_of_patch, block.matcher.prefix)
            first, behind = getattr(block, "outside", (0, 0))
            if behind:  # tokens behind the patches join the prefix
                joined = torch.cat((token_of_patch[:first], token_of_patch[first:].roll(behind)))
                token_of_patch = torch.cat((order[:first], order[first:].roll(-behind)))
                order = joined.index_select(0, order)
            else:  # its own inverse
                token_of_patch = order
            x = x.index_select(1, order)  # a single ONNX operation
            positions = None if positions is None else positions.index_select(-2, order)
        token_of_patch = token_of_patch.expand(x.shape[:2])
    sizes = x.new_ones(*x.shape[:2], 1)
    return SizedTokens(x, sizes, token_of_patch, positions, sizes[..., :0]), None


def unmerged(output: Any) -> Any:
    """Return a block's output as a tensor; merged tokens are copied to their patches if the model does so."""
    return output.unmerge() if isinstance(output, SizedTokens) else output


def _check_no_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise UnsupportedModelError("attention masks are not supported in a model that merges tokens")


class MergedTokens:
    """Mixin for timm's ViT class whose blocks merge tokens."""

    def forward_features(
        self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor | SizedTokens:
        """Return the normalised tokens after the last block, with sizes if the head averages tokens."""
        _check_no_mask(attn_mask, is_causal)
        tokens = self.run_blocks(self.patch_embed(x))
        if isinstance(tokens, Tensor) or tokens.token_of_patch is not None:
            features: Tensor = self.norm(unmerged(tokens))
            return features
        return tokens._replace(x=self.norm(tokens.x))

    def run_blocks(self: Any, x: Tensor) -> Tensor | SizedTokens:
        x = self.norm_pre(self.patch_drop(self._pos_embed(x)))
        y: Tensor | SizedTokens = (
            checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        )
        return y

    def pool(self: Any, x: Tensor | SizedTokens, pool_type: str | None = None) -> Tensor:
        """Pool tokens to [B, C]. Means and attention weigh each token by its number of patches."""
        attention_pool = getattr(self, "attn_pool", None)
        if isinstance(x, SizedTokens) and attention_pool is not None:
            first = 0 if getattr(self, "pool_include_prefix", True) else self.num_prefix_tokens
            attended: Tensor = attention_pool(x.x[:, first:], attn_mask=x.bias()[..., first:])
            return attended
        if isinstance(x, Tensor) or (pool_type or self.global_pool) != "avg":
            tokens = x if isinstance(x, Tensor) else x.x
            pooled: Tensor = super().pool(tokens, pool_type)  # type: ignore[misc]
            return pooled
        first = 0 if getattr(self, "pool_include_prefix", False) else self.num_prefix_tokens
        sizes = x.sizes[:, first:]  # (B, N, 1)
        mean: Tensor = (x.x[:, first:] * sizes).sum(1) / sizes.sum(1)
        return mean

    def forward_intermediates(self: Any, *args: Any, **options: Any) -> Any:
        self.check_features(None)
        # timm's loop expects a tensor from each block. A copy of the model with wrapped blocks provides them.
        wrapper = copy.copy(self)
        stream: list[Any] = []
        blocks = nn.Sequential(*(_UnmergedOutput(block, stream) for block in self.blocks))
        wrapper.__dict__.update(_modules={**self._modules, "blocks": blocks}, grad_checkpointing=False)
        return super(MergedTokens, wrapper).forward_intermediates(*args, **options)  # type: ignore[misc]

    def check_features(self: Any, indices: object) -> None:
        if self.blocks[-1].unmerge:
            return
        raise UnsupportedModelError(
            "this model merges tokens, so its blocks have no features of every patch; to keep those, prune "
            f"with {option_name('keep_dead_tokens', True)} or {option_name('preserve', 'tokens')}"
        )


class MergedEvaTokens(MergedTokens):
    """Mixin for timm's rotary ViT class whose blocks merge tokens."""

    def run_blocks(self: Any, x: Tensor) -> Tensor | SizedTokens:
        x, rope = self._pos_embed(x)
        tokens: Tensor | SizedTokens = self.norm_pre(x)
        if rope is not None and rope.dim() == 4:  # patches were dropped in training: [B, 1, N, 2 * d]
            rope = rope[:, 0]
        for block in self.blocks:
            if self.grad_checkpointing:
                tokens = checkpoint(block, tokens, rope=rope)
            else:
                tokens = block(tokens, rope=rope)
        return tokens


class MergedBiasTokens(MergedTokens):
    """Mixin for timm's ViT classes with relative position biases whose blocks merge tokens."""

    def run_blocks(self: Any, x: Tensor) -> Tensor | SizedTokens:
        if self.cls_token is not None:
            x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), dim=1)
        if isinstance(self, beit.Beit):
            x = self.pos_drop(x if self.pos_embed is None else x + self.pos_embed)
        table = getattr(self, "rel_pos_bias", getattr(self, "shared_rel_pos", None))
        shared = None if table is None else getattr(table, "get_bias", table)()
        tokens: Tensor | SizedTokens = x
        for block in self.blocks:
            tokens = checkpoint(block, tokens, shared) if self.grad_checkpointing else block(tokens, shared)
        return tokens

    def forward_head(self: Any, x: Any, pre_logits: bool = False) -> Any:
        if not isinstance(x, SizedTokens):
            return super().forward_head(x, pre_logits)  # type: ignore[misc]
        pooled = self.pool(x)
        pooled = self.head_drop(self.fc_norm(pooled) if hasattr(self, "fc_norm") else pooled)
        return pooled if pre_logits else self.head(pooled)


class MergedCaitTokens(MergedBiasTokens):
    """Mixin for CaiT whose blocks merge patches before the class token joins them."""

    def forward_features(self: Any, x: Tensor) -> Tensor | SizedTokens:  # type: ignore[override]
        x = self.pos_drop(self.patch_embed(x) + self.pos_embed)
        tokens = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        if tokens.token_of_patch is not None:
            tokens = tokens.unmerge()
        if self.blocks_token_only is not None:
            tokens = self.forward_cls(tokens)
        if isinstance(tokens, SizedTokens):
            return tokens._replace(x=self.norm(tokens.x))
        normed: Tensor = self.norm(tokens)
        return normed

    def forward_cls(self: Any, x: Any) -> Any:
        if not isinstance(x, SizedTokens):
            return super().forward_cls(x)  # type: ignore[misc]
        cls_token = self.cls_token.expand(x.x.shape[0], -1, -1)
        sizes = F.pad(x.sizes, (0, 0, 1, 0), value=1.0)
        x = x._replace(sizes=sizes)
        for block in self.blocks_token_only:
            y = block.attn(block.norm1(torch.cat((cls_token, x.x), dim=1)), x.bias())
            cls_token = cls_token + block.drop_path(scaled(block, 1, y))
            y = block.mlp(block.norm2(cls_token))
            cls_token = cls_token + block.drop_path(scaled(block, 2, y))
        return x._replace(x=torch.cat((cls_token, x.x), dim=1))

    def pool(self: Any, x: Any, pool_type: str | None = None) -> Tensor:
        if self.global_pool == "token":
            return x.x[:, 0]
        return super().pool(x, pool_type)


class _UnmergedOutput(nn.Module):
    """Block that returns a token for every patch. ``stream`` passes merged tokens to the next block."""

    def __init__(self, block: nn.Module, stream: list[Any]) -> None:
        super().__init__()
        self.block, self.stream = block, stream

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        merged = self.block(self.stream.pop() if self.stream else x, **options)
        self.stream.append(merged)
        tokens: Tensor = unmerged(merged)
        return tokens
