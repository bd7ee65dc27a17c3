"""Selection of channels against rankings that refit from scratch for every removal."""

from __future__ import annotations

import math

import pytest
import torch

from helpers.moments import rows
from mhacut.linalg.selection import damped, rank_channels, rank_logit_channels


def test_channels_whose_price_overflows_are_removed_once():
    found = rank_channels(torch.eye(6).double(), torch.full((2, 6), 1e200, dtype=torch.float64), 2, 1)
    assert found.order.sort(-1).values.tolist() == [[0, 1, 2], [0, 1, 2]]


def refit_error(x, columns, kept, root=None):
    """Mean square of what the kept channels do not predict of the output, by least squares."""
    left = (x - x[:, kept] @ torch.linalg.lstsq(x[:, kept], x).solution) @ columns.T
    return float((left if root is None else left @ root).square().sum()) / len(x)


def slow_greedy(error, channels, keep):
    """Remove what costs least, one channel at a time, each cost found by refitting from scratch."""
    kept = list(channels)
    while len(kept) > keep:
        kept.remove(min(kept, key=lambda gone: error([channel for channel in kept if channel != gone])))
    return kept


@pytest.mark.parametrize("seed", range(4))
def test_selection_is_greedy_by_the_error_after_the_refit(seed):
    x, columns = rows(200, 7, seed), torch.randn(3, 7, generator=torch.Generator().manual_seed(seed)).double()
    second = x.T @ x / 200

    def error(kept):
        return refit_error(x, columns, kept)

    found = rank_channels(second, columns, heads=1, smallest=1)
    for width in range(1, 8):
        kept = slow_greedy(error, range(7), width)
        assert found.kept(width).tolist() == [kept]
        assert float(found.error[width]) == pytest.approx(error(kept), rel=1e-3, abs=1e-9)
    assert sorted(found.order[0].tolist()) == list(range(7))


@pytest.mark.parametrize("seed", range(3))
def test_heads_give_in_turn_what_costs_least_of_all_and_none_below_the_smallest(seed):
    heads, width, smallest = 3, 4, 2
    x, columns = (
        rows(300, 12, seed),
        torch.randn(5, 12, generator=torch.Generator().manual_seed(seed)).double(),
    )

    def error(kept):
        return refit_error(x, columns, kept)

    alive, gone = list(range(12)), []
    while len(alive) > heads * smallest:
        may_go = [c for c in alive if sum(o // width == c // width for o in alive) > smallest]
        gone.append(min(may_go, key=lambda c: error([other for other in alive if other != c])))
        alive.remove(gone[-1])
    found = rank_channels(x.T @ x / 300, columns, heads, smallest)
    for head in range(heads):
        own = [channel - head * width for channel in range(head * width, (head + 1) * width)]
        leaving = [channel - head * width for channel in gone if channel // width == head]
        assert found.order[head].tolist()[smallest:] == leaving[::-1]
        assert sorted(found.order[head].tolist()) == own
    assert float(found.error[heads * smallest]) == pytest.approx(error(alive), rel=1e-3)
    assert found.error[12] == 0
    assert torch.all(found.error.diff() <= 0)


def test_a_metric_prices_the_removal_but_does_not_choose():
    x, generator = rows(200, 7, 0), torch.Generator().manual_seed(0)
    columns, root = (torch.randn(3, size, generator=generator).double() for size in (7, 3))
    metric = root @ root.T
    plain, priced = (rank_channels(x.T @ x / 200, columns, 1, 1, metric) for metric in (None, metric))
    assert torch.equal(plain.order, priced.order)
    for width in range(1, 7):
        kept = priced.kept(width)[0]
        expected = refit_error(x, columns, kept, root)
        assert float(priced.error[width]) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("seed", range(4))
def test_logit_selection_is_greedy_by_the_error_after_the_refit(seed):
    sides = [torch.stack([rows(200, 6, seed + shift + head) for head in (0, 20)]) for shift in (0, 50)]
    query, key = (side.mT @ side / 200 for side in sides)
    found = rank_logit_channels(query, key, smallest=1)
    for head in range(2):

        def error(kept, head=head):
            # q k^T of all pairs of rows; what kept channels do not predict of either side is lost.
            q, k = (side[head] for side in sides)
            seen = [side[:, kept] @ torch.linalg.lstsq(side[:, kept], side).solution for side in (q, k)]
            return float((q @ k.T - seen[0] @ seen[1].T).square().sum())

        for width in range(1, 7):
            assert found.kept(width)[head].tolist() == slow_greedy(error, range(6), width)


@pytest.mark.parametrize("least", [1, 1e-9])
@pytest.mark.parametrize("seed", range(6))
def test_logit_selection_follows_the_prices_of_whole_inverses(seed, least):
    """What it keeps up to date by rank-1 terms, here from scratch for every removal.

    Without directions of little variance none is cheap; with them, the ridge decides.
    """
    generator = torch.Generator().manual_seed(seed)

    def second_moment():
        x, mix = (torch.randn(size, 14, generator=generator).double() for size in (30, 14))
        x = x * torch.logspace(0, math.log10(least) / 2, 14) @ torch.linalg.qr(mix).Q
        return (x.mT @ x / 30)[None]

    query, key = second_moment(), second_moment()

    def kept_energy(left):
        projections = [
            side[0][:, left] @ torch.linalg.solve(damped(side)[0][left][:, left], side[0][left])
            for side in (query, key)
        ]
        return float((projections[0] * projections[1]).sum())

    left, removed = list(range(14)), []
    while len(left) > 2:
        gone = max(left, key=lambda channel: kept_energy([other for other in left if other != channel]))
        left.remove(gone)
        removed.append(gone)
    order = rank_logit_channels(query, key, smallest=2).order[0].tolist()
    assert order == [*left, *reversed(removed)]


def test_selection_keeps_as_many_in_every_head_and_never_two_of_a_kind():
    x = rows(300, 12, 1)
    x[:, 5] = x[:, 4]
    x[:, 9] = 0
    kept = rank_channels(x.T @ x, torch.ones(2, 12).double(), heads=3, smallest=2).kept(2)
    assert kept.shape == (3, 2)
    channels = (kept + torch.tensor([[0], [4], [8]])).flatten().tolist()
    assert not {4, 5} <= set(channels)
    assert 9 not in channels
    logits = rank_logit_channels((x.T @ x)[None], (x.T @ x)[None], smallest=10).kept(10)
    assert not {4, 5} <= set(logits[0].tolist())
    assert 9 not in logits[0].tolist()


def test_many_channels_go_at_once_at_little_loss():
    generator = torch.Generator().manual_seed(0)
    x = (
        torch.randn(400, 120, generator=generator).double()
        @ torch.randn(120, 120, generator=generator).double()
    )
    columns, second = torch.randn(9, 120, generator=generator).double(), x.T @ x

    kept = rank_channels(second, columns, heads=1, smallest=60).kept(60)[0]
    order = torch.randperm(120, generator=generator)[:60]
    strongest = (x.norm(dim=0) * columns.norm(dim=0)).sort(descending=True).indices[:60]
    left, *others = (refit_error(x, columns, some) for some in (kept, order, strongest))
    assert left < 0.9 * min(others)
