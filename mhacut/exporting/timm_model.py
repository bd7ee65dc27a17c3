"""Slim models in timm: ``timm.create_model("local-dir:DIR", pretrained=True)`` after ``import mhacut``.

No architecture of timm takes a width for each layer. The one registered here does: its arguments are a dense
architecture, which it builds, and a plan, by which it cuts that. timm may import this module while mhacut is
being imported; so modules of mhacut are imported only when a model is made.
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
    """Build a slim model, as named in the folders that ``mhacut export --format timm`` writes."""
    from mhacut.checkpoint.build import known_model, unknown_model
    from mhacut.errors import CheckpointError
    from mhacut.plan import Plan
    from mhacut.surgery.slice import cut

    base = kwargs.get("base_architecture")
    if not isinstance(base, str) or "plan" not in kwargs:
        raise CheckpointError(
            f"{NAME}: needs base_architecture and plan, which the config.json of a folder holds that "
            'mhacut export --format timm wrote; open it with timm.create_model("local-dir:DIR", '
            "pretrained=True)"
        )
    if base == NAME or not known_model(base):
        raise CheckpointError(f"{NAME}: base_architecture: {unknown_model(base)}")
    kwargs.pop("feature_cls", None)  # slim models have one extractor, that below

    def cut_model(base_architecture: str, plan: Any, tokens: Any = None, **arguments: Any) -> nn.Module:
        dense: nn.Module = create_model(base_architecture, pretrained=False, **arguments)
        cut(dense, Plan.from_json(plan, tokens))
        return dense

    # The dense family's function that resizes weights of another image size; not every family has one.
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
    """Return the extractor of timm's ``features_only``, which calls the model's ``forward_intermediates``."""
    from mhacut.surgery.tokens import tokens_of

    levels = [level["reduction"] for level in model.feature_info]
    if out_indices is None:
        out_indices = min(3, len(levels)) if len(set(levels)) == 1 else len(levels)
    # A model that leaves out tokens keeps its head, which cannot pool others.
    features: nn.Module = FeatureGetterNet(model, out_indices, prune=not tokens_of(model))
    return features
