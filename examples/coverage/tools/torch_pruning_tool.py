"""Torch-Pruning 1.6.1: uniform, ratio 0.5, by L2 norms, with what its own timm scripts do set by hand.

Those scripts replace ``forward`` by that of an older timm and do not run on timm 1.0.31. Its default cuts the
embedding too; first it may take q, k, v and the MLP's hidden channels only, as every tool here. Where that
fails, or leaves attention whole, its default is tried.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torch_pruning
from cell import build, projections, short
from torch import Tensor, nn

from tools import Done

Removal = tuple[str, bool, list[int]]
"""Name of a module or parameter, whether its outputs, and the channels that went."""


def cut(model: nn.Module, x: Tensor) -> Done:
    architecture = model.pretrained_cfg["architecture"]  # type: ignore[union-attr, index]
    try:
        done = prune(model, x, inner=True)
        with torch.no_grad():
            done.model(x)
        if cuts_attention(done.model, architecture):
            return done
        why = "q, k, v and hidden channels alone: no attention was cut, and no error raised"
    except Exception as error:
        done, why = None, f"q, k, v and hidden channels alone: {short(error)}"
    try:
        whole = prune(build(architecture), x, inner=False)
        with torch.no_grad():
            whole.model(x)
        if not cuts_attention(whole.model, architecture):
            raise RuntimeError("no attention was cut, and no error raised")
    except Exception as error:
        if done is None:
            raise RuntimeError(f"{why}; with the embedding: {short(error)}") from error
        done.told, done.silent = f"{why}; with the embedding: {short(error)}", True
        return done
    whole.told = why
    return whole


def cuts_attention(model: nn.Module, architecture: str) -> bool:
    with torch.device("meta"):
        dense = projections(timm.create_model(architecture))
    slim = projections(model)
    return any(slim[name][key] < size for name, own in dense.items() for key, size in own.items())


def prune(model: nn.Module, x: Tensor, *, inner: bool) -> Done:
    began = time.process_time()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
    names = {module: name for name, module in model.named_modules()}
    heads: dict[nn.Module, int] = {}
    for name, own in projections(model).items():
        attention: Any = model.get_submodule(name)
        for key in own:
            projection = attention.get_submodule(key.rpartition(".")[0])
            if isinstance(projection, nn.Linear | nn.Conv2d) and isinstance(
                getattr(attention, "num_heads", None), int
            ):
                heads[projection] = attention.num_heads
    hidden = [module for name, module in model.named_modules() if name.endswith((".fc1", ".w1", ".fc1_g"))]
    roots = {*heads, *hidden}
    layers = [module for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    classifier = getattr(model, "get_classifier", lambda: None)()
    ignored = [layer for layer in layers if layer not in roots] if inner else []
    if not inner and isinstance(classifier, nn.Module):
        ignored = [module for module in classifier.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    pruner = torch_pruning.pruner.BasePruner(
        model,
        x,
        importance=torch_pruning.importance.GroupMagnitudeImportance(p=2),
        pruning_ratio=0.5,
        num_heads=dict(heads),
        ignored_layers=ignored,
        # The defaults of these two are shared by all pruners of a process.
        in_channel_groups={},
        out_channel_groups={},
    )
    parameters = {parameter: name for name, parameter in model.named_parameters()}
    removed: list[Removal] = []
    for group in pruner.step(interactive=True):
        for dependency, channels in group:
            module = dependency.target.module
            name = names.get(module) if isinstance(module, nn.Module) else parameters.get(module)
            if name is not None:
                outputs = pruner.DG.is_out_channel_pruning_fn(dependency.handler)
                removed.append((name, outputs, list(channels)))
        group.prune()
    for name in projections(model):
        attention = model.get_submodule(name)
        set_widths(attention)
    return Done(
        model,
        "inner" if inner else "inner and embedding",
        masker(removed) if inner else None,  # norms over the embedding see other channels
        seconds=time.process_time() - began,
    )


def set_widths(attention: Any) -> None:
    """Timm reshapes by these attributes, which Torch-Pruning does not know. The scale stays as it was."""
    projection = getattr(attention, "qkv", None) or getattr(attention, "q", None)
    if not isinstance(projection, nn.Linear) or not isinstance(getattr(attention, "num_heads", None), int):
        return
    parts = 3 if hasattr(attention, "qkv") else 1
    width = projection.out_features // parts
    if hasattr(attention, "head_dim"):
        attention.head_dim = width // attention.num_heads
    if hasattr(attention, "attn_dim"):
        attention.attn_dim = width


def masker(removed: list[Removal]) -> Callable[[nn.Module], nn.Module]:
    def masked(dense: nn.Module) -> nn.Module:
        """The dense model with removed rows and columns at zero."""
        for module in dense.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        with torch.no_grad():
            for name, outputs, channels in removed:
                try:
                    layer: Any = dense.get_submodule(name)
                except AttributeError:
                    continue  # a parameter of its own: what reads or makes the channel is zero already
                if not isinstance(layer, nn.Linear | nn.Conv2d | nn.BatchNorm2d):
                    continue
                if outputs or isinstance(layer, nn.BatchNorm2d):
                    layer.weight[channels] = 0
                    if layer.bias is not None:
                        layer.bias[channels] = 0
                else:
                    layer.weight[:, channels] = 0
        return dense

    return masked


def save(done: Done, folder: Path) -> None:
    torch.save(torch_pruning.state_dict(copy.deepcopy(done.model)), folder / "slim.pt")


def load(architecture: str, folder: Path) -> nn.Module:
    """Its own way, but as torch loads files by default: nothing in them is run."""
    state = torch.load(folder / "slim.pt", weights_only=True)
    model: nn.Module = torch_pruning.load_state_dict(timm.create_model(architecture), state)
    return model
