"""Slim models in timm: ``timm.create_model("local-dir:DIR", pretrained=True)`` after ``import mhacut``.

timm knows no architecture whose widths are free. This one is: it names a dense architecture and a cut, and
builds the first, then makes the second. This module is imported while timm is, maybe in the middle of an
import of ours, so ours are imported when a model is made.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Container, Iterable
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
    from mhacut.plan import Plan
    from mhacut.surgery import cut

    base = kwargs.get("base_architecture")
    if not isinstance(base, str) or "plan" not in kwargs:
        raise CheckpointError(
            f"{NAME}: needs base_architecture and plan, which the config.json of a folder holds that "
            'mhacut export --format timm wrote; open it with timm.create_model("local-dir:DIR", '
            "pretrained=True)"
        )
    if base == NAME or not known_model(base):
        raise CheckpointError(f"{NAME}: base_architecture: {unknown_model(base)}")
    # Without a class to wrap it in, features are those that timm gives of the dense model.
    as_dense = kwargs.get("features_only", False) and "feature_cls" not in kwargs
    wanted = {
        name: kwargs.pop(name) for name in ("features_only", "out_indices") if as_dense and name in kwargs
    }
    used: dict[str, Any] = {}

    def cut_model(base_architecture: str, plan: Any, **arguments: Any) -> nn.Module:
        used.update(arguments)
        dense: nn.Module = create_model(base_architecture, pretrained=False, **arguments)
        cut(dense, Plan.from_json(plan))
        return dense

    model: nn.Module = build_model_with_cfg(
        cut_model,
        NAME,
        pretrained,
        feature_cfg={"out_indices": 3},
        pretrained_filter_fn=_checkpoint_filter(base),
        **kwargs,
    )
    if not as_dense:
        return model
    features: nn.Module = create_model(base, pretrained=False, **wanted, **used)
    return _refilled(features, model, {unit.layer for unit in Plan.from_json(kwargs["plan"])})


def _refilled(features: nn.Module, slim: Any, layers: Iterable[str]) -> nn.Module:
    """``features``, which timm made of the dense model, with what ``slim`` has in its place.

    It has the modules up to the last level that is asked for, some under other names.

    Args:
        features: of the dense model.
        slim: the whole model.
        layers: names of those that were cut.
    """
    modules = dict(features.named_modules())
    for name in layers:
        if place := _place(name, modules):
            features.set_submodule(place, slim.get_submodule(name))
    tensors = features.state_dict()
    for name, tensor in slim.state_dict(keep_vars=True).items():
        if place := _place(name, tensors):
            owner, _, last = place.rpartition(".")
            setattr(features.get_submodule(owner), last, tensor)
            del tensors[place]
    assert not tensors, sorted(tensors)
    of_the_head = ("num_classes", "classifier", "global_pool")
    cfg = {name: value for name, value in slim.pretrained_cfg.items() if name not in of_the_head}
    features.pretrained_cfg = features.default_cfg = cfg  # type: ignore[assignment]
    return features


def _place(name: str, names: Container[str]) -> str:
    """What a module or tensor of a model is called where timm takes features of it; empty if it is gone."""
    flattened = name.replace(".", "_", 1)  # children of a sequence become children of the whole
    places = (name, f"model.{name}", f"body.{name}", flattened)
    return next((place for place in places if place in names), "")


def _checkpoint_filter(base: str) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None:
    """What the dense family makes weights of another image size fit with."""
    family = sys.modules[model_entrypoint(base).__module__]
    return getattr(family, "checkpoint_filter_fn", None)
