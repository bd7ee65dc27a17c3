"""Healing of models that merge tokens, and of several slim models of one dense model."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.healing import CASES, HELD, MERGING, VIT, Bench
from mhacut.pruning import kept_outputs
from mhacut.pruning.kept_outputs import KeptOutputs
from mhacut.surgery.merging import set_merged

# --- merged tokens ---


def test_what_merges_tokens_is_compared_token_by_token():
    """With nothing cut, blocks give what they aim at, whatever was merged before and by whom."""
    bench = Bench(MERGING)
    slim = copy.deepcopy(bench.dense)
    set_merged(slim, (4, 3, 2))
    healed = bench.healed(slim)
    assert all(torch.equal(a, b) for a, b in zip(healed.parameters(), slim.parameters(), strict=True))


def test_a_block_aims_at_the_dense_one_with_its_own_merges(monkeypatch):
    bench, seen = Bench(MERGING), []
    set_merged(bench.slim, (4, 0, 2))
    monkeypatch.setattr("mhacut.pruning.heal._train", lambda model, name, parts, *_: seen.append(parts))
    bench.healed()
    teacher = copy.deepcopy(bench.dense)
    set_merged(teacher, (4, 0, 2))
    outputs, matches = [], []
    for block in bench.slim.blocks:
        block.register_forward_hook(lambda module, args, output: outputs.append(output))
    for block in (bench.slim.blocks[0], bench.slim.blocks[2]):
        block.matcher.register_forward_hook(lambda module, args, output: matches.append(output))
    bench.slim(bench.images[:HELD])
    for block, found in zip((teacher.blocks[0], teacher.blocks[2]), matches, strict=True):
        block.matcher.register_forward_hook(lambda module, args, output, found=found: found)
    aims = []
    for block in teacher.blocks:
        block.register_forward_hook(lambda module, args, output: aims.append(output))
    teacher(bench.images[:HELD])
    assert len(seen) == len(aims) == 3
    for block, (unseen, _), aim, output in zip(bench.slim.blocks, seen, [*aims], [*outputs], strict=True):
        torch.testing.assert_close(unseen[0].aim, getattr(aim, "x", aim), rtol=0, atol=1e-12)
        found = unseen[0].output(block)
        torch.testing.assert_close(found, getattr(output, "x", output), rtol=0, atol=1e-12)


def test_healing_helps_a_model_that_merges_tokens():
    bench = Bench(MERGING)
    set_merged(bench.slim, (4, 3, 0))
    assert bench.divergence(bench.healed(steps=30)) < 0.9 * bench.divergence(bench.slim)


# --- outputs of the dense model that are kept ---


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
