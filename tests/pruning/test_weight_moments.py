"""Moments by weights alone are those of white inputs, sampled."""

from __future__ import annotations

import pytest
import timm
import torch

from helpers.models import build
from mhacut.pruning.unit_moments import white_moments
from mhacut.surgery.channels import channels_of
from mhacut.surgery.find import find_prunable_layers
from properties.cases import CASES

SIZE, HEADS = 24, 3


@pytest.fixture(scope="module")
def attention():
    torch.manual_seed(0)
    model = timm.create_model(
        "vit_tiny_patch16_224", depth=1, embed_dim=SIZE, num_heads=HEADS, img_size=32
    ).double()
    module = model.blocks[0].attn
    torch.nn.init.normal_(module.qkv.bias)
    (layer, _) = find_prunable_layers(model).layers
    return module, {unit.kind: unit for unit in layer.units}


def sampled(module):
    """q, k, v [H, rows, d] of white inputs with second moments that are exact."""
    x = torch.linalg.qr(torch.randn(200, SIZE, dtype=torch.float64)).Q
    x = torch.cat([x, -x]) / (2**0.5)  # mean 0, x^T x the identity
    rows = torch.nn.functional.linear(x, module.qkv.weight).detach()
    return rows.view(len(x), 3, HEADS, -1).permute(1, 2, 0, 3)


def test_moments_of_white_inputs(attention):
    module, units = attention
    torch.manual_seed(1)
    q, k, v = sampled(module)
    bias = module.qkv.bias.detach().view(3, HEADS, -1)
    query, key = (side.energy for side in white_moments(module, units["qk"])[0].every)
    torch.testing.assert_close(query, q.mT @ q + bias[0].unsqueeze(-1) * bias[0].unsqueeze(-2))
    torch.testing.assert_close(key, k.mT @ k)
    (values,) = white_moments(module, units["v"])[0].every
    torch.testing.assert_close(values.covariance, torch.block_diag(*(v.mT @ v)))


@pytest.mark.parametrize("name", ["visformer.Attention", "levit.Attention, convolutions"])
def test_convolutions_of_single_pixels_are_linear_layers(name):
    """Others are not: what they read is not white where windows overlap."""
    model = build(CASES[name], dtype=torch.float64).requires_grad_(False)
    unit = next(unit for unit in find_prunable_layers(model).units(("qk",)))
    module = model.get_submodule(unit.layer)
    moments, _ = white_moments(module, unit)
    for axis, side in zip((axis for axis in unit.axes if axis.dim == 0), moments.every, strict=False):
        rows = channels_of(module, unit, axis).flatten(2)
        torch.testing.assert_close(side.energy, rows @ rows.mT)
    convolution = module.get_submodule(unit.axes[0].tensor.rpartition(".")[0])
    for size in ((1, 3), (3, 1), (3, 3)):
        convolution.kernel_size = size
        assert white_moments(module, unit) is None
