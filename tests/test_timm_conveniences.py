"""What timm can do to a model it can do to the slim one too, whatever its architecture."""

from __future__ import annotations

import pytest
import timm_cases
import timm_cases_separate
import torch
from models import relative
from plans import random_plan
from timm_cases_separate import ModelCase

from mhacut.surgery import cut, dissect

QUICK = {"rope half", "swin v2", "crossvit"}
MODELS = {name: (timm_cases, case) for name, case in timm_cases.CASES.items()} | {
    name: (timm_cases_separate, case)
    for name, case in timm_cases_separate.CASES.items()
    if isinstance(case, ModelCase)
}


@pytest.fixture(
    params=[
        pytest.param(pair, id=name, marks=() if name in QUICK else pytest.mark.slow)
        for name, pair in MODELS.items()
    ]
)
def models(request):
    """The dense model, the slim one, images for both."""
    room, case = request.param
    dense, slim = (room.build(case, dtype=torch.float32) for _ in range(2))
    plan, _ = random_plan(dissect(slim), seed=0)
    cut(slim, plan)
    return dense, slim, room.image(case, dtype=torch.float32)


@torch.no_grad()
def test_another_head(models):
    dense, slim, x = models
    assert slim.num_classes == dense.num_classes == 5
    for model in (dense, slim):
        model.reset_classifier(7)
    assert slim(x).shape == dense(x).shape == (2, 7)
    slim.reset_classifier(0)
    assert slim(x).shape == (2, slim.head_hidden_size)


@torch.no_grad()
def test_features_on_the_way(models):
    dense, slim, x = models
    if not hasattr(dense, "forward_intermediates"):
        pytest.skip("timm gives none of this model")
    (last, taken), (dense_last, dense_taken) = (model.forward_intermediates(x) for model in (slim, dense))
    assert [part.shape for part in taken] == [part.shape for part in dense_taken]
    for found, dense_found, expected in zip(
        *map(several, (last, dense_last, slim.forward_features(x))), strict=True
    ):
        assert found.shape == dense_found.shape
        assert relative(found, expected) < 1e-5


def several(features):
    """CrossViT has two."""
    return features if isinstance(features, list) else [features]


def test_gradients_can_be_checkpointed(models):
    dense, slim, x = models
    try:
        dense.set_grad_checkpointing(True)
    except (AssertionError, AttributeError):
        pytest.skip("timm cannot for this model")
    slim.train()
    gradients = []
    for checkpointed in (False, True):
        slim.zero_grad()
        slim.set_grad_checkpointing(checkpointed)
        torch.manual_seed(0)
        slim(x).square().sum().backward()
        gradients.append(
            {name: tensor.grad.clone() for name, tensor in slim.named_parameters() if tensor.grad is not None}
        )
    assert gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[0].items():
        torch.testing.assert_close(
            gradients[1][name], expected, rtol=1e-3, atol=1e-3 * float(expected.abs().max())
        )
