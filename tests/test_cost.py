from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from mhacut.cost import build_cost_table, measure_flops
from mhacut.errors import UnsupportedModelError
from mhacut.surgery import dissect


@pytest.mark.parametrize(
    ("architecture", "giga"),
    [("deit_tiny_patch16_224", 1.26), ("deit_small_patch16_224", 4.61), ("deit_base_patch16_224", 17.58)],
)
@pytest.mark.parametrize("fused", [True, False])
def test_the_published_numbers(architecture, giga, fused):
    # Every block costs the same, so two small models tell what twelve blocks cost.
    totals = []
    for depth in (1, 2):
        model = timm.create_model(architecture, depth=depth).eval()
        for block in model.blocks:
            block.attn.fused_attn = fused
        totals.append(measure_flops(model, (3, 224, 224)))
    assert round((totals[0] + 11 * (totals[1] - totals[0])) / 1e9, 2) == giga


def test_the_table_is_differentiable_in_the_widths():
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval()
    table = build_cost_table(model, dissect(model), (3, 32, 32))
    width = torch.tensor(64.0, requires_grad=True)
    key = ("blocks.0.attn", "v")
    table.flops({key: width}).backward()
    assert float(width.grad) == table.flops({key: 64}) - table.flops({key: 63})


def test_an_operator_nobody_counts_is_an_error_not_a_zero():
    class Sorts(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return (x * self.scale).cumsum(-1)

    with pytest.raises(UnsupportedModelError, match="aten::cumsum"):
        measure_flops(Sorts().eval(), (3, 4, 4))
