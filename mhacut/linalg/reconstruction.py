"""Least-squares reconstruction: kept channels replace removed channels in refitted weights.

Ridge regression predicts removed channels x_P from kept channels, x_P ~ B x_S + c, and the prediction is
folded into the weights that read x. The ridge of :data:`RIDGES` with the least error on held-out images is
used. An infinite ridge predicts removed channels by their mean if a bias can absorb it, else by 0. The
channel scales of arXiv 2405.20867 are the diagonal case.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from mhacut.linalg.moments import Moments

RIDGES = (1e-9, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Ridge parameters of the regression, relative to the mean variance of the kept channels. Several are needed
if images are fewer than channels."""

_NOTHING = 1e-150
"""Lower bound of the mean variance, so that the ridge of a head with zero output is above 0."""


class Refit(NamedTuple):
    """Refit of a layer after a cut that keeps channels S and removes channels P.

    The output projection W becomes W_S + W_P B with bias b + W_P c, or the logits become q_S C k_S^T.
    """

    matrix: Tensor
    """Matrix [removed, kept] of an output projection refit, or [H, kept, kept] of a logit refit."""
    ridge: float
    """Ridge parameter, relative to the mean variance; infinite if the regression did not help on held-out
    images."""
    error: float
    """Squared error of the layer's output or logits on held-out images, divided by the error without a
    refit."""
    error_per_row: float
    """Squared error on held-out images, per output token or per pair of q and k tokens."""
    constant: Tensor | None = None


def refit_linear(fit: Moments, held: Moments, kept: Tensor, columns: Tensor, *, constant: bool) -> Refit:
    """Refit the output projection ``columns`` so that kept channels replace removed channels.

    ``fit`` holds the moments for the regression, ``held`` those that choose its ridge. ``constant``: the
    layer has an output bias.
    """
    seen, unseen, both = _centred(fit, fit, constant), _centred(held, fit, constant), fit + held
    gone = others(kept, len(seen))
    lost = columns.double()[:, gone]  # (out, P)
    errors = _errors(seen, unseen, kept, gone, lost, _brought(lost, _part(unseen, gone, gone)))
    ridge = min(errors, key=lambda choice: errors[choice])
    prediction = torch.zeros(len(gone), len(kept), dtype=torch.float64, device=kept.device)
    offset = torch.zeros(len(gone), dtype=torch.float64, device=kept.device)
    baseline = _brought(lost, _part(held.energy, gone, gone))
    if errors[ridge] > baseline:
        return Refit(prediction, float("inf"), _share(baseline, baseline), baseline, offset)
    if ridge < float("inf"):
        # Held-out images chose the ridge; the fit itself may use them too.
        every = _centred(both, both, constant)
        prediction = _ridge_solve(_part(every, kept, kept), _part(every, kept, gone), ridge).T
    if constant:
        offset = both.mean[gone] - prediction @ both.mean[kept]
    return Refit(prediction, ridge, _share(errors[ridge], baseline), errors[ridge], offset)


def linear_error(
    fit: Moments, held: Moments, columns: Tensor, *, constant: bool
) -> Callable[[Tensor], float]:
    """Return a fast function from kept channels to the output error after :func:`refit_linear`."""
    seen, unseen, columns = _centred(fit, fit, constant), _centred(held, fit, constant), columns.double()
    gram = columns.mT @ columns  # (d, d)
    as_zero, as_mean = gram * held.energy, gram * unseen

    def error(kept: Tensor) -> float:
        gone = others(kept, len(seen))
        zero, mean = (max(float(_part(weighted, gone, gone).sum()), 0.0) for weighted in (as_zero, as_mean))
        return min(zero, *_errors(seen, unseen, kept, gone, columns[:, gone], mean).values())

    return error


def _centred(moments: Moments, about: Moments, constant: bool) -> Tensor:
    return moments.about(about.mean) if constant else moments.energy


def _brought(lost: Tensor, second: Tensor) -> float:
    return float((lost @ second * lost).sum())


def _errors(
    seen: Tensor, unseen: Tensor, kept: Tensor, gone: Tensor, lost: Tensor, unpredicted: float
) -> dict[float, float]:
    """Return the squared output error per row on held-out images, for each ridge.

    ``seen`` and ``unseen`` are second moments [d, d] about the same centre. The columns ``lost`` [out,
    removed] read the removed channels. ``unpredicted`` is the error of an infinite ridge.
    """
    errors = {float("inf"): unpredicted}
    values, vectors = torch.linalg.eigh(_part(seen, kept, kept))
    size = float(values.clamp_min(0).mean())
    rounding = max(0.0, -float(values[0]))  # least absolute ridge, see _ridge_solve
    # With W_P B = predicted D vectors^T, D diagonal, the error of every ridge is a quadratic form in D: one
    # decomposition serves all ridges.
    predicted = lost @ _part(seen, gone, kept) @ vectors  # (out, K)
    linear = (predicted * (lost @ _part(unseen, gone, kept) @ vectors)).sum(0)
    quadratic = (predicted.T @ predicted) * (vectors.T @ _part(unseen, kept, kept) @ vectors)
    for ridge in RIDGES:
        if size <= 0:
            break
        shrunk = 1 / (values.clamp_min(0) + max(ridge * size, rounding))
        saved = float(2 * shrunk @ linear - shrunk @ quadratic @ shrunk)
        errors[ridge] = max(0.0, errors[float("inf")] - saved)
    return errors


def refit_logits(
    fit: tuple[Moments, Moments],
    held: tuple[Moments, Moments],
    kept: Tensor,
    plain: float,
    *,
    mixes: bool = True,
) -> Refit:
    """Return the best refit C of each head's logits; ``kept`` is [H, kept].

    q and k are assumed independent. ``plain`` is the factor on the logits if the refit does not help.
    ``mixes`` allows mixing of channels.
    """
    heads, width = kept.shape
    identity = torch.eye(width, dtype=torch.float64, device=kept.device).expand(heads, -1, -1)
    gone = torch.stack([others(row, fit[0].total.shape[-1]) for row in kept])
    choices = {float("inf"): plain * identity}
    if mixes and gone.shape[-1] > 0:
        for ridge in RIDGES:
            choices[ridge] = _mixing(fit, kept, gone, ridge)
    errors = {ridge: _logit_error(held, kept, mixing) for ridge, mixing in choices.items()}
    baseline = errors[float("inf")]
    ridge = min(errors, key=lambda choice: errors[choice])
    mixing = choices[ridge]
    if ridge < float("inf"):
        mixing = _mixing((fit[0] + held[0], fit[1] + held[1]), kept, gone, ridge)
    return Refit(mixing, ridge, _share(errors[ridge], baseline), errors[ridge])


def output_error(
    second: Tensor, kept: Tensor, columns: Tensor, fisher: Tensor | None, *, refit: bool = True
) -> float:
    """Return the output error per row after removal of channels and a refit of the output columns.

    ``columns`` is [out, d], or [places * out, d] if places such as kernel positions read each channel.
    ``fisher`` [out, out] weighs the error; None is the plain squared error.
    """
    gone = others(kept, second.shape[-1])
    if len(gone) == 0:
        return 0.0
    left = _part(second, gone, gone)
    if refit:
        system, target = _part(second, kept, kept), _part(second, kept, gone)
        solved = _ridge_solve(system, target, RIDGES[0])
        # |x_P - B x_S|^2 in full. The short form, second_PP - second_PS B, holds without a ridge only: with
        # one it adds ridge |B|^2, which is large where kept channels hardly vary along some direction.
        left = left - target.T @ solved - solved.T @ (target - system @ solved)
    lost = columns[:, gone]
    return float((lost.mT @ weighed_by(fisher, lost) * left).sum().clamp_min(0))


def symmetric_root(fisher: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(fisher)
    root: Tensor = vectors * values.clamp_min(0).sqrt() @ vectors.mT
    return root


def weighed_by(fisher: Tensor | None, columns: Tensor) -> Tensor:
    """Multiply ``columns`` [kernel positions * out, d] by ``fisher`` [out, out] at each kernel position."""
    if fisher is None:
        return columns
    weighed: Tensor = fisher @ columns.unflatten(0, (-1, len(fisher)))
    return weighed.flatten(0, 1)


def others(kept: Tensor, size: int) -> Tensor:
    rest = torch.ones(size, dtype=torch.bool, device=kept.device)
    rest[kept] = False
    return rest.nonzero()[:, 0]


def _part(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    picked: Tensor = matrix[rows[:, None], columns]
    return picked


def _share(error: float, baseline: float) -> float:
    return error / baseline if baseline > 0 else 0.0


def _mixing(moments: tuple[Moments, Moments], kept: Tensor, gone: Tensor, ridge: float) -> Tensor:
    """Return I + Bq^T Bk [H, kept, kept]; Bq and Bk predict removed q and k channels from kept ones."""
    predictions = []
    for side in moments:
        target = _block(side.energy, kept, gone)
        predictions.append(_ridge_solve(_block(side.energy, kept, kept), target, ridge))
    # Predicted channels add (q_S Bq)(k_S Bk)^T to the logits q_S k_S^T of the kept ones.
    query, key = predictions  # (H, kept, removed)
    identity = torch.eye(kept.shape[-1], dtype=torch.float64, device=kept.device)
    return identity + query @ key.transpose(-2, -1)


def _ridge_solve(system: Tensor, target: Tensor, ridge: float) -> Tensor:
    """Return (system + ridge * mean(diag(system)) * I)^-1 target, [..., n, m]; 0 if the system is 0."""
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    size = diagonal.mean(-1)[..., None, None].clamp_min(_NOTHING)
    damped = system + ridge * size * torch.eye(system.shape[-1], dtype=system.dtype, device=system.device)
    solution: Tensor
    # A Cholesky factor shows that half the ridge is enough, in far less time than eigenvalues take.
    if not torch.linalg.cholesky_ex((system + damped) / 2).info.any():
        solution = torch.linalg.solve(damped, target)
        return solution
    values, vectors = torch.linalg.eigh(system)
    # A ridge smaller than a negative eigenvalue could cancel it, and the solution would explode.
    lifted = values.clamp_min(0) + torch.maximum(ridge * size.squeeze(-1), -values[..., :1])
    solution = vectors @ (vectors.mT @ target / lifted.unsqueeze(-1))
    return solution


def _logit_error(moments: tuple[Moments, Moments], kept: Tensor, mixing: Tensor) -> float:
    query, key = (side.energy for side in moments)
    every = torch.arange(query.shape[-1], device=kept.device).expand(len(kept), -1)
    # With q and k independent, E|q M k^T|^2 = tr(M^T E[q q^T] M E[k k^T]), here for M = I - C, expanded.
    full = (query * key).sum()
    cross = (_block(query, every, kept) @ mixing * _block(key, every, kept)).sum()
    inner = mixing.transpose(-2, -1) @ _block(query, kept, kept) @ mixing
    return max(0.0, float(full - 2 * cross + (inner * _block(key, kept, kept)).sum()))


def _block(matrix: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    picked: Tensor = matrix.gather(-2, rows.unsqueeze(-1).expand(-1, -1, matrix.shape[-1]))
    return picked.gather(-1, columns.unsqueeze(-2).expand(-1, rows.shape[-1], -1))
