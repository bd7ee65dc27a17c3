"""``modeling_mhacut.py`` in a folder: code by which transformers opens a pruned model without mhacut.

The file is made of the source of mhacut's own classes.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from mhacut.adapters.attend import graph_is_recorded
from mhacut.surgery import merging_blocks, token_merging
from mhacut.surgery.merging_blocks import Branches, Matcher, MergingLayer, Projections

MODULE = "modeling_mhacut"


class Pruned:
    """Mixin by which a transformers class builds the pruned model that ``config.mhacut`` describes."""

    def __init__(self: Any, config: Any, *args: Any, **options: Any) -> None:
        super().__init__(config, *args, **options)  # type: ignore[call-arg]
        stated = config.mhacut
        for name, shape in stated["shapes"].items():
            module, key = self.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]
            tensor = getattr(module, key)
            setattr(module, key, nn.Parameter(tensor.new_empty(shape), requires_grad=tensor.requires_grad))
        for name, merge in stated["merges"].items():
            layer = self.get_submodule(name)
            merging = f"Merging{type(layer).__name__}"  # a global name, so that pickle finds the class
            layer.__class__ = globals().setdefault(merging, type(merging, (MergingLayer, type(layer)), {}))
            layer.matcher = None if merge["matcher"] is None else Matcher(**merge["matcher"])
            layer.branches = Branches(*merge["branches"])
            layer.projections = merge["projections"] and Projections(*merge["projections"])
            if merge["outside"] is not None:
                layer.outside = merge["outside"]
        for name, values in stated["attributes"].items():
            vars(self.get_submodule(name)).update(values)


def modeling_of(model: Any) -> tuple[dict[str, Any], str] | None:
    """Return entries of ``config.json`` and the source of ``modeling_mhacut.py`` for a pruned model.

    None if a layer of the model has a class that only mhacut defines.
    """
    import transformers

    cls = type(model)
    if getattr(transformers, cls.__name__, None) is not cls:
        return None
    with torch.device("meta"):
        dense = cls(model.config)
    stated: dict[str, Any] = {"shapes": {}, "merges": {}, "attributes": {}}
    modules = dict(dense.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, Matcher):
            continue
        if name not in modules:
            return None
        expected, merges = modules[name], isinstance(module, MergingLayer)
        if type(module) is not type(expected) and not (merges and type(expected) in type(module).__mro__):
            return None
        if merges:
            arguments = [*inspect.signature(Matcher).parameters]
            matcher: Any = module.matcher
            stated["merges"][name] = {
                "matcher": None if matcher is None else {key: getattr(matcher, key) for key in arguments},
                "branches": [*module.branches[:-1], None],  # mlp, which only a cut needs
                "projections": module.projections,
                "outside": getattr(module, "outside", None),
            }
        for key, value in vars(module).items():
            plain = isinstance(value, bool | int | float | str)
            if plain and key != "training" and key[0] != "_" and vars(expected).get(key) != value:
                stated["attributes"].setdefault(name, {})[key] = value
    expected_shapes = {key: list(tensor.shape) for key, tensor in dense.named_parameters()}
    for key, tensor in model.named_parameters():
        if list(tensor.shape) != expected_shapes.get(key):
            stated["shapes"][key] = list(tensor.shape)
    autos = [name for name in dir(transformers) if name.startswith("AutoModel") and _opens(name, model)]
    auto_map = dict.fromkeys(autos, f"{MODULE}.Pruned{cls.__name__}")
    return {"auto_map": auto_map, "mhacut": stated}, _source(cls.__name__)


def _opens(auto: str, model: Any) -> bool:
    import transformers

    mapping = getattr(getattr(transformers, auto), "_model_mapping", None)
    found = mapping[type(model.config)] if mapping and type(model.config) in mapping else ()
    return type(model) in (found if isinstance(found, tuple) else (found,))


def _source(cls: str) -> str:
    objects: tuple[Any, ...] = (
        graph_is_recorded,
        Branches,
        merging_blocks.Projections,
        merging_blocks.apply_part,
        merging_blocks._cls_weights,
        merging_blocks._check_no_mask,
        merging_blocks._with_sizes,
        Matcher,
        merging_blocks.Merging,
        MergingLayer,
        Pruned,
    )
    parts = [
        inspect.getsource(token_merging),
        "from operator import attrgetter\n\nimport transformers\nfrom torch import nn\n"
        "from torch.utils._pytree import tree_leaves\n\nUnsupportedModelError = ValueError",
        *(inspect.getsource(each) for each in objects),
        f"class Pruned{cls}(Pruned, transformers.{cls}):\n    pass\n",
    ]
    return "\n\n".join(parts)
