"""Merging of tokens against a slow reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mhacut.surgery.merge import SizedTokens, match, merge


def slow_merge(x: Tensor, sizes: Tensor, keys: Tensor, count: int, prefix: int) -> tuple[Tensor, Tensor]:
    """Merge one image's tokens [N, C], sizes [N], keys [N, d], token by token."""
    a = list(range(prefix + 1, len(x), 2))
    b = list(range(prefix, len(x), 2))
    best = {}
    for i in a:
        cosines = [float(keys[i] @ keys[j] / (keys[i].norm() * keys[j].norm())) for j in b]
        best[i] = max(zip(cosines, b, strict=True), key=lambda pair: pair[0])
    gone = sorted(a, key=lambda i: -best[i][0])[:count]
    groups = {j: [j] for j in b}
    for i in gone:
        groups[best[i][1]].append(i)
    places = [*range(prefix), *(i for i in a if i not in gone)]
    tokens, counts = [x[i] for i in places], [sizes[i] for i in places]
    for j in b:
        total = sum(sizes[i] for i in groups[j])
        tokens.append(sum(sizes[i] * x[i] for i in groups[j]) / total)
        counts.append(total)
    return torch.stack(tokens), torch.stack(counts)


@pytest.mark.parametrize(
    ("count", "total", "prefix"), [(1, 6, 1), (4, 17, 1), (8, 17, 1), (5, 24, 5), (3, 7, 0)]
)
def test_merge_is_that_of_a_slow_reference(count: int, total: int, prefix: int):
    chance = torch.Generator().manual_seed(count)
    x, keys = torch.randn(2, 3, total, 4, generator=chance, dtype=torch.float64)
    sizes = torch.randint(1, 5, (3, total, 1), generator=chance).double()
    tokens, left = merge(SizedTokens(x, sizes), match(keys, count, prefix), prefix)
    assert tokens.shape == (3, total - count, 4)
    for image in range(3):
        expected, counts = slow_merge(x[image], sizes[image, :, 0], keys[image], count, prefix)
        torch.testing.assert_close(tokens[image], expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(left[image, :, 0], counts, rtol=0, atol=0)


def test_sizes_and_sums_are_kept():
    x = torch.randn(2, 11, 3, dtype=torch.float64)
    sizes = torch.ones(2, 11, 1, dtype=torch.float64)
    for count in (3, 2, 1):
        total = (x * sizes).sum(1)
        x, sizes = merge(SizedTokens(x, sizes), match(x, count, 1), 1)
        torch.testing.assert_close((x * sizes).sum(1), total)
    assert (sizes.sum(1) == 11).all()


def test_equal_tokens_are_merged_the_same_way_each_time():
    x = torch.ones(1, 9, 2)
    found, again = match(x, 2, 1), match(x.clone(), 2, 1)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))
    assert sorted([*found.merged[0].tolist(), *found.kept[0].tolist()]) == [0, 1, 2, 3]
