"""What is refused, and that neither a refusal nor a run with other tensors changes anything."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from helpers.models import SMALL, ModelCase, build, image, relative
from helpers.plans import random_plan
from mhacut.errors import PlanError, UnsupportedModelError
from mhacut.plan import Plan, UnitPlan
from mhacut.surgery.features import Features
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.hooks import captured_outputs
from mhacut.surgery.mask import masked_tensors, run_with
from mhacut.surgery.slice import cut
from properties.cases import CASES


@pytest.mark.parametrize(("architecture", "cls"), [("bat_resnext26ts", "BilinearAttnTransform")])
def test_attention_that_is_not_registered_is_refused_by_name(architecture, cls):
    with torch.device("meta"):
        model = timm.create_model(architecture)
    with pytest.raises(UnsupportedModelError, match=cls.replace(".", r"\.")) as refusal:
        find_prunable_layers(model)
    assert "`mhacut models`" in str(refusal.value)
    assert len(str(refusal.value)) < 250


def assert_stays(model, layer, cls):
    prunable = find_prunable_layers(model)
    assert layer not in {unit.layer for unit in prunable.units()}
    assert "blocks.0.attn" in {unit.layer for unit in prunable.units()}
    assert any(names == (layer,) and name.endswith(cls) for name, names in prunable.unknown.items())
    assert any(line.startswith(f"{layer} (") and "not supported" in line for line in prunable.skipped)


def test_unknown_attention_stays_and_the_rest_is_cut():
    class StrangeAttention(nn.Module):
        pass

    model = build(ModelCase("vit_tiny_patch16_224", SMALL))
    model.blocks[1].attn = StrangeAttention()
    assert_stays(model, "blocks.1.attn", "StrangeAttention")


@pytest.mark.parametrize("architecture", ["resnet18", "seresnet50", "ecaresnet50t"])
def test_a_model_without_attention_is_refused(architecture):
    with torch.device("meta"):
        model = timm.create_model(architecture)
    with pytest.raises(UnsupportedModelError, match="no attention layer"):
        find_prunable_layers(model)


def test_a_subclass_that_computes_something_else_stays():
    model = build(ModelCase("vit_tiny_patch16_224", SMALL))

    class OtherAttention(type(model.blocks[0].attn)):
        def forward(self, x, **options):
            return super().forward(x, **options) + self.qkv(x)[..., : x.shape[-1]]  # q leaves it

    model.blocks[1].attn.__class__ = OtherAttention
    assert_stays(model, "blocks.1.attn", "OtherAttention")


def test_attention_with_an_mlp_inside_is_unknown_too():
    class TalkingHeadAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = timm.layers.Mlp(8, 16)

    model = build(ModelCase("vit_tiny_patch16_224", SMALL))
    model.blocks[1].extra = TalkingHeadAttention()
    assert_stays(model, "blocks.1.extra", "TalkingHeadAttention")


def test_mlps_of_another_class_are_reported():
    class OtherMlp(nn.Module):
        def forward(self, x):
            return x

    model = build(ModelCase("vit_tiny_patch16_224", SMALL))
    model.blocks[0].mlp, model.blocks[1].mlp = OtherMlp(), OtherMlp()
    prunable = find_prunable_layers(model)
    assert {unit.kind for unit in prunable.units()} == {"qk", "v"}
    assert prunable.skipped == ("blocks.0.mlp (OtherMlp): this MLP class is not supported (2 layers)",)


def test_the_hidden_channels_of_a_classifier_are_left_alone():
    with torch.device("meta"):
        hiera = timm.create_model("hiera_tiny_224")
    assert find_prunable_layers(hiera).skipped == (
        "head (ClNormMlpClassifierHead): the hidden channels of a classifier are not pruned",
    )


def test_a_module_shared_between_layers_is_refused():
    model = build(ModelCase("vit_tiny_patch16_224", SMALL))
    model.blocks[1].attn = model.blocks[0].attn
    with pytest.raises(UnsupportedModelError, match="share a module"):
        find_prunable_layers(model)


@pytest.mark.parametrize(
    ("unit", "message"),
    [
        (UnitPlan("blocks.9.attn", "v", 64, ((0,),) * 3), "blocks.9.attn"),
        (UnitPlan("blocks.0.attn", "hidden", 64, ((0,),) * 3), "with 'hidden' channels"),
        (UnitPlan("blocks.0.attn", "v", 64, ((0,),) * 2), "3 heads of 64"),
        (UnitPlan("blocks.0.attn", "v", 32, ((0,),) * 3), "the plan expects 3 of 32"),
    ],
)
def test_a_plan_for_another_model_is_refused_before_any_tensor_changes(unit, message):
    model = build(ModelCase("vit_tiny_patch16_224", SMALL))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    good = UnitPlan("blocks.0.attn", "qk", 64, ((0, 1),) * 3)
    with pytest.raises(PlanError, match=message):
        cut(model, Plan((good, unit)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def output_with(model, tensors, images):
    return Features("output").of(model, images, tensors)[0]


@pytest.mark.parametrize("run", [run_with, output_with])
@torch.no_grad()
def test_a_run_with_other_tensors_leaves_the_model_as_it_was(run):
    # CoaT's parallel blocks call one MLP by three names, in two of which torch would leave the other tensors.
    case = CASES["coat.FactorAttnConvRelPosEnc, parallel"]
    model, x = build(case, dtype=torch.float64), image(case, dtype=torch.float64)
    own, expected = dict(model.named_parameters()), model(x)
    prunable = find_prunable_layers(model)
    _, channel_scales = random_plan(prunable, 0)
    masked = run(model, masked_tensors(model, prunable, channel_scales), x)
    assert relative(masked, expected) > 1e-3
    assert all(parameter is own[name] for name, parameter in model.named_parameters())
    assert torch.equal(model(x), expected)


def test_no_hook_stays_if_one_cannot_be_registered():
    model = nn.Sequential(nn.Identity())
    with pytest.raises(AttributeError, match="missing"), captured_outputs(model, ["0", "missing"]):
        pass
    assert not model[0]._forward_hooks
