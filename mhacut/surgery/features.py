"""Features that a pruned model must preserve: token maps, layer outputs or ``features_only`` levels."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Layer
from mhacut.errors import UnsupportedModelError, UsageError, option_name
from mhacut.surgery.find import PrunableLayers, classifier_size
from mhacut.surgery.hooks import captured_outputs
from mhacut.surgery.merging_blocks import unmerged

Run = Callable[[Tensor], Sequence[Tensor]]
"""Function that runs a model on images [B, C, H, W] and returns some of its tensors."""


@torch.no_grad()
def channel_dims(model: nn.Module, run: Run, layers: Sequence[Layer | None], image: Tensor) -> list[int]:
    """Return the channel dimension of each tensor that ``run(image)`` returns.

    ``layers`` names the last layer before each tensor (None: a convolutional map). The channel dimension has
    as many entries as the output of this layer has channels.
    """
    with captured_outputs(model, {layer.name for layer in layers if layer is not None}) as outputs:
        maps = run(image)
    dims = []
    for each, layer in zip(maps, layers, strict=True):
        last = each.ndim != 4
        if layer is not None and layer.name in outputs and not last:
            width = outputs[layer.name][-1].shape[layer.channel_dim]
            # Where neither fits, a convolution, which gives [B, C, H, W], has changed the width.
            last = each.shape[-1] == width != each.shape[1]
        dims.append(-1 if last else 1)
    return dims


Source = Literal["output", "pooled", "tokens", "pyramid", "layers", "maps"]
PLAIN_LEVELS = 3
"""Number of last blocks whose outputs timm's ``features_only`` returns for a plain ViT."""


@dataclass(frozen=True)
class Features:
    """Features to compare between the dense and the slim model, and how to read them."""

    source: Source
    """Features to read: the model's output (``output``), the classifier's input (``pooled``), timm's
    normalised tokens (``tokens``), levels of timm's ``features_only`` (``pyramid``), outputs of named modules
    (``layers``), or outputs of a :class:`~mhacut.surgery.submodule.SubmoduleFn` (``maps``)."""
    layers: tuple[str, ...] = ()
    levels: tuple[int, ...] = ()
    """Indices of the feature levels in timm's ``forward_intermediates``."""
    channel_dims: tuple[int, ...] = ()
    """Index of the channel dimension of each token map."""

    @property
    def dense(self) -> bool:
        """Whether the features contain every token, instead of 1 vector per image."""
        return self.source not in ("output", "pooled")

    def of(
        self, model: nn.Module, images: Tensor, tensors: Mapping[str, Tensor] | None = None
    ) -> list[Tensor]:
        """Run ``model`` on ``images`` [B, C, H, W] and return its features.

        Dense features are token maps [B, tokens, channels]. ``tensors`` replace tensors of the model by name.
        """
        reader = _Reader(model, self)
        maps: list[Tensor]
        if tensors:
            substitutes = {f"model.{name}": tensor for name, tensor in tensors.items()}
            maps = torch.func.functional_call(reader, substitutes, (images,), tie_weights=False)
        else:
            maps = reader(images)
        if not self.dense:
            return maps
        dims = self.channel_dims
        return [each.movedim(dim, -1).flatten(1, -2) for each, dim in zip(maps, dims, strict=True)]


class _Reader(nn.Module):
    """Wrapper of a model that returns its features instead of its output."""

    def __init__(self, model: nn.Module, features: Features) -> None:
        super().__init__()
        self.model, self.features = model, features
        self.training = model.training

    def forward(self, images: Tensor) -> list[Any]:
        model: Any = self.model
        if self.features.source == "maps":
            return [tensor[:, None] if tensor.ndim == 2 else tensor for tensor in model.maps(images)]
        if self.features.source == "tokens":
            return [model.forward_features(images)]
        if self.features.source == "pyramid":
            levels = list(self.features.levels)
            return list(model.forward_intermediates(images, indices=levels, intermediates_only=True))
        if self.features.source == "layers":
            return list(_outputs_of_layers(model, self.features.layers, images))
        if self.features.source == "pooled" and classifier_size(model):
            return [model.forward_head(model.forward_features(images), pre_logits=True)]
        return [model(images)]


def _outputs_of_layers(model: nn.Module, names: Sequence[str], images: Tensor) -> list[Any]:
    with captured_outputs(model, names, lambda args, output: unmerged(output)) as outputs:
        model(images)
    wrong = [name for name in names if len(outputs.get(name, ())) != 1]
    if wrong:
        times = len(outputs.get(wrong[0], ()))
        raise UnsupportedModelError(f"the model runs {wrong[0]!r} {times} times per image, expected once")
    return [outputs[name][0] for name in names]


@torch.no_grad()
def find_token_map(model: nn.Module, prunable: PrunableLayers, image: Tensor) -> Features:
    if not hasattr(model, "forward_features"):
        raise UnsupportedModelError(
            "the model has no method forward_features, from which mhacut reads token features"
        )
    run = _Reader(model, Features("tokens"))
    (tokens,) = run(image)
    _check_map(tokens, "forward_features", image)
    dims = channel_dims(model, run, prunable.layers[-1:], image)
    return Features("tokens", channel_dims=tuple(dims))


@torch.no_grad()
def find_pyramid(model: Any, image: Tensor) -> Features:
    info = [level["reduction"] for level in getattr(model, "feature_info", ()) if "reduction" in level]
    if not info or not hasattr(model, "forward_intermediates"):
        raise UnsupportedModelError(
            "timm has no features_only (forward_intermediates and feature_info) for this architecture; name "
            "the layers whose outputs are to be preserved, or take its tokens"
        )
    plain = len(info) > 1 and len(set(info)) == 1
    levels = range(max(len(info) - PLAIN_LEVELS, 0) if plain else 0, len(info))
    features = Features("pyramid", levels=tuple(levels), channel_dims=(1,) * len(levels))
    for number, feature_map in enumerate(_Reader(model, features)(image)):
        if not isinstance(feature_map, Tensor) or feature_map.ndim != 4:
            raise UnsupportedModelError(f"level {number} of features_only is not a map [B, C, H, W]")
    return features


@torch.no_grad()
def find_layers(model: nn.Module, names: Sequence[str], prunable: PrunableLayers, image: Tensor) -> Features:
    known = dict(model.named_modules())
    for name in names:
        if name not in known or not name:
            near = difflib.get_close_matches(
                name, [known_name for known_name in known if known_name], n=3, cutoff=0.5
            )
            raise UsageError(
                f"{option_name('preserve', name)}: expected answers, pooled, tokens, pyramid, or layers; the "
                "model has none of this name" + (f"; the nearest: {', '.join(near)}" if near else "")
            )
        within = next((layer for layer in prunable.layers if name.startswith(f"{layer.name}.")), None)
        if within is not None and name != f"{within.name}.{within.result}":
            raise UsageError(
                f"the output of {name!r} may change its shape when channels of {within.name!r} are cut; "
                f"name {within.name!r} or a block"
            )
    for name, output in zip(names, _outputs_of_layers(model, names, image), strict=True):
        _check_map(output, name, image)
    places = {name: place for place, name in enumerate(known)}
    last: list[Layer | None] = []
    for name in names:
        end = max(places[known_name] for known_name in known if f"{known_name}.".startswith(f"{name}."))
        before = [layer for layer in prunable.layers if places[layer.name] <= end]
        last.append(before[-1] if before else None)
    dims = channel_dims(model, lambda images: _outputs_of_layers(model, names, images), last, image)
    return Features("layers", layers=tuple(names), channel_dims=tuple(dims))


def _check_map(output: object, name: str, image: Tensor) -> None:
    if not isinstance(output, Tensor) or output.ndim not in (3, 4):
        found = list(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise UnsupportedModelError(
            f"{name}: expected a token map [B, tokens, channels] or [B, rows, columns, channels], "
            f"found {found}"
        )
    if len(output) != len(image):
        raise UnsupportedModelError(
            f"{name} gives {len(output)} windows for {len(image)} images; name a block, whose output is one "
            "map per image"
        )
