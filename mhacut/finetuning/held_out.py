"""Scores of the weights on validation or held-out images, and the choice of the learning rate."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from itertools import islice

import torch

from mhacut.finetuning.images import Batch, StepBatches, TrainingImages, training_loader
from mhacut.finetuning.run import RATES, Run
from mhacut.measuring.accuracy import Evaluation
from mhacut.runtime.process import worker_count

_STEPS = 25
"""Largest number of training steps in the trial of a learning rate."""
_MAX_RISE = 1.2
"""A learning rate is accepted if the held-out loss after its trial is at most 1.2 times the loss before. The
full run recovers from a rise of 20 %."""
_BATCH = 64


def measured_score(run: Run) -> tuple[float | None, Evaluation | None]:
    """Return the score and the accuracy of the current weights.

    Every process must call this function. The score is the top-1 accuracy on validation images, or else the
    negative loss on held-out training images. Values that cannot be measured are None.
    """
    if run.validation is not None:
        run.reporter.start("evaluating")
        evaluation = run.measure(run.trainer.result)
        return evaluation.top1, evaluation
    return (None, None) if run.held_out is None else (-_held_out_loss(run), None)


def find_learning_rate(run: Run) -> float:
    """Return the highest of ``RATES`` that hardly raises the held-out loss in a trial, else the lowest.

    The rate with the lowest loss after a short trial would be too low for a long run. The weights are
    restored. Every process must call this function.
    """
    assert run.held_out is not None
    run.reporter.start("trying learning rates")
    model = run.trainer.model
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # Held-out images are the last of the first epoch, so the trial does not train on them.
    steps = max(1, (run.images.count - run.held_out.count) // run.images_per_step)
    steps = min(_STEPS, run.total_steps, steps)
    before = after = _held_out_loss(run)
    for number, rate in enumerate(RATES):
        tried = replace(run.options, lr=rate, warmup_epochs=None, model_ema=False, compile=False)
        run.trainer = run.new_trainer(tried, total_steps=steps)
        run.trainer.connect()
        with closing(parts_of(run, run.images, run.batches, range(steps))) as parts:
            for step in range(steps):
                run.trainer.step(step, islice(parts, tried.grad_accum_steps))
                run.reporter.advance(number * steps + step + 1, len(RATES) * steps, f"at {rate:g}")
        run.trainer.disconnect()
        after = _held_out_loss(run)
        model.load_state_dict(start)
        if after <= _MAX_RISE * before:
            break
    run.reporter.log(
        f"learning rate {rate:g}: after {steps} steps, loss on {run.held_out.count} held-out images "
        f"{after:.3f} (before {before:.3f})"
    )
    return rate


def parts_of(
    run: Run, images: TrainingImages, batches: StepBatches, steps: range, mine: Sequence[int] = ()
) -> Generator[Batch, None, None]:
    """Load the batches of ``steps``: the parts ``mine`` of each step, by default those of this process."""
    size, rank = run.processes.size, run.processes.rank
    return training_loader(
        images,
        batches,
        start=steps.start,
        stop=steps.stop,
        mine=mine or range(rank, size * run.options.grad_accum_steps, size),
        workers=worker_count(run.options.workers),
        pin_memory=run.processes.device.type == "cuda",
    )


def _held_out_loss(run: Run) -> float:
    """Return the mean loss on held-out images; infinity if the loss is not finite."""
    images, objective, model = run.held_out, run.trainer.objective, run.trainer.result
    assert images is not None
    batches = StepBatches(images.count, batch_size=min(_BATCH, images.count), parts=1, seed=0)

    @torch.no_grad()
    def mean() -> float:
        losses = []
        model.eval()
        parts = parts_of(run, images, batches, range(batches.steps_per_epoch), [0])
        for batch in parts:
            pixels = batch.images.to(run.processes.device)
            labels = batch.labels.to(pixels.device) if images.labelled else None
            losses.append(float(objective(model(pixels), labels, objective.teacher_targets(pixels))))
        return sum(losses) / len(losses)

    # Every process must call this, but only the first computes the loss.
    loss = run.processes.from_first(mean)
    return loss if math.isfinite(loss) else math.inf
