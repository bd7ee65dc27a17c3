"""Vision models as Hugging Face's transformers write them: a cut is exact, and they stay of their classes."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import mhacut
from helpers.huggingface import TinyBackbone
from helpers.models import relative
from helpers.plans import random_plan
from mhacut.plan import Plan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.mask import masked_tensors, run_with
from mhacut.surgery.slice import cut

SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 7,
}
STAGES = {"out_features": ["stage1", "stage3"]}
SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 16,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 4,
}
MODELS = {
    "tiny": (TinyBackbone, {}),
    "vit": ("ViTModel", SIZES),
    "classifier": ("ViTForImageClassification", SIZES),
    "deit": ("DeiTModel", SIZES),
    "dinov2": ("Dinov2Model", SIZES),
    "swiglu": ("Dinov2Model", {**SIZES, "use_swiglu_ffn": True}),
    "registers": ("Dinov2WithRegistersModel", SIZES),
    "dinov3": ("DINOv3ViTModel", {**SIZES, "intermediate_size": 64}),
    "dinov3_gated": ("DINOv3ViTModel", {**SIZES, "use_gated_mlp": True}),
    "dinov2_backbone": ("Dinov2Backbone", {**SIZES, **STAGES}),
    "dinov3_backbone": ("DINOv3ViTBackbone", {**SIZES, **STAGES}),
    "clip": ("CLIPVisionModel", SIZES),
    "siglip": ("SiglipVisionModel", SIZES),
    "beit": ("BeitModel", {**SIZES, "use_relative_position_bias": True}),
    "swin": ("SwinModel", SWIN),
}


class First(nn.Module):
    """Give the first tensor of the model's output."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x):
        output = self.model(x)
        output = next(iter(output.values()))
        return output if isinstance(output, torch.Tensor) else output[-1]


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    cls, sizes = MODELS[request.param]
    torch.manual_seed(0)
    if isinstance(cls, str):
        transformers = pytest.importorskip("transformers", reason="pip install 'mhacut[interop]'")
        if transformers.__version__ < "5":
            pytest.skip("classes of transformers 4 have other names of layers")
        cls = getattr(transformers, cls)
        built = cls(cls.config_class(**sizes))
    else:
        built = cls(**sizes)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return First(built).eval().requires_grad_(False)


def images_of(model, batch=2):
    size = getattr(getattr(model.model, "config", None), "image_size", 28)
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("equal", [True, False], ids=["equal", "unequal"])
def test_masked_equals_sliced(model, equal):
    prunable, x = find_prunable_layers(model), images_of(model)
    plan, scales = random_plan(prunable, 0)
    if equal:  # what prune_ makes of classes with one width
        halves = [unit.keep_first(unit.width // 2) for unit in prunable.units()]
        plan = Plan(tuple(halves))
        scales = {
            each.key: (torch.arange(each.dense_width) < each.width).float().expand(each.heads, -1)
            for each in halves
        }
    masked = run_with(model, masked_tensors(model, prunable, scales), x)
    slim = copy.deepcopy(model)
    cut(slim, plan, scales)
    assert relative(slim(x), masked) < 1e-5
    assert relative(masked, model(x)) > 1e-3
    assert slim.state_dict().keys() == model.state_dict().keys()
    if equal:
        same = {type(a) is type(b) for a, b in zip(slim.modules(), model.modules(), strict=True)}
        assert same == {True} or "DINOv3" in type(model.model).__name__
    twice = copy.deepcopy(slim)  # a slim model is found, and cut, like a dense one
    cut(twice, Plan(tuple(unit.keep_first(unit.width) for unit in find_prunable_layers(twice).units())))
    assert relative(twice(x), slim(x)) < 1e-5


def test_a_pruned_model_exports_trains_and_opens_again(model, tmp_path):
    whole = copy.deepcopy(model).requires_grad_(True)
    x = images_of(model, 12)
    result = mhacut.prune_(whole, "model", images=x.split(6), flops="70%", effort="fast", heal_steps=2)
    assert result.flops_after <= 0.7 * result.flops_before
    y = whole(x).detach()
    assert 0 < relative(y, model(x)) < 1
    mhacut.save_pruned(whole, tmp_path / "part.safetensors")
    fresh = copy.deepcopy(model)
    mhacut.apply_pruned(fresh, tmp_path / "part.safetensors")
    assert relative(fresh(x), y) < 1e-5
    exported = torch.export.export(whole, (x[:2],)).module()
    assert relative(exported(x[:2]).detach(), y[:2]) < 1e-5
    whole.train()(x).square().sum().backward()
    assert sum(parameter.grad is not None for parameter in whole.parameters()) > 10
