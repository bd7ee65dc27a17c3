"""Search for a common image normalisation with which a classifier is clearly more accurate."""

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
"""Number of images for detecting a wrong input normalisation."""
_SCREENED = 4
"""1 of this many images selects candidate normalisations. The other images compare the candidates."""
_CLEAR, _CERTAIN = 2.0, 3.0
"""Accuracy difference, in standard errors, above which another normalisation is a hint or is certain."""
_SAME = 0.002
"""Largest rounding difference between means or standard deviations of the same normalisation."""


@dataclass(frozen=True)
class Normalisation:
    """Mean and standard deviation of input pixels in 0..1, per colour channel."""

    name: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


USUAL = (
    Normalisation("ImageNet's", IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    Normalisation("Inception's", IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    Normalisation("CLIP's", OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    Normalisation("CIFAR-10's usual", (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
)
"""Normalisations of timm models and of models trained on small images."""


@dataclass(frozen=True)
class BetterNormalisations:
    """Normalisations with which a model is clearly more accurate than with its own normalisation."""

    ranked: tuple[tuple[Normalisation, float], ...]
    """Better normalisations with their top-1 accuracy in percent, best first; at least 1."""
    own_top1: float
    """Top-1 accuracy in percent with the model's own normalisation, on the same images."""
    images: int
    certain: bool
    """Whether the accuracy gain exceeds 3 standard errors. Gains of at most 2 are not reported."""


Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Function that returns an iterator over batches (images [B, C, H, W], labels [B]). Every call gives the same
batches."""


@torch.inference_mode()
def better_normalisation(
    model: nn.Module, batches: Batches, mean: Sequence[float], std: Sequence[float], device: torch.device
) -> BetterNormalisations | None:
    """Return common normalisations whose top-1 accuracy exceeds that of ``mean`` and ``std``.

    The difference is at least 2 standard errors. A quarter of the images selects candidates. The rest is
    used only if there are candidates.
    """
    if len(mean) != 3:
        return None
    own = Normalisation("", tuple(mean), tuple(std))
    candidates = [usual for usual in USUAL if not _nearly_equal(usual, own)]
    # Choosing candidates and comparing them on the same images would favour whoever was lucky on these.
    screened = _right(model, batches, own, (own, *candidates), device, screening=True)
    more = (screened[1:].sum(dim=1) > screened[0].sum()).tolist()
    chosen = [candidate for candidate, is_more in zip(candidates, more, strict=True) if is_more]
    if not chosen:
        return None
    compared = _right(model, batches, own, (own, *chosen), device, screening=False)
    images = screened.shape[1] + compared.shape[1]
    counts = compared.sum(dim=1) + screened[[True, *more]].sum(dim=1)
    own_top1, *top1 = (100 * counts / images).tolist()
    # Several may be better: CLIP's and ImageNet's are close to each other.
    errors = [_standard_errors(right, compared[0]) for right in compared[1:]]
    clear = [candidate for candidate in zip(chosen, top1, errors, strict=True) if candidate[2] > _CLEAR]
    clear.sort(key=lambda candidate: -candidate[1])
    found = tuple((candidate, percent) for candidate, percent, _ in clear)
    return BetterNormalisations(found, own_top1, images, max(errors) > _CERTAIN) if clear else None


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
    right: list[Tensor] = []
    for images, labels in _part(batches(), screening):
        images, labels = images.to(device), labels.to(device)
        answers = [model(_renormalised(images, own, one)).argmax(dim=1) for one in tried]
        right.append(torch.stack(answers) == labels)
    return torch.cat(right, dim=1) if right else torch.zeros(len(tried), 0, dtype=torch.bool, device=device)


def _part(batches: Iterable[tuple[Tensor, Tensor]], screening: bool) -> Iterator[tuple[Tensor, Tensor]]:
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
    if other is own:
        return images
    own_mean, own_std, mean, std = (
        torch.tensor(values, dtype=images.dtype, device=images.device).view(1, 3, 1, 1)
        for values in (own.mean, own.std, other.mean, other.std)
    )
    return (images * own_std + own_mean - mean) / std


def _standard_errors(first: Tensor, second: Tensor) -> float:
    """Return the difference of two accuracies in standard errors (McNemar's test)."""
    alone = int((first & ~second).sum()), int((second & ~first).sum())
    return (alone[0] - alone[1]) / math.sqrt(max(1, sum(alone)))
