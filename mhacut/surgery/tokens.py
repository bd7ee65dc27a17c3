"""Models that leave out tokens: those that no output reads, and those that are merged into others.

In each block that merges, between attention and MLP, tokens that resemble others most are averaged into them:
bipartite soft matching, from "Token Merging: Your ViT But Faster" (arXiv 2210.09461), with a fixed number of
merges per block, so that every shape is known beforehand, and without scatter, which runtimes lack or run
slowly. The class token and others before the patches are never merged, and no tensor of the model changes.
Attention after a merge adds the logarithm of a token's size to its logits ("proportional attention").

Three things differ from ToMe; on an ImageNet ViT-Ti with half its FLOPs, they reduce the divergence to two
fifths:

- Tokens are compared as they stand in the residual stream, not by their keys: matches then do not depend on
  the basis and the width of q and k, which pruning changes.
- Tokens have weights: their size, times the root of the attention that the class token pays to each of their
  patches. Cheapest merges come first, by Ward's criterion, and averages are weighted: tokens that stand for
  many patches, or get much attention, change little. (The weight is the size alone if no class token is read,
  or q and k have norms.)
- Averages keep the mean norm of what is averaged, as in "Token Fusion" (arXiv 2312.01026).

Where tokens of square images are copied back to their patches, the first merge takes black squares of a
checkerboard into white ones: all four neighbours of a patch may receive it, not two.
"""

from __future__ import annotations

import copy
import inspect
import math
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import Attention
from timm.models import checkpoint_seq, vision_transformer
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from mhacut.adapters.attend import graph_is_recorded
from mhacut.adapters.base import mixed
from mhacut.adapters.huggingface import Linears, Nested, is_old
from mhacut.adapters.registry import adapter_for
from mhacut.adapters.softmax_special import CLS_WEIGHTS, OUTPUT_TOKENS
from mhacut.errors import PlanError, UnsupportedModelError, option_name
from mhacut.plan import TokenPlan, Unmerge
from mhacut.surgery.output_tokens import (
    OUTPUT_TOKEN_BLOCKS,
    OUTPUT_TOKEN_MODELS,
    OutputTokenBlock,
    dense_class,
    output_tokens_of,
    set_output_tokens,
)


class Match(NamedTuple):
    """Which tokens are merged into which, for a batch of images; tokens are counted after the prefix.

    Every second token may be merged: set A. The others, including the first, may receive: set B.
    """

    merged: Tensor
    """Tokens of A that are merged, [B, r]."""
    kept: Tensor
    """Tokens of A that are not, ascending, [B, |A| - r]."""
    receivers: Tensor
    """For each merged token, the token of B that receives it, [B, r]."""
    weights: Tensor
    """Weights of all tokens in an average, [B, N, 1]."""


class SizedTokens(NamedTuple):
    """Tokens with their sizes, which the blocks after a merge pass on."""

    x: Tensor
    """Tokens, [B, N, C]."""
    sizes: Tensor
    """Number of patches that each stands for, [B, N, 1]."""
    token_of_patch: Tensor | None = None
    """For each token that the image began with, the one that stands for it now, [B, all tokens]; None where
    nothing reads the features of patches."""

    def __getitem__(self, index: Any) -> Any:
        """Return an entry; the first one copied back, since transformers takes it for the hidden state."""
        return self.unmerge() if index == 0 else tuple(self)[index]

    def bias(self) -> Tensor:
        """Return the logarithm of the sizes, to be added to the logits of attention, [B, 1, 1, N]."""
        return self.sizes.mT.log()[:, None]

    def unmerge(self) -> Tensor:
        """Return the token that stands for each token that the image began with, [B, all tokens, C]."""
        return self.x if self.token_of_patch is None else _taken(self.x, self.token_of_patch)


FLOOR = 0.1
"""Attention that is added to all tokens, so that none has weight 0; attention is 1 on average over tokens."""
_LEAST = 1e-12
"""Least norm to divide by: tokens may be zero, or cancel each other out."""


def weigh(sizes: Tensor, cls_weights: Tensor | None, prefix: int) -> Tensor:
    """Return the weights of tokens, [B, N, 1].

    Args:
        sizes: number of patches that each stands for, [B, N, 1].
        cls_weights: the class token's weights of attention, [B, H, N]; None where there is no such token.
        prefix: number of first tokens, which stand for no patch.
    """
    sizes = at_least_float32(sizes)
    if cls_weights is None:
        return sizes
    paid = at_least_float32(cls_weights).sum(1)[..., None] / sizes  # to each patch
    mean = paid[:, prefix:].mean(1, keepdim=True)
    # Only ratios of weights matter. Nothing is left for patches where the class token looks at itself alone.
    return sizes * torch.add(paid, mean.clamp_min(1e-20), alpha=FLOOR).sqrt()


def match(x: Tensor, weights: Tensor, count: int, prefix: int) -> Match:
    """Match the ``count`` tokens of set A whose merge into their best token of set B costs least.

    The cost is Ward's, the growth of the sum of squares within groups, on directions: for tokens of weights
    v and w, ``(1 - cosine) / (1 / v + 1 / w)``.

    Args:
        x: tokens, [B, N, C].
        weights: weights of tokens, [B, N, 1].
        count: number of tokens to merge, at most half of those behind the prefix.
        prefix: number of first tokens that are left out.
    """
    with full_precision(x):
        directions = at_least_float32(x)
        directions = directions / torch.linalg.vector_norm(directions, dim=-1, keepdim=True).clamp_min(_LEAST)
        a, b, light = directions[:, prefix + 1 :: 2], directions[:, prefix::2], weights.reciprocal()
        cost = (1 - torch.bmm(a, b.mT)) / (light[:, prefix + 1 :: 2] + light[:, prefix::2].mT)
    cost, nearest = cost.min(-1)  # (B, |A|)
    # Sorted by topk: exporters know no sort.
    order = cost.topk(cost.shape[1], dim=-1, largest=False).indices
    merged, rest = order[:, :count], order[:, count:]  # (B, r), (B, |A| - r)
    # Back in their order, because the next block splits tokens by it.
    kept = rest.topk(rest.shape[1], dim=-1, largest=False).values
    return Match(merged, kept, nearest.gather(1, merged), weights)


def merge(tokens: SizedTokens, matched: Match, prefix: int) -> SizedTokens:
    """Average merged tokens, and their norms, into those that receive them, by the weights of the match."""
    x, sizes, places = tokens
    merged, kept, receivers, weights = matched
    with full_precision(x):
        x = at_least_float32(x)
        norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True)  # as in match: graphs compute it once
        # What adds up when tokens are merged.
        sums = torch.cat((weights * x, weights * norms, weights, at_least_float32(sizes)), -1)
        a, b = _taken(sums, torch.cat((merged, kept), 1), prefix + 1, 2), sums[:, prefix::2]
        numbers = torch.arange(b.shape[1], device=b.device)[:, None]
        receives = (receivers[:, None] == numbers).to(b.dtype)  # (B, |B|, r)
        b = torch.baddbmm(b, receives, a[:, : merged.shape[1]])
    # All alike, for few operations: tokens that received none are divided by what they were multiplied by.
    sums = torch.cat((sums[:, :prefix], a[:, merged.shape[1] :], b), 1)
    x, norms, weights, left = sums.split((x.shape[-1], 1, 1, 1), dim=-1)
    x = x * (norms / (weights * torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(_LEAST)))
    moved = None if places is None else token_of_patch_after(places, matched, prefix)
    return SizedTokens(x.to(tokens.x.dtype), left.to(sizes.dtype), moved)


def token_of_patch_after(places: Tensor, matched: Match, prefix: int) -> Tensor:
    """Return where the tokens at ``places`` [B, all tokens] stand after a merge of ``matched``."""
    kept = matched.kept.shape[1]
    places_of_b = torch.arange(kept, kept + matched.weights[:, prefix::2].shape[1], device=places.device)
    places_of_kept = torch.arange(kept, device=places.device).expand_as(matched.kept)
    new_of_a = torch.cat((matched.receivers + kept, places_of_kept), 1)  # in the order of the match
    order = torch.cat((matched.merged, matched.kept), 1)
    # Sorted by topk, the places of a permutation's values are its inverse.
    inverse = order.topk(order.shape[1], dim=-1, largest=False).indices
    new = torch.cat((places_of_b.expand(len(order), -1), new_of_a.gather(1, inverse)), 1)  # B, then A
    old = places[:, prefix:] - prefix
    in_a = old % 2 * len(places_of_b)
    return torch.cat((places[:, :prefix], new.gather(1, old // 2 + in_a) + prefix), 1)


def _taken(tokens: Tensor, places: Tensor, first: int = 0, step: int = 1) -> Tensor:
    """Return ``tokens`` [B, N, C] at ``first + step * places`` [B, n], [B, n, C]."""
    batch, total = tokens.shape[:2]
    starts = torch.arange(first, first + batch * total, total, device=tokens.device)[:, None]
    # An embedding copies rows, gather numbers.
    return F.embedding(torch.add(starts, places, alpha=step), tokens.flatten(0, 1))


def at_least_float32(x: Tensor) -> Tensor:
    """Return half precision as float32: float16 overflows in weighted sums, bfloat16 rounds sizes."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def full_precision(x: Tensor) -> Any:
    """Context in which autocast rounds neither cosines, of which many would be equal, nor averages."""
    device = x.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


class Matcher(nn.Module):
    """The matches of a block, as a separate module, so that they can be read and set from outside."""

    def __init__(self, count: int, prefix: int) -> None:
        """Take the number of tokens to merge, and that of protected ones."""
        super().__init__()
        self.count, self.prefix = count, prefix

    def forward(self, x: Tensor, sizes: Tensor, cls_weights: Tensor | None) -> Match:
        """Match tokens; of fewer patches than planned for, at most half are merged.

        Args:
            x: tokens, [B, N, C].
            sizes: number of patches that each stands for, [B, N, 1].
            cls_weights: the class token's weights of attention, [B, H, N]; None where they are not read.
        """
        weights = weigh(sizes, None if cls_weights is None else cls_weights.detach(), self.prefix)
        count = min(self.count, (int(x.shape[1]) - self.prefix) // 2)
        return match(x.detach(), weights, count, self.prefix)


class Merging:
    """Mixed into a block's class, in front of it: tokens have sizes, and the block may merge some.

    Sizes travel with the tokens, from block to block, so that a forward pass leaves no state behind.
    """

    matcher: Matcher | None
    """None where the block merges nothing."""
    gives_sizes: bool
    """Whether what follows needs the sizes."""
    unmerge: Unmerge
    """Whether tokens are copied back to the places of their patches where features leave the model."""


class MergingBlock(Merging, vision_transformer.Block):  # type: ignore[misc]
    """timm's block with a merge between attention and MLP."""

    def forward(
        self, x: Tensor | SizedTokens, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor | SizedTokens:
        """Map N tokens to N - merged."""
        _check_no_mask(attn_mask, is_causal)
        tokens, bias = _sized(x, self)
        y, cls_weights = self.attn(self.norm1(tokens.x), attn_mask=bias), None
        if isinstance(y, tuple):
            y, cls_weights = y
        left, matcher = tokens._replace(x=tokens.x + self.drop_path1(self.ls1(y))), self.matcher
        if matcher is not None:
            left = merge(left, matcher(left.x, tokens.sizes, cls_weights), matcher.prefix)
        y = left.x + self.drop_path2(self.ls2(self.mlp(self.norm2(left.x))))
        return left._replace(x=y) if self.gives_sizes else y


class MergingLayer(Merging):
    """Mixed into a layer of transformers, which may merge between attention and MLP; always copied back.

    Its parts are found by the names that transformers gives them. The last layer gives a tensor.
    """

    def forward(
        self, hidden_states: Tensor | SizedTokens, attention_mask: Tensor | None = None, **options: Any
    ) -> Tensor | SizedTokens:
        """Map N tokens to N - merged."""
        # In place of none, transformers makes a mask that masks nothing while a graph is recorded.
        _check_no_mask(None if graph_is_recorded() else attention_mask, False)
        tokens, bias = _sized(hidden_states, self)
        y, *_ = _part(self, "attention")(_part(self, "norm1")(tokens.x), attention_mask=bias, **options)
        left, matcher = tokens._replace(x=tokens.x + self._branch(1, y)), self.matcher
        if matcher is not None:
            left = merge(left, matcher(left.x, tokens.sizes, None), matcher.prefix)
        y = self._branch(2, _part(self, "mlp")(_part(self, "norm2")(left.x)))
        left = left._replace(x=left.x + y)
        return left if self.gives_sizes else left.unmerge()

    def _branch(self, number: int, y: Tensor) -> Tensor:
        for name in (f"layer_scale{number}", "drop_path", "dropout"):
            y = getattr(self, name, nn.Identity())(y)
        return y


_PARTS = {
    "norm1": ("norm1", "layernorm_before", "layer_norm1"),
    "attention": ("attention", "self_attn"),
    "norm2": ("norm2", "layernorm_after", "layer_norm2"),
    "mlp": ("mlp",),
}
"""Names of the parts of a layer in transformers."""
_PREFIX = ("cls_token", "class_embedding", "distillation_token", "register_tokens")
"""Names of parameters there that stand before the patches."""


def _part(layer: Any, part: str) -> Any:
    """Return a part of a layer, or None."""
    return next((getattr(layer, name) for name in _PARTS[part] if hasattr(layer, name)), None)


def _is_layer(layer: nn.Module) -> bool:
    """Whether this looks like a layer of transformers in which every token sees all others."""
    parts = [_part(layer, name) for name in _PARTS]
    if None in parts or type(adapter_for(_part(layer, "attention"))) not in (Linears, Nested):
        return False
    _, _, *others = inspect.signature(type(layer).forward).parameters.values()
    # Layers of windows are given their resolution, those with rotary positions the angles.
    return all("mask" in each.name or each.kind is each.VAR_KEYWORD for each in others)


@torch.no_grad()
def _computes_alike(layer: Any) -> bool:
    """Whether a layer of transformers computes what :class:`MergingLayer` does without a merge."""
    weight = next(layer.parameters())
    if weight.is_meta or isinstance(layer, Merging):
        return True
    x = torch.linspace(0, 9, 4 * _width(layer)).sin().view(1, 4, -1).to(weight)
    outputs = []
    for merging in (False, True):
        twin = copy.deepcopy(layer).eval()
        if merging:
            _set_merging(twin, None, True).gives_sizes = False
        outputs.append(twin(x, None))
    expected, found = outputs
    return isinstance(expected, Tensor) and torch.allclose(found, expected, rtol=1e-2, atol=1e-2)


def _width(layer: Any) -> int:
    return int(_part(layer, "norm1").weight.numel())


class MergedOutputTokenBlock(Merging, OUTPUT_TOKEN_BLOCKS[vision_transformer.Block]):  # type: ignore[misc, valid-type]
    """A block whose first tokens alone are read, after blocks that merge."""

    def forward(
        self, x: Tensor | SizedTokens, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Map N tokens to those that are read, [B, read, C]."""
        _check_no_mask(attn_mask, is_causal)
        tokens, bias = _sized(x)
        return super().forward(tokens.x, attn_mask=bias)


def _sized(x: Tensor | SizedTokens, block: Merging | None = None) -> tuple[SizedTokens, Tensor | None]:
    """Return tokens with their sizes, and the bias from these; None if each token stands for one patch.

    The first block that merges gets a tensor; where it copies, it brings patches into the order for its sets.
    """
    if not isinstance(x, Tensor):
        return x, x.bias()
    places = None
    if block is not None and block.unmerge:
        places = torch.arange(x.shape[1], device=x.device)
        if block.unmerge is True and block.matcher is not None:
            places = checkerboard_order(places, block.matcher.prefix)
            x = x.index_select(1, places)  # one operation in ONNX
        places = places.expand(x.shape[:2])
    return SizedTokens(x, x.new_ones(*x.shape[:2], 1), places), None


def checkerboard_order(places: Tensor, prefix: int) -> Tensor:
    """Return an order of a square image's tokens in which every second patch is black on a checkerboard.

    It is its own inverse: in every second row, neighbours change places. Rows of odd length alternate
    already. Images that are not square have an unknown width, and keep their order.

    Args:
        places: 0 to N - 1, [N].
        prefix: number of first tokens that are no patches.
    """
    count = len(places) - prefix
    side = math.isqrt(count)
    if side % 2 or side**2 != count:
        return places
    patch = places[prefix:] - prefix
    return torch.cat((places[:prefix], places[prefix:] + patch // side % 2 * (1 - patch % 2 * 2)))


def tokens_in(output: Any) -> Any:
    """Return the tokens in what a block gives, one for each patch where they are to be copied back."""
    return output.unmerge() if isinstance(output, SizedTokens) else output


def _check_no_mask(attn_mask: Tensor | None, is_causal: bool) -> None:
    if attn_mask is not None or is_causal:
        raise UnsupportedModelError("a model that merges tokens takes no attention mask")


class MergedTokens:
    """Mixed into timm's model, in front of it: most tokens stand for several patches."""

    def forward_features(
        self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor | SizedTokens:
        """Return the tokens that are left, normalised; with their sizes where the head averages them."""
        _check_no_mask(attn_mask, is_causal)
        x = self.norm_pre(self.patch_drop(self._pos_embed(self.patch_embed(x))))
        tokens = checkpoint_seq(self.blocks, x) if self.grad_checkpointing else self.blocks(x)
        if isinstance(tokens, Tensor) or tokens.token_of_patch is not None:
            features: Tensor = self.norm(tokens_in(tokens))
            return features
        return SizedTokens(self.norm(tokens.x), tokens.sizes)

    def pool(self: Any, x: Tensor | SizedTokens, pool_type: str | None = None) -> Tensor:
        """Pool tokens to [B, C], in a mean each patch with the same weight."""
        if isinstance(x, Tensor) or (pool_type or self.global_pool) != "avg":
            tokens = x if isinstance(x, Tensor) else x.x
            pooled: Tensor = super().pool(tokens, pool_type)  # type: ignore[misc]
            return pooled
        first = 0 if self.pool_include_prefix else self.num_prefix_tokens
        sizes = x.sizes[:, first:]  # (B, N, 1)
        mean: Tensor = (x.x[:, first:] * sizes).sum(1) / sizes.sum(1)
        return mean

    def forward_intermediates(self: Any, *args: Any, **options: Any) -> Any:
        """Return what timm's model does, each patch with the token that stands for it."""
        self.check_features(None)
        twin = copy.copy(self)
        stream: list[Any] = []
        blocks = nn.Sequential(*(_Copying(block, stream) for block in self.blocks))
        twin.__dict__.update(_modules={**self._modules, "blocks": blocks}, grad_checkpointing=False)
        return super(MergedTokens, twin).forward_intermediates(*args, **options)  # type: ignore[misc]

    def check_features(self: Any, indices: object) -> None:
        """Refuse features of patches, unless tokens are copied back to these."""
        if self.blocks[-1].unmerge:
            return
        raise UnsupportedModelError(
            "this model merges tokens, so its blocks have no features of every patch; to keep those, prune "
            f"with {option_name('keep_dead_tokens', True)} or {option_name('preserve', 'tokens')}"
        )


class _Copying(nn.Module):
    """A block that gives one token for each patch, and passes the merged ones on by another way."""

    def __init__(self, block: nn.Module, stream: list[Any]) -> None:
        super().__init__()
        self.block, self.stream = block, stream

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        merged = self.block(self.stream.pop() if self.stream else x, **options)
        self.stream.append(merged)
        tokens: Tensor = tokens_in(merged)
        return tokens


_BLOCKS: dict[type[nn.Module], type[nn.Module]] = {
    vision_transformer.Block: MergingBlock,
    OUTPUT_TOKEN_BLOCKS[vision_transformer.Block]: MergedOutputTokenBlock,
}
_VITS = (vision_transformer.VisionTransformer, VisionTransformerDistilled)
_MODELS: dict[type[nn.Module], type[nn.Module]] = {
    cls: mixed("Merged", MergedTokens, cls) for cls in (*_VITS, *map(OUTPUT_TOKEN_MODELS.__getitem__, _VITS))
}
"""Plain ViTs, all tokens of whose last block are computed or a few, and their classes that merge tokens."""
_UNMERGED = {merged: plain for plain, merged in (*_BLOCKS.items(), *_MODELS.items())}
_ATTENTION = (Attention, OUTPUT_TOKENS[Attention], CLS_WEIGHTS[Attention])


class Stack(NamedTuple):
    """The plain ViT in a model, whose tokens may be merged."""

    name: str
    """Name of the module that lists its blocks: ``blocks``, ``module.encoder.layer``."""
    blocks: Any
    vit: Any
    """timm's model; None for layers of transformers."""
    prefix: int
    """Number of tokens before the patches."""
    width: int
    """Channels of a token."""

    def block_of(self, layer: str) -> int | None:
        """Return the number of the block that holds a layer of this name."""
        inside, number = layer.startswith(f"{self.name}."), layer.removeprefix(f"{self.name}.")
        return int(number.partition(".")[0]) if inside else None


def stack_of(model: nn.Module) -> Stack | None:
    """Return the first plain ViT in ``model``, which may be the model."""
    for name, module in model.named_modules():
        vit: Any = module
        if type(vit) in _MODELS or isinstance(vit, MergedTokens):
            return Stack(f"{name}.blocks".lstrip("."), vit.blocks, vit, vit.num_prefix_tokens, vit.embed_dim)
        if isinstance(module, nn.ModuleList) and len(module) and all(map(_is_layer, module)):
            width = _width(module[0])
            first = [p for key, p in model.named_parameters() if key.rpartition(".")[2] in _PREFIX]
            return Stack(name, module, None, sum(p.numel() for p in first) // width, width)
    return None


def why_not_merged(model: Any, unmerge: Unmerge = False) -> str:
    """Return the reason why tokens of ``model`` cannot be merged (and copied back); empty if they can."""
    stack = stack_of(model)
    if stack is None:
        cls = dense_class(getattr(model, "module", model))
        return f"{cls.__name__} is not a plain ViT, in which every block sees all tokens"
    if stack.vit is None:
        if is_old():
            return "that takes transformers 5"
        if not any(isinstance(module, nn.Conv2d) for module in model.modules()):
            return "which of its tokens are patches is not known; name the module that embeds them, too"
        if not _computes_alike(stack.blocks[0]):
            return f"layers of class {type(stack.blocks[0]).__name__} are no attention and MLP in a row"
        return "" if unmerge and len(stack.blocks) > 1 else "it has no block before its last"
    model = stack.vit
    pooled = model.global_pool in ("token", "avg") and getattr(model, "attn_pool", None) is None
    if not (unmerge or pooled):
        return f"its outputs are not pooled by class token or mean (global_pool={model.global_pool!r})"
    if len(model.blocks) < 2:
        return "it has no block before its last"
    for block in model.blocks:
        if type(block) not in _BLOCKS and not isinstance(block, Merging):
            return f"blocks of class {type(block).__name__} do not merge tokens"
        adapter = adapter_for(block.attn)
        if getattr(adapter, "cls", None) not in _ATTENTION:
            return f"attention of class {type(block.attn).__name__} does not merge tokens"
    return ""


def merged_of(model: nn.Module) -> tuple[int, ...]:
    """Return the number of tokens that each block of ``model`` merges; empty if none does."""
    stack = stack_of(model)
    if stack is None or not any(isinstance(block, Merging) for block in stack.blocks):
        return ()
    return tuple(_count(block) for block in stack.blocks)


def unmerge_of(model: nn.Module) -> Unmerge:
    """Whether ``model`` merges tokens and copies them back, and by which rule."""
    stack = stack_of(model)
    unmerge: Unmerge = stack is not None and getattr(stack.blocks[-1], "unmerge", False)
    return unmerge


def set_merged(model: Any, merged: tuple[int, ...], unmerge: Unmerge = False) -> None:
    """Change ``model`` in place so that block i merges ``merged[i]`` tokens; empty for no merges."""
    if (merged, unmerge) == (merged_of(model), unmerge_of(model)):
        return
    _undo(model)
    if not any(merged):
        return
    reason = why_not_merged(model, unmerge)
    if reason:
        raise UnsupportedModelError(f"tokens cannot be merged: {reason}")
    check_merges(model, merged)
    stack, by_attention = stack_of(model), False
    assert stack is not None
    vit, blocks = stack.vit, stack.blocks
    if vit is not None:
        by_attention = (
            vit.global_pool == "token"
            and not unmerge
            and all(
                isinstance(norm, nn.Identity)
                for block in blocks
                for norm in (block.attn.q_norm, block.attn.k_norm)
            )
        )
    # Blocks before the first merge keep their class: their tokens have no sizes.
    first = next(number for number, count in enumerate(merged) if count)
    for block, count in [*zip(blocks, merged, strict=True)][first:]:
        _set_merging(block, Matcher(count, stack.prefix) if count else None, unmerge)
        if count and by_attention:
            _set_class(block.attn, CLS_WEIGHTS[Attention])
    blocks[-1].gives_sizes = vit is not None and (unmerge or vit.global_pool == "avg")
    if vit is not None:
        vit.__class__ = _MODELS[type(vit)]


def _set_merging(block: Any, matcher: Matcher | None, unmerge: Unmerge) -> Any:
    """Give a block the class that merges."""
    plain = type(block)
    if plain not in _BLOCKS:
        _BLOCKS[plain] = mixed("Merging", MergingLayer, plain)
        _UNMERGED[_BLOCKS[plain]] = plain
    block.__class__ = _BLOCKS[plain]
    block.matcher, block.gives_sizes, block.unmerge = matcher, True, unmerge
    return block


def check_merges(model: Any, merged: tuple[int, ...]) -> None:
    """Check that each block has the tokens that it is to merge.

    How many a model has that takes images of any size depends on the image: its blocks merge at most half.
    """
    _, blocks, vit, *_ = stack_of(model) or Stack("", (), None, 0, 0)
    if len(merged) != len(blocks):
        raise PlanError(f"plan of tokens: the model has {len(blocks)} blocks, the plan {len(merged)}")
    if vit is None:
        return
    left, fixed = vit.patch_embed.num_patches, getattr(vit.patch_embed, "strict_img_size", True)
    for number, (block, count) in enumerate(zip(blocks, merged, strict=True)):
        if fixed and count > left // 2:
            raise PlanError(
                f"plan of tokens: block {number} merges at most {left // 2} of the {left} patches left, "
                f"found {count}"
            )
        if count and isinstance(block, OutputTokenBlock):
            raise PlanError(f"plan of tokens: block {number} computes no tokens that it could merge")
        left -= count


def _undo(model: nn.Module) -> None:
    stack = stack_of(model)
    for block in () if stack is None else stack.blocks:
        if type(block) in _UNMERGED:
            block.__class__ = _UNMERGED[type(block)]
            del block.matcher, block.gives_sizes, block.unmerge
            if isinstance(getattr(block, "attn", None), CLS_WEIGHTS[Attention]):
                _set_class(block.attn, Attention)
    if stack is not None and type(stack.vit) in _UNMERGED:
        stack.vit.__class__ = _UNMERGED[type(stack.vit)]


def _set_class(attention: nn.Module, cls: type[nn.Module]) -> None:
    """Change the class of an attention layer in place, to that which suits its widths."""
    attention.__class__ = cls
    adapter_for(attention).resize(attention, {})  # type: ignore[union-attr]


def _count(block: Any) -> int:
    """Return the number of tokens that a block merges."""
    matcher = getattr(block, "matcher", None)
    return 0 if matcher is None else matcher.count


def tokens_of(model: nn.Module) -> TokenPlan:
    """Return the plan of tokens that was applied to ``model``."""
    return TokenPlan(output_tokens_of(model), merged_of(model), unmerge_of(model))


def with_tokens(model: nn.Module, tokens: TokenPlan) -> nn.Module:
    """Return a model with the same weights that leaves out the planned tokens; ``model`` itself if it does.

    Unchanged tensors are shared. Errors are those of :func:`apply_tokens`.
    """
    if tokens == tokens_of(model):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    changed = copy.deepcopy(model, dict[int, Any](shared))
    apply_tokens(changed, tokens)
    return changed


@torch.no_grad()
def apply_tokens(model: nn.Module, tokens: TokenPlan) -> None:
    """Change ``model`` in place so that it leaves out what ``tokens`` states, unless it does already."""
    applied = tokens_of(model)
    if tokens == applied:
        return
    if tokens.output_tokens != applied.output_tokens:
        if applied.output_tokens is not None or tokens.output_tokens is None:
            raise PlanError(
                f"the last block computes {applied.output_tokens or 'all'} tokens, the plan expects "
                f"{tokens.output_tokens or 'all'}"
            )
        set_merged(model, ())
        set_output_tokens(model, tokens.output_tokens)
    set_merged(model, tokens.merged, tokens.unmerge)
