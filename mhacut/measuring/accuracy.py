"""Accuracy of a classifier, figures for result tables, and agreement of an exported program."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhacut.budget import format_amount, format_flops
from mhacut.errors import DataError, MhacutError, option_name

_TOP = 5
_MANY = 1000
"""Number of images below which output tables show the standard error of the accuracy."""


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of a model on labelled images."""

    top1: float
    """Top-1 accuracy in percent of the images."""
    top5: float | None
    """Top-5 accuracy in percent of the images; None for models with 5 classes or fewer."""
    images: int
    seconds: float
    """Wall time of the evaluation in seconds, including the time to read images."""
    loss: float | None = None
    """Mean cross-entropy in nats."""
    sample: str = "images"
    """Name of the image set in output texts: ``validation images``."""

    @property
    def standard_error(self) -> float:
        # Agresti and Coull add 2 right and 2 wrong answers. Otherwise, 6 right of 6 would have an error of 0.
        right = (self.top1 / 100 * self.images + 2) / (self.images + 4)
        return 100 * math.sqrt(right * (1 - right) / (self.images + 4))

    @property
    def judged_on(self) -> str:
        """Text with the number and name of the images, and the standard error for few images."""
        return f"of {self.images} {self.sample}{self.doubt}"

    @property
    def label(self) -> str:
        return f"top-1, % {self.judged_on}"

    @property
    def doubt(self) -> str:
        """Text of the standard error, such as `` (± 0.5)``; empty for many images."""
        return f" (± {self.standard_error:.2g})" if self.images < _MANY else ""


@dataclass(frozen=True)
class ModelFigures:
    flops: int
    parameters: int
    latency_ms: float | None = None
    """Median latency per batch, in milliseconds; None if not measured."""
    evaluation: Evaluation | None = None
    """Accuracy on the validation images; None without validation images."""
    size: int | None = None
    """Bytes of the model file, in the dtype of the checkpoint. For the dense model, bytes of its tensors."""


class Figure(NamedTuple):
    """Measured quantity, such as latency, of the dense and the slim model. None means: not measured."""

    name: str
    dense: float | None
    slim: float | None
    unit: str
    """Unit of the dense and the slim value: ``%``, ``ms``, ``B``, a unit of divergence, or empty for a
    count."""
    conditions: str = ""

    @property
    def label(self) -> str:
        """Name, unit and measurement conditions, as the first cell of a table row."""
        return f"{self.heading} {self.conditions}".rstrip()

    @property
    def heading(self) -> str:
        return f"{self.name}, {self.unit}" if self.unit not in ("", "B") else self.name

    def text(self, value: float | None) -> str:
        if value is None:
            return ""
        if self.unit in ("%", "ms"):
            return f"{value:.2f}"
        if self.unit == "B":
            return format_amount(value, "size")
        return f"{value:.2g}" if self.unit else format_flops(value)

    def row(self) -> tuple[str, str, str, str]:
        """Return table cells: label, dense value, slim value, and ratio (for percentages: difference)."""
        ratio = ""
        if self.dense is not None and self.slim is not None:
            percent = self.unit == "%"
            ratio = f"{self.slim - self.dense:+.2f}" if percent else f"{100 * self.slim / self.dense:.1f}%"
        return self.label, self.text(self.dense), self.text(self.slim), ratio


def standard_error_of_drop(before: Sequence[bool], after: Sequence[bool]) -> float:
    # Paired: the variance of the difference of the two answers to one image, each -1, 0 or 1.
    lost = [int(a) - int(b) for a, b in zip(before, after, strict=True)]
    mean = sum(lost) / len(lost)
    variance = sum((one - mean) ** 2 for one in lost) / max(len(lost) - 1, 1)
    return 100 * math.sqrt(variance / len(lost))


def accuracy_for_history(before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
    """Return the accuracy entry for a slim file's history; empty unless both models were measured."""
    if before is None or after is None:
        return {}
    return {"accuracy": {"top1_before": before.top1, "top1_after": after.top1, "images": after.images}}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    *,
    device: torch.device,
    amp: bool = False,
    progress: Callable[[int, int], None] | None = None,
    answers: list[tuple[Tensor, Tensor]] | None = None,
) -> Evaluation:
    """Measure the accuracy of ``model`` on batches of images [B, C, H, W] and labels [B].

    Images with label -1 are not counted. ``answers`` receives the logits and labels of each batch, on the
    CPU.
    """
    began, was_training = time.perf_counter(), model.training
    model.to(device).eval()
    batches = len(loader) if isinstance(loader, Sized) else 0
    first = first_five = images = classes = 0
    loss, confusion = 0.0, torch.zeros(0, dtype=torch.long)
    try:
        for done, (inputs, labels) in enumerate(loader, start=1):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
                logits: Tensor = model(inputs.to(device))
            _check_finite(logits, done, amp)
            classes = logits.shape[1]
            best = logits.float().topk(min(_TOP, classes), dim=1).indices
            pairs = labels.cpu().clamp_min(0) * classes + best[:, 0].cpu()
            counts = torch.bincount(pairs[labels.cpu() >= 0], minlength=classes**2)
            confusion = counts if done == 1 else confusion + counts
            hits = best == labels.to(device)[:, None]  # [B, 5]
            entropy = F.cross_entropy(logits.float(), labels.to(device), reduction="sum", ignore_index=-1)
            loss += float(entropy)
            first += int(hits[:, 0].sum())
            first_five += int(hits.sum())
            if answers is not None:
                answers.append((logits.float().cpu(), labels.cpu()))
            images += len(labels)
            if progress is not None:
                progress(done, batches)
    finally:
        model.train(was_training)
    if images == 0:
        raise DataError("no images to evaluate on: the data set is empty")
    _check_order(confusion.reshape(classes, classes), images)
    return Evaluation(
        top1=100 * first / images,
        top5=100 * first_five / images if classes > _TOP else None,
        images=images,
        seconds=time.perf_counter() - began,
        loss=loss / images,
    )


_IMAGES_PER_CLASS = 5
"""Minimum mean number of images per class for a check of the order of classes."""


def _check_order(confusion: Tensor, images: int) -> None:
    """Raise an error if a permutation of classes explains the labels; ``confusion`` is [label, answer]."""
    right, (fitted, answers) = int(confusion.diagonal().sum()), confusion.max(1)
    permuted = int(fitted.sum())
    one_to_one = len(answers.unique()) == len(answers)
    if images < _IMAGES_PER_CLASS * len(confusion) or not one_to_one or permuted < 0.7 * images:
        return
    if right < permuted / 2:
        raise DataError(
            f"labels have another order than the model's classes: top-1 is {100 * right / images:.1f} %, and "
            f"{100 * permuted / images:.1f} % in another order of the classes. Name the class folders in the "
            f"head's order with {option_name('class_map')}"
        )


def _check_finite(logits: Tensor, batch: int, amp: bool) -> None:
    # A class with NaN would rank first.
    if not bool(logits.isfinite().all()):
        bad = int((~logits.isfinite()).any(dim=1).sum())
        raise MhacutError(
            f"the model's outputs are not finite for {bad} of {len(logits)} images of batch {batch}; "
            "no accuracy is given" + (f". Try without {option_name('amp')}" if amp else "")
        )


# -- agreement --


@dataclass(frozen=True)
class Fidelity:
    """Similarity of a slim model's outputs to the dense model's outputs."""

    divergence: float
    """Mean over images of the KL divergence of class probabilities in nats, or of the divergence of
    features."""
    agreement: float | None
    """Fraction of images for which both models have the same top-1 class; None for features."""
    images: int
    sample: str
    """Name of the image set in output texts: ``validation images``."""

    @property
    def judged_on(self) -> str:
        return f"{self.images} {self.sample}" if self.images > 1 else f"1 {self.sample}".removesuffix("s")


@dataclass(frozen=True)
class Agreement:
    """Similarity of an exported program's outputs to the outputs of its source model."""

    images: int
    kl: float | None
    """Mean KL divergence of the program's class probabilities from the model's, in nats. None if the outputs
    are not logits."""
    same_answer: float | None
    """Fraction of images for which program and model have the same top-1 class. None if the outputs are not
    logits."""
    cosine: float
    """Mean over images of the cosine between the outputs of program and model."""


def agreement(expected: Tensor, found: Tensor, *, classes: bool) -> Agreement:
    p, q = expected.double().flatten(1), found.double().flatten(1)
    cosine = float(F.cosine_similarity(p, q).mean())
    if not classes:
        return Agreement(len(p), None, None, cosine)
    # In float64: the KL divergence of a good export is far below what float32 resolves.
    log_p, log_q = p.log_softmax(dim=1), q.log_softmax(dim=1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(dim=1).mean())
    same = float((p.argmax(dim=1) == q.argmax(dim=1)).double().mean())
    return Agreement(len(p), max(kl, 0.0), same, cosine)  # rounding can leave a little less than nothing
