"""Effective ranks against the singular values of the logits and outputs themselves."""

from __future__ import annotations

import pytest
import torch

from mhacut.linalg.pca import effective_rank, logit_energies, output_energies

HEADS, WIDTH, ROWS, OUT = 3, 6, 40, 10


def rows(seed, rank=WIDTH):
    """[H, rows, d] of a given rank, with channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    scale = 2.0 ** -torch.arange(WIDTH, dtype=torch.float64)
    mixed = torch.randn(HEADS, ROWS, rank, generator=generator, dtype=torch.float64)
    return mixed @ torch.randn(HEADS, rank, WIDTH, generator=generator, dtype=torch.float64) * scale


@pytest.mark.parametrize("rank", [2, WIDTH])
def test_energies_of_logits_are_squared_singular_values_of_all_logits(rank):
    q, k = rows(0, rank), rows(1)
    found = logit_energies(q.mT @ q, k.mT @ k)
    for head in range(HEADS):
        expected = torch.linalg.svdvals(q[head] @ k[head].T)[:WIDTH].square()
        torch.testing.assert_close(found[head], expected, rtol=1e-8, atol=1e-8 * float(expected[0]))


def test_energies_of_outputs_are_squared_singular_values_of_what_a_head_adds():
    x = rows(2)
    columns = torch.randn(OUT, HEADS, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = output_energies(x.mT @ x, columns)
    for head in range(HEADS):
        expected = torch.linalg.svdvals(x[head] @ columns[:, head].T)[:WIDTH].square()
        torch.testing.assert_close(found[head], expected, rtol=1e-8, atol=1e-8 * float(expected[0]))


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 0.9999])
def test_effective_rank_is_the_first_width_that_holds_enough(share):
    generator = torch.Generator().manual_seed(8)
    energies = (
        torch.rand(50, 9, generator=generator, dtype=torch.float64).pow(6).sort(-1, descending=True).values
    )
    energies[0] = 0
    energies[1] = 1
    energies[2, 3:] = 0
    for row, found in zip(energies.tolist(), effective_rank(energies, share).tolist(), strict=True):
        total = sum(row)
        slow = next(width for width in range(1, 10) if sum(row[:width]) >= share * total)
        assert found == slow
