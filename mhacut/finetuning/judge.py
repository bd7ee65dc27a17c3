"""Weights judged on validation images or on held-out training images, and the learning rate by a trial."""

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
"""Largest number of steps that a learning rate is tried for."""
_MOST = 1.2
"""Largest share of the loss before that they may leave: the run mends more than that."""
_BATCH = 64
"""Largest number of held-out images in one forward pass."""


def measured_score(run: Run) -> tuple[float | None, Evaluation | None]:
    """Return a score of the run's weights, the higher the better, and their accuracy; None if not measured.

    The score is the top-1 accuracy on the validation images; without any, the negative loss on held-out
    training images. Every process must call this.
    """
    if run.validation is not None:
        run.reporter.start("evaluating")
        evaluation = run.measure(run.trainer.result)
        return evaluation.top1, evaluation
    return (None, None) if run.held_out is None else (-_held_out_loss(run), None)


def choose_rate(run: Run) -> float:
    """Return the highest learning rate that hardly raises the held-out loss in a few steps, or the lowest.

    Not the one that leaves least: few steps favour low rates, and many need a higher one. The weights are
    left as they were. Every process must call this.
    """
    assert run.held_out is not None
    run.reporter.start("trying learning rates")
    model = run.trainer.model
    start = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    # Held-out images are the last of the first epoch, where all are trained on later.
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
        if after <= _MOST * before:
            break
    run.reporter.log(
        f"learning rate {rate:g}: {steps} steps take the loss on {run.held_out.count} held-out images from "
        f"{before:.3f} to {after:.3f}"
    )
    return rate


def parts_of(
    run: Run, images: TrainingImages, batches: StepBatches, steps: range, mine: Sequence[int] = ()
) -> Generator[Batch, None, None]:
    """Yield the parts ``mine`` of each of these steps, by default those of this process."""
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
    """Return the mean loss on the held-out images, features left out; infinite where it is not finite.

    Every process must call this; the first computes it.
    """
    images, objective, model = run.held_out, run.trainer.objective, run.trainer.result
    assert images is not None
    batches = StepBatches(images.count, batch_size=min(_BATCH, images.count), parts=1, seed=0)

    @torch.no_grad()
    def mean() -> float:
        losses = []
        model.eval()
        parts = parts_of(run, images, batches, range(batches.steps_per_epoch), [0])
        for number, batch in enumerate(parts):
            pixels = batch.images.to(run.processes.device)
            labels = batch.labels.to(pixels.device) if images.labelled else None
            if number == len(run.targets):  # the teacher's outputs stay the same
                run.targets.append(objective.teacher_targets(pixels))
            losses.append(float(objective(model(pixels), labels, run.targets[number])))
        return sum(losses) / len(losses)

    loss = run.processes.from_first(mean)
    return loss if math.isfinite(loss) else math.inf
