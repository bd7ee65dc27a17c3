"""Sequential reconstruction against slow least squares; forward passes that stop and are resumed."""

from __future__ import annotations

import copy
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from helpers.jobs import Recorder
from helpers.models import ModelCase, build, image
from helpers.plans import distillation_of
from mhacut.plan import Plan, UnitPlan
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.fisher import FisherOptions
from mhacut.pruning.resumable import ResumableModel
from mhacut.pruning.sequential import RIDGES, sequentially_reconstructed
from mhacut.runtime.progress import SILENT
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.slice import cut

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 16, "patch_size": 8, "num_classes": 5}
PLAIN = ModelCase("vit_tiny_patch16_224", SMALL)
CASES = {
    "vit": PLAIN,
    "no bias": ModelCase("vit_tiny_patch16_224", {**SMALL, "proj_bias": False}),
    "blocks that take more": ModelCase(
        "vit_small_patch16_rope_224", {**SMALL, "num_heads": 2, "qkv_fused": False}
    ),
    "swin": ModelCase(
        "swin_tiny_patch4_window7_224",
        {
            "depths": (2, 2),
            "embed_dim": 12,
            "num_heads": (2, 2),
            "img_size": 32,
            "window_size": 4,
            "num_classes": 5,
        },
    ),
    "parallel branches": ModelCase(
        "coat_tiny",
        {
            "embed_dims": (16, 16, 16, 16),
            "serial_depths": (1, 1, 1, 1),
            "parallel_depth": 1,
            "img_size": 64,
            "num_classes": 5,
        },
    ),
}
HELD = 6


class Bench:
    def __init__(self, case, images=24):
        self.dense = build(case, dtype=torch.float64).requires_grad_(False)
        self.images = image(case, batch=images, dtype=torch.float64)
        self.prunable = find_prunable_layers(self.dense)
        self.calibration = calibrate(
            self.dense, self.prunable, self.images, batch_size=images, fisher=FisherOptions(images)
        )
        assert self.calibration.held == HELD
        self.slim = copy.deepcopy(self.dense)
        plans = []
        for unit in self.prunable.units():
            kept = tuple(range(unit.width // 2))
            plans.append(UnitPlan(unit.layer, unit.kind, unit.width, (kept,) * unit.heads))
        cut(self.slim, Plan(tuple(plans)))

    def reconstructed(self, images=None, held=HELD, reporter=SILENT, batch_size=16):
        return sequentially_reconstructed(
            self.slim,
            find_prunable_layers(self.slim),
            self.dense,
            self.images if images is None else images,
            replace(self.calibration, held=held),
            batch_size,
            reporter,
        )

    def divergence(self, model):
        return distillation_of(self.dense, self.images).divergence_of(model)


@torch.no_grad()
def test_a_small_batch_size_bounds_the_images_that_are_run_at_once():
    bench, seen = Bench(PLAIN), []
    for model in (bench.dense, bench.slim):
        model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    few, many = bench.reconstructed(batch_size=1), bench.reconstructed()
    assert sorted({*seen}) == [1, 2, 3]
    same = zip(few.parameters(), many.parameters(), strict=True)
    assert all(torch.allclose(one, other, rtol=1e-9, atol=1e-12) for one, other in same)


def runs_of(model, names, images):
    """Name, input and output of each call of these modules."""
    calls = []

    def keep(name):
        return lambda module, args, output: calls.append((name, args[0], output))

    handles = [model.get_submodule(name).register_forward_hook(keep(name)) for name in names]
    model(images)
    for handle in handles:
        handle.remove()
    return calls


def projections(bench):
    """Names of the output projections, in running order; CoaT runs some of them several times."""
    names = [f"{layer.name}.{last}" for layer in bench.prunable.layers for last in ("proj", "fc2")]
    modules = dict(bench.slim.named_modules())
    calls = [name for name, *_ in runs_of(bench.slim, [n for n in names if n in modules], bench.images[:1])]
    return [name for name in calls if calls.count(name) == 1]


def reconstruct_slowly(bench, names):
    """Refit each projection in turn, each from a run of the whole model as it is by then."""
    model = copy.deepcopy(bench.slim)
    for name in names:
        ((_, x, output),) = runs_of(model, [name], bench.images)
        ((_, _, aim),) = runs_of(bench.dense, [name], bench.images)
        missing = (aim - output).flatten(0, -2)
        layer = name.rpartition(".")[0]
        weights = bench.calibration.fisher.token_importance(layer, x.shape[:-1], len(bench.images))
        x = x.flatten(0, -2)
        weights = torch.ones(len(x)).double() if weights is None else weights
        projection = model.get_submodule(name)
        if projection.bias is not None:
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
            projection.weight += found[: projection.weight.shape[1]].mT
            if projection.bias is not None:
                projection.bias += found[-1]
    return model


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
@pytest.mark.slow
def test_each_projection_is_refitted_on_what_those_before_it_give(case):
    bench = Bench(CASES[case])
    names, reporter = projections(bench), Recorder()
    expected = reconstruct_slowly(bench, names)
    found = bench.reconstructed(reporter=reporter)
    assert reporter.steps == [(number + 1, len(names)) for number in range(len(names))]
    torch.testing.assert_close(found(bench.images), expected(bench.images), rtol=1e-6, atol=1e-8)
    assert bench.divergence(found) < 0.9 * bench.divergence(bench.slim)
    for module in (*found.modules(), *bench.dense.modules()):
        assert not module._forward_hooks
        assert "forward" not in vars(module)


HIDDEN_BYTES = (96 + 24 + 48 + 24) * 5 * 8
"""In and out of the widest projection of PLAIN, dense and slim, per image: channels, tokens, float64."""


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
    few = torch.cat([bench.images[:held], bench.images[HELD:][: count - held]])
    expected = bench.reconstructed(images=few, held=held)
    monkeypatch.setattr(f"mhacut.pruning.sequential.{limit}", value)
    found = bench.reconstructed()
    assert torch.equal(found(bench.images), expected(bench.images))
    assert not torch.equal(found(bench.images), bench.slim(bench.images))


@torch.no_grad()
def test_the_given_model_is_left_as_it_was():
    bench = Bench(PLAIN)
    before = copy.deepcopy(bench.slim.state_dict())
    assert bench.reconstructed() is not bench.slim
    assert all(torch.equal(tensor, before[name]) for name, tensor in bench.slim.state_dict().items())


@pytest.mark.parametrize("in_both", [True, False])
@torch.no_grad()
def test_a_projection_that_runs_more_than_once_is_skipped(in_both):
    bench = Bench(PLAIN)

    def run_before(module, args):
        module.fc2(module.act(module.fc1(args[0])))

    for model in (bench.dense, bench.slim) if in_both else (bench.dense,):
        model.blocks[1].mlp.register_forward_pre_hook(run_before)
    reporter = Recorder()
    found = bench.reconstructed(reporter=reporter)
    assert reporter.steps[-1] == (3, 3)
    assert torch.equal(found.blocks[1].mlp.fc2.weight, bench.slim.blocks[1].mlp.fc2.weight)
    assert not torch.equal(found.blocks[0].mlp.fc2.weight, bench.slim.blocks[0].mlp.fc2.weight)


@torch.no_grad()
def test_a_projection_that_the_cut_model_runs_at_other_places_is_skipped():
    bench = Bench(PLAIN)
    # One token more than in the dense model: nothing that could be compared.
    projection = bench.slim.blocks[0].mlp.fc2
    projection.register_forward_pre_hook(lambda module, args: torch.cat([args[0], args[0][:, :1]], dim=1))
    bench.slim.blocks[0].mlp.register_forward_hook(lambda module, args, output: output[:, :-1])
    found = bench.reconstructed()
    assert torch.equal(found.blocks[0].mlp.fc2.weight, projection.weight)
    assert not torch.equal(found.blocks[1].mlp.fc2.weight, bench.slim.blocks[1].mlp.fc2.weight)


# --- passes that are resumed ---


class Times(nn.Module):
    """A factor, and how often it was applied."""

    def __init__(self, factor):
        super().__init__()
        self.weight, self.runs, self.outputs = nn.Parameter(torch.tensor(factor)), 0, []

    def forward(self, x, *, plus=0.0):
        self.runs += 1
        output = x * self.weight + plus
        self.outputs.append(weakref.ref(output))
        return output


class Model(nn.Module):
    """Branches, a module that runs twice, an argument by name and sums between them."""

    def __init__(self):
        super().__init__()
        self.stem, self.left, self.right, self.head = Times(2.0), Times(3.0), Times(5.0), Times(7.0)
        self.twice = nn.Sequential(Times(1.0), Times(2.0))

    def forward(self, x):
        x = self.twice(self.stem(x))
        return self.head(self.twice(self.left(x, plus=1.0) + self.right(x)))


BATCHES = [torch.ones(1), torch.ones(2)]


def reached(model, name):
    (found,) = model.run_to(name)
    assert [len(given) for given, _ in found] == [len(output) for _, output in found] == [1, 2]
    return float(found[0][0][0]), float(found[1][1][0])


def test_all_batches_stop_at_a_module_and_go_on_with_what_it_has_become():
    model = Model()
    names = ("stem", "left", "right", "head")
    with ResumableModel(model, BATCHES) as passes:
        assert reached(passes, "stem") == (1, 2)
        assert reached(passes, "left") == (4, 13)
        model.left.weight.data.mul_(2)
        passes.repeat_target()
        assert reached(passes, "right") == (4, 20)
        assert reached(passes, "head") == (2 * (25 + 20), 7 * 2 * (25 + 20))
    assert [model.get_submodule(name).runs for name in names] == [2, 4, 2, 2]
    assert [module.runs for module in model.twice] == [4, 4]
    assert not any("forward" in vars(module) for module in model.modules())
    assert float(model(BATCHES[0]).detach()) == 7 * 2 * (25 + 20)


def test_calls_on_the_way_are_kept_too():
    with ResumableModel(Model(), BATCHES) as passes:
        found = passes.run_to("stem", "right")
        assert [[(float(x[0]), float(y[0])) for x, y in calls] for calls in found] == [
            [(1, 2), (1, 2)],
            [(4, 20), (4, 20)],
        ]
        assert reached(passes, "head") == (66, 462)


def test_a_run_can_stop_ahead_of_a_module():
    model = Model()
    with ResumableModel(model, BATCHES) as passes:
        assert [(x.tolist(), kwargs) for (x,), kwargs in passes.run_up_to("left")] == [
            ([4.0], {"plus": 1.0}),
            ([4.0, 4.0], {"plus": 1.0}),
        ]
        assert model.left.runs == 0
        with passes.paused():
            assert float(model.left(torch.tensor(2.0)).detach()) == 6
            model.left.weight.data.mul_(2)
        assert reached(passes, "left") == (4, 25)
        assert [float(args[0][0]) for args, _ in passes.run_up_to("right")] == [4, 4]
        assert reached(passes, "head") == (2 * (25 + 20), 7 * 2 * (25 + 20))
    assert model.left.runs == 3
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_module_that_no_batch_comes_to_any_more_is_refused():
    with ResumableModel(Model(), BATCHES) as passes:
        passes.run_to("right")
        with pytest.raises(ValueError, match="does not reach left any more"):
            passes.run_to("left")
        with pytest.raises(ValueError, match="does not reach left any more"):
            passes.run_up_to("left")


def test_of_a_sequential_its_last_output_is_kept():
    model = nn.Sequential(Times(2.0), nn.Sequential(Times(3.0), Times(5.0), Times(7.0)), Times(11.0))
    modules = (model[0], *model[1])

    def alive():
        return [any(ref() is not None for ref in module.outputs) for module in modules]

    with ResumableModel(model, BATCHES[:1]) as passes:
        assert float(passes.run_to("1.2")[0][0][0]) == 30
        assert alive() == [True, False, True, True]
        passes.repeat_target()
        assert float(passes.run_to("1.2")[0][0][0]) == 30
        assert float(passes.run_to("2")[0][0][0]) == 210
        assert alive() == [False, False, False, True]
    assert [module.runs for module in (*modules, model[2])] == [1, 1, 1, 2, 1]


def test_of_a_sequential_that_stops_at_each_module_two_outputs_are_kept():
    """Those of every module on the way would take as much memory as all blocks together."""
    model = nn.Sequential(*(Times(2.0) for _ in range(6)))
    with ResumableModel(model, BATCHES[:1]) as passes:
        for name in range(6):
            passes.run_to(str(name))
            alive = [any(ref() is not None for ref in module.outputs) for module in model]
            assert alive == [name - 1 <= number <= name for number in range(6)]  # its input and output


def test_tensors_that_were_overwritten_are_computed_anew():
    class Adding(Model):
        def forward(self, x):
            x += self.left(x)
            x += self.right(x)
            return x

    model = nn.Sequential(Times(2.0), Adding(), Adding(), Times(7.0))
    with ResumableModel(model, BATCHES) as passes:
        assert reached(passes, "1.left") == (2, 6)
        assert reached(passes, "1.right") == (8, 40)
        model[1].right.weight.data.mul_(2)
        passes.repeat_target()
        assert reached(passes, "2.left") == (88, 264)
        assert reached(passes, "2.right") == (352, 1760)
        assert reached(passes, "3") == (2112, 14784)


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_run_that_fails_leaves_the_model_as_it_was(error):
    model, own = Model(), lambda x: x
    model.head.forward = own

    def fail(*_):
        raise error("on purpose")

    handle = model.right.register_forward_pre_hook(fail)
    with pytest.raises(error, match="on purpose"), ResumableModel(model, BATCHES) as passes:
        passes.run_to("head")
    handle.remove()
    assert [name for name, module in model.named_modules() if "forward" in vars(module)] == ["head"]
    assert model.head.forward is own
