"""Slim models in timm: ``timm.create_model("local-dir:DIR", pretrained=True)`` after ``import mhacut``.

Architectures of timm have no argument for the width of each layer, so this module registers one that has: it
builds a dense architecture and cuts it by a plan.
"""

from __future__ import annotations

import sys
from typing import Any

from timm.models import build_model_with_cfg, create_model, model_entrypoint, register_model
from timm.models._features import FeatureGetterNet
from torch import nn

NAME = "mhacut_slim"


@register_model
def mhacut_slim(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build timm model ``base_architecture``, and cut it by ``plan`` and ``tokens``, which are JSON."""
    # Imported late: timm may import this module while mhacut is being imported.
    from mhacut.checkpoint.build import known_model, unknown_model
    from mhacut.errors import CheckpointError
    from mhacut.plan import Plan
    from mhacut.surgery.slice import cut

    base = kwargs.get("base_architecture")
    if not isinstance(base, str) or "plan" not in kwargs:
        raise CheckpointError(
            f"{NAME}: base_architecture or plan is missing. Write a folder with mhacut export --format timm, "
            'and open it with timm.create_model("local-dir:DIR", pretrained=True)'
        )
    if base == NAME or not known_model(base):
        raise CheckpointError(f"{NAME}: base_architecture: {unknown_model(base)}")
    kwargs.pop("feature_cls", None)  # replaced by _features

    def cut_model(base_architecture: str, plan: Any, tokens: Any = None, **arguments: Any) -> nn.Module:
        dense: nn.Module = create_model(base_architecture, pretrained=False, **arguments)
        cut(dense, Plan.from_json(plan, tokens))
        return dense

    # Resizes weights for another image size. Some families of timm have no such function.
    family = sys.modules[model_entrypoint(base).__module__]
    model: nn.Module = build_model_with_cfg(
        cut_model,
        NAME,
        pretrained,
        pretrained_filter_fn=getattr(family, "checkpoint_filter_fn", None),
        feature_cfg={"feature_cls": _features, "out_indices": None},
        **kwargs,
    )
    return model


def _features(model: Any, out_indices: Any, **_: Any) -> nn.Module:
    """Return the model of timm's ``features_only``, which calls ``forward_intermediates`` of ``model``."""
    from mhacut.surgery.tokens import tokens_of

    levels = [level["reduction"] for level in model.feature_info]
    if out_indices is None:
        out_indices = min(3, len(levels)) if len(set(levels)) == 1 else len(levels)
    # The head of a model with fewer tokens stays: its pooling fits these tokens.
    features: nn.Module = FeatureGetterNet(model, out_indices, prune=not tokens_of(model))
    return features
