"""Sets ``mhacut.prune_`` beside Torch-Pruning on models with a dense head, which is never trained again.

    python examples/benchmarks/in_place.py --subject saliency --root downloads
    python examples/benchmarks/in_place.py --subject narrow10 --grid 2 --root downloads

prints one table: a row per method and budget of the backbone's FLOPs (dense_tasks.py has the models). All see
the same images of ``train/`` and are judged on those of ``val/``. Torch-Pruning (Taylor) also gets labels,
classes of the patches or the dense model's own map above one half; it learns from the whole model's answers
and cuts the backbone alone.

- error: squared error of the features that the head reads over their variance.
- corr, MAE: of the map with the dense model's; accuracy: of patches, in %; agree: with the dense answers.
- time: of the backbone, one image on one thread of the CPU, over the dense one's, in turns.
- CPU s, wall s: of pruning.

``--merge FILE`` keeps the rows in a file as they come and reuses those it finds there.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from process import commit, describe_machine

METHODS = ("mhacut", "mhacut-channels", "mhacut-pooled", "tp-taylor-uniform", "tp-taylor-global")
SIZE = (3, 224, 224)
SUBJECTS = {
    "saliency": ("dinov2_small_focus.safetensors", "imagenet_wide430"),
    "narrow10": ("vit_tiny_imagenet_narrow10.safetensors", "imagenet_narrow10"),
    "tiny200": ("vit_tiny_tiny200.safetensors", "tiny200"),
}
"""Checkpoints and folders of images; README.md says how to get them."""
Row = dict[str, Any]


def pruned(method: str, keep: float, task: Any, vit: Any, asked: argparse.Namespace) -> Any:
    """A copy of the task's model, its backbone cut by one method to ``keep`` % of its FLOPs."""
    import mhacut

    model = copy.deepcopy(task.model)
    search = {"effort": asked.effort, "seed": asked.seed, "reporter": Said()}
    search |= {
        name: value for name in ("heal_steps", "tuning_steps") if (value := getattr(asked, name)) is not None
    }
    if method == "mhacut-pooled":
        from dense_tasks import reading

        with tempfile.TemporaryDirectory() as folder:
            found = mhacut.prune(
                vit,
                flops=f"{keep:g}%",
                images=task.images,
                preserve="pooled",
                scope="attention+mlp",
                keep_dead_tokens=True,
                output=Path(folder) / "slim.safetensors",
                calibration_images=len(task.images),
                latency=False,
                **search,
            )
            model.backbone = reading(found.model(), asked.blocks)
    elif method.startswith("tp-"):
        model.backbone = by_torch_pruning(method, keep / 100, task)
    else:
        channels = {"scope": "attention+mlp"} if method == "mhacut-channels" else {}
        batches = task.images.split(16)
        mhacut.prune_(model, "backbone", images=batches, flops=f"{keep:g}%", **channels, **search)
    return model.eval().requires_grad_(False)


def by_torch_pruning(method: str, keep: float, task: Any) -> Any:
    from methods.common import Task
    from methods.torch_pruning_timm import prune

    from mhacut.surgery.flops import measure_flops

    _, criterion, spread = method.split("-")
    options = {"criterion": criterion, "spread": spread}
    whole = task.logits(copy.deepcopy(task.model))
    given = Task.of(whole, SIZE, task.images, task.labels, 1.0, options)
    # The budget is the backbone's; the head stays.
    cut = (1 - keep) * measure_flops(task.model.backbone, SIZE)
    slim = prune(dataclasses.replace(given, share=1 - cut / given.table.dense)).model
    return getattr(slim, "model", slim).backbone


class Said:
    """Tells on stderr what is decided, and when stages begin, in seconds."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def log(self, message: str) -> None:
        print(f"{time.perf_counter() - self.began:6.0f} s  {message}", file=sys.stderr, flush=True)

    def start(self, stage: str) -> None:
        self.log(stage)

    def advance(self, done: int, total: int, detail: str = "") -> None:
        pass


def task_of(asked: argparse.Namespace) -> tuple[Any, Any]:
    """The task, and for mosaics the ViT itself."""
    import dense_tasks

    checkpoint, folder = (str(Path(asked.root) / name) for name in SUBJECTS[asked.subject])
    if asked.subject == "saliency":
        counts = {"count": asked.calibration_images, "compared": asked.compared, "seed": asked.seed}
        return dense_tasks.saliency(checkpoint, folder, asked.library, **counts), None
    from mhacut.checkpoint.load import read_model

    vit: Any = read_model(checkpoint, model="vit_tiny_patch16_224").model.eval().requires_grad_(False)
    vit.reset_classifier(0)
    counts = (asked.mosaics, asked.calibration_images, asked.compared)
    return dense_tasks.patches_of(vit, folder, asked.grid, asked.blocks, counts, asked.seed), vit


def rows(asked: argparse.Namespace) -> list[Row]:
    """Make the rows that are not in the file of ``--merge``."""
    import torch

    from mhacut.measuring.latency import compare_runs, fixed_images, run_of
    from mhacut.surgery.flops import measure_flops

    torch.set_num_threads(asked.threads)
    known: list[Row] = json.loads(Path(asked.merge).read_text("utf-8")) if exists(asked.merge) else []
    about = {"subject": subject_of(asked), "effort": asked.effort, "seed": asked.seed}
    cells = [("dense", 100.0), *((method, keep) for keep in asked.keep for method in asked.methods)]

    def found(method: str, keep: float) -> Row | None:
        wanted = {**about, "method": method, "keep": keep}
        return next((row for row in known if wanted.items() <= row.items()), None)

    if not all(found(*cell) for cell in cells):
        task, vit = task_of(asked)
        whole = measure_flops(task.model.backbone, SIZE)
    for method, keep in cells:
        if found(method, keep):
            continue
        cpu, wall = time.process_time(), time.perf_counter()
        model = task.model if method == "dense" else pruned(method, keep, task, vit, asked)
        cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
        image = fixed_images(1, SIZE)
        runs = [run_of(each.backbone, image) for each in (task.model, model)]
        torch.set_num_threads(1)
        times = compare_runs(runs, seconds=asked.seconds, device=torch.device("cpu"), threads=1)
        torch.set_num_threads(asked.threads)
        row = {**about, "method": method, "keep": keep}
        row |= {"flops": 100 * measure_flops(model.backbone, SIZE) / whole, "time": times.ratios[-1]}
        row |= {**task.scores(model), "cpu_s": cpu, "wall_s": wall, "commit": commit()}
        row |= describe_machine(asked.threads)
        known.append(row)
        print(shown(row), flush=True)
        if asked.merge:
            Path(asked.merge).write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
    return [row for cell in cells if (row := found(*cell))]


def exists(file: str | None) -> bool:
    return file is not None and Path(file).exists()


def subject_of(asked: argparse.Namespace) -> str:
    if asked.subject == "saliency":
        return f"saliency, {asked.library}"
    return f"mosaics {asked.grid}x{asked.grid}, {asked.subject}"


HEADINGS: dict[str, Callable[[Row], str]] = {
    "FLOPs": lambda row: f"{row['flops']:.1f} %",
    "method": lambda row: row["method"],
    "error": lambda row: f"{row['error']:.4f}",
    "corr or accuracy": lambda row: f"{row['correlation']:.4f}" if "mae" in row else f"{row['accuracy']:.2f}",
    "MAE or agree": lambda row: f"{row['mae']:.4f}" if "mae" in row else f"{row['agreement']:.2f}",
    "time": lambda row: f"{row['time']:.2f}",
    "CPU s": lambda row: f"{row['cpu_s']:.0f}",
    "wall s": lambda row: f"{row['wall_s']:.0f}",
}


def shown(row: Row) -> str:
    return "| " + " | ".join(write(row) for write in HEADINGS.values()) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--subject", required=True, choices=SUBJECTS, help="all but the first are mosaics")
    parser.add_argument("--root", default=".", metavar="DIR", help="folder of its model and images")
    parser.add_argument(
        "--library", default="timm", choices=["timm", "transformers", "dinov2"], help="code of DINOv2"
    )
    parser.add_argument("--grid", type=int, default=2, help="pictures in a row of a mosaic")
    parser.add_argument("--blocks", type=int, nargs="+", default=[5, 11], help="that the linear head reads")
    parser.add_argument("--mosaics", type=int, default=1000, metavar="N", help="to train the linear head on")
    parser.add_argument("--keep", type=float, nargs="+", default=[75, 60, 50], metavar="PERCENT")
    parser.add_argument("--methods", nargs="+", default=["mhacut", METHODS[3]], choices=METHODS)
    parser.add_argument("--calibration-images", type=int, default=256, metavar="N")
    parser.add_argument("--compared", type=int, default=250, metavar="N", help="validation images or mosaics")
    parser.add_argument("--effort", default="balanced", choices=["fast", "balanced", "best"])
    parser.add_argument("--heal-steps", type=int)
    parser.add_argument("--tuning-steps", type=int)
    parser.add_argument("--seconds", type=float, default=20, help="of timing")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--merge", metavar="FILE")
    asked = parser.parse_args()
    asked.blocks = tuple(asked.blocks)
    table = rows(asked)
    print("\n| " + " | ".join(HEADINGS) + " |")
    print("|" + "---|" * len(HEADINGS))
    for row in table:
        print(shown(row))


if __name__ == "__main__":
    main()
