"""What timm can do to a model it can do to the slim one too, whatever its architecture."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from helpers.models import build, image, relative
from helpers.plans import random_plan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.slice import cut
from properties.cases import FIRST_MODEL, MODELS, UNLIKE_ATTENTION

QUICK = {"attention.AttentionRope, half", "swin_transformer_v2.WindowAttention"}


def marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    if name in QUICK:
        return ()
    slow = any(MODELS[name] is FIRST_MODEL.get(cls) for cls in UNLIKE_ATTENTION)
    return (pytest.mark.slow if slow else pytest.mark.exhaustive,)


@pytest.fixture(params=[pytest.param(case, id=name, marks=marks(name)) for name, case in MODELS.items()])
def models(request):
    dense, slim = (build(request.param) for _ in range(2))
    plan, _ = random_plan(find_prunable_layers(slim), seed=0)
    cut(slim, plan)
    return dense, slim, image(request.param)


@torch.no_grad()
def test_another_head(models):
    dense, slim, x = models
    assert slim.num_classes == dense.num_classes
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


@torch.no_grad()
def test_features_only(models, request, tmp_path):
    case, (dense, slim, x) = request.node.callspec.params["models"], models
    if not hasattr(slim, "forward_intermediates"):
        pytest.skip("timm gives none of this model")
    save_file(
        {name: tensor.clone() for name, tensor in slim.state_dict().items()}, tmp_path / "slim.safetensors"
    )
    features = timm.create_model(
        "mhacut_slim",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "slim.safetensors"), "num_classes": slim.num_classes},
        base_architecture=case.architecture,
        plan=random_plan(find_prunable_layers(dense), seed=0)[0].to_json(),
        features_only=True,
        **{"num_classes": 5, **case.args},
    ).eval()
    levels, indices = features(x), features.feature_info.out_indices
    assert [level.shape[1] for level in levels] == features.feature_info.channels()
    expected = slim.forward_intermediates(x, indices=list(indices), intermediates_only=True)
    for level, wanted in zip(levels, expected, strict=True):
        assert relative(level, wanted) < 1e-5


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
