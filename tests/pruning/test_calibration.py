"""Calibration against hooks and gradients written out."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

import pytest
import torch
from torch.autograd.functional import jacobian

from helpers.models import ModelCase, build, image, relative
from mhacut.errors import MhacutError
from mhacut.linalg.moments import Moments
from mhacut.pruning.calibrate import HELD_OUT, calibrate
from mhacut.pruning.fisher import SHRINKAGE
from mhacut.pruning.preserve import Preserved
from mhacut.runtime.distributed import Processes
from mhacut.surgery.features import find_token_map
from mhacut.surgery.find import find_prunable_layers
from properties.cases import CASES, VITS

SMALL = {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 16, "patch_size": 8, "num_classes": 5}
TINY = ModelCase("vit_tiny_patch16_224", SMALL)
each_case = pytest.mark.parametrize("case", VITS.values(), ids=VITS.keys())


class Calibrated:
    def __init__(self, case=TINY, images=9, classifier=True, **options):
        self.model = build(case, dtype=torch.float64).requires_grad_(False)
        if not classifier:
            self.model.num_classes = 0  # its outputs are features then
        self.images = image(case, batch=images, dtype=torch.float64)
        self.prunable = find_prunable_layers(self.model)
        self.found = self.run(**options)

    def run(self, **options):
        return calibrate(self.model, self.prunable, self.images, **{"batch_size": 4, **options})


def same(found, expected, bound=1e-5):
    # Products are taken in float32; totals of centred keys are 0 but for rounding.
    size = float(expected.second.abs().max())
    assert found.rows == expected.rows
    assert float((found.second - expected.second).abs().max()) <= bound * size
    assert float((found.total - expected.total).abs().max()) <= bound * (size * expected.rows) ** 0.5


def moments(x):
    return Moments(x.shape[-2], x.sum(-2), x.mT @ x)


KINDS = (("attn", "qk"), ("attn", "v"), ("mlp", "hidden"))


def activations(it, block):
    """Queries and centred keys [H, B, N, d], inputs of the projection and of the MLP's second layer."""
    seen = {}
    hooks = [
        block.attn.qkv.register_forward_hook(lambda m, i, o: seen.update(qkv=o)),
        block.attn.proj.register_forward_pre_hook(lambda m, i: seen.update(output=i[0])),
        block.mlp.fc2.register_forward_pre_hook(lambda m, i: seen.update(hidden=i[0])),
    ]
    it.model(it.images)
    [hook.remove() for hook in hooks]
    q, k, _ = seen["qkv"].reshape(len(it.images), 5, 3, 3, 8).permute(2, 3, 0, 1, 4)
    return q, k - k.mean(2, keepdim=True), seen["output"], seen["hidden"]


def test_moments_are_those_of_what_hooks_see():
    it = Calibrated()
    q, k, outputs, hidden_rows = activations(it, it.model.blocks[1])
    assert torch.allclose(it.found.teacher.double(), it.model(it.images), atol=1e-5)
    held = it.found.held
    assert held == round(HELD_OUT * 9) == 2
    for name, part in (("held", slice(0, held)), ("fit", slice(held, None)), ("every", slice(None))):
        got = {kind: getattr(it.found.moments[f"blocks.1.{kind[0]}", kind[1]], name) for kind in KINDS}
        query, key = got["attn", "qk"]
        same(query, moments(q[:, part].flatten(1, 2)))
        same(key, moments(k[:, part].flatten(1, 2)))
        (output,), (hidden,) = got["attn", "v"], got["mlp", "hidden"]
        same(output, moments(outputs[part].flatten(0, 1)))
        same(hidden, moments(hidden_rows[part].flatten(0, 1)))


@each_case
def test_batches_make_no_difference(case):
    it = Calibrated(case, images=5, batch_size=5)
    other = it.run(batch_size=2)
    assert other.held == it.found.held
    assert relative(other.teacher, it.found.teacher) < 1e-5
    for key, unit in it.found.moments.items():
        for part in ("fit", "held"):
            for one, another in zip(getattr(unit, part), getattr(other.moments[key], part), strict=True):
                same(another, one)
        statistics, others = it.found.statistics[key], other.statistics[key]
        assert torch.allclose(statistics.redundancy, others.redundancy, atol=1e-5)
        assert torch.allclose(statistics.difference, others.difference, rtol=1e-4)


def test_outputs_that_are_not_finite_are_refused():
    it = Calibrated()
    it.model.head.bias[0] = float("nan")
    with pytest.raises(MhacutError, match=r"not finite.*mean"):
        it.run()


def test_a_single_image_serves_for_both():
    it = Calibrated(images=1, fisher_images=1)
    assert it.found.held == 0
    assert it.found.teacher.shape == (1, 5)
    for unit in it.found.moments.values():
        assert [side.rows for side in unit.fit] == [side.rows for side in unit.held]
        assert all(torch.equal(a.second, b.second) for a, b in zip(unit.fit, unit.held, strict=True))


def test_the_model_is_left_as_it_was():
    it = Calibrated()
    before = {name: tensor.clone() for name, tensor in it.model.state_dict().items()}
    it.run(fisher_images=9)
    assert all(torch.equal(tensor, before[name]) for name, tensor in it.model.state_dict().items())
    assert all(parameter.grad is None for parameter in it.model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in it.model.modules())


# --- fisher ---


def outputs_under(it, layer, images, errors):
    handle = it.model.get_submodule(layer).register_forward_hook(lambda m, i, output: output + errors)
    try:
        return it.model(images)
    finally:
        handle.remove()


@pytest.mark.parametrize("classifier", [True, False])
def test_fisher_is_that_of_autograd_for_one_draw(classifier):
    it = Calibrated(batch_size=9, fisher_images=9, seed=3, classifier=classifier)
    fitted = it.images[it.found.held :]
    noise = torch.randn(len(fitted), 5, generator=torch.Generator().manual_seed(3)).double()
    dense = it.model(fitted)
    for layer in it.prunable.layers:
        errors = torch.zeros(len(fitted), 5, 24, dtype=torch.float64, requires_grad=True)
        moved = outputs_under(it, layer.name, fitted, errors)
        if classifier:
            aim = (noise * dense.softmax(-1).sqrt() * moved.log_softmax(-1)).sum()
        else:
            aim = (noise * moved).sum() * (2 / (5 * dense.var())) ** 0.5
        (gradient,) = torch.autograd.grad(aim, errors)
        expected = torch.einsum("bti,btj->ij", gradient, gradient) / len(fitted)
        assert relative(it.found.fisher.matrices[layer.name], expected) < 1e-4
        influence = gradient.square().sum((0, 2))  # a token counts as much as its gradients say
        importance = SHRINKAGE + (1 - SHRINKAGE) * influence / influence.mean()
        weights = it.found.fisher.token_importance(layer.name, (2, 5), images=2)
        assert relative(weights, importance.repeat(2)) < 1e-4


@pytest.mark.parametrize("classifier", [True, False])
def test_fisher_is_the_information_of_the_output_on_average(classifier):
    # By its definition: J^T F J of every token, F that of the class logits; one image, seen often enough.
    it = Calibrated(images=2, classifier=classifier)
    x = it.images[1:]
    draws = x.expand(600, -1, -1, -1)
    found = calibrate(it.model, it.prunable, draws, batch_size=600, fisher_images=600)
    dense = it.model(x)
    # Features are judged relative to their variance over the batch.
    variance = it.model(draws).var()
    for layer in it.prunable.layers:
        errors = torch.zeros(1, 5, 24, dtype=torch.float64)
        slopes = jacobian(lambda e, name=layer.name: outputs_under(it, name, x, e)[0], errors)[:, 0]
        p = dense.softmax(-1)[0]
        metric = torch.diag(p) - torch.outer(p, p) if classifier else 2 * torch.eye(5) / (5 * variance)
        expected = torch.einsum("cti,cd,dtj->ij", slopes, metric.double(), slopes)
        assert (found.fisher.matrices[layer.name] - expected).norm() < 0.15 * expected.norm()


@pytest.mark.parametrize("images", [2, 9])
def test_images_held_out_are_never_differentiated(images):
    it = Calibrated(images=images, fisher_images=images)
    assert it.found.fisher.matrices.keys() == {layer.name for layer in it.prunable.layers}
    it.images[: it.found.held] += 1
    other = it.run(fisher_images=images)
    for layer, fisher in it.found.fisher.matrices.items():
        assert torch.equal(other.fisher.matrices[layer], fisher)


class Meeting(Processes):
    """One of two processes, here threads, that add up their tensors once both have given them."""

    barrier = threading.Barrier(2, timeout=60)
    given: ClassVar[dict[int, dict[str, torch.Tensor]]] = {}

    def summed(self, tensors):
        self.given[self.rank] = dict(tensors)
        self.barrier.wait()
        names = dict.fromkeys([*self.given[0], *self.given[1]])
        found = {
            name: torch.stack([part[name] for part in self.given.values() if name in part]).sum(0)
            for name in names
        }
        self.barrier.wait()  # before either tells more
        return found


def calibrated_by_two_and_by_one(model, images, **given):
    def run(processes):
        own = copy.deepcopy(model)  # the other listens to its own
        given_to_all = {"fisher_images": 6, "processes": processes, **given}
        return calibrate(own, find_prunable_layers(own), images, **given_to_all)

    with ThreadPoolExecutor(2) as threads:
        both = list(threads.map(run, [Meeting(rank, 2, torch.device("cpu")) for rank in (0, 1)]))
    return both, run(None)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 16])
@pytest.mark.parametrize("name", ["attention.Attention", "attention.SeparateFocusedAttention, pvt v2"])
def test_processes_that_share_the_images_find_what_one_finds(name, batch_size):
    """Random projections included; a process may have no batch of a kind, or none at all."""
    model, images = build(CASES[name]).requires_grad_(False), image(CASES[name], batch=9)
    both, alone = calibrated_by_two_and_by_one(model, images, batch_size=batch_size)
    shared = both[0]
    assert all(torch.equal(*pair) for pair in zip(*(it.teacher for it in both), strict=True))
    assert torch.allclose(shared.teacher, alone.teacher, rtol=1e-5, atol=1e-6)
    assert shared.held == alone.held
    assert alone.fisher.matrices
    assert alone.fisher.importance
    for layer, expected in alone.fisher.matrices.items():
        assert relative(shared.fisher.matrices[layer], expected) < 1e-5
    for layer, grids in alone.fisher.importance.items():
        for grid, expected in grids.items():
            assert relative(shared.fisher.importance[layer][grid], expected) < 1e-5
    for key, expected in alone.moments.items():
        for part in ("fit", "held"):
            for pair in zip(getattr(shared.moments[key], part), getattr(expected, part), strict=True):
                same(*pair)
        for name in ("redundancy", "difference"):
            assert relative(*(getattr(it.statistics[key], name) for it in (shared, alone))) < 1e-4


@pytest.mark.parametrize("batch_size", [2, 16])
def test_processes_that_share_the_images_whiten_dense_features_alike(batch_size):
    model, images = build(TINY).requires_grad_(False), image(TINY, batch=9)
    features = find_token_map(model, find_prunable_layers(model), images[:1])
    given = {"batch_size": batch_size, "preserved": Preserved("tokens", "dense", features)}
    both, alone = calibrated_by_two_and_by_one(model, images, **given)
    assert alone.teacher.shape == (9, 5 * 24)
    for shared in both:
        assert relative(shared.teacher, alone.teacher) < 1e-4
        for layer, expected in alone.fisher.matrices.items():
            assert relative(shared.fisher.matrices[layer], expected) < 1e-3


# --- how much tokens count ---


def test_moments_weigh_queries_and_outputs_as_tokens_count_but_not_keys():
    it = Calibrated(fisher_images=9)
    q, k, outputs, hidden_rows = activations(it, it.model.blocks[0])
    attn, mlp = (
        it.found.fisher.token_importance(f"blocks.0.{name}", (9, 5), images=9) for name in ("attn", "mlp")
    )
    assert attn.std() > 0.1  # else nothing is tested
    assert mlp.std() > 0.1

    def weighted(x, weights):
        return Moments(45, weights @ x, x.mT @ (weights[:, None] * x))

    found = {kind: it.found.moments[f"blocks.0.{name}", kind].every for name, kind in KINDS}
    same(found["qk"][0], weighted(q.reshape(3, 45, 8), attn))
    same(found["qk"][1], weighted(k.reshape(3, 45, 8), torch.ones_like(attn)))
    same(found["v"][0], weighted(outputs.reshape(45, 24), attn))
    same(found["hidden"][0], weighted(hidden_rows.reshape(45, -1), mlp))


def test_tokens_all_count_alike_where_that_is_asked_for_or_nothing_is_known():
    it = Calibrated(fisher_images=9, token_importance=False)
    assert it.found.fisher.matrices
    plain = it.run()
    for key, expected in plain.moments.items():
        for found, wanted in zip(it.found.moments[key].every, expected.every, strict=True):
            same(found, wanted)
    assert it.found.fisher.token_importance("blocks.0.attn", (9, 5), images=9) is None


def test_rows_that_are_laid_out_otherwise_than_the_output_count_alike():
    it = Calibrated(fisher_images=9)
    assert it.found.fisher.token_importance("blocks.0.attn", (9, 5), images=9) is not None
    assert it.found.fisher.token_importance("blocks.0.attn", (9, 1, 5), images=9) is None
    assert it.found.fisher.token_importance("blocks.0.attn", (18, 5), images=9) is None
    assert it.found.fisher.token_importance("blocks.0.attn", (10, 5), images=9) is None
    assert it.found.fisher.token_importance("head", (9, 5), images=9) is None


def test_a_layer_that_runs_on_several_grids_weighs_all_their_tokens_together():
    args = {"embed_dims": (16,) * 4, "serial_depths": (1,) * 4, "parallel_depth": 1}
    case = ModelCase("coat_tiny", {"img_size": 64, **args})
    model, images = build(case, dtype=torch.float64), image(case, dtype=torch.float64, batch=6)
    found = calibrate(model, find_prunable_layers(model), images, batch_size=6, fisher_images=6).fisher
    layer, grids = next((layer, grids) for layer, grids in found.importance.items() if len(grids) > 1)
    assert torch.cat(list(grids.values())).mean() == pytest.approx(1)
    for grid, weights in grids.items():
        assert torch.equal(
            found.token_importance(layer, (6 * grid[0], *grid[1:]), images=6), weights.repeat(6)
        )
        assert weights.mean() != pytest.approx(1, rel=1e-2)
