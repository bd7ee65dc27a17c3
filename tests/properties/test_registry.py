"""Every class that is cut has a case, and every case is of the class under which it stands."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.layers import Attention
from timm.models.mvitv2 import MultiScaleAttentionPoolFirst

from helpers.models import build
from mhacut.adapters.registry import ADAPTERS
from mhacut.adapters.softmax import Softmax
from mhacut.adapters.softmax_special import CLS_WEIGHTS
from properties.cases import BY_CLASS

NOT_RUNNING = {MultiScaleAttentionPoolFirst}
"""Left whole, and timm's own forward fails: it multiplies queries of a head with keys of another."""


def registered_classes() -> set[type]:
    """Classes with an adapter, without those of slim layers, which cuts of the others make.

    Those of blocks that merge tokens have the tests of merging.
    """
    found = {cls for adapter in ADAPTERS for cls in adapter.module_classes}
    return {
        cls for cls in found - NOT_RUNNING - set(CLS_WEIGHTS.values()) if not cls.__name__.startswith("Slim")
    }


def test_every_registered_class_has_a_case():
    without = {cls.__name__ for cls in registered_classes() - BY_CLASS.keys()}
    assert not without, f"no case in tests/properties/cases for {without}"
    assert registered_classes() == BY_CLASS.keys()


def test_a_row_that_would_ignore_a_mask_is_refused():
    class Masked(Attention):
        pass

    with pytest.raises(TypeError, match=r"Masked\.forward takes attn_mask, is_causal"):
        Softmax(Masked)


def test_a_plain_row_normalises_q_and_k_where_the_class_does():
    class Plain(Attention):
        def forward(self, x):
            return super().forward(x)

    torch.manual_seed(0)
    dense = Plain(8, num_heads=2, qkv_bias=True, qk_norm=True, norm_layer=torch.nn.LayerNorm).double().eval()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    expected = dense(x)
    row = Softmax(Plain)
    cut = copy.deepcopy(dense)
    row.resize(cut, {})
    assert type(cut) is row.twin
    torch.testing.assert_close(cut(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize("cls", BY_CLASS, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_cases_are_of_their_class(cls):
    for case in BY_CLASS[cls].values():
        assert any(is_of(module, cls) for module in build(case).modules())


def is_of(module: object, cls: type) -> bool:
    slim = type(module).__name__.startswith("Slim") and type(module).__bases__[-1]
    return cls in (type(module), slim)
