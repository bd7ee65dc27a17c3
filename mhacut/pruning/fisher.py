"""How sharply the model's answer reacts to errors of each layer's output: in which direction, at which token.

Ours. Tokens are far from alike: with a class token, errors of the last block's other tokens reach nobody, and
even in the first block of a CIFAR-10 ViT that one token of 65 has a quarter to a half of all influence.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from mhacut.adapters.base import Layer
from mhacut.runtime.distributed import Processes
from mhacut.surgery.find import PrunableLayers

SHRINKAGE = 0.5
"""Of the tokens' weights, what is spread evenly. Few images tell little of the few tokens that matter, and
at deep cuts errors are not the small ones that gradients speak of. On two CIFAR-10 ViTs, with 256 images and
one seed, the divergence at 50, 25 and 12.5 % of the FLOPs was .00020, .0175 and .087 with a half (.0049, .124
and .363 for the ViT that is trained better), .00020, .0165 and .095 with a quarter (.0052, .132, .374),
.00023, .0192 and .098 with a tenth (.0057, .139, .406), and .00027, .0236 and .107 with all, which is tokens
all alike (.0068, .139, .355). With 32 images or 1,024, and with synthetic ones, a half did as well. These are
validation images that the README's tables are of: 2,000 of the 5,000."""

Grid = tuple[int, ...]
"""Shape of a layer's output for one image, without its channels: (1, 65), (windows, tokens), ..."""


@dataclass(frozen=True)
class FisherInformation:
    """What :func:`measure_fisher` found; empty where nothing was differentiated."""

    matrices: Mapping[str, Tensor] = field(default_factory=dict)
    """Per layer, [out, out]: the KL divergence of the answer from an error e of the layer's output is about
    1/2 tr(S E[e e^T]), E over tokens and images."""
    importance: Mapping[str, Mapping[Grid, Tensor]] = field(default_factory=dict)
    """Per layer and grid, how much each token counts, flat, [tokens]: in proportion to its squared gradient,
    but for :data:`SHRINKAGE`. Of mean 1 over all tokens of a layer, which may run on several grids."""

    def token_importance(self, layer: str, shape: Sequence[int], images: int) -> Tensor | None:
        """How much each row counts in a mean over tokens and images.

        Args:
            layer: whose output the rows become: a row for each token of it, or several that follow each
                other, such as both halves of a rotary head.
            shape: of an activation without its channels, images first.
            images: how many those are.

        Returns:
            [all rows], float64; None where all count alike, or where the rows are laid out otherwise than
            those of the layer's output.
        """
        if shape[0] % images:
            return None
        own = _grid(shape, images)
        for grid, weights in self.importance.get(layer, {}).items():
            if own[: len(grid)] == grid:
                return weights.repeat_interleave(math.prod(own[len(grid) :])).repeat(images)
        return None


def _grid(shape: Sequence[int], images: int) -> Grid:
    """Of one image. Windows of an image follow one another in the first dimension."""
    return (shape[0] // images, *shape[1:])


@torch.no_grad()
def measure_fisher(
    model: nn.Module,
    prunable: PrunableLayers,
    images: Tensor,
    *,
    batch_size: int,
    seed: int = 0,
    classifier: bool = True,
    progress: Callable[[int], None] | None = None,
    processes: Processes | None = None,
) -> FisherInformation:
    """Run ``images`` [n, C, H, W] through ``model`` and back, once.

    Args:
        model: dense, eval mode, float32, without gradients; images are moved to its device batch by batch.
        prunable: of ``model``.
        images: normalised.
        batch_size: images at a time.
        seed: of the random projections that estimate it.
        classifier: whether outputs are class logits.
        progress: called with the number of images of each batch.
        processes: that take turns batch by batch, and add up what they found.
    """
    processes = processes or Processes(0, 1, images.device)
    generator = torch.Generator().manual_seed(seed)
    device = next(model.parameters()).device
    sums = _Sums()
    drawn_elsewhere: list[int] = []
    with _listening_to_gradients(model, prunable.layers, sums):
        for number, batch in enumerate(torch.split(images, batch_size)):
            if number % processes.size == processes.rank:
                sums.images = len(batch)
                _differentiate(model, batch.to(device), generator, classifier, drawn_elsewhere)
                drawn_elsewhere.clear()
            else:
                drawn_elsewhere.append(len(batch))
            if progress is not None:
                progress(len(batch))
    return sums.shared(processes, len(images))


class _Sums:
    """Sums over tokens and images, float64, on the model's device."""

    def __init__(self) -> None:
        self.images = 0
        """Of the batch under way."""
        self.matrices: dict[str, Tensor] = {}
        self.influence: dict[tuple[str, Grid], Tensor] = {}
        """Squared gradients, [tokens]."""

    def add(self, layer: str, gradient: Tensor) -> None:
        """Take the gradient of one batch, [images, ..., out]."""
        rows = gradient.flatten(0, -2)
        gram = (rows.mT @ rows).double()
        self.matrices[layer] = self.matrices[layer] + gram if layer in self.matrices else gram
        if gradient.shape[0] % self.images:
            return  # laid out otherwise than image by image
        key = layer, _grid(gradient.shape[:-1], self.images)
        at_tokens = rows.square().sum(-1).double().view(self.images, -1).sum(0)
        self.influence[key] = self.influence[key] + at_tokens if key in self.influence else at_tokens

    def shared(self, processes: Processes, images: int) -> FisherInformation:
        """Of all processes, which differentiated so many images together."""
        sums: dict[str, Tensor] = {f"fisher {layer}": total for layer, total in self.matrices.items()}
        for (layer, grid), total in self.influence.items():
            sums[f"influence {'x'.join(map(str, grid))} {layer}"] = total
        matrices: dict[str, Tensor] = {}
        influence: dict[str, dict[Grid, Tensor]] = {}
        for name, total in processes.summed(sums).items():
            kind, _, rest = name.partition(" ")
            if kind == "fisher":
                matrices[rest] = total / images
            else:
                sizes, _, layer = rest.partition(" ")
                influence.setdefault(layer, {})[tuple(map(int, sizes.split("x")))] = total
        return FisherInformation(matrices, {layer: _weights(grids) for layer, grids in influence.items()})


def _weights(influence: Mapping[Grid, Tensor]) -> dict[Grid, Tensor]:
    """Of the tokens of one layer; none where none matters."""
    mean = torch.cat(list(influence.values())).mean()
    if not mean > 0:
        return {}
    return {grid: SHRINKAGE + (1 - SHRINKAGE) * each / mean for grid, each in influence.items()}


def _differentiate(
    model: nn.Module,
    batch: Tensor,
    generator: torch.Generator,
    classifier: bool,
    drawn_elsewhere: Sequence[int],
) -> None:
    """Run ``batch`` and back.

    What flows back is the gradient g of sum_c eps_c sqrt(p_c) log p_c with eps_c of unit variance: E[g g^T]
    is then the Fisher information of the answer, the second-order term of its KL divergence.
    """
    with torch.enable_grad():
        outputs: Tensor = model(batch.detach().requires_grad_(True))
        for size in drawn_elsewhere:  # by other processes, for their batches in between
            torch.randn((size, *outputs.shape[1:]), generator=generator)
        noise = torch.randn(outputs.shape, generator=generator).to(outputs.device)
        if classifier:
            logs = outputs.float().log_softmax(-1)
            projected = (noise * logs.detach().mul(0.5).exp() * logs).sum()
        else:
            scale = outputs.detach().float().var().clamp_min(1e-12) * outputs[0].numel() / 2
            projected = (noise * outputs.float()).sum() / scale.sqrt()
        torch.autograd.backward(projected)


@contextmanager
def _listening_to_gradients(model: nn.Module, layers: tuple[Layer, ...], sums: _Sums) -> Iterator[None]:
    def watch(layer: Layer) -> Callable[[nn.Module, object, Tensor], None]:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            output.register_hook(  # type: ignore[no-untyped-call]
                lambda gradient: sums.add(
                    layer.name, gradient.detach().float().movedim(layer.channel_dim, -1)
                )
            )

        return hook

    handles = [
        model.get_submodule(f"{layer.name}.{layer.result}".rstrip(".")).register_forward_hook(watch(layer))
        for layer in layers
        if layer.units
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
