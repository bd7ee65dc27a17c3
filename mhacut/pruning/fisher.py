"""Fisher information: sensitivity of the model's output to errors of each layer's output."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Layer
from mhacut.errors import MhacutError, option_name
from mhacut.linalg.moments import gram
from mhacut.pruning.preserve import Preserved
from mhacut.runtime.device import ordered_attention
from mhacut.runtime.distributed import Processes
from mhacut.runtime.progress import Counter
from mhacut.surgery.find import PrunableLayers
from mhacut.surgery.hooks import registered

SHRINKAGE = 0.5
"""Weight of uniform importance in the importance of tokens. Estimates from few images are noisy, and
gradients describe small errors only (docs/explanation/choices.md)."""

FISHER_IMAGES = 48
"""Maximum number of images for the Fisher information. More images take longer and change the result
little."""

MAX_BYTES = 2**31
"""Maximum memory for the activations of a backward pass. Batches that need more are split."""

Grid = tuple[int, ...]
"""Shape of a layer's output for 1 image, without the channel axis."""


@dataclass(frozen=True)
class FisherInformation:
    matrices: Mapping[str, Tensor] = field(default_factory=dict)
    """Fisher matrix F, [out, out], by layer. An error e of the layer's output raises the KL divergence of the
    model's output by about 1/2 tr(F E[e e^T])."""
    importance: Mapping[str, Mapping[Grid, Tensor]] = field(default_factory=dict)
    """Importance of each token, [tokens], by layer and grid: squared gradient, shrunk by :data:`SHRINKAGE`,
    with mean 1."""

    def token_importance(self, layer: str, shape: Sequence[int], images: int) -> Tensor | None:
        """Return the importance of each token (row), float64 [rows]; None if not measured."""
        if shape[0] % images:
            return None
        laid_out = _grid(shape, images)
        for grid, importance in self.importance.get(layer, {}).items():
            if laid_out[: len(grid)] == grid:
                return importance.repeat_interleave(math.prod(laid_out[len(grid) :])).repeat(images)
        return None


def _grid(shape: Sequence[int], images: int) -> Grid:
    return (shape[0] // images, *shape[1:])


@torch.no_grad()
def measure_fisher(
    model: nn.Module,
    prunable: PrunableLayers,
    images: Tensor,
    *,
    batch_size: int,
    preserved: Preserved,
    seed: int,
    token_importance: bool,
    counter: Counter,
    processes: Processes,
) -> FisherInformation:
    """Estimate the Fisher information of all layers in one forward and backward pass over ``images``."""
    if len(images) == 0:
        return FisherInformation()
    # One random projection of the outputs per image gives an unbiased estimate from a single backward pass.
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    kept_bytes, shape = _backward_bytes(model, images[:1].to(device), preserved)
    at_once = max(1, MAX_BYTES // max(kept_bytes, 1))
    gradients = _Gradients()
    with gradients.captured(model, prunable.layers):
        for number, batch in enumerate(torch.split(images, batch_size)):
            # Processes draw for the batches of all, so that each has the noise it would have in one process.
            noise = torch.randn((len(batch), *shape), generator=generator)
            if number % processes.size == processes.rank:
                for part, drawn in zip(batch.split(at_once), noise.split(at_once), strict=True):
                    gradients.images = len(part)
                    with torch.enable_grad(), ordered_attention(device):
                        outputs = preserved.outputs(model, part.to(device).detach().requires_grad_(True))
                        torch.autograd.backward(preserved.projected(outputs, drawn.to(outputs.device)))
            counter.add(len(batch))
    information = _information(processes.summed(gradients.sums), len(images))
    if not all(_finite(matrix) for matrix in information.matrices.values()):
        check_outputs(preserved.outputs(model, images[:batch_size].to(device)))
        raise _not_finite("gradients")
    return information if token_importance else FisherInformation(information.matrices)


def check_outputs(outputs: Tensor) -> None:
    if not _finite(outputs):
        raise _not_finite("outputs")


def _finite(tensor: Tensor) -> bool:
    # In parts, since isfinite copies what it is given: with many classes this is hundreds of megabytes.
    return all(bool(part.isfinite().all()) for part in tensor.split(64))


def _not_finite(what: str) -> MhacutError:
    return MhacutError(
        f"the model's {what} are not finite on the calibration images; check {option_name('mean')}, "
        f"{option_name('std')} and the file"
    )


class _Gradients:
    """Sums of gradient products over tokens and images, float64, on the model's device."""

    def __init__(self) -> None:
        self.images = 0
        """Number of images in the running batch."""
        self.sums: dict[str, Tensor] = {}
        """``matrix LAYER`` [out, out], and ``squares GRID LAYER`` for squared gradients of tokens."""

    def captured(self, model: nn.Module, layers: tuple[Layer, ...]) -> AbstractContextManager[None]:
        def watch(layer: Layer) -> Callable[[nn.Module, object, Tensor], None]:
            def hook(module: nn.Module, args: object, output: Tensor) -> None:
                if not torch.is_grad_enabled():
                    return
                size = output.shape[layer.channel_dim]
                if f"matrix {layer.name}" not in self.sums:  # 0, should no gradient arrive
                    zeros = torch.zeros(size, size, dtype=torch.float64, device=output.device)
                    self.sums[f"matrix {layer.name}"] = zeros
                output.register_hook(
                    lambda gradient: self._add(
                        layer.name, gradient.detach().float().movedim(layer.channel_dim, -1)
                    )
                )

            return hook

        return registered(
            model.get_submodule(f"{layer.name}.{layer.result}".rstrip(".")).register_forward_hook(
                watch(layer)
            )
            for layer in layers
            if layer.units
        )

    def _add(self, layer: str, gradient: Tensor) -> None:
        rows = gradient.flatten(0, -2)  # (images * tokens, out)
        self.sums[f"matrix {layer}"] += gram(rows).double()
        if gradient.shape[0] % self.images:
            return  # not laid out image by image
        key = f"squares {'x'.join(map(str, _grid(gradient.shape[:-1], self.images)))} {layer}"
        squares = rows.square().sum(-1).double().view(self.images, -1).sum(0)  # (tokens)
        self.sums[key] = self.sums[key] + squares if key in self.sums else squares


def _information(sums: Mapping[str, Tensor], images: int) -> FisherInformation:
    matrices: dict[str, Tensor] = {}
    squares: dict[str, dict[Grid, Tensor]] = {}
    for name, total in sums.items():
        kind, _, rest = name.partition(" ")
        if kind == "matrix":
            matrices[rest] = total / images
        else:
            sizes, _, layer = rest.partition(" ")
            squares.setdefault(layer, {})[tuple(map(int, sizes.split("x")))] = total
    importance = {}
    for layer, grids in squares.items():
        mean = torch.cat(list(grids.values())).mean()
        reached = mean > 0  # by gradients
        importance[layer] = {
            grid: SHRINKAGE + (1 - SHRINKAGE) * total / mean for grid, total in grids.items() if reached
        }
    return FisherInformation(matrices, importance)


def _backward_bytes(model: nn.Module, image: Tensor, preserved: Preserved) -> tuple[int, torch.Size]:
    """Return the bytes that a backward pass needs for ``image``, and the shape of its output."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    sizes: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # itself, it would hold the pass that made it, which holds it, for ever

    noting = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with torch.enable_grad(), ordered_attention(image.device), noting:
        outputs = preserved.outputs(model, image.detach().requires_grad_(True))
    # The outputs keep all storages alive, so that addresses are unique.
    return sum(sizes.values()), outputs.shape[1:]
