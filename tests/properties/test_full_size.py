"""Models at the size that users have them; of the largest, two blocks."""

from __future__ import annotations

import pytest
import timm
import torch
from torch.func import functional_call

from helpers.models import ModelCase, build_once, image, relative
from helpers.plans import random_plan
from mhacut.surgery.costs import build_cost_table
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.mask import masked_tensors
from mhacut.surgery.slice import cut


@pytest.mark.parametrize(
    ("architecture", "shape"),
    [
        pytest.param("vit_tiny_patch16_224", {}, marks=pytest.mark.slow),
        pytest.param("deit_tiny_distilled_patch16_224", {}, marks=pytest.mark.slow),
        pytest.param("deit3_small_patch16_224", {}, marks=pytest.mark.exhaustive),
        pytest.param("vit_small_patch14_reg4_dinov2", {"img_size": 224}, marks=pytest.mark.exhaustive),
        pytest.param("vit_base_patch16_siglip_224", {"depth": 2}, marks=pytest.mark.slow),
        pytest.param("aimv2_large_patch14_224", {"depth": 2}, marks=pytest.mark.exhaustive),
    ],
)
def test_at_full_size(architecture, shape):
    case = ModelCase(architecture, shape, 224)
    model = build_once(case).float()
    prunable = find_prunable_layers(model)
    plan, channel_scales = random_plan(prunable, 11)
    table = build_cost_table(model, prunable, case.size)
    x = image(case, batch=1)
    with torch.no_grad():
        masked = functional_call(model, masked_tensors(model, prunable, channel_scales), (x,))
        cut(model, plan, channel_scales)
        assert relative(model(x), masked) < 1e-4
    assert measure_flops(model, case.size) == table.flops(plan.widths())
    dense = timm.create_model(architecture, num_classes=model.num_classes, **shape)
    assert dense.state_dict().keys() == model.state_dict().keys()
