"""Tokens that a model leaves out: those that no output reads, and those that are merged into others."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from mhacut.errors import PlanError
from mhacut.plan import TokenPlan
from mhacut.surgery.merging import merged_of, set_merged
from mhacut.surgery.read import read_of, set_read


def tokens_of(model: nn.Module) -> TokenPlan:
    """Return the plan of tokens that was applied to ``model``."""
    return TokenPlan(read_of(model), merged_of(model))


def with_tokens(model: nn.Module, tokens: TokenPlan) -> nn.Module:
    """Return a model with the same weights that leaves out the planned tokens; ``model`` itself if it does.

    Unchanged tensors are shared. Errors are those of :func:`apply_tokens`.
    """
    if tokens == tokens_of(model):
        return model
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    changed = copy.deepcopy(model, dict[int, Any](shared))
    apply_tokens(changed, tokens)
    return changed


@torch.no_grad()
def apply_tokens(model: nn.Module, tokens: TokenPlan) -> None:
    """Change ``model`` in place so that it leaves out what ``tokens`` states, unless it does already.

    Args:
        model: a timm model, on any device, meta included; its layers may be cut.
        tokens: the plan.

    Raises:
        PlanError: the plan is not for this model.
        UnsupportedModelError: the model cannot do without tokens.
    """
    applied = tokens_of(model)
    if tokens == applied:
        return
    if tokens.read != applied.read:
        if applied.read is not None or tokens.read is None:
            raise PlanError(
                f"the model computes {applied.read or 'all'} tokens of its last block, the plan is for "
                f"{tokens.read or 'all'}"
            )
        set_merged(model, ())
        set_read(model, tokens.read)
    set_merged(model, tokens.merged)
