"""Pooling heads, which attend once behind the last block, and what else of a ViT is left whole."""

from __future__ import annotations

import pytest
import torch
from timm.layers import AttentionPoolLatent

from helpers.models import build, double, relative
from mhacut.options.prune import SearchOptions
from mhacut.plan import Plan
from mhacut.pruning.calibrate import calibrate
from mhacut.pruning.candidates import find_candidates
from mhacut.pruning.repair import repair
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.slice import cut
from properties.cases import VITS

SIGLIP = VITS["pooling head"]


@pytest.mark.parametrize("built", [{"q_proj": False}, {"out_features": 0}], ids=str)
def test_a_pooling_head_that_is_built_otherwise_is_left_alone_too(built):
    model = build(VITS["plain"])
    model.attn_pool = AttentionPoolLatent(model.embed_dim, num_heads=3, **built)
    assert find_prunable_layers(model).skipped == (
        "attn_pool (AttentionPoolLatent): this pooling head is not pruned",
    )


@torch.no_grad()
def test_a_pooling_head_attends_with_one_channel():
    """Its queries are the same for every image, so that one direction of each head's keys counts."""
    model, images = double(SIGLIP, batch=8)
    unit = find_prunable_layers(model).unit(("attn_pool", "qk"))
    dense = model(images)
    moments = calibrate(model, find_prunable_layers(model), images, batch_size=4).moments
    (candidate,) = find_candidates(
        model.attn_pool, unit, moments[unit.key], 1, SearchOptions(basis="principal")
    )
    plan = Plan((candidate.plan(1),))
    repair(model, find_prunable_layers(model), plan, moments, candidates={unit.key: (candidate,)})
    cut(model, plan)
    assert model.attn_pool.q.out_features == unit.heads
    assert relative(model(images), dense) < 1e-5
