"""Look for a usual normalisation of images with which a classifier is clearly more accurate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
    OPENAI_CLIP_MEAN,
    OPENAI_CLIP_STD,
)
from torch import Tensor, nn

SAMPLE = 256
"""Number of images that are enough to see a wrong normalisation."""
_SCREENED = 4
"""One image in this many finds candidates, and the others compare them, so that the winner is not chosen by
chance."""
_CLEAR, _CERTAIN = 2.0, 3.0
"""Standard errors of a difference worth a hint, and of one that is chance in one comparison of a thousand."""
_SAME = 0.002
"""Largest difference of two means or standard deviations that differ only in rounding."""


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation per channel, for pixels in 0..1."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


USUAL = (
    Normalisation("ImageNet's", IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    Normalisation("Inception's", IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    Normalisation("CLIP's", OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    Normalisation("CIFAR-10's usual", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
)
"""Normalisations of timm's models, and of many that were trained on small images."""


@dataclass(frozen=True)
class Better:
    """Normalisations with which the model is clearly more accurate than with its own."""

    found: tuple[tuple[Normalisation, float], ...]
    """At least one, with its accuracy in percent, the best first."""
    own_top1: float
    """Percent of the same images, with the model's own."""
    images: int
    certain: bool
    """Whether one of them is more accurate by three standard errors, not only by two."""


Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Function that begins a pass over batches of (images [B, C, H, W], labels [B]); the same in every pass."""


@torch.inference_mode()
def better_normalisation(
    model: nn.Module, batches: Batches, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> Better | None:
    """Return the usual normalisations that are better than ``mean`` and ``std`` by two standard errors.

    A quarter of the images finds those that may be better; only then, the others compare them with the
    model's own. So if the normalisation is right, the cost is about that of one pass over :data:`SAMPLE`
    images.
    """
    if len(mean) != 3:
        return None
    own = Normalisation("", tuple(mean), tuple(std))
    candidates = [usual for usual in USUAL if not _nearly_equal(usual, own)]
    # Choosing candidates and comparing them on the same images would favour whoever was lucky on these.
    screened = _right(model, batches, own, (own, *candidates), device, screening=True)
    more = (screened[1:].sum(dim=1) > screened[0].sum()).tolist()
    chosen = [one for one, is_more in zip(candidates, more, strict=True) if is_more]
    if not chosen:
        return None
    compared = _right(model, batches, own, (own, *chosen), device, screening=False)
    images = screened.shape[1] + compared.shape[1]
    counts = compared.sum(dim=1) + screened[[True, *more]].sum(dim=1)
    own_top1, *top1 = (100 * counts / images).tolist()
    # Several may be better: CLIP's and ImageNet's are close to each other.
    errors = [_standard_errors(right, compared[0]) for right in compared[1:]]
    clear = [one for one in zip(chosen, top1, errors, strict=True) if one[2] > _CLEAR]
    clear.sort(key=lambda one: -one[1])
    found = tuple((one, percent) for one, percent, _ in clear)
    return Better(found, own_top1, images, max(errors) > _CERTAIN) if clear else None


def _nearly_equal(first: Normalisation, second: Normalisation) -> bool:
    pairs = zip((*first.mean, *first.std), (*second.mean, *second.std), strict=True)
    return all(abs(one - other) <= _SAME for one, other in pairs)


def _right(
    model: nn.Module,
    batches: Batches,
    own: Normalisation,
    tried: Sequence[Normalisation],
    device: torch.device,
    *,
    screening: bool,
) -> Tensor:
    """Return for each normalisation tried which images are classified rightly, [tried, images] bool."""
    right: list[Tensor] = []
    for images, labels in _part(batches(), screening):
        images, labels = images.to(device), labels.to(device)
        answers = [model(_renormalised(images, own, one)).argmax(dim=1) for one in tried]
        right.append(torch.stack(answers) == labels)
    return torch.cat(right, dim=1) if right else torch.zeros(len(tried), 0, dtype=torch.bool, device=device)


def _part(batches: Iterable[tuple[Tensor, Tensor]], screening: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """Give every fourth image of the sample, or all the others."""
    seen = 0
    for images, labels in batches:
        numbers = torch.arange(seen, seen + len(labels))
        chosen = ((numbers % _SCREENED == 0) == screening) & (numbers < SAMPLE)
        seen += len(labels)
        if chosen.any():
            yield images[chosen], labels[chosen]
        if seen >= SAMPLE:
            return


def _renormalised(images: Tensor, own: Normalisation, other: Normalisation) -> Tensor:
    """Return images [B, 3, H, W] normalised by ``own`` as ``other`` would normalise them."""
    if other is own:
        return images
    own_mean, own_std, mean, std = (
        torch.tensor(values, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
        for values in (own.mean, own.std, other.mean, other.std)
    )
    return (images * own_std + own_mean - mean) / std


def _standard_errors(first: Tensor, second: Tensor) -> float:
    """Return by how many standard errors ``first``, [n] bool, holds more often than ``second``.

    Of two that are equally often right, each is alone right as often as the other (McNemar's test).
    """
    alone = int((first & ~second).sum()), int((second & ~first).sum())
    return (alone[0] - alone[1]) / math.sqrt(max(1, sum(alone)))
