"""Merging of tokens against a slow reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhacut.surgery.token_merging import SizedTokens, checkerboard_order, match, merge, weigh


def slow_merge(x: Tensor, sizes: Tensor, weights: Tensor, count: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Merge one image's tokens [N, C], sizes [N], weights [N], token by token."""
    a = list(range(prefix + 1, len(x), 2))
    b = list(range(prefix, len(x), 2))
    best = {}
    for i in a:
        costs = [
            float(
                weights[i]
                * weights[j]
                / (weights[i] + weights[j])
                * (1 - x[i] @ x[j] / (x[i].norm() * x[j].norm()))
            )
            for j in b
        ]
        best[i] = min(zip(costs, b, strict=True), key=lambda pair: pair[0])
    gone = sorted(a, key=lambda i: best[i][0])[:count]
    groups = {j: [j] for j in b}
    for i in gone:
        groups[best[i][1]].append(i)
    places = [*range(prefix), *(i for i in a if i not in gone)]
    tokens, counts = [x[i] for i in places], [sizes[i] for i in places]
    for j in b:
        total = sum(weights[i] for i in groups[j])
        mean = sum(weights[i] * x[i] for i in groups[j]) / total
        norm = sum(weights[i] * x[i].norm() for i in groups[j]) / total
        tokens.append(mean * norm / mean.norm())
        counts.append(sum(sizes[i] for i in groups[j]))
    return torch.stack(tokens), torch.stack(counts)


def slow_weights(sizes: Tensor, cls_weights: Tensor, prefix: int) -> Tensor:
    """Size times the root of .1 plus attention to each patch, [N], for the tokens of one image."""
    paid = [float(cls_weights[:, token].mean() / sizes[token]) for token in range(len(sizes))]
    mean = sum(paid[prefix:]) / len(paid[prefix:])
    roots = [(each / mean + 0.1) ** 0.5 for each in paid]
    return sizes * torch.tensor(roots, dtype=torch.float64)


@pytest.mark.parametrize(
    ("count", "total", "prefix"), [(1, 6, 1), (4, 17, 1), (8, 17, 1), (5, 24, 5), (3, 7, 0)]
)
def test_merge_is_that_of_a_slow_reference(count: int, total: int, prefix: int):
    chance = torch.Generator().manual_seed(count)
    x = torch.randn(3, total, 4, generator=chance, dtype=torch.float64)
    sizes = torch.randint(1, 5, (3, total, 1), generator=chance).double()
    cls_weights = torch.rand(3, 2, total, generator=chance, dtype=torch.float64)
    weights = torch.stack(
        [slow_weights(*one, prefix) for one in zip(sizes[..., 0], cls_weights, strict=True)]
    )
    found = weigh(sizes, cls_weights, prefix)
    ratios = found / found[:, :1]
    torch.testing.assert_close(ratios[..., 0], weights / weights[:, :1])
    tokens, left, *_ = merge(SizedTokens(x, sizes), match(x, found, count, prefix), prefix)
    assert tokens.shape == (3, total - count, 4)
    for image in range(3):
        expected, counts = slow_merge(x[image], sizes[image, :, 0], weights[image], count, prefix)
        torch.testing.assert_close(tokens[image], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(left[image, :, 0], counts, rtol=0, atol=0)


def test_what_the_class_token_looks_at_is_not_merged():
    """Of two pairs equally alike, the one that is looked at stays as it is."""
    x = torch.tensor(
        [[[0.0, 1.0], [1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, 0.1]]]
    ).double()  # the first is the prefix
    sizes = torch.ones(1, 5, 1).double()
    for looked_at, stays in ((0, [3, 4]), (1, [1, 2])):
        cls_weights = torch.ones(1, 1, 5).double()
        cls_weights[0, 0, 2 * looked_at + 1 : 2 * looked_at + 3] = 5
        found = match(x, weigh(sizes, cls_weights, 1), 1, 1)
        tokens = merge(SizedTokens(x, sizes), found, 1).x
        kept = [tuple(token) for token in tokens[0].tolist()]
        assert all(tuple(x[0, place].tolist()) not in kept for place in stays)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_holds_weighted_sums(dtype: torch.dtype):
    """A large channel of a token of many patches that is looked at: sums are beyond float16."""
    x = torch.randn(1, 197, 8).to(dtype)
    x[:, :, 3] = 1500
    sizes = torch.ones(1, 197, 1, dtype=dtype)
    sizes[:, 5] = 20
    cls_weights = torch.full((1, 3, 197), 0.01, dtype=dtype)
    cls_weights[..., 5] = 1
    weights = weigh(sizes, cls_weights, 1)
    tokens, left, *_ = merge(SizedTokens(x, sizes), match(x, weights, 60, 1), 1)
    assert tokens.dtype == left.dtype == dtype
    wide = [each.float() for each in (x, sizes)]
    expected = merge(SizedTokens(*wide), match(wide[0], weights.float(), 60, 1), 1).x
    torch.testing.assert_close(tokens.float(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(("total", "prefix"), [(17, 1), (24, 5), (15, 0)])
def test_tokens_are_copied_back_to_their_places(total: int, prefix: int):
    """Where equal tokens merge, copies are the tokens that were there."""
    chance = torch.Generator().manual_seed(total)
    kinds = torch.randn(3, 4, generator=chance, dtype=torch.float64)
    chosen = torch.rand(2, total, generator=chance).mul(3).long()
    chosen[:, prefix : prefix + 6] = torch.tensor([0, 0, 1, 1, 2, 2])  # each kind among those that receive
    first = kinds[chosen]
    tokens = SizedTokens(first, torch.ones(2, total, 1).double(), torch.arange(total).expand(2, -1))
    for _ in range(4):
        tokens = merge(tokens, match(tokens.x, tokens.sizes, 1, prefix), prefix)
        tokens = merge(tokens, match(tokens.x, tokens.sizes, 1, prefix), prefix)
        torch.testing.assert_close(tokens.unmerge(), first)
    assert tokens.token_of_patch is not None
    for token_of_patch, sizes in zip(tokens.token_of_patch, tokens.sizes, strict=True):
        assert torch.equal(token_of_patch.bincount().double(), sizes[:, 0])


@pytest.mark.parametrize(("side", "prefix"), [(4, 0), (5, 1), (16, 5)])
def test_neighbours_in_an_image_are_in_different_sets(side: int, prefix: int):
    order = checkerboard_order(torch.arange(prefix + side**2), prefix)
    assert order[order].tolist() == list(range(prefix + side**2))  # so that it says where patches stand
    assert order[:prefix].tolist() == list(range(prefix))
    sets = ((order[prefix:] - prefix) % 2).view(side, side)
    assert (sets[1:] != sets[:-1]).all()
    assert (sets[:, 1:] != sets[:, :-1]).all()
    stays = torch.arange(prefix + 8)  # of 2 x 4 patches
    assert torch.equal(checkerboard_order(stays, prefix), stays)
