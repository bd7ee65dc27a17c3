"""Tensor maths against slow, obvious references in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from helpers.moments import noise
from mhacut.pruning.paper.indicators import (
    THRESHOLD,
    adjust_scores,
    initial_indicator,
    straight_through_mask,
    top_channels,
)
from mhacut.pruning.paper.statistics import (
    cosine_similarity,
    logit_energy,
    output_energy,
    redundancy,
    similarity_weight,
)

seeds = st.integers(0, 2**32 - 1)


def test_redundancy_of_logit_terms_is_the_cosine_of_rank_one_products():
    q, k = noise(50, 5, seed=1), noise(50, 5, seed=2)
    expected = torch.zeros(5, dtype=torch.float64)
    for i in range(5):
        for j in range(5):
            if i != j:
                a, b = torch.outer(q[:, i], k[:, i]), torch.outer(q[:, j], k[:, j])
                expected[i] += ((a * b).sum() / (a.norm() * b.norm())).abs() / 4
    found = redundancy(cosine_similarity(q.T @ q), cosine_similarity(k.T @ k))
    assert torch.allclose(found, expected)


def test_dead_channels_are_like_nothing_and_finite():
    x = noise(20, 4)
    x[:, 1] = 0
    cosine = cosine_similarity(x.T @ x)
    assert torch.equal(cosine[1], torch.eye(4, dtype=torch.float64)[1])
    assert cosine.isfinite().all()


def test_logit_energy_is_what_the_logits_lose():
    q, k = noise(3, 2, 6, 4, seed=1), noise(3, 2, 6, 4, seed=2)
    energy = logit_energy(q, k)

    def logits(q, k):
        full = q @ k.transpose(-2, -1)
        return full - full.mean(-1, keepdim=True)  # softmax ignores what is constant over keys

    for channel in range(4):
        without = [i for i in range(4) if i != channel]
        lost = logits(q, k) - logits(q[..., without], k[..., without])
        assert torch.allclose(energy[:, channel], lost.square().sum((0, 2, 3)))


def test_output_energy_is_what_the_output_loses():
    heads, width, out = 2, 3, 5
    x, columns = noise(40, heads, width, seed=1), noise(out, heads, width, seed=2)
    energy = output_energy(x.square().sum(0), columns)
    for head in range(heads):
        for channel in range(width):
            lost = torch.outer(x[:, head, channel], columns[:, head, channel])
            assert energy[head, channel] == pytest.approx(float(lost.square().sum()))


@given(seed=seeds, heads=st.integers(1, 4), channels=st.integers(1, 9))
def test_every_score_starts_above_the_threshold(seed, heads, channels):
    weight = similarity_weight(noise(heads, channels, seed=seed).sigmoid())
    difference = noise(heads, channels, seed=seed + 1).exp()
    for start in (
        initial_indicator(difference, (heads, channels), weight),
        initial_indicator(None, (heads, channels), weight),
        initial_indicator(torch.zeros_like(difference), (heads, channels), weight),
    ):
        assert (start * weight > THRESHOLD).all()


@given(data=st.data(), heads=st.integers(1, 4), channels=st.integers(1, 8))
def test_adjusted_scores_keep_exactly_the_width_in_every_head(data, heads, channels):
    # Few distinct values, so that ties are common.
    values = st.sampled_from([0.0, 0.25, 0.4999999, 0.5, 0.5000001, 0.6, 1e6, -3.0])
    rows = data.draw(
        st.lists(st.lists(values, min_size=channels, max_size=channels), min_size=heads, max_size=heads)
    )
    width = data.draw(st.integers(1, channels))
    for dtype in (torch.float32, torch.float64):
        score = torch.tensor(rows, dtype=dtype)
        mask = straight_through_mask(adjust_scores(score, width))
        kept = [tuple(row.nonzero()[:, 0].tolist()) for row in mask]
        assert kept == [slow_top(row, width) for row in score.tolist()]
        assert tuple(kept) == top_channels(score, width)


def slow_top(row, width):
    return tuple(sorted(sorted(range(len(row)), key=lambda i: (-row[i], i))[:width]))


def test_gradients_pass_masks_and_adjustment_as_through_the_identity():
    score = torch.tensor([[0.2, 0.9, 0.9, 0.4]], requires_grad=True)
    factor = torch.tensor([[1.0, -2.0, 3.0, 5.0]])
    (straight_through_mask(adjust_scores(score, 1)) * factor).sum().backward()
    assert torch.equal(score.grad, factor)
