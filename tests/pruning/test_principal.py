"""Principal bases: a layer turned into one computes what it did, and no other few channels carry more."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.models import build, image, relative
from helpers.moments import noise
from mhacut.linalg.pca import logit_basis, output_basis
from mhacut.linalg.reconstruction import output_error
from mhacut.plan import Plan, UnitPlan
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.unit_moments import rotated
from mhacut.surgery.channels import rotate
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.slice import cut
from properties.cases import CASES, VITS

each_case = pytest.mark.parametrize("case", VITS.values(), ids=VITS.keys())
seeds = st.integers(0, 2**32 - 1)


def rows(heads, count, width, seed):
    """Activations of very unequal directions, [H, count, width]."""
    return (
        noise(heads, count, width, seed=seed)
        * 2.0 ** -torch.arange(width)
        @ noise(heads, width, width, seed=seed + 1)
    )


def energy(x):
    return x.mT @ x / x.shape[-2]


# --- rotation of a layer ---


@each_case
@pytest.mark.parametrize("slim", [False, True], ids=["dense", "slim"])
def test_a_rotated_layer_computes_what_it_did(case, slim):
    model, x = build(case, dtype=torch.float64), image(case, dtype=torch.float64)
    if slim:  # q/k narrower than v, and both cut to widths of their own
        widths = {"qk": 3, "v": 5, "hidden": 7}
        cut(
            model,
            Plan(
                tuple(
                    UnitPlan(u.layer, u.kind, u.width, (tuple(range(widths[u.kind])),) * u.heads)
                    for u in find_prunable_layers(model).units()
                )
            ),
        )
    expected, turned = model(x), 0
    for unit in find_prunable_layers(model).units():
        if unit.mixing == "rotate":
            before = copy.deepcopy(model.state_dict())
            rotate(
                model.get_submodule(unit.layer), unit, noise(unit.heads, unit.width, unit.width, seed=turned)
            )
            changed = {
                name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])
            }
            assert changed == {f"{unit.layer}.{axis.tensor}" for axis in unit.axes}
            turned += 1
    assert relative(model(x), expected) < 1e-8
    assert turned == sum(
        unit.kind != "hidden" and unit.mixing == "rotate" for unit in find_prunable_layers(model).units()
    )


@pytest.mark.parametrize("name", ["levit.Attention", "levit.Attention, convolutions"])
def test_a_bias_in_front_of_a_batch_norm_is_turned_with_it(name):
    model, x = build(CASES[name], dtype=torch.float64), image(CASES[name], dtype=torch.float64)
    turned = 0
    for unit in find_prunable_layers(model).units():
        for axis in unit.axes:
            if axis.norm is not None:
                linear = model.get_submodule(f"{unit.layer}.{axis.tensor.removesuffix('.weight')}")
                linear.bias = torch.nn.Parameter(noise(len(linear.weight), seed=1))
    expected = model(x)
    for unit in find_prunable_layers(model).units():
        if unit.mixing == "rotate":
            basis = noise(unit.heads, unit.width, unit.width, seed=turned)
            rotate(model.get_submodule(unit.layer), unit, basis)
            turned += 1
    assert turned
    assert relative(model(x), expected) < 1e-8


@each_case
def test_moments_follow_a_rotation(case):
    model, images = build(case, dtype=torch.float64).requires_grad_(False), image(case, batch=3)
    images, prunable = images.double(), find_prunable_layers(model)
    found = calibrate(model, prunable, images, batch_size=3).moments
    bases = {
        u.key: noise(u.heads, u.width, u.width, seed=1) for u in prunable.units() if u.mixing == "rotate"
    }
    for key, basis in bases.items():
        rotate(model.get_submodule(key[0]), prunable.unit(key), basis)
    measured = calibrate(model, prunable, images, batch_size=3).moments
    for unit in prunable.units():
        for part in ("fit", "held"):
            expected = getattr(measured[unit.key], part)
            for mine, seen in zip(
                getattr(rotated(found[unit.key], unit, bases.get(unit.key)), part), expected, strict=True
            ):
                assert mine.rows == seen.rows
                assert relative(mine.second, seen.second) < 1e-4
                size = seen.rows * float(seen.energy.abs().max()) ** 0.5  # keys are centred: total 0
                assert float((mine.total - seen.total).abs().max()) < 1e-4 * size


# --- the basis of the logits ---


@given(seed=seeds, width=st.integers(1, 6))
def test_the_first_logit_channels_leave_the_tail_of_the_singular_values(seed, width):
    query, key = energy(rows(2, 40, 6, seed)), energy(rows(2, 40, 6, seed + 9))
    basis = logit_basis(query, key)
    inverse = torch.linalg.inv(basis).mT
    turned = basis @ query @ basis.mT, inverse @ key @ inverse.mT
    sizes = singular(query, key)
    # Both sides come out uncorrelated, with the same energy per channel: that of the logits' singular values.
    for side in turned:
        assert relative(side, torch.diag_embed(sizes)) < 1e-5
    left = (turned[0] * turned[1])[:, width:, width:].sum()
    assert float(left) == pytest.approx(float(sizes[:, width:].square().sum()), rel=1e-4, abs=1e-12)


def singular(query, key):
    """Of R_q R_k per head, as q k^T has them when q and k are independent, [H, d]."""
    return torch.linalg.eigvals(query @ key).real.clamp_min(0).sqrt().sort(dim=-1, descending=True).values


def test_a_single_key_leaves_a_basis_that_single_precision_holds():
    query = energy(rows(2, 40, 6, 0))
    basis = logit_basis(query, torch.zeros_like(query))
    for matrix in (basis, torch.linalg.inv(basis)):
        assert 0 < float(matrix.abs().max()) < 1e15
    assert relative(torch.linalg.inv(basis) @ basis, torch.eye(6).expand(2, -1, -1)) < 1e-4


# --- the basis of the output ---


@given(seed=seeds, width=st.integers(0, 6), outputs=st.sampled_from([2, 4, 6, 9]))
def test_the_first_output_channels_leave_the_tail_of_the_singular_values(seed, width, outputs):
    x, columns = rows(1, 60, 6, seed)[0], noise(outputs, 6, seed=seed + 3)
    second = energy(x)
    basis = output_basis(second[None], columns[:, None])[0]
    assert torch.allclose(basis @ basis.T, torch.eye(6).double(), atol=1e-9)
    assert relative((x @ basis.T) @ (columns @ basis.T).T, x @ columns.T) < 1e-9
    tail = float(torch.linalg.svdvals(x @ columns.T)[width:].square().sum()) / 60
    rounding = 1e-8 * float(second.trace() * columns.square().sum())
    left = output_error(basis @ second @ basis.T, torch.arange(width), columns @ basis.T, None)
    assert left == pytest.approx(tail, rel=1e-3, abs=rounding)
    for shift in range(5):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed % 1000 + shift))
        kept = order[:width].sort().values
        assert output_error(second, kept, columns, None) >= tail * (1 - 1e-6) - rounding


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_channels_that_are_dead_or_repeat_each_other_leave_the_basis_usable(rank):
    x = rows(2, 40, rank, seed=0) @ noise(2, rank, 5, seed=2) if rank else torch.zeros(2, 40, 5).double()
    second = energy(x)
    for basis in (logit_basis(second, second), output_basis(second, noise(7, 2, 5, seed=4))):
        assert basis.isfinite().all()
        assert torch.linalg.inv(basis).isfinite().all()
        assert relative(torch.linalg.inv(basis) @ basis, torch.eye(5).expand(2, -1, -1)) < 1e-4
    turned = (
        output_basis(second, noise(7, 2, 5, seed=4))
        @ second
        @ output_basis(second, noise(7, 2, 5, seed=4)).mT
    )
    for head in range(2):
        left = output_error(turned[head], torch.arange(rank), torch.ones(3, 5).double(), None)
        assert left <= 1e-6 * float(second[head].trace()) * 5
