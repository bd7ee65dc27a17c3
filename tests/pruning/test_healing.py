"""Healing block by block against least squares and slow forward passes."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mhacut
from helpers.flatten import FLATTEN
from helpers.healing import CASES, HELD, MERGING, SWIN, VIT, Bench
from helpers.jobs import job_of
from helpers.models import build, slow_but
from mhacut.adapters.base import Layer
from mhacut.options.prune import EFFORTS, SearchOptions
from mhacut.pruning import recover as heal
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.fisher import SHRINKAGE, FisherInformation
from mhacut.pruning.recover import blocks_of, healed
from mhacut.pruning.resumable import ResumableModel
from mhacut.surgery.find import PrunableLayers, find_prunable_layers
from mhacut.surgery.tokens import set_merged
from properties.cases import MODELS


def calls_of(model, name, images):
    calls = []
    handle = model.get_submodule(name).register_forward_hook(
        lambda module, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )
    model(images)
    handle.remove()
    (call,) = calls
    return call


def held_out_error(bench, block, output, aim, last):
    """The error that healing judges by, from its definition; the sum of squares is done in loops."""
    dim = block.layer.channel_dim
    output, aim = (tensor.movedim(dim, -1).flatten(1, -2) for tensor in (output, aim))  # (B, tokens, C)
    variance = aim[HELD:].flatten(0, 1).var(0, correction=0)
    weights = torch.ones(aim.shape[1]).double()
    for grid, importance in bench.calibration.fisher.importance[block.layer.name].items():
        if grid == (1, aim.shape[1]):
            weights = importance - SHRINKAGE if last else importance
    total = 0.0
    for missing in (output - aim)[:HELD]:
        for token, weight in zip(missing, weights, strict=True):
            total += float(weight * (token.square() / variance).sum())
    return total


def test_blocks_hold_attention_and_mlp():
    def names(case):
        return [block.name for block in blocks_of(find_prunable_layers(build(case)))]

    assert names(VIT) == ["blocks.0", "blocks.1"]
    assert names(SWIN) == ["layers.0.blocks.0", "layers.1.blocks.0", "layers.1.blocks.1"]
    assert names(FLATTEN["flatten_pvt_tiny"]) == ["block1.0", "block2.0", "block3.0", "block4.0"]


@pytest.mark.parametrize(
    ("layers", "expected"),
    [
        # No MLP anywhere.
        ({"a.attn": "attention", "b.attn": "attention"}, {"a.attn": "a.attn", "b.attn": "b.attn"}),
        # Two of one family in a block, which is named by the last layer.
        ({"a.attn": "attention", "a.x.m": "mlp", "a.y.m": "mlp", "b.attn": "attention", "b.mlp": "mlp"},
         {"a": "a.y.m", "b": "b.mlp"}),
        # Attention beside blocks, in what holds them.
        ({"s.0.attn": "attention", "s.0.mlp": "mlp", "s.cross": "attention"},
         {"s.0": "s.0.mlp", "s.cross": "s.cross"}),
        ({"a1.attn": "attention", "a1.mlp": "mlp", "a.attn": "attention", "a.mlp": "mlp"},
         {"a1": "a1.mlp", "a": "a.mlp"}),
    ],
)  # fmt: skip
def test_what_a_block_is(layers, expected):
    prunable = PrunableLayers(
        tuple(Layer(name, SimpleNamespace(family=family), ()) for name, family in layers.items()), ()
    )
    assert {block.name: block.layer.name for block in blocks_of(prunable)} == expected


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
@pytest.mark.slow
def test_each_block_is_nearer_to_the_dense_one_on_held_out_images_or_as_it_was(case):
    bench = Bench(CASES[case])
    model = bench.healed()
    blocks, better = blocks_of(find_prunable_layers(bench.slim)), 0
    for number, block in enumerate(blocks):
        # What the healed blocks before it give.
        args, kwargs, after = calls_of(model, block.name, bench.images)
        _, _, aim = calls_of(bench.dense, block.name, bench.images)
        before = bench.slim.get_submodule(block.name)(*args, **kwargs)
        last = number == len(blocks) - 1
        then, now = (held_out_error(bench, block, output, aim, last) for output in (before, after))
        assert now <= then
        if torch.equal(before, after):
            continue
        assert now < then
        better += 1
    assert better > len(blocks) / 2
    assert bench.divergence(model) < bench.divergence(bench.slim)
    assert bench.reporter.steps[-1] == (len(blocks), len(blocks))
    for module in (*model.modules(), *bench.dense.modules()):
        assert "forward" not in vars(module)
        assert not module._forward_hooks
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "blocks", "by_token"),
    [
        ("davit.WindowAttention", ["stages.0.blocks.0.0", "stages.1.blocks.0.0"], True),
        ("edgenext.CrossCovarianceAttn, model", ["stages.1.blocks.1", "stages.3.blocks.1"], False),
    ],
)
def test_errors_are_weighted_by_channel_where_a_block_gives_maps_around_layers_on_tokens(
    monkeypatch, name, blocks, by_token
):
    errors = {}
    monkeypatch.setattr(
        heal, "_train", lambda model, name, unseen, fit, error, *_: errors.update({name: error})
    )
    bench = Bench(MODELS[name])
    bench.healed()
    for block in blocks:
        _, _, aim = calls_of(bench.dense, block, bench.images)  # (B, C, H, W)
        variance = aim[HELD:].var((0, 2, 3), correction=0)
        torch.testing.assert_close(errors[block].channels, 1 / variance)
        assert (errors[block].tokens is not None) == by_token


@torch.no_grad()
def test_nothing_but_blocks_is_changed_and_the_given_model_not_at_all():
    bench = Bench(VIT)
    before = copy.deepcopy(bench.slim.state_dict())
    after = bench.healed().state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in bench.slim.state_dict().items())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all(name.startswith("blocks.") for name in changed)


@torch.no_grad()
def test_the_seed_decides_the_bytes():
    bench = Bench(VIT, dtype=torch.float32)
    first, again, other = (bench.healed(seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


@torch.no_grad()
@pytest.mark.parametrize(("steps", "lr"), [(1, 10.0), (4, 1e200)])
def test_what_does_not_help_or_diverges_is_put_back(steps, lr):
    bench = Bench(VIT)
    before, after = bench.slim.state_dict(), bench.healed(steps=steps, lr=lr).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_a_block_that_already_gives_what_the_dense_one_gives_is_not_trained():
    bench = Bench(VIT)
    before, after = bench.dense.state_dict(), bench.healed(bench.dense).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_weights_that_blocks_share_are_not_trained():
    bench = Bench(VIT)
    shared = bench.slim.blocks[0].norm1
    bench.slim.blocks[1].norm1 = shared
    model = bench.healed()
    assert model.blocks[1].norm1 is model.blocks[0].norm1
    assert torch.equal(model.blocks[0].norm1.weight, shared.weight)
    assert not torch.equal(model.blocks[0].norm2.weight, bench.slim.blocks[0].norm2.weight)


@torch.no_grad()
def test_blocks_that_run_twice_are_left_alone():
    bench = Bench(VIT)
    for model in (bench.dense, bench.slim):
        model.blocks = nn.Sequential(model.blocks[0], model.blocks[0], model.blocks[1])
    bench.prunable = find_prunable_layers(build(VIT))
    model = copy.deepcopy(bench.slim)
    job = job_of(
        bench.dense, bench.images, prunable=bench.prunable, options=SearchOptions(heal_steps=2, batch_size=8)
    )
    layers = tuple(layer for layer in bench.prunable.layers if layer.name.startswith("blocks.0"))
    found = healed(model, PrunableLayers(layers, ()), job, bench.calibration)
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("bytes_left", [1, 10**9])
@torch.no_grad()
def test_memory_bounds_the_number_of_images(bytes_left):
    bench, runs = Bench(VIT), []
    handle = bench.dense.blocks[1].register_forward_pre_hook(lambda _, args: runs.append(len(args[0])))
    bench.healed(most_bytes=bytes_left)
    handle.remove()
    assert sum(runs[1:]) == (2 if bytes_left == 1 else 16)  # the first run finds the blocks


@pytest.mark.parametrize("name", ["class token", "windows", "channels first"])
@torch.no_grad()
def test_what_waits_for_an_image_is_bounded_closely(name):
    bench = Bench(CASES[name])
    one, blocks = bench.images[:1], blocks_of(find_prunable_layers(bench.slim))
    blocks, bound = heal._comparable(bench.slim, bench.dense, blocks, one)
    with ResumableModel(bench.slim, [one]) as slim, ResumableModel(bench.dense, [one]) as dense:
        waiting = []
        for block in blocks:
            slim.run_up_to(block.name)
            dense.run_through(block.name)
            waiting.append(slim.nbytes + dense.nbytes)
    assert bound / 3 < max(waiting) <= bound


# --- a linear block: the optimum is known ---


class Toy(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block, self.head = block, nn.Linear(3, 2)

    def forward(self, images):
        return self.head(self.block(images.flatten(2).mT).mean(1))


class Curved(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.outer(torch.tanh(self.inner(x)))


class Overwriting(nn.Linear):
    """A linear layer that spoils what it was given."""

    def forward(self, x):
        output = super().forward(x.clone())
        x.zero_()
        return output


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("kind", [nn.Linear, Overwriting])
@torch.no_grad()
def test_a_linear_block_comes_to_the_least_squares_optimum(kind, weighted):
    torch.manual_seed(0)
    dense, slim = (Toy(block).double().requires_grad_(False) for block in (Curved(), kind(4, 3)))
    images = torch.randn(60, 4, 2, 2).double()
    layer = Layer("block", SimpleNamespace(family="mlp"), ())
    prunable = PrunableLayers((layer,), ())
    importance = torch.tensor([0.5, 2.5, 0.75, 0.25]).double() + SHRINKAGE  # the rest nobody reads
    fisher = FisherInformation({}, {"block": {(1, 4): importance}} if weighted else {})
    calibration = Calibration(20, {}, {}, fisher, dense(images))
    job = job_of(
        dense, images, prunable=prunable, options=SearchOptions(heal_steps=400, batch_size=40, seed=0)
    )
    block = healed(slim, prunable, job, calibration, lr=0.05, batch=40).block

    tokens = images[20:].flatten(2).mT  # (B, 4, 4)
    roots = (importance - SHRINKAGE if weighted else torch.ones(4).double()).sqrt().repeat(40)[:, None]
    x = torch.cat([tokens, torch.ones(40, 4, 1).double()], dim=-1).flatten(0, 1)
    expected = torch.linalg.lstsq(roots * x, roots * dense.block(tokens).flatten(0, 1)).solution
    torch.testing.assert_close(block.weight, expected[:4].mT, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.bias, expected[4], rtol=1e-4, atol=1e-5)


# --- merged tokens ---


def test_what_merges_tokens_is_compared_token_by_token():
    """With nothing cut, blocks give what they aim at, whatever was merged before and by whom."""
    bench = Bench(MERGING)
    slim = copy.deepcopy(bench.dense)
    set_merged(slim, (4, 3, 2))
    model = bench.healed(slim)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), slim.parameters(), strict=True))


def test_a_block_aims_at_the_dense_one_with_its_own_merges(monkeypatch):
    bench, seen = Bench(MERGING), []
    set_merged(bench.slim, (4, 0, 2))
    monkeypatch.setattr(heal, "_train", lambda model, name, unseen, *_: seen.append(unseen))
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
    for block, unseen, aim, output in zip(bench.slim.blocks, seen, [*aims], [*outputs], strict=True):
        torch.testing.assert_close(unseen[0].aim, getattr(aim, "x", aim), rtol=0, atol=1e-12)
        found = unseen[0].output(block)
        torch.testing.assert_close(found, getattr(output, "x", output), rtol=0, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("unmerge", [False, True])
def test_healing_helps_a_model_that_merges_tokens(unmerge):
    bench = Bench(MERGING)
    set_merged(bench.slim, (4, 3, 0), unmerge)
    assert bench.divergence(bench.healed(steps=30)) < 0.9 * bench.divergence(bench.slim)


# --- mhacut prune ---


def test_the_effort_decides_unless_steps_are_given():
    assert [SearchOptions(effort=effort).healed_steps for effort in EFFORTS] == [0, 40, 40]
    assert SearchOptions(effort="best", heal_steps=3).healed_steps == 3


@pytest.mark.parametrize("case", slow_but({"sizes"}, ["class token", "sizes"]))
def test_a_run_is_nearer_to_the_dense_model_once_healed(case):
    module, args = build(CASES[case]), dict(CASES[case].args)
    del args["img_size"]
    options = {"model_args": args, "calibration_images": 32, "repair": False, "gain_steps": 0}
    options |= {"latency": False, "flops": "40%", "round_to": 1, "dry_run": True}
    without, result = (mhacut.prune(module, heal_steps=steps, **options) for steps in (0, 20))
    assert "healing" not in without.seconds
    assert "healing" in result.seconds
    assert result.divergence < without.divergence
