"""Models in lockstep, and the second repair against least squares layer by layer."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.models import Case, build, image
from helpers.plans import distillation_of
from mhacut.plan import Plan, UnitPlan
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.fisher import FisherOptions
from mhacut.pruning.lockstep import run_in_lockstep
from mhacut.pruning.sequential import RIDGES, repair_in_order
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.slice import cut

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 16, "patch_size": 8, "num_classes": 5}
PLAIN = Case("vit_tiny_patch16_224", SMALL)
NO_BIAS = Case("vit_tiny_patch16_224", {**SMALL, "proj_bias": False})
SWIN = Case(
    "swin_tiny_patch4_window7_224",
    {
        "depths": (2, 2),
        "embed_dim": 12,
        "num_heads": (2, 2),
        "img_size": 32,
        "window_size": 4,
        "num_classes": 5,
    },
)
HELD = 6


class Bench:
    def __init__(self, case, images=24):
        self.dense = build(case, dtype=torch.float64).requires_grad_(False)
        self.images = image(case, batch=images, dtype=torch.float64)
        self.prunable = find_prunable_layers(self.dense)
        self.fisher = calibrate(
            self.dense, self.prunable, self.images, batch_size=images, fisher=FisherOptions(images)
        ).fisher
        self.slim = copy.deepcopy(self.dense)
        plans = []
        for unit in self.prunable.units():
            kept = tuple(range(unit.width // 2))
            plans.append(UnitPlan(unit.layer, unit.kind, unit.width, (kept,) * unit.heads))
        cut(self.slim, Plan(tuple(plans)))

    def judge(self, model):
        """By images that ``model`` is right about."""
        return distillation_of(model, self.images)

    def repaired(self, judge=None, **more):
        judge = self.judge(self.dense) if judge is None else judge
        return repair_in_order(self.slim, self.dense, self.images, HELD, self.fisher, judge, **more)


def output_of(model, name, images):
    seen = []
    handle = model.get_submodule(name).register_forward_hook(lambda m, i, o: seen.append((i[0], o)))
    model(images)
    handle.remove()
    return seen[0]


def slowly(bench, names):
    """Each readout in turn, from a whole run of the model as it is by then."""
    model = copy.deepcopy(bench.slim)
    for layer, name in names:
        x, answer = output_of(model, name, bench.images)
        missing = (output_of(bench.dense, name, bench.images)[1] - answer).flatten(0, -2)
        weights = bench.fisher.token_importance(layer, x.shape[:-1], len(bench.images))
        output_projection = model.get_submodule(name)
        x = x.flatten(0, -2)
        if output_projection.bias is not None:
            x = F.pad(x, (0, 1), value=1.0)
        held = len(x) * HELD // len(bench.images)

        def move(rows, ridge, x=x, missing=missing, weights=weights):
            gram = x[rows].mT @ (weights[rows, None] * x[rows])
            damped = gram + ridge * gram.diagonal().mean() * torch.eye(len(gram)).double()
            return torch.linalg.solve(damped, x[rows].mT @ (weights[rows, None] * missing[rows]))

        def left(found, x=x, missing=missing, weights=weights, held=held):
            return float(weights[:held] @ (missing[:held] - x[:held] @ found).square().sum(-1))

        errors = {ridge: left(move(slice(held, None), ridge)) for ridge in RIDGES}
        ridge = min(errors, key=errors.get)
        if errors[ridge] < left(torch.zeros(x.shape[1], missing.shape[1]).double()):
            found = move(slice(None), ridge)
            output_projection.weight += found[: output_projection.weight.shape[1]].mT
            if output_projection.bias is not None:
                output_projection.bias += found[-1]
    return model


@pytest.mark.parametrize("case", [PLAIN, NO_BIAS, SWIN], ids=["vit", "no bias", "swin"])
@torch.no_grad()
def test_each_readout_is_refitted_on_what_those_before_it_give(case):
    bench = Bench(case)
    layers = [layer.name for layer in bench.prunable.layers]
    names = [(layer, f"{layer}.{'proj' if layer.endswith('attn') else 'fc2'}") for layer in layers]
    expected, told = slowly(bench, names), []
    found = bench.repaired(progress=lambda *done: told.append(done))
    assert told == [(number + 1, len(names)) for number in range(len(names))]
    torch.testing.assert_close(found.model(bench.images), expected(bench.images), rtol=1e-6, atol=1e-8)
    assert found.after < 0.9 * found.before
    assert not any(module._forward_hooks for module in (*found.model.modules(), *bench.dense.modules()))


HIDDEN_BYTES = (96 + 24 + 48 + 24) * 5 * 8
"""In and out of the widest readout of PLAIN, dense and slim, per image: channels, tokens, float64."""


@pytest.mark.parametrize(
    ("limit", "value", "count", "held"),
    [
        ("MOST_IMAGES", 8, 8, 2),
        ("MOST_BYTES", 8 * HIDDEN_BYTES, 8, 2),
        ("MOST_BYTES", 9 * HIDDEN_BYTES - 1, 8, 2),
        ("MOST_BYTES", 1, 2, 1),
    ],
)
@torch.no_grad()
def test_of_many_images_some_are_taken_from_both_parts(monkeypatch, limit, value, count, held):
    bench = Bench(PLAIN)
    judge = bench.judge(bench.dense)
    few = torch.cat([bench.images[:held], bench.images[HELD:][: count - held]])
    expected = repair_in_order(bench.slim, bench.dense, few, held, bench.fisher, judge)
    monkeypatch.setattr(f"mhacut.pruning.sequential.{limit}", value)
    found = bench.repaired(judge)
    assert torch.equal(found.model(bench.images), expected.model(bench.images))
    assert found.after == expected.after != found.before


@torch.no_grad()
def test_what_does_not_help_is_left_out():
    bench = Bench(PLAIN)
    before = copy.deepcopy(bench.slim.state_dict())
    found = bench.repaired(judge=bench.judge(bench.slim))
    assert found.model is bench.slim
    assert found.before == pytest.approx(0, abs=1e-9)
    assert found.after > 1e-6
    assert all(torch.equal(tensor, before[name]) for name, tensor in bench.slim.state_dict().items())


@pytest.mark.parametrize("in_both", [True, False])
@torch.no_grad()
def test_a_readout_that_runs_more_than_once_is_left_alone(in_both):
    bench = Bench(PLAIN)

    def run_before(module, args):
        module.fc2(module.act(module.fc1(args[0])))

    for model in (bench.dense, bench.slim) if in_both else (bench.dense,):
        model.blocks[1].mlp.register_forward_pre_hook(run_before)
    told = []
    found = bench.repaired(progress=lambda *done: told.append(done))
    assert told[-1] == (3, 3)
    assert torch.equal(found.model.blocks[1].mlp.fc2.weight, bench.slim.blocks[1].mlp.fc2.weight)
    assert not torch.equal(found.model.blocks[0].mlp.fc2.weight, bench.slim.blocks[0].mlp.fc2.weight)


@torch.no_grad()
def test_a_readout_that_the_cut_model_runs_at_other_places_is_left_alone():
    bench = Bench(PLAIN)
    # Of one image more than the dense model's has: nothing that could be compared.
    output_projection = bench.slim.blocks[0].mlp.fc2
    output_projection.register_forward_pre_hook(
        lambda module, args: torch.cat([args[0], args[0][:, :1]], dim=1)
    )
    bench.slim.blocks[0].mlp.register_forward_hook(lambda module, args, output: output[:, :-1])
    found = bench.repaired()
    assert torch.equal(found.model.blocks[0].mlp.fc2.weight, output_projection.weight)
    assert not torch.equal(found.model.blocks[1].mlp.fc2.weight, bench.slim.blocks[1].mlp.fc2.weight)


# --- lockstep ---


class Chain(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.first, self.second = (nn.Linear(2, 2, bias=False).double() for _ in range(2))
        self.runs = 0
        with torch.no_grad():
            for linear in (self.first, self.second):
                linear.weight.copy_(factor * torch.eye(2))

    def forward(self, x):
        self.runs += 1
        return self.second(self.first(x))


def test_all_batches_stop_together_and_go_on_with_what_was_changed():
    models, batches, seen = (
        [Chain(2.0), Chain(3.0)],
        [torch.full((n, 2), 1.0).double() for n in (1, 2, 3)],
        [],
    )

    def stop(name, inputs, outputs):
        seen.append((name, [[float(part[0, 0]) for part in model] for model in (*inputs, *outputs)]))
        assert [[len(part) for part in model] for model in inputs] == [[1, 2, 3]] * 2
        if name == "first":
            models[0].first.weight.mul_(5)
        return [0] if name == "first" else []

    run_in_lockstep(models, batches, ("first", "second"), stop)
    assert seen == [
        ("first", [[1.0] * 3, [1.0] * 3, [2.0] * 3, [3.0] * 3]),
        ("second", [[10.0] * 3, [3.0] * 3, [20.0] * 3, [9.0] * 3]),
    ]
    assert [model.runs for model in models] == [3, 3]


def test_models_that_run_in_another_order_are_refused():
    models = [Chain(1.0), Chain(1.0)]
    models[1].first, models[1].second = models[1].second, models[1].first
    models[1].forward = lambda x: models[1].first(models[1].second(x))
    with pytest.raises(ValueError, match="first and second"):
        run_in_lockstep(models, [torch.ones(1, 2).double()] * 2, ("first", "second"), lambda *_: ())


def test_models_that_run_on_alone_are_refused():
    models = [Chain(1.0), Chain(1.0)]
    models[1].forward = lambda x: models[1].second(models[1].second(models[1].first(x)))
    told = []

    def run():
        try:
            run_in_lockstep(models, [torch.ones(1, 2).double()] * 2, ("first", "second"), lambda *_: ())
        except ValueError as error:
            told.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(30)  # those at a stop would wait for the others for ever
    assert told
    assert told[0].endswith("nothing more and second")


@pytest.mark.parametrize(("where", "count"), [("stop", 3), ("model", 1)])
def test_an_interrupted_run_leaves_no_thread_in_torch(where, count):
    """Python aborts where one still is as it exits."""
    models, batches = [Chain(1.0)] * count, [torch.ones(1, 2).double()] * count
    left = []

    def interrupted(*_):
        if not left:
            time.sleep(0.2)  # until the caller waits
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.5)
            left.append(1)

    def stop(*_):
        if where == "stop":
            interrupted()
        return ()

    if where == "model":
        models[0].first.register_forward_pre_hook(interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_in_lockstep(models, batches, ("first", "second"), stop)
    assert left == [1]
    assert not any(module._forward_hooks for model in models for module in model.modules())


@pytest.mark.parametrize("where", ["stop", "model"])
def test_an_error_ends_all_threads_and_is_told(where):
    models, batches = [Chain(1.0), Chain(1.0)], [torch.ones(1, 2).double()] * 3
    before = threading.active_count()

    def fail(*_):
        raise ZeroDivisionError("on purpose")

    if where == "model":
        models[1].second.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError, match="on purpose"):
        run_in_lockstep(models, batches, ("first", "second"), fail if where == "stop" else lambda *_: ())
    assert threading.active_count() == before
    assert not any(module._forward_hooks for model in models for module in model.modules())
