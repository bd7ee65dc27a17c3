"""Slim models in timm: ``timm.create_model("local-dir:DIR", pretrained=True)`` after ``import mhacut``.

No architecture of timm takes a width for each layer. The one registered here does: its arguments are a dense
architecture, which it builds, and a plan, by which it cuts that. timm may import this module while mhacut is
being imported; so modules of mhacut are imported only when a model is made.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable
from typing import Any, cast

from timm.models import build_model_with_cfg, create_model, model_entrypoint, register_model
from torch import Tensor, nn

NAME = "mhacut_slim"
_FEATURE_ARGS = ("features_only", "out_indices", "feature_cls", "feature_location")
"""Arguments of timm's factories that only say how a model returns features."""


@register_model
def mhacut_slim(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Build a slim model, as named in the folders that ``mhacut export --format timm`` writes.

    Args:
        pretrained: load the weights of the folder it came from.
        kwargs: ``base_architecture``, timm's name of the dense model; ``plan``, the channels that stay, as
            :meth:`mhacut.plan.Plan.to_json` gives them; ``tokens``, where the plan has any, as
            :meth:`mhacut.plan.TokenPlan.to_json` gives them; the rest as for that architecture.

    Raises:
        CheckpointError: ``base_architecture`` or ``plan`` is missing, timm has no such architecture, or the
            asked ``feature_cls`` does not work with it.
        PlanError: the plan does not fit the architecture.
        UnsupportedModelError: features are asked for that the model does not compute for all tokens.
    """
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
    # Only the factory of the dense architecture knows how timm makes a feature extractor of its model.
    as_features = kwargs.get("features_only", False)
    wanted = {name: kwargs.pop(name) for name in _FEATURE_ARGS if as_features and name in kwargs}
    if wanted.get("feature_cls") == "fx":
        raise CheckpointError(
            f"{NAME}: feature_cls='fx' traces a model and renames its layers; try another feature_cls, or "
            "forward_intermediates of the model"
        )
    cut_to = Plan.from_json(kwargs["plan"], kwargs.get("tokens"))
    used: dict[str, Any] = {}  # the arguments that came with the pretrained_cfg among them

    def cut_model(base_architecture: str, plan: Any, tokens: Any = None, **arguments: Any) -> nn.Module:
        used.update(arguments)
        dense: nn.Module = create_model(base_architecture, pretrained=False, **arguments)
        cut(dense, cut_to)
        return dense

    model: nn.Module = build_model_with_cfg(
        cut_model,
        NAME,
        pretrained,
        pretrained_filter_fn=_checkpoint_filter(base),
        **kwargs,
    )
    if not as_features:
        return model
    features: nn.Module = create_model(base, pretrained=False, **wanted, **used)
    if cut_to.tokens:
        cast(Any, model).check_features(list(cast(Any, features).feature_info.out_indices))
    return _refilled(features, model, {unit.layer for unit in cut_to})


def _refilled(features: nn.Module, slim: Any, layers: Iterable[str]) -> nn.Module:
    """Return ``features`` with the modules and tensors of ``slim`` in place of its own.

    Args:
        features: timm's feature extractor of the dense model: its modules up to the last level that is
            asked for, some under other names.
        slim: the whole slim model.
        layers: names of the layers that were cut.

    Raises:
        CheckpointError: tensors of ``features`` have names that the slim model does not have.
    """
    from mhacut.errors import CheckpointError

    cut_layers = {id(slim.get_submodule(name)) for name in layers}
    named = list(slim.named_modules(remove_duplicate=False))
    names = Counter(id(module) for _, module in named)
    modules = dict(features.named_modules(remove_duplicate=False))
    for name, module in named:
        # Modules with several names too, so that those stay names of one module.
        if (id(module) in cut_layers or names[id(module)] > 1) and (place := _place(name, modules)):
            features.set_submodule(place, module)
    tensors = features.state_dict()
    for name, tensor in slim.state_dict(keep_vars=True).items():
        if place := _place(name, tensors):
            owner, _, last = place.rpartition(".")
            setattr(features.get_submodule(owner), last, tensor)
            del tensors[place]
    if tensors:
        raise CheckpointError(
            f"{NAME}: {type(features).__name__} names the features of {type(slim).__name__} differently, "
            f"for example {next(iter(tensors))!r}; try another feature_cls, or forward_intermediates of the "
            "model"
        )
    # As timm's pretrained_cfg_for_features.
    of_the_head = ("num_classes", "classifier", "global_pool")
    cfg = {name: value for name, value in slim.pretrained_cfg.items() if name not in of_the_head}
    features.pretrained_cfg = features.default_cfg = cfg  # type: ignore[assignment]
    return features


def _place(name: str, names: Container[str]) -> str:
    """Return the name of a module or tensor in timm's feature extractor; empty if it is not there."""
    flattened = name.replace(".", "_", 1)  # children of a sequence become children of the whole
    places = (name, f"model.{name}", f"body.{name}", flattened)
    return next((place for place in places if place in names), "")


def _checkpoint_filter(base: str) -> Callable[[dict[str, Tensor], nn.Module], dict[str, Tensor]] | None:
    """Return the dense family's function that resizes weights of another image size."""
    family = sys.modules[model_entrypoint(base).__module__]
    return getattr(family, "checkpoint_filter_fn", None)
