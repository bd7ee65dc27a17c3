"""Exchanges end where no other would help, by a refit of every choice from scratch."""

from __future__ import annotations

from itertools import combinations, product

import pytest
import torch

from helpers.models import ModelCase, build, image
from mhacut import prune
from mhacut.linalg.exchange import LEAST_GAIN, _Choice, exchange_channels
from mhacut.linalg.reconstruction import output_error
from mhacut.linalg.selection import rank_channels
from mhacut.options.prune import EFFORTS, PruneOptions, SearchOptions
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.candidates import exchanged, find_candidates
from mhacut.surgery.find import find_prunable_layers


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
        self.matrices = root @ root.T if weighed else torch.eye(out).double()

    def greedy(self, width):
        return rank_channels(self.second, self.columns, self.heads, 1).kept(width)

    def exchanged(self, width):
        return exchange_channels(self.second, self.columns, self.greedy(width), self.matrices)

    def error(self, kept):
        """Of the output, once ``kept`` [heads, width] are refitted."""
        places = (torch.as_tensor(kept) + self.channels * torch.arange(self.heads)[:, None]).flatten()
        prediction = torch.linalg.solve(self.second[places][:, places], self.second[places])
        left = self.second - self.second[:, places] @ prediction
        return float((self.matrices @ self.columns @ left * self.columns).sum())


def neighbours_of(layer, kept):
    """Every choice that differs in one channel of one head."""
    for head, row in enumerate(kept.tolist()):
        for out, into in product(row, set(range(layer.channels)) - set(row)):
            changed = kept.clone()
            changed[head] = torch.tensor([into if channel == out else channel for channel in row])
            yield changed


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("heads", "channels", "width"), [(1, 12, 4), (1, 9, 8), (3, 6, 2), (2, 5, 1)])
def test_no_exchange_is_left_that_helps(seed, heads, channels, width, weighed):
    layer = Layer(seed, heads, channels, sources=6, weighed=weighed)
    kept = layer.exchanged(width)
    assert kept.shape == (heads, width)
    assert all(row == sorted(set(row)) and set(row) <= set(range(channels)) for row in kept.tolist())
    left = layer.error(kept)
    assert left <= layer.error(layer.greedy(width)) * (1 + 1e-9)
    for other in neighbours_of(layer, kept):
        assert layer.error(other) > (1 - LEAST_GAIN - 1e-5) * left


def test_exchanges_find_what_greedy_removal_misses():
    found, greedy, best = [], [], []
    for seed in range(12):
        layer = Layer(seed, 1, 10, sources=5)
        found.append(layer.error(layer.exchanged(4)))
        greedy.append(layer.error(layer.greedy(4)))
        best.append(min(layer.error([kept]) for kept in combinations(range(10), 4)))
    right = [
        sum(error < 1.001 * least for error, least in zip(errors, best, strict=True))
        for errors in (greedy, found)
    ]
    assert right[1] > right[0]
    assert sum(found) < 0.98 * sum(greedy)


def test_many_at_once_end_there_too():
    layer = Layer(0, 1, 200, sources=40, out=20)
    kept = layer.exchanged(100)
    left = layer.error(kept)
    assert left < 0.995 * layer.error(layer.greedy(100))
    swaps = list(neighbours_of(layer, kept))
    chosen = torch.randperm(len(swaps), generator=torch.Generator().manual_seed(0))[:150]
    assert min(layer.error(swaps[place]) for place in chosen) > (1 - LEAST_GAIN - 1e-5) * left


def test_channels_that_repeat_each_other_are_no_trouble():
    layer = Layer(0, 1, 6, sources=3)
    twice = torch.arange(12) % 6
    kept = (
        exchange_channels(layer.second[twice][:, twice], layer.columns[:, twice], torch.tensor([[0, 6, 1]]))[
            0
        ]
        % 6
    )
    assert len(set(kept.tolist())) == 3


def test_readers_of_several_places_are_weighed_each():
    layer = Layer(3, 1, 9, sources=5, out=4, weighed=True)
    second_place = torch.randn(4, 9, generator=torch.Generator().manual_seed(9)).double()
    columns = torch.cat([layer.columns, second_place])
    kept = exchange_channels(layer.second, columns.float(), layer.greedy(3), layer.matrices)

    def error(kept):
        return output_error(layer.second, kept[0], columns, layer.matrices)

    left = error(kept)
    assert all(error(other) > (1 - LEAST_GAIN - 1e-5) * left for other in neighbours_of(layer, kept))
    assert left < error(layer.greedy(3))


def test_exchanges_end_where_no_error_is_left(monkeypatch):
    layer = Layer(0, 1, 12, sources=5)
    layer.columns[:, 6:] = 0
    rounds, exchanged, begun = [], _Choice.exchanged, _Choice.__init__

    def rounded_up(choice, *args):
        begun(choice, *args)
        choice.served *= 1 + 1e-6  # as rounding may leave it: more than the whole

    def counted(choice, *places):
        rounds.append(places)
        assert len(rounds) < 50
        return exchanged(choice, *places)

    monkeypatch.setattr(_Choice, "__init__", rounded_up)
    monkeypatch.setattr(_Choice, "exchanged", counted)
    kept = exchange_channels(layer.second, layer.columns, torch.arange(8)[None])
    assert layer.error(kept) == pytest.approx(0, abs=1e-4)


class Unit:
    """An MLP, ranked, and cut to an eighth."""

    def __init__(self, images=64):
        case = ModelCase(
            "vit_tiny_patch16_224",
            {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 32, "patch_size": 8},
        )
        model = build(case).requires_grad_(False)
        self.prunable = find_prunable_layers(model)
        (self.unit,) = self.prunable.units(["hidden"])
        self.module = model.get_submodule(self.unit.layer)
        found = calibrate(model, self.prunable, image(case, batch=images), batch_size=16)
        self.moments = found.moments[self.unit.key]
        (self.candidate,) = find_candidates(
            self.module, self.unit, self.moments, 8, SearchOptions(basis="channel")
        )
        self.width = self.unit.width // 8

    def exchanged(self, width):
        return exchanged(self.module, self.candidate, self.moments, width, None)


def test_exchanges_keep_the_order_but_for_what_changed_sides():
    it = Unit()
    before, after = (
        candidate.ranking.order[0].tolist() for candidate in (it.candidate, it.exchanged(it.width))
    )
    kept = set(after[: it.width])
    assert kept != set(before[: it.width])
    assert after == [c for c in before if c in kept] + [c for c in before if c not in kept]
    assert it.exchanged(it.unit.width) is it.candidate


def test_what_is_seen_in_few_rows_is_not_exchanged(monkeypatch):
    it = Unit(images=8)
    rows = it.moments.fit[0].rows
    for few, same in ((rows / it.unit.width, False), (rows / it.unit.width + 0.01, True)):
        monkeypatch.setattr("mhacut.pruning.candidates.FEW_ROWS", few)
        assert (it.exchanged(it.width) is it.candidate) == same


def test_no_effort_exchanges_unasked():
    for effort in EFFORTS:
        assert not SearchOptions(effort=effort).swaps
        assert not PruneOptions.from_flat(
            checkpoint="m", flops="50%", effort=effort, swap_moves=None
        ).search.swaps
        assert SearchOptions(effort=effort, swap_moves=True).swaps


@pytest.mark.slow
def test_prune_exchanges_where_it_is_asked_to(tiny_vit):
    options = {
        "flops": "60%",
        "model": tiny_vit.architecture,
        "model_args": tiny_vit.args,
        "allocation": "uniform",
        "repair_in_order": False,
        "effort": "fast",
        "calibration_images": 32,
        "dry_run": True,
        "latency": False,
    }
    asked_for, left_out = (prune(tiny_vit.path, swap_moves=asked, **options) for asked in (True, False))
    changed = {unit.kind for unit, other in zip(asked_for.plan, left_out.plan, strict=True) if unit != other}
    assert changed == {"hidden"}  # all else is in principal channels
    assert asked_for.plan.widths() == left_out.plan.widths()
    assert "swapping channels" in asked_for.seconds
    assert "swapping channels" not in left_out.seconds
