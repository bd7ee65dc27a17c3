"""Slim models in timm: ``timm.create_model("local-dir:DIR", pretrained=True)`` after ``import mhacut``.

timm knows no architecture whose widths are free. This one is: it names a dense architecture and a cut, and
builds the first, then makes the second. This module is imported while timm is, maybe in the middle of an
import of ours, so ours are imported when a model is made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, create_model, model_entrypoint, register_model
from torch import Tensor, nn

NAME = "mhacut_slim"


@register_model
def mhacut_slim(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """A dense model, cut. What ``mhacut export --format timm`` writes names it, with all arguments.

    Args:
        pretrained: load the weights of the folder it came from.
        kwargs: ``base_architecture``, timm's name of the dense model; ``plan``, what stays of it, as
            :meth:`mhacut.plan.Plan.to_json` gives it; the rest as for that architecture.

    Raises:
        CheckpointError: no such architecture, or a plan that does not fit it.
    """
    from mhacut.checkpoint.recognise import known_model, unknown_model
    from mhacut.errors import CheckpointError

    base = kwargs.get("base_architecture")
    if not isinstance(base, str) or "plan" not in kwargs:
        raise CheckpointError(
            f"{NAME}: needs base_architecture and plan, which the config.json of a folder holds that "
            'mhacut export --format timm wrote; open it with timm.create_model("local-dir:DIR", '
            "pretrained=True)"
        )
    if base == NAME or not known_model(base):
        raise CheckpointError(f"{NAME}: base_architecture: {unknown_model(base)}")
    model: nn.Module = build_model_with_cfg(
        _cut_model,
        NAME,
        pretrained,
        feature_cfg={"out_indices": 3, "feature_cls": "getter"},
        pretrained_filter_fn=_checkpoint_filter(base),
        **kwargs,
    )
    return model


def _cut_model(base_architecture: str, plan: Any, **kwargs: Any) -> nn.Module:
    from mhacut.plan import Plan
    from mhacut.surgery import cut

    model: nn.Module = create_model(base_architecture, pretrained=False, **kwargs)
    cut(model, Plan.from_json(plan))
    return model


def _checkpoint_filter(base: str) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None:
    """What the dense family makes weights of another image size fit with."""
    family = sys.modules[model_entrypoint(base).__module__]
    return getattr(family, "checkpoint_filter_fn", None)
