"""``mhacut finetune``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mhacut._version import __version__
from mhacut.budget import format_flops
from mhacut.cli.console import Console, safe, table
from mhacut.cli.flags import FLAGS, Flag, command
from mhacut.options.finetune import FinetuneOptions

if TYPE_CHECKING:
    from mhacut.finetuning.result import FinetuneResult
    from mhacut.measuring.accuracy import Evaluation

_FLAGS: dict[str, Flag] = {
    "checkpoint": Flag("", "A slim file, as mhacut prune writes it.", "SLIM"),
    "output": Flag(
        "Result", "Directory of the run; by default SLIM's stem and -finetuned, here.", "DIR", "-o"
    ),
    "overwrite": Flag("Result", "Start anew in a DIR that holds a run; SLIM is never replaced."),
    "resume": Flag("Result", "Go on with the run in DIR, with its own options.", "DIR"),
    "save_every": Flag("Result", "Steps between saves within an epoch; 0 saves at its end.", "N"),
    "teacher": Flag(
        "Teacher", "The dense checkpoint, to learn from; labels are then optional.", "CHECKPOINT"
    ),
    "label_weight": Flag("Teacher", "Weight of labels beside the teacher.", "WEIGHT"),
    "data_dir": Flag("Data", "Folder with train/ and val/, or of unlabelled images.", "DIR"),
    "dataset": FLAGS["dataset"],
    "class_map": FLAGS["class_map"],
    "labels": FLAGS["labels"],
    "eval_images": Flag("Data", "Validation images to measure accuracy on; all by default, 0 for none.", "N"),
    "workers": FLAGS["workers"],
    "epochs": Flag("Training", "Passes over the training images.", "N"),
    "steps": Flag("Training", "Optimiser steps in all, in place of --epochs.", "N"),
    "batch_size": Flag("Training", "Images at a time, per process.", "N", "-b"),
    "grad_accum_steps": Flag("Training", "Batches per optimiser step.", "N"),
    "opt": Flag("Training", "Optimiser, by its name in timm.", "NAME"),
    "lr": Flag("Training", "Learning rate at its highest.", "RATE"),
    "weight_decay": Flag("Training", "Weight decay.", "RATE"),
    "sched": Flag("Training", "Learning rate over the run."),
    "warmup_epochs": Flag("Training", "Epochs in which the learning rate rises.", "N"),
    "clip_grad": Flag("Training", "Largest norm of the gradient; 0 for no limit.", "NORM"),
    "model_ema": Flag("Training", "Measure and write a moving average of the weights."),
    "seed": Flag("Training", "Of everything random.", "N"),
    "aug": Flag("Augmentation", "Vary training images at all."),
    "aa": Flag("Augmentation", "AutoAugment policy, rand-m9-mstd0.5-inc1.", "POLICY"),
    "mixup": Flag("Augmentation", "Alpha of mixup; 0 for none.", "ALPHA"),
    "cutmix": Flag("Augmentation", "Alpha of cutmix; 0 for none.", "ALPHA"),
    "device": FLAGS["device"],
    "amp": Flag("Computing", "Mixed precision."),
    "compile": Flag("Computing", "Compile the model with torch.compile."),
    "log": Flag("Computing", "Log to png, tensorboard or wandb, besides summary.csv.", "NAME"),
}

_FURTHER = {
    "train_split": "Split to train on.",
    "val_split": FLAGS["val_split"].help,
    **{name: FLAGS[name].help for name in ("mean", "std", "crop_pct", "interpolation", "img_size")},
    "dtype": "Of the weights that are written: float32, bfloat16 or float16; by default SLIM's.",
    "teacher_model": "timm architecture of a teacher file that does not say; by default SLIM's.",
    "teacher_model_args": "Argument of that architecture, KEY=VALUE.",
    "feature_weight": "Weight of matching the teacher's block outputs.",
    "kd_temperature": "Divides both models' outputs before they are compared.",
    "momentum": "Of optimisers that have it.",
    "layer_decay": "Factor on the learning rate from each layer to the one before.",
    "drop_path": "Stochastic depth of the last block.",
    "warmup_lr": "Where the learning rate rises from.",
    "min_lr": "Where the learning rate ends.",
    "decay_epochs": "Epochs between decays of --sched step.",
    "decay_rate": "Factor of each decay of --sched step; power of --sched poly.",
    "clip_mode": "What --clip-grad limits: norm, value or agc.",
    "model_ema_decay": "Of --model-ema, per step.",
    "model_ema_warmup": "Let the moving average forget faster at the start.",
    "scale": "Least and largest share of the area that a random crop keeps.",
    "ratio": "Least and largest aspect ratio of a random crop.",
    "hflip": "Probability of a horizontal flip; 0 where left and right differ.",
    "vflip": "Probability of a vertical flip.",
    "color_jitter": "Changes of brightness, contrast, saturation.",
    "reprob": "Probability of erasing a rectangle.",
    "remode": "What an erased rectangle is filled with: const, rand or pixel.",
    "recount": "Erased rectangles per image at most.",
    "mixup_prob": "Probability that a step's images are mixed, with --mixup or --cutmix.",
    "mixup_switch_prob": "Probability of cutmix rather than mixup, with both.",
    "smoothing": "Label smoothing.",
    "train_interpolation": "Of random crops; by default the model's own.",
    "amp_dtype": "Of --amp: bfloat16, or float16 on CUDA.",
    "grad_checkpointing": "Less memory for more time.",
    "channels_last": "Lay images out with channels last.",
    "deterministic": "Refuse CUDA kernels that sum in random order.",
}
"""Rarely needed: told in brief."""


def _completed(values: Mapping[str, Any]) -> Mapping[str, Any]:
    if values.get("resume") is None:
        return values
    from mhacut.finetuning.resuming import completed  # imports torch

    return completed(values)


@command(
    FinetuneOptions,
    flags=_FLAGS,
    further=_FURTHER,
    complete=_completed,
)
def finetune(options: FinetuneOptions, console: Console) -> None:
    """Train SLIM on, to win back what the cut lost, and write a better slim file.

    Learns from the dense model (--teacher), from labels, or from both; with a teacher, images need no labels.
    DIR holds last.safetensors, best.safetensors, summary.csv, args.yaml, and state.pt to --resume from.
    Names and meanings are those of timm's train.py.
    Several GPUs: torchrun --nproc-per-node N -m mhacut finetune ... (of several machines, all must see DIR)

    Example: mhacut finetune vit-2.0G.safetensors --teacher vit.safetensors --data-dir images/ -o run
    """
    from mhacut.commands.finetune import run_finetune

    result = run_finetune(options, console)
    console.result(_text(result), _document(result))


def _text(result: FinetuneResult) -> str:
    rows = [[safe(result.architecture), "before", "after", ""]]
    if result.before is not None and result.after is not None:
        best = " (best epoch)" if len(result.epochs) > 1 else ""
        label = f"top-1, % of {result.after.images} images{best}"
        before, after = result.before.top1, result.after.top1
        rows.append([label, f"{before:.2f}", f"{after:.2f}", f"{after - before:+.2f}"])
    flops = format_flops(result.flops)
    rows.append(["FLOPs", flops, flops, ""])
    lines = [
        table(rows),
        "",
        f"saved {safe(result.output)}",
        f"loads with: mhacut.load_model({str(result.output)!r})",
        f"trained {result.steps} steps on {safe(result.data)}, {result.images_per_second:.0f} images/s on "
        f"{'' if result.processes == 1 else f'{result.processes} x '}{safe(result.device)}",
    ]
    if result.unreadable:
        lines.append(
            f"{len(result.unreadable)} images could not be read, others stood in for them; "
            f"first {safe(result.unreadable[0])}"
        )
    return "\n".join(lines)


def _document(result: FinetuneResult) -> dict[str, Any]:
    return {
        "command": "finetune",
        "mhacut": __version__,
        "directory": str(result.folder),
        "output": str(result.output),
        "architecture": result.architecture,
        "before": _accuracy(result.before),
        "after": _accuracy(result.after),
        "flops": result.flops,
        "steps": result.steps,
        "epochs": [
            {
                "epoch": row.epoch,
                "train_loss": row.train_loss,
                "eval_loss": row.eval_loss,
                "eval_top1": row.eval_top1,
                "eval_top5": row.eval_top5,
                "lr": row.lr,
            }
            for row in result.epochs
        ],
        "data": result.data,
        "unreadable": list(result.unreadable),
        "images_per_second": result.images_per_second,
        "device": result.device,
        "processes": result.processes,
        "seconds": result.seconds,
    }


def _accuracy(evaluation: Evaluation | None) -> dict[str, Any] | None:
    if evaluation is None:
        return None
    return {"top1": evaluation.top1, "top5": evaluation.top5, "images": evaluation.images}
