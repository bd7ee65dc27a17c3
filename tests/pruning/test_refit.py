"""Refits of linear readers and of logits against least squares done the slow way."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from helpers.models import relative
from helpers.moments import exact, rows
from mhacut.linalg.moments import Moments, gram
from mhacut.linalg.reconstruction import RIDGES, linear_error, output_error, refit_linear, refit_logits
from mhacut.linalg.selection import rank_channels


def test_moments_add_up_and_centre_as_written_out():
    x = rows(30, 4, 0)
    moments = exact(x[:11]) + exact(x[11:])
    assert torch.allclose(moments.mean, x.mean(0))
    assert torch.allclose(moments.covariance, (x - x.mean(0)).T @ (x - x.mean(0)) / 30)
    centre = torch.tensor([1.0, -2.0, 0.0, 3.0]).double()
    assert torch.allclose(moments.about(centre), (x - centre).T @ (x - centre) / 30)
    assert torch.allclose(Moments.of(x).second, moments.second, rtol=1e-5)


@pytest.mark.parametrize("mean", [0, 300])
def test_rows_count_as_often_as_their_weights_say(mean):
    x = torch.stack([rows(30, 4, 0), rows(30, 4, 1)]) + mean
    counts = torch.randint(0, 4, (30,), generator=torch.Generator().manual_seed(0))
    repeated = exact(x.repeat_interleave(counts, dim=-2))
    weights = counts.double() * 30 / counts.sum()
    found = Moments.of(x, weights)
    assert found.rows == 30
    assert torch.allclose(found.mean, repeated.mean, rtol=1e-6)
    assert torch.allclose(found.energy, repeated.energy, rtol=1e-6)
    assert relative(found.covariance, repeated.covariance) < 1e-4
    halves = Moments.of(x[:, :11], weights[:11]) + Moments.of(x[:, 11:], weights[11:])
    assert torch.allclose(halves.energy, repeated.energy, rtol=1e-6)


@pytest.mark.parametrize("size", [1, 191, 383, 384, 385, 576, 700])
def test_a_gram_matrix_is_the_product_whatever_its_size(size):
    x = torch.randn(2, 9, size, dtype=torch.float64)
    found = gram(x)
    assert torch.allclose(found, torch.einsum("bri,brj->bij", x, x), rtol=1e-12)


@pytest.mark.parametrize("mean", [0, 30, 3000])
def test_a_large_mean_does_not_drown_the_variance(mean):
    x = (rows(500, 6, 0) - torch.arange(6)) @ torch.diag(torch.tensor([1, 1, 0.1, 0.1, 1e-2, 1e-2])).double()
    batches = (x + mean).float().split(120)
    found = sum(map(Moments.of, batches[1:]), Moments.of(batches[0]))
    expected = exact(torch.cat(batches))
    assert torch.allclose(found.mean, expected.mean, rtol=1e-9)
    assert torch.allclose(found.second, expected.second, rtol=1e-6)
    assert relative(found.covariance[4:, 4:], expected.covariance[4:, 4:]) < 1e-4
    # So that nothing seems to be won by keeping less.
    assert rank_channels(found.covariance, torch.ones(3, 6), heads=1, smallest=1).error.min() >= 0


@pytest.mark.parametrize("constant", [True, False])
def test_linear_refit_is_least_squares(constant):
    x, columns = rows(400, 6, 1), torch.randn(3, 6, generator=torch.Generator().manual_seed(2)).double()
    kept, gone = torch.tensor([0, 2, 5]), torch.tensor([1, 3, 4])
    found = refit_linear(exact(x), exact(x), kept, columns, constant=constant)
    inputs = torch.cat([x[:, kept], torch.ones(400, 1).double()], 1) if constant else x[:, kept]
    solution = torch.linalg.lstsq(inputs, x[:, gone]).solution
    assert found.ridge == 1e-9  # nothing is held out here that a ridge could help with
    assert torch.allclose(found.matrix, solution[:3].T, atol=1e-5)
    assert torch.allclose(found.constant, solution[3] if constant else torch.zeros(3).double(), atol=1e-4)
    left = (x[:, gone] - inputs @ solution) @ columns[:, gone].T
    plain = x[:, gone] @ columns[:, gone].T
    assert found.error == pytest.approx(float(left.square().sum() / plain.square().sum()), rel=1e-4)


@given(seed=st.integers(0, 2**31), fitted=st.integers(1, 12), held=st.sampled_from([1, 60]), constant=...)
def test_few_images_never_make_it_worse_than_removing(seed: int, fitted: int, held: int, constant: bool):
    x = rows(held + fitted, 8, seed)
    columns = torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)).double()
    seen, unseen, kept = exact(x[:fitted]), exact(x[fitted:]), torch.tensor([1, 2, 6])
    found = refit_linear(seen, unseen, kept, columns, constant=constant)
    assert found.error <= 1 + 1e-9
    assert found.matrix.isfinite().all()
    if found.error == 1.0:
        assert found.constant.count_nonzero() == found.matrix.count_nonzero() == 0


@given(seed=st.integers(0, 2**31), constant=st.booleans())
@example(seed=759, constant=True)  # the least error is that of channels taken as 0, not as their mean
def test_the_error_of_the_best_ridge_is_that_of_its_rows(seed, constant):
    x = rows(40, 7, seed)
    columns = torch.randn(3, 7, generator=torch.Generator().manual_seed(seed)).double()
    fit, held = x[:25], x[25:]
    for kept in ([0], [1, 4], [0, 2, 3, 5, 6]):
        gone = [channel for channel in range(7) if channel not in kept]
        mean = fit.mean(0) if constant else torch.zeros(7).double()
        inputs, targets = (fit - mean)[:, kept], (fit - mean)[:, gone]
        second = inputs.T @ inputs / len(fit)
        errors = [float((held[:, gone] @ columns[:, gone].T).square().sum() / len(held))]  # taken as 0
        for ridge in (*RIDGES, 1e15):
            damped = second + ridge * second.diagonal().mean() * torch.eye(len(kept)).double()
            predicted = (held - mean)[:, kept] @ torch.linalg.solve(damped, inputs.T @ targets / len(fit))
            left = ((held - mean)[:, gone] - predicted) @ columns[:, gone].T
            errors.append(float(left.square().sum() / len(held)))
        refit = refit_linear(exact(fit), exact(held), torch.tensor(kept), columns, constant=constant)
        assert refit.error_per_row == pytest.approx(min(errors), rel=1e-6)
        error = linear_error(exact(fit), exact(held), columns, constant=constant)
        assert error(torch.tensor(kept)) == pytest.approx(min(errors), rel=1e-6)


def test_held_out_images_far_from_the_mean_have_the_error_of_their_rows():
    fit, held = rows(25, 7, 0) + 1e6, 0.01 * rows(15, 7, 1)
    columns, kept, gone = torch.ones(3, 7).double(), torch.tensor([0, 2]), [1, 3, 4, 5, 6]
    as_zero = float((held[:, gone] @ columns[:, gone].T).square().sum() / len(held))
    refit = refit_linear(exact(fit), exact(held), kept, columns, constant=True)
    assert refit.error_per_row == pytest.approx(as_zero, rel=1e-9)


@given(seed=st.integers(0, 2**31), rank=st.integers(1, 5), width=st.integers(1, 6))
@example(seed=5456975, rank=3, width=3)  # of three directions, one with 6e-7 of the variance of the others
def test_data_that_leaves_the_solution_open_gives_the_least_error_but_for_the_ridge(seed, rank, width):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(50, rank, generator=generator).double() @ rows(rank, 7, seed)
    columns = torch.randn(3, 7, generator=generator).double()
    kept = torch.randperm(7, generator=generator)[:width].sort().values
    gone = torch.tensor([channel for channel in range(7) if channel not in kept.tolist()])
    found = refit_linear(exact(x), exact(x), kept, columns, constant=False)
    error = float(((x[:, gone] - x[:, kept] @ found.matrix.T) @ columns[:, gone].T).square().sum())
    # No solution beats the one of least norm; a ridge solution has an objective not above that one's.
    solution = torch.linalg.lstsq(x[:, kept], x[:, gone], driver="gelsd").solution
    least = float(((x[:, gone] - x[:, kept] @ solution) @ columns[:, gone].T).square().sum())
    penalty = RIDGES[0] * x[:, kept].square().sum(0).mean() * (solution @ columns[:, gone].T).square().sum()
    rounding = 1e-9 * float(x.square().sum() * columns.square().sum())
    assert least - rounding <= error <= least + float(penalty) + rounding
    assert 50 * found.error_per_row == pytest.approx(error, rel=1e-3, abs=rounding)
    promised = 50 * output_error(exact(x).energy, kept, columns, None)
    assert promised == pytest.approx(error, rel=1e-3, abs=rounding)


@given(seed=st.integers(0, 2**31), metric=st.booleans(), width=st.integers(1, 7))
def test_the_error_of_the_output_is_that_of_explicit_least_squares(seed, metric, width):
    x, generator = rows(200, 7, seed), torch.Generator().manual_seed(seed)
    columns, root = (torch.randn(4, size, generator=generator).double() for size in (7, 4))
    kept = torch.randperm(7, generator=generator)[:width].sort().values
    inputs = torch.cat([x[:, kept], torch.ones(200, 1).double()], 1)
    left = (x - inputs @ torch.linalg.lstsq(inputs, x).solution) @ columns.T
    expected = (left @ root).square().sum(1) if metric else left.square().sum(1)
    found = output_error(exact(x).covariance, kept, columns, root @ root.T if metric else None)
    assert found == pytest.approx(float(expected.mean()), rel=1e-4, abs=1e-8 * float(x.square().sum()))


@pytest.mark.parametrize("seed", range(8))
def test_no_error_is_below_zero_where_kept_channels_determine_the_others(seed):
    """Curves have to fall, also where all that is left of an error is rounding, of either sign."""
    x = rows(40, 3, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.cat([x, x @ torch.randn(3, 3, generator=generator).double()], 1)
    columns = torch.randn(2, 6, generator=generator).double()
    assert 0 <= output_error(exact(x).energy, torch.tensor([0, 1, 2]), columns, None) < 1e-12


def test_readers_at_several_places_add_their_errors():
    x, generator = rows(200, 6, 3), torch.Generator().manual_seed(3)
    places, root = torch.randn(3, 4, 6, generator=generator).double(), rows(4, 4, 4)
    second, kept, metric = exact(x).covariance, torch.tensor([1, 4]), root @ root.T
    each = sum(output_error(second, kept, columns, metric) for columns in places)
    assert output_error(second, kept, places.flatten(0, 1), metric) == pytest.approx(each)
    ranked = rank_channels(second, places.flatten(0, 1), 1, 1, metric)
    order = ranked.order[0, :3].sort().values
    alike = sum(output_error(second, order, columns, metric) for columns in places)
    assert float(ranked.error[3]) == pytest.approx(alike, rel=1e-3)


@pytest.mark.parametrize("constant", [True, False])
def test_held_back_images_that_disagree_leave_the_columns_as_they_were(constant):
    x = rows(200, 4, 1) - torch.arange(4)
    other = x.clone()
    x[:, 3], other[:, 3] = x[:, 0] + x[:, 1], -x[:, 0] - x[:, 1]
    columns, kept = torch.ones(2, 4).double(), torch.tensor([0, 1, 2])
    found = refit_linear(exact(x), exact(other), kept, columns, constant=constant)
    assert found.ridge == float("inf")
    assert found.matrix.count_nonzero() == 0
    # What is known of the removed channel is its mean.
    mean = (x[:, 3].mean() + other[:, 3].mean()) / 2 if constant else torch.tensor(0.0)
    assert found.constant.tolist() == pytest.approx([float(mean)], abs=1e-9)
    agreeing = refit_linear(exact(x), exact(x), kept, columns, constant=constant)
    assert agreeing.ridge < 1e-3
    assert agreeing.error < 1e-6


def test_held_back_logits_that_disagree_leave_the_queries_as_they_were():
    q, k = rows(80, 4, 5)[None], rows(80, 4, 6)[None]
    q[..., 3], k[..., 3] = q[..., 0], k[..., 1]
    other = q.clone()
    other[..., 3] *= -1
    kept = torch.tensor([[0, 1, 2]])
    found = refit_logits((exact(q), exact(k)), (exact(other), exact(k)), kept, plain=1.25)
    assert found.ridge == float("inf")
    assert torch.equal(found.matrix, 1.25 * torch.eye(3)[None].double())
    assert found.error == 1.0


def test_fewer_rows_than_channels_do_not_blow_up_what_rounding_left_of_the_rest():
    # In float32, the second moment of 50 rows has eigenvalues about 0, also below.
    generator = torch.Generator().manual_seed(0)
    mix, mean = torch.randn(60, 192, generator=generator), torch.randn(192, generator=generator)
    x = torch.randn(400, 60, generator=generator) @ mix + mean
    columns = torch.randn(96, 192, generator=generator)
    kept, gone = torch.arange(0, 192, 2), torch.arange(1, 192, 2)
    seen = Moments.of(x[:50])
    found = refit_linear(seen, seen, kept, columns, constant=True)
    unseen = x[50:].double()
    left = unseen[:, gone] - unseen[:, kept] @ found.matrix.T - found.constant
    reader = columns[:, gone].double().T
    assert (left @ reader).norm() < (unseen[:, gone] @ reader).norm()
    assert found.matrix.norm() < 100
    heads = Moments.of(x[:50, :64] - x[:50, :64].mean(0))
    heads = Moments(50, heads.total[None], heads.second[None])
    logits = refit_logits((heads, heads), (heads, heads), torch.arange(0, 64, 1)[None, :56], plain=1.0)
    assert logits.matrix.norm() < 100


def test_every_head_is_refitted_for_itself():
    q, k = (torch.stack([rows(60, 5, seed + head) for head in range(3)]) for seed in (10, 20))
    kept = torch.tensor([[0, 1], [1, 4], [2, 3]])
    sides = exact(q), exact(k)
    together = refit_logits(sides, sides, kept, plain=1.0)
    left = 0.0
    for head in range(3):
        own = exact(q[head : head + 1]), exact(k[head : head + 1])
        alone = refit_logits(own, own, kept[head : head + 1], plain=1.0)
        assert torch.allclose(together.matrix[head], alone.matrix[0], rtol=1e-5)
        left += alone.error_per_row
    assert together.error_per_row == pytest.approx(left, rel=1e-6)


def test_logit_refit_is_the_best_of_all_mixings():
    q, k = rows(300, 4, 7)[None], rows(300, 4, 8)[None]
    kept = torch.tensor([[1, 3]])
    sides = exact(q), exact(k)
    found = refit_logits(sides, sides, kept, plain=1.0)

    def error(mixing):
        left = q @ k.transpose(-2, -1) - q[..., kept[0]] @ mixing @ k[..., kept[0]].transpose(-2, -1)
        return float(left.square().sum())

    least = error(found.matrix)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        assert error(found.matrix + 0.01 * torch.randn(1, 2, 2, generator=generator).double()) > least
    plain = error(torch.eye(2).double())
    assert found.error == pytest.approx(least / plain, rel=1e-6)
