"""Accuracy on the validation images, each process measuring its share of them."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from mhacut.data import EvaluationLoader, Preprocessing, WithoutLabels, evaluation_loader, has_split
from mhacut.errors import option_name
from mhacut.measuring.accuracy import Evaluation, evaluate
from mhacut.options.finetune import FinetuneOptions
from mhacut.runtime.distributed import Processes
from mhacut.runtime.progress import Reporter


def validation_images(
    options: FinetuneOptions,
    preprocessing: Preprocessing,
    classes: int,
    processes: Processes,
    reporter: Reporter,
) -> EvaluationLoader | None:
    """Return this process's share of the labelled validation images; None where there are none.

    Args:
        options: options of the run.
        preprocessing: preprocessing of the model.
        classes: number of classes; with fewer than two there is no accuracy that could fall.
        processes: processes that share the images.
        reporter: receives a message where the split is missing, or has no labels.

    Raises:
        DataError: the images do not fit the model; accuracy is asked for and they have no labels.
    """
    data = options.data
    if options.eval_images == 0 or classes < 2:
        return None
    if not has_split(data, data.val_split):
        reporter.log(
            f"accuracy is not measured: no split {data.val_split!r} in {data.data_dir} "
            f"({option_name('val_split')})"
        )
        return None
    try:
        return evaluation_loader(
            preprocessing,
            data,
            num_classes=classes,
            batch_size=max(options.training.batch_size, 64),
            limit=options.eval_images,
            part=(processes.rank, processes.size),
        )
    except WithoutLabels as error:
        if options.eval_images is not None:
            raise  # somebody asked for accuracy
        reporter.log(f"accuracy is not measured: {error}")
        return None


def measure(
    model: nn.Module,
    images: EvaluationLoader,
    processes: Processes,
    *,
    progress: Callable[[int, int], None],
) -> Evaluation:
    """Return the accuracy of ``model`` over the images of all processes, each of which must call this.

    It is measured in float32 also where training is in mixed precision, so that it compares with what
    ``prune`` and ``evaluate`` report.

    Args:
        model: a classifier, moved to the processes' device.
        images: this process's share.
        processes: processes that share them.
        progress: called after each batch with (batches done, batches in all).
    """
    with processes.together():
        found = evaluate(model, images, device=processes.device, progress=progress)
    if processes.size == 1:
        return found
    top5, loss = found.top5 or 0.0, found.loss or 0.0
    right, right5, summed, count = processes.total(
        [
            round(found.top1 * found.images / 100),
            round(top5 * found.images / 100),
            loss * found.images,
            found.images,
        ]
    )
    return Evaluation(
        top1=100 * right / count,
        top5=None if found.top5 is None else 100 * right5 / count,
        images=int(count),
        seconds=found.seconds,
        loss=summed / count,
    )
