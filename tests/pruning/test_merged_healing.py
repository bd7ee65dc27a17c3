"""Healing of models that merge tokens."""

from __future__ import annotations

import copy

import torch

from helpers.healing import HELD, MERGING, Bench
from mhacut.surgery.tokens import set_merged


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
    monkeypatch.setattr("mhacut.pruning.recover._train", lambda model, name, parts, *_: seen.append(parts))
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
