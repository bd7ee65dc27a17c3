"""What ``mhacut inspect`` says of a layer, it can say of every class."""

from __future__ import annotations

import torch

from helpers.models import build
from mhacut.inspection.layers import describe_heads
from mhacut.pruning.unit_moments import white_moments
from mhacut.surgery.find import find_prunable_layers

UNSEEN = {
    ("AttentionPoolLatent", "qk"),
    ("CascadedGroupAttention", "qk"),
    ("CascadedGroupAttention", "v"),
    ("LiteMLA", "qk"),
    ("LiteMLA", "v"),
    ("MultiQueryAttention2d", "v"),
    ("WindowAttentionGlobal", "qk"),
}
"""Channels that, in some layer, no linear layer makes of the layer's input, by class and kind."""


def test_heads_of_every_class_can_be_looked_at(case):
    model = build(case, dtype=torch.float64)
    for layer in find_prunable_layers(model).layers:
        for unit in layer.units if layer.adapter.family == "attention" else ():
            module = model.get_submodule(layer.name)
            seen = white_moments(module, unit)
            assert seen is not None or (type(module).__name__, unit.kind) in UNSEEN
            if seen is not None:
                moments, similarity = seen
                assert similarity.shape == (unit.heads, unit.width)
                found = describe_heads(module, unit, moments, similarity)
                assert all(1 <= head.rank99 <= unit.width for head in found)
