"""Healing block by block against least squares and slow forward passes."""

from __future__ import annotations

import copy
import gc
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import mhacut
from helpers.flatten import FLATTEN
from helpers.healing import CASES, HELD, SWIN, VIT, Bench
from helpers.jobs import Recorder, job_of
from helpers.models import build, image
from mhacut.adapters.base import Layer
from mhacut.options.prune import EFFORTS, SearchOptions
from mhacut.pruning import recover as heal
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.fisher import SHRINKAGE, FisherInformation
from mhacut.pruning.recover import blocks_of, healed
from mhacut.pruning.resumable import ResumableModel
from mhacut.surgery.find import PrunableLayers, find_prunable_layers
from properties.cases import MODELS


def calls_of(model, name, images):
    """Arguments and output of the one call of a module."""
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
    assert bench.reporter.steps[-1] == (4 * len(blocks), 4 * len(blocks))
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
    monkeypatch.setattr(heal, "_train", lambda model, name, parts, error, *_: errors.update({name: error}))
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
def test_what_does_not_help_is_put_back(monkeypatch):
    monkeypatch.setattr("mhacut.pruning.recover.LR", 10.0)
    bench = Bench(VIT)
    before, after = bench.slim.state_dict(), bench.healed(steps=1).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


@torch.no_grad()
def test_a_block_whose_training_diverges_is_put_back_and_counted_whole(monkeypatch):
    monkeypatch.setattr("mhacut.pruning.recover.LR", 1e200)
    bench = Bench(VIT)
    before, after = bench.slim.state_dict(), bench.healed().state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert bench.reporter.steps[-1] == (8, 8)


@torch.no_grad()
def test_a_block_that_already_gives_what_the_dense_one_gives_is_not_trained():
    bench = Bench(VIT)
    before, after = bench.dense.state_dict(), bench.healed(bench.dense).state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert bench.reporter.steps[-1] == (8, 8)


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
def test_memory_bounds_the_number_of_images(monkeypatch, bytes_left):
    monkeypatch.setattr("mhacut.pruning.recover.MOST_BYTES", bytes_left)
    bench, runs = Bench(VIT), []
    handle = bench.dense.blocks[1].register_forward_pre_hook(lambda _, args: runs.append(len(args[0])))
    bench.healed()
    handle.remove()
    assert sum(runs[1:]) == (2 if bytes_left == 1 else 16)  # the first run finds the blocks


@pytest.mark.parametrize(
    ("name", "most"), [("class token", 10**5), ("windows", 10**6), ("channels first", 10**6)]
)
def test_no_more_waits_than_memory_allows(monkeypatch, name, most):
    monkeypatch.setattr(heal, "MOST_BYTES", most)
    waiting: dict[int, int] = {}
    kept = []

    def counted(run):
        def until(self, module):
            found = run(self, module)
            waiting[id(self)] = self.nbytes
            kept.append(sum(waiting.values()))
            return found

        return until

    def alone(of_one_image):
        def measured(*args):
            found = of_one_image(*args)
            waiting.clear()
            return found

        return measured

    for each in ("run_up_to", "run_to"):
        monkeypatch.setattr(ResumableModel, each, counted(getattr(ResumableModel, each)))
    monkeypatch.setattr(heal, "_bytes_before", alone(heal._bytes_before))
    Bench(CASES[name]).healed()
    assert most / 2 < max(kept) <= most


def test_tensors_of_one_block_wait_at_a_time(monkeypatch):
    """Inputs and aims of a block would take as much memory again while the next one's are computed."""
    alive, run_up_to = [], ResumableModel.run_up_to

    def counted(self, name):
        alive.append(sum(type(found) is heal._Call for found in gc.get_objects()))
        return run_up_to(self, name)

    monkeypatch.setattr(ResumableModel, "run_up_to", counted)
    bench = Bench(VIT)
    bench.healed()
    assert alive == [0] * len(alive)
    assert len(alive) > 2


def test_what_passes_keep_is_counted_once():
    """Of images that are part of a larger tensor, only their own part."""
    model, images = build(VIT), image(VIT, batch=64)
    with ResumableModel(model, [images[:1], images[1:2]]) as passes:
        assert passes.nbytes == images[:2].nbytes
        tokens = passes.run_up_to("blocks.0")[0][0][0]
        # What patch_embed gave, and the tokens with their positions.
        assert passes.nbytes == images[:2].nbytes + 2 * (tokens.nbytes + tokens[:, 1:].nbytes)


# --- a linear block: the optimum is known ---


class Toy(nn.Module):
    """Points as tokens, one block and a head."""

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
def test_a_linear_block_comes_to_the_least_squares_optimum(monkeypatch, kind, weighted):
    monkeypatch.setattr("mhacut.pruning.recover.LR", 0.05)
    monkeypatch.setattr("mhacut.pruning.recover.BATCH", 40)
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
    block = healed(slim, prunable, job, calibration).block

    tokens = images[20:].flatten(2).mT  # (B, 4, 4)
    roots = (importance - SHRINKAGE if weighted else torch.ones(4).double()).sqrt().repeat(40)[:, None]
    x = torch.cat([tokens, torch.ones(40, 4, 1).double()], dim=-1).flatten(0, 1)
    expected = torch.linalg.lstsq(roots * x, roots * dense.block(tokens).flatten(0, 1)).solution
    torch.testing.assert_close(block.weight, expected[:4].mT, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(block.bias, expected[4], rtol=1e-4, atol=1e-5)


# --- mhacut prune ---


def test_the_effort_decides_unless_steps_are_given():
    assert [SearchOptions(effort=effort).healed_steps for effort in EFFORTS] == [0, 40, 150]
    assert SearchOptions(effort="best", heal_steps=3).healed_steps == 3


@pytest.mark.parametrize("case", ["class token", "windows", "sizes"])
@pytest.mark.slow
def test_a_run_keeps_what_helps(monkeypatch, case):
    module, args = build(CASES[case]), dict(CASES[case].args)
    del args["img_size"]
    options = {
        "model_args": args,
        "calibration_images": 32,
        "repair": False,
        "gain_steps": 0,
        "latency": False,
    }

    def prune(reporter, steps):
        return mhacut.prune(
            module, flops="40%", round_to=1, heal_steps=steps, reporter=reporter, dry_run=True, **options
        )

    without = prune(Recorder(), 0)
    assert "healing" not in without.seconds
    for lr, helps in ((1e-3, True), (1e3, False)):
        monkeypatch.setattr("mhacut.pruning.recover.LR", lr)
        reporter = Recorder()
        result = prune(reporter, 20)
        (note,) = (note for note in reporter.messages if note.startswith("healing"))
        assert note.startswith("healing was left out") != helps
        assert (result.divergence < without.divergence) == helps
        assert result.divergence <= without.divergence
        assert "healing" in result.seconds
