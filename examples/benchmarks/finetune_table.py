"""What fine-tuning wins back: top-1 of slim files before and after, with and without a teacher, over seeds.

    python examples/benchmarks/finetune_table.py slim-50pct.safetensors slim-25pct.safetensors \
        --teacher dense.safetensors --data-dir cifar10 --steps 500 2000 --seeds 42 43 44 --output runs

prints a row per slim file, number of steps and kind of teaching: mean and spread over the seeds, beside the
dense model. Each run has a directory of its own under ``--output``: one that is there and finished is read,
one that was cut off goes on. Accuracy is that of the last weights on all validation images, so that no epoch
is chosen by the images that judge it.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from pathlib import Path

import timm
import torch

import mhacut
from mhacut.checkpoint.load import open_checkpoint

DONE = "finished.json"


def main() -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("slim", type=Path, nargs="+")
    parser.add_argument("--teacher", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs"))
    parser.add_argument("--steps", type=int, nargs="+", default=[500, 2000])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--teaching", nargs="+", choices=("teacher", "labels"), default=["teacher", "labels"])
    parser.add_argument("--amp", action="store_true", help="bfloat16 mixed precision")
    arguments = parser.parse_args()
    precision = "bfloat16 amp, " if arguments.amp else ""
    print(
        f"{platform.machine()}, {torch.get_num_threads()} thread(s), torch {torch.__version__}, timm "
        f"{timm.__version__}; batch size {arguments.batch_size}, lr {arguments.lr:g}, seeds "
        f"{' '.join(map(str, arguments.seeds))}, {precision}otherwise default options of mhacut finetune"
    )
    print(f"dense: top-1 {dense_top1(arguments):.2f}%")
    print("| slim file | steps | learns from | before | after | seeds | images/s |")
    print("|---|---|---|---|---|---|---|")
    for slim in arguments.slim:
        for steps in arguments.steps:
            for teaching in arguments.teaching:
                rows = [run(arguments, slim, steps, teaching, seed) for seed in arguments.seeds]
                after = [row["after"] for row in rows]
                told = f"{statistics.mean(after):.2f}"
                if len(after) > 1:
                    told += f" ± {statistics.stdev(after):.2f}"
                rate = statistics.median(row["images_per_second"] for row in rows)
                learns = "the dense model and labels" if teaching == "teacher" else "labels"
                before = f"{rows[0]['before']:.2f}"
                print(f"| {slim.stem} | {steps} | {learns} | {before} | {told} | {len(rows)} | {rate:.0f} |")


def run(arguments: argparse.Namespace, slim: Path, steps: int, teaching: str, seed: int) -> dict[str, float]:
    """Top-1 before and after one run, made or read."""
    folder = arguments.output / f"{slim.stem}-{steps}-{teaching}-{seed}"
    if (folder / DONE).exists():
        found: dict[str, float] = json.loads((folder / DONE).read_text())
        return found
    if (folder / "args.yaml").exists():
        result = mhacut.finetune(resume=folder)
    else:
        result = mhacut.finetune(
            slim,
            output=folder,
            data_dir=arguments.data_dir,
            teacher=arguments.teacher if teaching == "teacher" else None,
            find_teacher=False,
            steps=steps,
            seed=seed,
            batch_size=arguments.batch_size,
            lr=arguments.lr,
            amp=arguments.amp,
            save_every=50,
            workers=0,
        )
    assert result.before is not None
    row = {
        "before": result.before.top1,
        "after": result.epochs[-1].eval_top1,
        "images_per_second": result.images_per_second,
    }
    (folder / DONE).write_text(json.dumps(row))
    return row


def dense_top1(arguments: argparse.Namespace) -> float:
    """Of the teacher, on the same images."""
    record = open_checkpoint(arguments.slim[0]).record
    assert record is not None
    args = {key: value for key, value in record.identity.model_args.items() if key != "num_classes"}
    said = record.preprocessing
    measured = mhacut.evaluate(
        arguments.teacher,
        model=record.identity.architecture,
        model_args=args,
        data_dir=arguments.data_dir,
        workers=0,
        mean=tuple(said["mean"]),
        std=tuple(said["std"]),
        crop_pct=said["crop_pct"],
        interpolation=said["interpolation"],
    )
    return measured.evaluation.top1


if __name__ == "__main__":
    main()
