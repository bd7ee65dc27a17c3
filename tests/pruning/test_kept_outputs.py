"""Outputs of the dense model that several slim models are healed towards."""

from __future__ import annotations

import pytest
import torch

from helpers.healing import CASES, MERGING, VIT, Bench
from mhacut.pruning import kept_outputs
from mhacut.pruning.kept_outputs import KeptOutputs
from mhacut.surgery.tokens import set_merged


@pytest.mark.parametrize("name", CASES)
def test_kept_outputs_heal_as_those_computed_again(name):
    """Bit for bit, and the dense model runs for the first slim model alone, but to find the blocks."""
    bench, kept = Bench(CASES[name]), KeptOutputs()
    runs = []
    last = bench.prunable.layers[-1].name
    bench.dense.get_submodule(last).register_forward_hook(lambda _, args, output: runs.append(args[0].shape))
    alone = bench.healed()
    without = len(runs)
    first = bench.healed(kept=kept)
    assert len(runs) == 2 * without
    again = bench.healed(kept=kept)
    assert len(runs) == 2 * without + 1  # of one image, to find the blocks
    for model in (first, again):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


def test_kept_outputs_are_those_before_later_layers_overwrite_them():
    bench, kept = Bench(VIT), KeptOutputs()
    for model in (bench.dense, bench.slim):
        model.blocks[1].register_forward_pre_hook(lambda _, args: (args[0].mul_(2),))
    alone = bench.healed()
    for model in (bench.healed(kept=kept), bench.healed(kept=kept)):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize(("most", "keeps"), [(2 * 5 * 24 * 4, True), (2 * 5 * 24 * 4 - 1, False)])
def test_memory_bounds_what_is_kept(monkeypatch, most, keeps):
    """Two blocks give five tokens of 24 channels each."""
    monkeypatch.setattr(kept_outputs, "MOST_BYTES", 16 * most)
    bench, kept = Bench(VIT, dtype=torch.float32), KeptOutputs()
    bench.healed(kept=kept)
    runs = []
    bench.dense.blocks[1].register_forward_pre_hook(lambda _, args: runs.append(args[0].shape))
    bench.healed(kept=kept)
    assert sum(shape[0] for shape in runs) == (1 if keeps else 1 + 16)  # one to find the blocks


def test_outputs_of_other_batches_are_dropped():
    kept = KeptOutputs()
    outputs = kept.of_batches((4, 4), 1)
    outputs["blocks.0"] = [torch.zeros(4), torch.zeros(4)]
    assert kept.of_batches((4, 4), 1) == outputs
    assert kept.of_batches((4, 2), 1) == {}
    assert kept.of_batches((4, 4), 1) == {}


def test_outputs_with_merged_tokens_are_not_kept():
    """Which tokens the dense model merges depends on the slim one."""
    bench, kept = Bench(MERGING), KeptOutputs()
    plain = bench.healed(kept=kept)
    set_merged(bench.slim, (4, 3, 2))
    merging = bench.healed(kept=kept)
    alone = bench.healed()
    assert all(torch.equal(a, b) for a, b in zip(merging.parameters(), alone.parameters(), strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(merging.parameters(), plain.parameters(), strict=True))
