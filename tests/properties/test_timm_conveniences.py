"""What timm can do to a model it can do to the slim one too, whatever its architecture."""

from __future__ import annotations

import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import save_file

from helpers.files import cut_into_file
from helpers.models import ModelCase, build, image, relative
from helpers.plans import random_plan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.slice import cut
from properties.cases import BY_CLASS, FIRST_MODEL, MODELS, VITS

QUICK = {"attention.AttentionRope, half", "swin_transformer_v2.WindowAttention"}


def marks(name: str) -> tuple[pytest.MarkDecorator, ...]:
    """Fast: two; slow: one model of each class; exhaustive: the others."""
    if name in QUICK:
        return ()
    return (pytest.mark.slow if MODELS[name] in FIRST_MODEL.values() else pytest.mark.exhaustive,)


@pytest.fixture(params=[pytest.param(case, id=name, marks=marks(name)) for name, case in MODELS.items()])
def models(request):
    """The dense model, the slim one, images for both."""
    dense, slim = (build(request.param) for _ in range(2))
    plan, _ = random_plan(find_prunable_layers(slim), seed=0)
    cut(slim, plan)
    return dense, slim, image(request.param)


@pytest.mark.parametrize("case", VITS.values(), ids=VITS.keys())
def test_a_slim_vit_is_still_one(case):
    model, x = build(case), image(case)
    plan, _ = random_plan(find_prunable_layers(model), 7)
    cut(model, plan)
    assert model.forward_features(x).shape[-1] == model.num_features
    assert model.get_classifier() is not None
    model.reset_classifier(3)
    assert model(x).shape == (2, 3)


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


@pytest.mark.exhaustive
@torch.no_grad()
def test_a_process_that_knows_nothing_of_them_reads_slim_models_of_every_kind(tmp_path):
    expected = {}
    for cases in BY_CLASS.values():
        models = (case for case in cases.values() if isinstance(case, ModelCase))
        case = next((case for case in models if not case.architecture.startswith("small_")), None)
        if case is None:  # what starts so is registered by the tests
            continue
        slim, x = build(case), image(case)
        plan, _ = random_plan(find_prunable_layers(slim), seed=1)
        path = tmp_path / f"{len(expected)}.safetensors"
        cut_into_file(slim, plan, path, case)
        expected[path.name] = slim(x)
        torch.save(x, path.with_suffix(".image"))
    code = (
        "import sys, pathlib, torch, mhacut\n"
        "for path in pathlib.Path(sys.argv[1]).glob('*.safetensors'):\n"
        "    x = torch.load(path.with_suffix('.image'))\n"
        "    torch.save(mhacut.load_model(path)(x).detach(), path.with_suffix('.logits'))"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path], check=True)
    for name, logits in expected.items():
        found = torch.load((tmp_path / name).with_suffix(".logits"))
        assert relative(found, logits) < 1e-5, name
