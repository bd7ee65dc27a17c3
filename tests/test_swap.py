"""Swaps end where no other would help, by a refit of every choice from scratch."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from mhacut import prune
from mhacut.tensor.selection import rank_channels
from mhacut.tensor.swap import LEAST_GAIN, swap_channels


class Layer:
    """Correlated channels, and what reads them."""

    def __init__(self, seed, heads, channels, sources, out=5, weighed=False):
        generator = torch.Generator().manual_seed(seed)
        size = heads * channels
        common, mixing, own = (
            torch.randn(*shape, generator=generator).double()
            for shape in ((600, sources), (sources, size), (600, size))
        )
        x = common @ mixing + 0.5 * own
        self.heads, self.channels = heads, channels
        self.second = x.T @ x / len(x)
        self.columns = torch.randn(out, size, generator=generator).double()
        root = torch.randn(out, out, generator=generator).double()
        self.metric = root @ root.T if weighed else torch.eye(out).double()

    def greedy(self, width):
        return rank_channels(self.second, self.columns, self.heads, 1).kept(width)

    def swapped(self, width):
        return swap_channels(self.second, self.columns, self.greedy(width), self.metric)

    def error(self, kept):
        """Of the output, once ``kept`` [heads, width] are refitted."""
        places = (torch.as_tensor(kept) + self.channels * torch.arange(self.heads)[:, None]).flatten()
        prediction = torch.linalg.solve(self.second[places][:, places], self.second[places])
        left = self.second - self.second[:, places] @ prediction
        return float((self.metric @ self.columns @ left * self.columns).sum())


def swaps_of(layer, kept):
    """Every choice that differs in one channel of one head."""
    for head, row in enumerate(kept.tolist()):
        for out, into in product(row, set(range(layer.channels)) - set(row)):
            changed = kept.clone()
            changed[head] = torch.tensor([into if channel == out else channel for channel in row])
            yield changed


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("heads", "channels", "width"), [(1, 12, 4), (1, 9, 8), (3, 6, 2), (2, 5, 1)])
def test_no_swap_is_left_that_helps(seed, heads, channels, width, weighed):
    layer = Layer(seed, heads, channels, sources=6, weighed=weighed)
    kept = layer.swapped(width)
    assert kept.shape == (heads, width)
    assert all(row == sorted(set(row)) and set(row) <= set(range(channels)) for row in kept.tolist())
    left = layer.error(kept)
    assert left <= layer.error(layer.greedy(width)) * (1 + 1e-9)
    for other in swaps_of(layer, kept):
        assert layer.error(other) > (1 - LEAST_GAIN - 1e-5) * left


def test_swaps_find_what_greedy_removal_misses():
    found, greedy, best = [], [], []
    for seed in range(12):
        layer = Layer(seed, 1, 10, sources=5)
        found.append(layer.error(layer.swapped(4)))
        greedy.append(layer.error(layer.greedy(4)))
        best.append(min(layer.error([kept]) for kept in combinations(range(10), 4)))
    right = [
        sum(error < 1.001 * least for error, least in zip(errors, best, strict=True))
        for errors in (greedy, found)
    ]
    assert right[1] > right[0]
    assert sum(found) < 0.98 * sum(greedy)


@pytest.mark.parametrize("seed", range(2))
def test_many_at_once_end_there_too(seed):
    layer = Layer(seed, 1, 300, sources=40, out=20)
    kept = layer.swapped(150)
    left = layer.error(kept)
    assert left < 0.995 * layer.error(layer.greedy(150))
    swaps = list(swaps_of(layer, kept))
    chosen = torch.randperm(len(swaps), generator=torch.Generator().manual_seed(seed))[:150]
    assert min(layer.error(swaps[place]) for place in chosen) > (1 - LEAST_GAIN - 1e-5) * left


def test_channels_that_repeat_each_other_are_no_trouble():
    layer = Layer(0, 1, 6, sources=3)
    twice = torch.arange(12) % 6
    kept = (
        swap_channels(layer.second[twice][:, twice], layer.columns[:, twice], torch.tensor([[0, 6, 1]]))[0]
        % 6
    )
    assert len(set(kept.tolist())) == 3


def test_prune_swaps_where_it_is_asked_to(tiny_vit, tmp_path):
    options = {
        "flops": "60%",
        "model": tiny_vit.architecture,
        "model_args": tiny_vit.args,
        "allocation": "uniform",
        "repair_in_order": False,
    }
    found = {
        asked: prune(tiny_vit.path, output=tmp_path / f"{asked}.safetensors", swap_moves=asked, **options)
        for asked in (None, True, False)
    }
    asked_for, left_out = found[True], found[False]
    assert found[None].plan == left_out.plan
    changed = {unit.kind for unit, other in zip(asked_for.plan, left_out.plan, strict=True) if unit != other}
    assert changed == {"hidden"}  # all else is in principal channels
    assert asked_for.plan.widths() == left_out.plan.widths()
    assert "swapping channels" in asked_for.seconds
    assert "swapping channels" not in left_out.seconds
