"""Tuning: joint training of all weights of a slim model to reproduce the dense model's outputs."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, TensorDataset

from mhacut.data.reading import Sample, collate
from mhacut.errors import DataError
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.distill import minimise
from mhacut.pruning.job import Job
from mhacut.pruning.preserve import FITTED_IMAGES
from mhacut.runtime.device import ordered_attention
from mhacut.surgery.hooks import captured_outputs
from mhacut.surgery.token_merging import SizedTokens
from mhacut.surgery.tokens import stack_of

RATE = 1.2e-4
"""Learning rate of tuning at a divergence of 1 nat or more on crops of held-out images. Below 1 nat, the rate
falls with the square root of the divergence, or linearly without hints (docs/explanation/choices.md)."""
MIN_KL = 0.1
"""Lower divergences count as this value in the choice of the learning rate: on images that the dense model
was trained on, the divergence is too low."""
TRIED_STEP = 2e-6
"""Size of the trial step that finds the learning rate for dense features (docs/explanation/choices.md)."""
DENSE_STEPS = 0.45
"""Default number of tuning steps for dense features, relative to the number for logits."""
DENSE_BATCH = 8
"""Maximum number of images per tuning step for dense features. Many small steps learn more in the same time
than few large steps."""
ROUNDS = 10
"""Maximum number of passes over the images in tuning, unless the user sets a number of steps."""
HINTS = 64.0
"""Weight in the tuning loss of the class token's error after each block (docs/explanation/choices.md)."""
FLOOR = 0.01
"""Smallest variance of a class token's channel, relative to the mean variance over channels."""
KEPT_BYTES = 2**28
"""Maximum memory for cached logits of the dense model, which several budgets share."""
WARM_UP, DENSE_WARM_UP = 0.1, 0.3
"""Fraction of steps in which the learning rate rises, for logits and for dense features. Adam's first steps
need low rates, since they depend on the sign of few gradients only."""


def tuned(slim: nn.Module, job: Job, calibration: Calibration, distance: float) -> nn.Module:
    """Return a copy of ``slim`` with weights trained to reproduce the dense model's preserved outputs.

    The loss is the job's divergence, which needs no labels. If a plain ViT classifies by its class token, the
    error of this token after each block is added (hints: FitNets, arXiv 1412.6550). Training uses random
    crops of all images that are not held out. For dense features, only the blocks of a plain ViT are
    tuned.
    """
    if calibration.preserved.dense:
        return _tuned_to_features(slim, job, calibration, distance)
    images, preserved, device = _images(job, calibration), calibration.preserved, job.device
    size, usual = job.options.batch_size, job.options.tuned_steps
    steps = job.options.tuning_steps or min(usual, math.ceil(ROUNDS * len(images) / size))
    model = copy.deepcopy(slim)
    batches = enumerate(_batches(images, steps, size, job))
    # Class tokens give hints if the model classifies by its class token.
    stack = stack_of(slim) if job.class_token and preserved.metric == "answers" else None
    blocks = [] if stack is None else list(stack.names)

    def run(network: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Return the preserved outputs, and the class token after each of ``blocks``, [blocks, B, C]."""
        with captured_outputs(network, blocks, lambda _, output: _class_token(output, stack)) as hints:
            outputs = preserved.outputs(network, batch).float()
        tokens = [token.float() for (token,) in hints.values()]
        return outputs, torch.stack(tokens) if tokens else outputs.new_zeros(0)

    if blocks:
        with torch.no_grad():
            seen = job.images[calibration.held :][:FITTED_IMAGES].split(size)
            known = torch.cat([run(job.model, batch.to(device))[1] for batch in seen], 1)
        variance = known.var(1, correction=0, keepdim=True)  # (blocks, 1, C)
        variance = torch.maximum(variance, FLOOR * variance.mean(-1, keepdim=True)).clamp_min(1e-12)

    sample = job.images[:size].to(device)
    both = (lambda: run(job.model, sample)[0]), (lambda: run(slim, sample)[0])
    _log_time(job, "all weights", steps, size, len(images), *both)

    def dense_of(batch: Tensor, number: int) -> tuple[Tensor, Tensor]:
        cache = [] if job.teacher_cache is None else job.teacher_cache
        if number < len(cache):
            return cache[number]
        with torch.no_grad():
            outputs = run(job.model, batch)
        if number == len(cache) and (number + 1) * sum(output.nbytes for output in outputs) <= KEPT_BYTES:
            cache.append(outputs)
        return outputs

    def loss() -> Tensor:
        number, batch = next(batches)
        batch = batch.to(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=job.amp), ordered_attention(device):
            dense, aims = dense_of(batch, number)
            outputs, tokens = run(model, batch)
            divergence = preserved.divergence(outputs, dense)
        return divergence + HINTS * ((tokens - aims).square() / variance).mean() if blocks else divergence

    lost = min(distance, 1.0)
    rate = job.options.tuning_lr or RATE * (lost**0.5 if blocks else max(lost, MIN_KL))
    weights, warm_up = model.requires_grad_(True).parameters(), math.ceil(WARM_UP * steps)
    minimise(loss, weights, steps=steps, lr=rate, warm_up=warm_up, reporter=job.reporter)
    return model.requires_grad_(False)


def _tuned_to_features(slim: nn.Module, job: Job, calibration: Calibration, distance: float) -> nn.Module:
    """Train the pruned model to reproduce the dense model's feature maps on uncropped calibration images.

    A few hundred images do not overfit, because each image has many features (docs/explanation/choices.md).
    """
    options, count = job.options, len(job.images) - calibration.held
    size = min(options.batch_size, DENSE_BATCH, count)
    learning = replace(job, options=replace(options, batch_size=size)).training(calibration)
    usual = math.ceil(DENSE_STEPS * options.tuned_steps)
    steps = options.tuning_steps or min(usual, math.ceil(ROUNDS * count / size))
    model = copy.deepcopy(slim)
    stack = stack_of(model)
    trained: nn.Module = model if stack is None else stack.container
    what = "all weights" if stack is None else "blocks"
    _log_time(job, what, steps, size, count, lambda: learning.loss(slim))
    weights = [*trained.requires_grad_(True).parameters()]
    rate = options.tuning_lr
    if rate is None:
        few = learning.part(0, size)
        few.amp = False
        rate = min(RATE * max(min(distance, 1.0), MIN_KL), best_step(lambda: few.loss(model), weights))
    warm_up, reporter = math.ceil(DENSE_WARM_UP * steps), job.reporter
    minimise(lambda: learning.loss(model), weights, steps=steps, lr=rate, warm_up=warm_up, reporter=reporter)
    return model.requires_grad_(False)


@torch.enable_grad()
def best_step(loss: Callable[[], Tensor], weights: Sequence[Tensor]) -> float:
    """Return the size of the sign-gradient step that lowers ``loss`` most."""
    value = loss()
    gradients = torch.autograd.grad(value, weights, materialize_grads=True)

    def move(step: float) -> None:
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.add_(gradient.sign(), alpha=step)

    with torch.no_grad():
        # A parabola through the loss, its slope, and the loss after a trial step.
        slope = sum(float(gradient.abs().sum()) for gradient in gradients)
        move(-TRIED_STEP)
        rise = float(loss() - value) + TRIED_STEP * slope
        move(TRIED_STEP)
    return TRIED_STEP**2 * slope / (2 * rise) if rise > 0 else TRIED_STEP


@torch.no_grad()
def _log_time(job: Job, what: str, steps: int, size: int, images: int, *runs: Callable[[], Tensor]) -> None:
    ticks = [time.perf_counter()]
    for run in runs:
        with torch.autocast(job.device.type, torch.bfloat16, enabled=job.amp), ordered_attention(job.device):
            float(run().sum())  # waits for the device
        ticks.append(time.perf_counter())
    # The last run is also differentiated, which takes about twice as long again.
    minutes = steps * (ticks[-1] - ticks[0] + 2 * (ticks[-1] - ticks[-2])) / 60
    job.reporter.log(
        f"tuning {what}: {steps} steps, each with {size} of {images} images, about {minutes:.1f} minutes"
    )


def _class_token(output: Any, stack: Any) -> Tensor:
    """Return the class token [B, C] of a block's output."""
    if isinstance(output, SizedTokens):
        return output.x[:, 0]
    token: Tensor = output[0] if stack.tokens_first else output[:, 0]
    return token


def _batches(images: ConcatDataset[Sample], count: int, size: int, job: Job) -> Iterator[Tensor]:
    """Yield ``count`` augmented batches [size, C, H, W] in random order."""
    generator = torch.Generator().manual_seed(job.options.seed)
    order = torch.empty(0, dtype=torch.long)
    while len(order) < count * size:
        order = torch.cat([order, torch.randperm(len(images), generator=generator)])
    loader: DataLoader[Sample] = DataLoader(
        images,
        batch_sampler=order[: count * size].view(count, size).tolist(),
        collate_fn=collate,
        num_workers=job.workers,
    )
    for batch, _, bad in iter(loader):
        if not len(batch):
            raise DataError(f"no image of a batch can be read; first {bad[0].file}: {bad[0].reason}")
        # Of tokens, the inputs of a part of a model, there are no crops.
        yield augmented(batch.float(), generator) if batch.ndim == 4 else batch


def augmented(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return a random crop of 50 to 100 % of the area of each image, at the same size, mirrored at random."""
    # Without crops, a model overfits to the logits of a few hundred images (docs/explanation/choices.md).
    count = len(images)
    side = torch.rand(count, generator=generator).mul(0.5).add(0.5).sqrt()
    shift = torch.rand(2, count, generator=generator).mul(2).sub(1) * (1 - side)
    mirrored = torch.rand(count, generator=generator) < 0.5
    affine = torch.zeros(count, 2, 3)
    affine[:, 0, 0], affine[:, 1, 1], affine[:, :, 2] = torch.where(mirrored, -side, side), side, shift.T
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _images(job: Job, calibration: Calibration) -> ConcatDataset[Sample]:
    near = job.images[calibration.held :]
    parts: list[Dataset[Any]] = [TensorDataset(near, torch.zeros(len(near), dtype=torch.long))]
    return ConcatDataset(parts if job.extra_images is None else [*parts, job.extra_images])
