"""Measure the accuracy of a classifier on labelled images."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sized
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhacut.errors import DataError, MhacutError, option_name

_TOP = 5


@dataclass(frozen=True)
class Evaluation:
    """Accuracy of a model on labelled images."""

    top1: float
    """Percent of images whose label is the model's first answer."""
    top5: float | None
    """Percent of images whose label is among the first five; None for 5 classes or fewer."""
    images: int
    seconds: float
    """Wall time, reading images included."""
    loss: float | None = None
    """Mean cross-entropy, in nats."""


def accuracy_for_history(before: Evaluation | None, after: Evaluation | None) -> dict[str, Any]:
    """Return the item of a command's entry in a slim file's history; nothing unless both were measured."""
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
) -> Evaluation:
    """Measure the top-1 and top-5 accuracy of ``model``, in eval mode, over every image of ``loader``.

    Args:
        model: images [B, C, H, W] to logits [B, classes]; moved to ``device``.
        loader: batches of (images, labels [B]).
        device: to compute on.
        amp: bfloat16 autocast.
        progress: called after each batch with (batches done, batches in all; 0 if the loader does not say).

    Raises:
        DataError: no images, or what the loader raises.
        MhacutError: outputs that are not finite, which would rank as the best, or out of memory.
    """
    began = time.perf_counter()
    was_training = model.training
    model.to(device).eval()
    batches = len(loader) if isinstance(loader, Sized) else 0
    first = first_five = images = 0
    classes = 0
    loss = 0.0
    try:
        for done, (inputs, labels) in enumerate(loader, start=1):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=amp):
                logits = _logits(model, inputs.to(device), device)
            if not bool(logits.isfinite().all()):
                bad = int((~logits.isfinite()).any(dim=1).sum())
                raise MhacutError(
                    f"the model's outputs are not finite for {bad} of {len(labels)} images of batch {done}; "
                    "no accuracy is given" + (f". Try without {option_name('amp')}" if amp else "")
                )
            classes = logits.shape[1]
            best = logits.float().topk(min(_TOP, classes), dim=1).indices  # [B, 5]
            right = best == labels.to(device)[:, None]
            loss += float(F.cross_entropy(logits.float(), labels.to(device), reduction="sum"))
            first += int(right[:, 0].sum())
            first_five += int(right.sum())
            images += len(labels)
            if progress is not None:
                progress(done, batches)
    finally:
        model.train(was_training)
    if images == 0:
        raise DataError("no images to evaluate on")
    return Evaluation(
        top1=100 * first / images,
        top5=100 * first_five / images if classes > _TOP else None,
        images=images,
        seconds=time.perf_counter() - began,
        loss=loss / images,
    )


def _logits(model: nn.Module, inputs: Tensor, device: torch.device) -> Tensor:
    try:
        logits: Tensor = model(inputs)
    except torch.OutOfMemoryError:
        raise MhacutError(
            f"{device} has too little memory for {len(inputs)} images at a time; use a smaller "
            f"{option_name('batch_size')}"
        ) from None
    return logits
