"""Images per second of ``mhacut finetune`` beside a plain loop of timm's parts, on the same slim model.

    python examples/benchmarks/finetune_throughput.py SLIM.safetensors --data-dir DIR

Both read, vary and normalise images in this process, learn from labels with AdamW, clip gradients and follow
a cosine schedule. They take turns of a few steps, so that whatever else the machine does falls on both alike.
Rates are in CPU time as well as wall time: on a machine that others share only the first says much.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import timm
import torch
from timm.data import create_dataset, create_loader
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter
from timm.utils.clip_grad import dispatch_clip_grad

import mhacut
from mhacut.checkpoint.load import read_model
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.data import Preprocessing
from mhacut.finetuning.images import StepBatches, training_images, training_loader
from mhacut.finetuning.objective import Mixing, Objective
from mhacut.finetuning.training import Trainer
from mhacut.options.finetune import FinetuneOptions
from mhacut.runtime.distributed import Processes
from mhacut.surgery.find import classifier_size

ENDLESS = 10**6


def main() -> None:
    """Print a line per turn, and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("slim", type=Path)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--steps", type=int, default=5, help="of a turn")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    loaded = read_model(arguments.slim)
    options = FinetuneOptions.of(
        checkpoint=arguments.slim,
        data_dir=arguments.data_dir,
        batch_size=arguments.batch_size,
        seed=arguments.seed,
        lr=1e-4,
        device="cpu",
        workers=0,
    )
    preprocessing = resolve_preprocessing(loaded, options)
    ours = mhacut_steps(options, preprocessing, classifier_size(loaded.model))
    theirs = timm_steps(options, preprocessing)
    print(f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, ", end="")
    print(f"torch {torch.__version__}, timm {timm.__version__}, seed {arguments.seed}, ", end="")
    print(f"{loaded.identity.architecture}, {arguments.batch_size} x {arguments.steps} images a turn")
    rates: dict[str, list[tuple[float, float]]] = {"mhacut": [], "timm": []}
    for turn in range(-1, arguments.turns):  # the first warms up
        for name, step in (("mhacut", ours), ("timm", theirs)):
            cpu, wall = seconds(step, arguments.steps)
            if turn >= 0:
                images = arguments.steps * arguments.batch_size
                rates[name].append((images / cpu, images / wall))
        if turn >= 0:
            print(f"turn {turn + 1}: " + ", ".join(f"{name} {rates[name][-1][0]:.0f}" for name in rates))
    for number, unit in ((0, "CPU second"), (1, "second")):
        medians = {name: statistics.median(rate[number] for rate in found) for name, found in rates.items()}
        ratios = [a[number] / b[number] for a, b in zip(rates["mhacut"], rates["timm"], strict=True)]
        print(
            f"images per {unit}: mhacut {medians['mhacut']:.1f}, timm {medians['timm']:.1f}; "
            f"median ratio {statistics.median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}"
        )


def mhacut_steps(options: FinetuneOptions, preprocessing: Preprocessing, classes: int) -> Callable[[], None]:
    """One step of ``mhacut finetune`` per call."""
    images = training_images(
        options,
        preprocessing,
        options,
        num_classes=classes,
        use_labels=True,
        need_labels=True,
    )
    batches = StepBatches(images.count, batch_size=options.batch_size, parts=1, seed=options.seed)
    loader = training_loader(images, batches, start=0, stop=ENDLESS, mine=[0], workers=0, pin_memory=False)
    trainer = Trainer(
        mhacut.load_model(options.checkpoint),
        Objective(options, classes),
        Mixing(options, classes),
        options,
        Processes(0, 1, torch.device("cpu")),
        labelled=True,
        total_steps=ENDLESS,
        steps_per_epoch=batches.steps_per_epoch,
    )
    numbers = itertools.count()
    return lambda: trainer.step(next(numbers), itertools.islice(loader, 1)) and None


def timm_steps(options: FinetuneOptions, preprocessing: Preprocessing) -> Callable[[], None]:
    """One step of a loop as in timm's train.py per call."""
    model = mhacut.load_model(options.checkpoint).train()
    dataset = create_dataset("", root=str(options.data_dir), split="train")
    loader = create_loader(
        dataset,
        input_size=preprocessing.input_size,
        batch_size=options.batch_size,
        is_training=True,
        scale=options.scale,
        ratio=options.ratio,
        hflip=options.hflip,
        color_jitter=None,
        interpolation=preprocessing.interpolation,
        mean=preprocessing.mean,
        std=preprocessing.std,
        num_workers=0,
        persistent_workers=False,
        use_prefetcher=False,
        device=torch.device("cpu"),
    )
    optimizer = create_optimizer_v2(model, opt=options.opt, lr=options.lr, weight_decay=options.weight_decay)
    schedule, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=ENDLESS, step_on_epochs=False, updates_per_epoch=1
    )
    loss_of, losses = LabelSmoothingCrossEntropy(0.0), AverageMeter()
    numbers = itertools.count()
    batches = endless(loader)

    def step() -> None:
        inputs, target = next(batches)
        optimizer.zero_grad()
        loss = loss_of(model(inputs), target)
        loss.backward()
        if options.clip_grad is not None:
            dispatch_clip_grad(model.parameters(), options.clip_grad, mode="norm")
        optimizer.step()
        schedule.step_update(next(numbers), metric=losses.avg)
        losses.update(loss.item(), inputs.size(0))

    return step


def endless(loader: torch.utils.data.DataLoader) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Batches for ever."""
    while True:
        yield from loader


def seconds(step: Callable[[], None], steps: int) -> tuple[float, float]:
    """CPU and wall time of some steps."""
    cpu, wall = time.process_time(), time.perf_counter()
    for _ in range(steps):
        step()
    return time.process_time() - cpu, time.perf_counter() - wall


if __name__ == "__main__":
    main()
