"""Fine-tunes the slim models of all methods in the same way, and their architectures from scratch.

    python examples/benchmarks/compare.py ... --keep-models slim
    python examples/benchmarks/finetune.py --checkpoint vit.safetensors --data-dir cifar10 \
        --models slim --runs runs.jsonl

One shot is not the end: what a method removed may be what training wins back at once. So every model gets
the same steps: AdamW, cosine schedule with a short warm-up, batches of 128, flips and crops, the same images
in the same order for the same seed. Each number of steps is a run of its own, with its schedule to its own
end. With a teacher, half of the loss is the divergence from the dense model. Accuracy is that of the last
step, in float32 on all of val/.

``--runs FILE`` gets one line of JSON per finished run. The same command goes on where it was stopped, inside
of a run too, to the same numbers; what is in the file is not run again. A table is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from methods import chosen
from methods.common import read_slim, temperatures_of
from PIL import Image
from process import describe_machine
from scores import HALVES, of_half, scores_of
from setups import Setup, read
from subjects import add_flags, complete
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from train_cifar_vit import IMAGE_ENDINGS, augment, normalize, seed_of, write_file

from mhacut.data import Preprocessing

START = ("pruned", "scratch")
SHIFT = 8
"""Crops are out of images padded by 1/8 of their width on each side."""


@dataclass(frozen=True)
class Run:
    """One model trained once."""

    method: str
    keep: float
    """Percent of the dense model's FLOPs."""
    start: str
    """Of :data:`START`: the method's weights, or random ones in its architecture."""
    teacher: bool
    steps: int
    seed: int


@dataclass(frozen=True)
class Recipe:
    """What all runs share."""

    lr: float
    batch: int
    weight_decay: float
    teacher_weight: float
    """Of the divergence from the teacher; the rest is of the cross-entropy."""
    amp: bool
    """bfloat16 autocast."""


@dataclass(frozen=True)
class Images:
    """Both splits, in memory."""

    train: Tensor
    """uint8 [N, 3, H, W]."""
    labels: Tensor
    held: Tensor
    held_labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]


def main(arguments: list[str] | None = None) -> None:
    parser = build_parser()
    asked = parser.parse_args(arguments)
    complete(parser, asked)
    torch.set_num_threads(asked.threads)
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # costs 7 % and changes no number
    setup = Setup.of(asked, calibration_images=0, seed=0)
    recipe = Recipe(asked.lr, asked.batch, asked.weight_decay, asked.teacher_weight, asked.amp)
    machine = describe_machine(asked.threads)
    log = Log(asked.runs, {"machine": machine, "setup": setup.told(), "recipe": asdict(recipe)})
    todo = [run for run in runs_of(asked) if log.result(run) is None]
    if todo:
        loaded, preprocessing = read(setup)
        dense = loaded.model.eval().requires_grad_(False)
        train, labels = read_images(Path(asked.data_dir, "train"), preprocessing)
        held, held_labels = read_images(Path(asked.data_dir, "val"), preprocessing)
        images = Images(train, labels, held, held_labels, preprocessing.mean, preprocessing.std)
        reference = outputs(dense, images)
        teacher = Teacher(dense, recipe.amp)
        starts: dict[tuple[Any, ...], dict[str, Any]] = {}  # many runs begin at the same weights
        for run in todo:
            print(" ".join(map(str, asdict(run).values())), file=sys.stderr, flush=True)
            model = slim_model(dense, asked.models, run)
            start = (run.method, run.keep, run.start, run.seed if run.start == "scratch" else None)
            if start not in starts:
                starts[start] = scores_of(reference, outputs(model, images), held_labels)
            cpu_s = Training(run, recipe, model, teacher, images, log.state_file).run(asked.save_every)
            after = scores_of(reference, outputs(model.eval(), images), held_labels)
            log.add(run, {"before": starts[start], "after": after, "cpu_s": cpu_s})
    print("\n".join(f"{name}: {value}" for name, value in {**machine, **asdict(recipe)}.items()))
    print(f"\n{as_text(log.results, asked.steps, asked.half)}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Fine-tune the models that compare.py --keep-models kept, all in the same way.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add_flags(parser)
    parser.add_argument("--models", type=Path, required=True, help="folder with METHOD-PERCENT.safetensors")
    parser.add_argument(
        "--methods", nargs="+", default=["*"], metavar="GLOB", help="those there are models of"
    )
    parser.add_argument(
        "--keep", type=float, nargs="+", default=[50.0, 25.0, 12.5], metavar="PERCENT", help="of the FLOPs"
    )
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 500, 2000], help="a run for each")
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="of batches and random weights"
    )
    parser.add_argument(
        "--teacher", nargs="+", choices=("off", "on"), default=["off", "on"], help="the dense model"
    )
    parser.add_argument(
        "--start", nargs="+", choices=START, default=list(START), help="the slim weights, or random ones"
    )
    parser.add_argument("--lr", type=float, default=3e-4, help="learning rate at its highest")
    parser.add_argument("--batch", type=int, default=128, help="images of a step")
    parser.add_argument("--weight-decay", type=float, default=0.05, help="of AdamW")
    parser.add_argument("--teacher-weight", type=float, default=0.5, help="of the divergence, with a teacher")
    parser.add_argument(
        "--amp",
        action="store_true",
        help="bfloat16 autocast: pays on CPUs that compute in it; on one that does not, 13 times slower",
    )
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument(
        "--half", choices=("all", *HALVES), default="all", help="of the validation images, for the table"
    )
    parser.add_argument("--save-every", type=int, default=100, metavar="STEPS", help="to go on from")
    parser.add_argument("--runs", type=Path, required=True, metavar="FILE", help="JSON lines")
    return parser


def runs_of(asked: argparse.Namespace) -> list[Run]:
    """All runs asked for, of the models that are there; seed after seed, so that a part is a whole table."""
    names = [method.name for method in chosen(asked.methods)]
    cells = [
        (name, keep) for keep in asked.keep for name in names if model_file(asked.models, name, keep).exists()
    ]
    if not cells:
        sys.exit(f"{asked.models}: none of the models asked for; `compare.py --keep-models` writes them")
    return [
        Run(name, keep, start, teacher == "on", steps, seed)
        for seed in asked.seeds
        for steps in sorted(asked.steps)
        for teacher in asked.teacher
        for start in asked.start
        for name, keep in cells
    ]


def model_file(folder: Path, method: str, keep: float) -> Path:
    return folder / f"{method}-{keep:g}.safetensors"


def slim_model(dense: nn.Module, folder: Path, run: Run) -> nn.Module:
    """What a run starts from, ready to train."""
    file = str(model_file(folder, run.method, run.keep))
    if temperatures_of(file) not in (None, ("own",)):
        sys.exit(f"{file}: compare.py has not chosen its softmax temperature yet")
    model = read_slim(dense, file, "own").requires_grad_(True)
    if run.start == "scratch":
        initialize(model, run.seed)
    return model


@torch.no_grad()
def initialize(model: nn.Module, seed: int) -> None:
    """Random weights, drawn as timm draws a ViT: matrices and embeddings normal at 0.02, biases 0."""
    torch.manual_seed(seed_of(seed, 3))
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.LayerNorm):
                parameter.fill_(1.0 if name == "weight" else 0.0)
            elif name == "bias":
                parameter.zero_()
            else:
                nn.init.trunc_normal_(parameter, std=0.02)


@torch.inference_mode()
def outputs(model: nn.Module, images: Images) -> Tensor:
    """Logits of all held images, float32."""
    return torch.cat([model(normalize(b, images.mean, images.std)) for b in images.held.split(50)])


def read_images(folder: Path, preprocessing: Preprocessing) -> tuple[Tensor, Tensor]:
    """Images as the model takes them but for normalisation, uint8 [N, 3, H, W], and labels [N].

    They are in the order of the classes' names, then of the files'.
    """
    transform = replace(preprocessing, mean=(0.0,), std=(1.0,)).transform()
    images, labels = [], []
    for label, entry in enumerate(sorted(entry for entry in folder.iterdir() if entry.is_dir())):
        for file in sorted(entry.iterdir()):
            if file.suffix.lower() in IMAGE_ENDINGS:
                with Image.open(file) as image:
                    images.append((255 * transform(image.convert("RGB"))).round().byte())
                labels.append(label)
    if not images:
        sys.exit(f"{folder}: no images; expected a folder per class")
    return torch.stack(images), torch.tensor(labels)


class Teacher:
    """The dense model's answers. Runs of one seed see the same batches, so that each is answered once."""

    def __init__(self, dense: nn.Module, amp: bool) -> None:
        self.dense, self.amp = dense, amp
        self.seed: int | None = None
        self.answers: dict[int, Tensor] = {}
        """Of that seed by step: steps x batch x classes numbers."""
        self.cpu_s = 0.0
        """Spent so far, which belongs to no one run."""

    @torch.no_grad()
    def answer(self, seed: int, step: int, images: Tensor) -> Tensor:
        """Log-probabilities [N, classes], float32, of the batch that ``seed`` has at ``step``."""
        if seed != self.seed:
            self.seed, self.answers = seed, {}
        if step not in self.answers:
            began = time.process_time()
            with torch.autocast("cpu", torch.bfloat16, enabled=self.amp):
                logits = self.dense(images)
            self.answers[step] = logits.float().log_softmax(1)
            self.cpu_s += time.process_time() - began
        return self.answers[step]


class Training:
    """A run under way. No step depends on what was drawn before it: its seed is its own index."""

    def __init__(
        self, run: Run, recipe: Recipe, model: nn.Module, teacher: Teacher, images: Images, state_file: Path
    ) -> None:
        """Start at step 0, or where ``state_file`` left this very run."""
        self.of, self.recipe, self.model, self.teacher, self.images = run, recipe, model, teacher, images
        self.state_file = state_file
        self.optimizer = create_optimizer_v2(
            model, opt="adamw", lr=recipe.lr, weight_decay=recipe.weight_decay
        )
        warmup = max(run.steps // 20, 1)
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=max(run.steps - warmup, 1),
            lr_min=recipe.lr / 100,
            warmup_t=warmup,
            warmup_lr_init=recipe.lr / 20,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        self.step, self.cpu_s = 0, 0.0
        if state_file.exists():
            state = torch.load(state_file, weights_only=True)
            if state["run"] == asdict(run):
                self.step, self.cpu_s = state["step"], state["cpu_s"]
                model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])

    def run(self, save_every: int) -> float:
        """Train to the end; CPU seconds that it took in all, without the teacher's."""
        began = time.process_time() - self.teacher.cpu_s - self.cpu_s
        self.model.train()
        while self.step < self.of.steps:
            self.train_step()
            self.cpu_s = time.process_time() - self.teacher.cpu_s - began
            if self.step % save_every == 0 and self.step < self.of.steps:
                state = {
                    "run": asdict(self.of),
                    "step": self.step,
                    "cpu_s": self.cpu_s,
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                }
                write_file(self.state_file, lambda temporary, state=state: torch.save(state, temporary))
        return self.cpu_s

    def train_step(self) -> None:
        count, batch = len(self.images.train), min(self.recipe.batch, len(self.images.train))
        epoch, place = divmod(self.step, count // batch)
        generator = torch.Generator().manual_seed(seed_of(self.of.seed, 1, epoch))
        rows = torch.randperm(count, generator=generator)[place * batch : (place + 1) * batch]
        torch.manual_seed(seed_of(self.of.seed, 2, self.step))
        pixels = normalize(self.images.train[rows], self.images.mean, self.images.std)
        images = augment(pixels, cutout=0, padding=pixels.shape[-1] // SHIFT)
        self.scheduler.step_update(self.step)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.recipe.amp):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), self.images.labels[rows])
        if self.of.teacher:
            taught = self.teacher.answer(self.of.seed, self.step, images)
            divergence = F.kl_div(
                logits.float().log_softmax(1), taught, reduction="batchmean", log_target=True
            )
            loss = (1 - self.recipe.teacher_weight) * loss + self.recipe.teacher_weight * divergence
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1


class Log:
    """Finished runs, one line of JSON each, after a first line that says what they share."""

    def __init__(self, file: Path, shared: Mapping[str, Any]) -> None:
        """Read what is there; a last line cut short by a crash is dropped.

        Raises:
            SystemExit: the file is of other things.
        """
        self.file = file
        text = file.read_text(encoding="utf-8") if file.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        lines = [json.loads(line) for line in whole.splitlines()]
        shared = json.loads(json.dumps(shared))
        if not lines:
            whole, lines = json.dumps(shared) + "\n", [shared]
        for part, value in shared.items():
            if lines[0].get(part) != value:
                sys.exit(f"{file}: made with {part} {lines[0].get(part)}, this is {value}: take another file")
        if whole != text:
            write_file(file, lambda temporary: temporary.write_text(whole, encoding="utf-8"))
        self.results: list[dict[str, Any]] = lines[1:]

    @property
    def state_file(self) -> Path:
        """Of the run under way."""
        return self.file.with_name(self.file.name + ".state")

    def result(self, run: Run) -> dict[str, Any] | None:
        return next((found for found in self.results if found["run"] == asdict(run)), None)

    def add(self, run: Run, found: Mapping[str, Any]) -> None:
        line = {"run": asdict(run), **found}
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.results.append(line)
        self.state_file.unlink(missing_ok=True)


def as_text(results: Sequence[Mapping[str, Any]], steps: Iterable[int], half: str = "all") -> str:
    """Top-1 on all validation images or a half; mean and sample standard deviation over seeds, by steps."""
    columns = sorted(set(steps))
    groups: dict[tuple[Any, ...], dict[int, list[float]]] = {}
    before: dict[tuple[Any, ...], float] = {}
    for found in results:
        run = found["run"]
        key = (-run["keep"], run["teacher"], run["start"], run["method"])
        groups.setdefault(key, {}).setdefault(run["steps"], []).append(of_half(found["after"], half)["top1"])
        before[key] = of_half(found["before"], half)["top1"]
    lines = [["method", "start", "keep", "teacher", "before", *(f"{count} steps" for count in columns)]]
    for key in sorted(groups):
        keep, teacher, start, method = key
        cells = [_mean(groups[key].get(count, [])) for count in columns]
        told = "-" if start == "scratch" else f"{before[key]:.2f}"
        lines.append([method, start, f"{-keep:g}%", "on" if teacher else "off", told, *cells])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    return "\n".join("  ".join(_justified(line, widths)).rstrip() for line in lines)


def _justified(line: Sequence[str], widths: Sequence[int]) -> Iterator[str]:
    for column, (cell, width) in enumerate(zip(line, widths, strict=True)):
        yield cell.ljust(width) if column < 2 else cell.rjust(width)


def _mean(values: Sequence[float]) -> str:
    if not values:
        return "-"
    spread = f" +-{statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread} ({len(values)})"


if __name__ == "__main__":
    main()
