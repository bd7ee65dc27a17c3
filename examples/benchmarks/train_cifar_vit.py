"""Trains the benchmarks' dense model: a small timm ViT on CIFAR-10 as a folder of images, on one CPU core.

    python examples/benchmarks/train_cifar_vit.py --data-dir cifar10 --network resnet --output teacher
    python examples/benchmarks/train_cifar_vit.py --data-dir cifar10 --init vit.safetensors \
        --teachers teacher/model.safetensors --output base

The second trains a vit_tiny_patch16_224 of 6 blocks on 32x32 pixels in patches of 4. In DeiT (arXiv
2012.12877) a ViT learns more from a convolutional network than from labels; the first trains one, in less
time than the ViT takes. For the ViT of the benchmarks, such teachers were no gain in its first four epochs.
Either writes into its output folder

    log.txt             one line per epoch: loss, top-1 on val/ of the weights and of their moving average
    state.pt            everything a run needs to go on; the same command goes on from it
    model.safetensors   the moving average of the weights after the last step

No step depends on what was drawn before it: its random numbers are seeded by its own index. So a run that is
stopped anywhere and started again ends with the same bytes as one that was not (same machine, same number of
threads). Results are those of the last step: no epoch is chosen by its accuracy on val/.

All images stay in memory as bytes and are augmented as batches. Dropped patches are the cheapest
augmentation: a step costs less with them than without. The last epochs see fewer distortions, because val/
has none.

The same command with another ``--epochs`` goes on too, along the other schedule; the log says where.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.layers import PatchDropout
from timm.models import create_model
from timm.models.resnet import BasicBlock, ResNet
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 32, "patch_size": 4, "depth": 6}
MEAN = (0.4914, 0.4822, 0.4465)
STD = (0.2470, 0.2435, 0.2616)
IMAGE_ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".webp"}


def main(arguments: list[str] | None = None) -> None:
    asked = build_parser().parse_args(arguments)
    torch.set_num_threads(asked.threads)
    torch.use_deterministic_algorithms(True)
    asked.output.mkdir(parents=True, exist_ok=True)
    size = MODEL_ARGS["img_size"]
    images, labels, classes = read_split(asked.data_dir / "train", size)
    held_images, held_labels, held_classes = read_split(asked.data_dir / "val", size)
    if classes != held_classes:
        sys.exit(f"{asked.data_dir}: train/ and val/ have different classes: {classes} and {held_classes}")
    training = Training(asked, images, labels, num_classes=len(classes))
    if training.resume():
        training.tell(f"goes on at step {training.step} of {training.steps}")
    training.run(held_images, held_labels)
    file = asked.output / "model.safetensors"
    weights = {name: tensor.contiguous() for name, tensor in training.average.module.state_dict().items()}
    write_file(file, lambda temporary: save_file(weights, temporary))
    top1 = accuracy(training.average.module, held_images, held_labels, exact=True)
    training.tell(f"{file}: top-1 {top1:.2f} on {len(held_labels)} images in float32")
    if asked.network == "vit":
        print("\nmhacut reads it with these flags:")
        print(f"mhacut prune {file} {mhacut_flags(len(classes))} --data-dir {asked.data_dir}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a small timm ViT, or a teacher for it, on a folder of 32x32 images; "
        "the same command resumes.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--data-dir", type=Path, required=True, help="folder with train/ and val/, a folder per class in each"
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write to")
    parser.add_argument("--network", choices=sorted(NETWORKS), default="vit")
    parser.add_argument(
        "--teachers", type=Path, nargs="+", default=[], help="files of networks that this command trained"
    )
    parser.add_argument(
        "--teacher-share", type=float, default=0.7, help="of the targets; labels have the rest"
    )
    parser.add_argument("--init", type=Path, help="safetensors file to start from, instead of from scratch")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--plain-epochs", type=int, default=2, help="last epochs without mixup and cutout")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--optimizer", default="adamw", help="any of timm's, muon for one")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--warmup", type=int, default=200, metavar="STEPS")
    parser.add_argument("--weight-decay", type=float, default=0.05)
    parser.add_argument("--smoothing", type=float, default=0.1, help="of the labels")
    parser.add_argument("--mixup", type=float, default=0.2, help="alpha; 0 turns it off")
    parser.add_argument("--cutout", type=int, default=8, metavar="PIXELS", help="side of a square; 0: none")
    parser.add_argument("--patch-drop", type=float, default=0.4, help="share of the patches, until then")
    parser.add_argument("--plain-patch-drop", type=float, default=0.25, help="in those last epochs")
    parser.add_argument("--ema-decay", type=float, default=0.998)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="a quarter faster; needs a C++ compiler")
    parser.add_argument("--save-every", type=int, default=50, metavar="STEPS")
    return parser


def build_vit(num_classes: int) -> Any:
    model: Any = create_model(ARCHITECTURE, num_classes=num_classes, **MODEL_ARGS)
    for block in model.blocks:
        block.attn.fused_attn = False  # torch's fused kernel takes longer on a CPU for so few tokens
    return model


def build_resnet(num_classes: int, *, widths: tuple[int, ...], stride: int) -> Any:
    """A ResNet of 15 convolutions for small images; ``stride`` is its stem's."""
    model = ResNet(BasicBlock, [2, 2, 2, 1], channels=widths, num_classes=num_classes)
    stem_width = model.conv1.out_channels
    model.conv1 = nn.Conv2d(3, stem_width, 3, padding=1, stride=stride, bias=False)
    model.maxpool = nn.Identity()
    return model.to(memory_format=torch.channels_last)


NETWORKS = {
    "vit": build_vit,
    "resnet": partial(build_resnet, widths=(16, 32, 64, 128), stride=1),
    "wide-resnet": partial(build_resnet, widths=(48, 96, 192, 192), stride=2),
}


def load_network(file: Path, num_classes: int) -> Any:
    """The one of :data:`NETWORKS` that fits the file, in eval mode."""
    weights = load_file(file)
    for build in NETWORKS.values():
        model = build(num_classes)
        own = model.state_dict()
        if own.keys() == weights.keys() and all(own[name].shape == weights[name].shape for name in own):
            model.load_state_dict(weights)
            return model.eval()
    sys.exit(f"{file}: of none of the networks {', '.join(NETWORKS)} with {num_classes} classes")


def mhacut_flags(num_classes: int) -> str:
    arguments = MODEL_ARGS if num_classes == 10 else {**MODEL_ARGS, "num_classes": num_classes}
    flags = [f"--model {ARCHITECTURE}", *(f"--model-arg {name}={value}" for name, value in arguments.items())]
    flags += [f"--{name} {','.join(map(str, values))}" for name, values in (("mean", MEAN), ("std", STD))]
    return " ".join(flags)


class Training:
    """A run: what it is made of, and how far it is."""

    def __init__(
        self, asked: argparse.Namespace, images: Tensor, labels: Tensor, *, num_classes: int
    ) -> None:
        """Start at step 0.

        Args:
            asked: the command's options.
            images: uint8 [N, 3, H, W].
            labels: int64 [N].
            num_classes: of the head.
        """
        self.asked = asked
        self.images, self.labels = images, labels
        self.steps_per_epoch = len(images) // asked.batch
        self.steps = asked.epochs * self.steps_per_epoch
        if self.steps <= asked.warmup:
            sys.exit(f"{self.steps} steps in all are not more than the {asked.warmup} of --warmup")
        torch.manual_seed(asked.seed)
        self.num_classes = num_classes
        self.model: Any = NETWORKS[asked.network](num_classes)
        if asked.init is not None:
            self.model.load_state_dict(load_file(asked.init))
        if asked.network == "vit":
            self.model.patch_drop = PatchDropout(num_prefix_tokens=self.model.num_prefix_tokens)
        # The number of patches that are kept changes once in a run: two fixed sizes, not one that varies.
        self.compiled = torch.compile(self.model, dynamic=False) if asked.compile else self.model
        self.teachers = [load_network(file, num_classes) for file in asked.teachers]
        self.optimizer = create_optimizer_v2(
            self.model, opt=asked.optimizer, lr=asked.lr, weight_decay=asked.weight_decay
        )
        self.scheduler = CosineLRScheduler(
            self.optimizer,
            t_initial=self.steps - asked.warmup,
            lr_min=asked.lr / 500,
            warmup_t=asked.warmup,
            warmup_lr_init=asked.lr / 100,
            warmup_prefix=True,
            t_in_epochs=False,
        )
        # From scratch the first weights are worth nothing, so the average has to forget them sooner.
        self.average = ModelEmaV3(self.model, decay=asked.ema_decay, use_warmup=asked.init is None)
        self.step = 0
        self.loss_sum = 0.0
        self.cpu_s = 0.0
        """CPU seconds of all starts of this run."""

    @property
    def options(self) -> dict[str, Any]:
        """What a resumed run must share with the run that it goes on with."""
        free = {"output", "save_every", "data_dir", "init", "teachers", *self.schedule}
        options = {name: value for name, value in vars(self.asked).items() if name not in free}
        if not self.teachers:
            del options["teacher_share"]
        return {**options, "teachers": len(self.teachers)}

    @property
    def schedule(self) -> dict[str, Any]:
        """What may change between two starts of a run."""
        names = ("epochs", "plain_epochs", "plain_patch_drop")
        return {name: getattr(self.asked, name) for name in names}

    def run(self, held_images: Tensor, held_labels: Tensor) -> None:
        """Train to the last step; score on the held images and save after every epoch."""
        began = time.process_time() - self.cpu_s
        while self.step < self.steps:
            self.loss_sum += self.train_step()
            self.cpu_s = time.process_time() - began
            if self.step % self.steps_per_epoch == 0:
                raw = accuracy(self.model, held_images, held_labels)
                average = accuracy(self.average.module, held_images, held_labels)
                self.cpu_s = time.process_time() - began
                self.tell(
                    f"epoch {self.step // self.steps_per_epoch} of {self.asked.epochs}: "
                    f"loss {self.loss_sum / self.steps_per_epoch:.4f}, top-1 {raw:.2f}, "
                    f"of the average {average:.2f}, {self.cpu_s:.0f} CPU s"
                )
                self.loss_sum = 0.0
                self.save()
            elif self.step % self.asked.save_every == 0:
                self.save()

    def train_step(self) -> float:
        """Take one step; its loss."""
        epoch, place = divmod(self.step, self.steps_per_epoch)
        distort = epoch < self.asked.epochs - self.asked.plain_epochs
        order = torch.randperm(
            len(self.images), generator=torch.Generator().manual_seed(seed_of(self.asked.seed, 1, epoch))
        )
        chosen = order[place * self.asked.batch : (place + 1) * self.asked.batch]
        # Dropped patches and mixup's Beta draw from the global generator.
        torch.manual_seed(seed_of(self.asked.seed, 2, self.step))
        images = augment(normalize(self.images[chosen]), cutout=self.asked.cutout if distort else 0)
        targets = smooth(self.labels[chosen], self.num_classes, self.asked.smoothing)
        if distort and self.asked.mixup:
            share = float(torch.distributions.Beta(self.asked.mixup, self.asked.mixup).sample())
            images = share * images + (1 - share) * images.flip(0)
            targets = share * targets + (1 - share) * targets.flip(0)
        if self.teachers:
            # They see what the model sees, mixed and cut alike (arXiv 2106.05237, section 3).
            seen, share = images.contiguous(memory_format=torch.channels_last), self.asked.teacher_share
            with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
                answers = torch.stack([teacher(seen).float().softmax(1) for teacher in self.teachers])
            targets = (1 - share) * targets + share * answers.mean(0)
        if self.asked.network == "vit":
            self.model.patch_drop.prob = self.asked.patch_drop if distort else self.asked.plain_patch_drop
        self.scheduler.step_update(self.step)
        self.model.train()
        with torch.autocast("cpu", torch.bfloat16):
            logits = self.compiled(images)
        loss = -(targets * logits.float().log_softmax(1)).sum(1).mean()
        value = float(loss.detach())
        if not math.isfinite(value):
            sys.exit(f"the loss of step {self.step} is {value}; {self.state_file} holds the steps before it")
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        # With step None the decay is constant; counting from 1 would drop the first average.
        self.average.update(self.model, step=self.step if self.asked.init is None else None)
        return value

    @property
    def state_file(self) -> Path:
        return Path(self.asked.output) / "state.pt"

    def save(self) -> None:
        state = {
            "options": json.dumps(self.options, sort_keys=True),
            "schedule": json.dumps(self.schedule, sort_keys=True),
            "step": self.step,
            "loss_sum": self.loss_sum,
            "cpu_s": self.cpu_s,
            "model": self.model.state_dict(),
            "average": self.average.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }
        write_file(self.state_file, lambda temporary: torch.save(state, temporary))

    def resume(self) -> bool:
        """Go on where the state file ends, if there is one."""
        if not self.state_file.exists():
            return False
        state = torch.load(self.state_file, weights_only=True)
        # Runs begun before there was a choice of these say nothing of them.
        first = {"network": "vit", "teachers": 0, "optimizer": "adamw", "compile": False}
        then = {**first, **json.loads(state["options"])}
        now = json.loads(json.dumps(self.options))
        changed = [f"--{name.replace('_', '-')}" for name in now if then.get(name) != now[name]]
        if changed:
            sys.exit(
                f"{self.state_file} is of a run with other {', '.join(changed)}: delete it, or ask for those"
            )
        if json.loads(state["schedule"]) != self.schedule:
            self.tell(f"from step {state['step']} on with {self.schedule} instead of {state['schedule']}")
        self.step, self.loss_sum, self.cpu_s = state["step"], state["loss_sum"], state["cpu_s"]
        self.model.load_state_dict(state["model"])
        self.average.module.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        return True

    def tell(self, line: str) -> None:
        """To stdout and the log file."""
        print(line, flush=True)
        with open(self.asked.output / "log.txt", "a", encoding="utf-8") as log:
            log.write(line + "\n")


def seed_of(*parts: int) -> int:
    """A seed for every tuple of small whole numbers, different tuples having different ones."""
    seed = 0
    for part in parts:
        seed = seed * 1_000_003 + part + 1
    return seed % 2**63


def write_file(file: Path, write: Any) -> None:
    """Have ``write`` fill a file beside ``file``, then move it to its place: never half a file."""
    temporary = file.with_name(file.name + ".part")
    write(temporary)
    with open(temporary, "rb+") as written:
        os.fsync(written.fileno())
    os.replace(temporary, file)


def read_split(folder: Path, size: int) -> tuple[Tensor, Tensor, list[str]]:
    """Images uint8 [N, 3, size, size], labels [N] and class names, in the order of the names."""
    classes = sorted(entry.name for entry in folder.iterdir() if entry.is_dir()) if folder.is_dir() else []
    images, labels = [], []
    for label, name in enumerate(classes):
        for file in sorted((folder / name).iterdir()):
            if file.suffix.lower() not in IMAGE_ENDINGS:
                continue
            with Image.open(file) as image:
                if image.size != (size, size):
                    sys.exit(f"{file}: {image.size[0]}x{image.size[1]} pixels, expected {size}x{size}")
                pixels = bytearray(image.convert("RGB").tobytes())
            images.append(torch.frombuffer(pixels, dtype=torch.uint8).view(size, size, 3).permute(2, 0, 1))
            labels.append(label)
    if not images:
        sys.exit(f"{folder}: no images; expected a folder per class with {size}x{size} images in it")
    return torch.stack(images), torch.tensor(labels), classes


def normalize(images: Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> Tensor:
    """Bytes to what the model reads, [..., 3, H, W]."""
    means, stds = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))
    return (images.float() / 255 - means) / stds


def augment(images: Tensor, *, cutout: int, padding: int = 4) -> Tensor:
    """Crops out of the padded images, half of them flipped, a square in each grey.

    Args:
        images: normalised, [B, 3, H, W].
        cutout: side of the square; its centre is anywhere, so part of it may lie outside. 0 for none.
        padding: on each side, in the mean colour.
    """
    count, _, height, width = images.shape
    padded = F.pad(images, (padding,) * 4)
    tops, lefts = torch.randint(0, 2 * padding + 1, (2, count, 1))
    rows, columns = tops + torch.arange(height), lefts + torch.arange(width)  # [B, H], [B, W]
    flipped = torch.rand(count, 1) < 0.5
    columns = torch.where(flipped, columns.flip(1), columns)
    cropped = padded[torch.arange(count)[:, None, None], :, rows[:, :, None], columns[:, None, :]]
    cropped = cropped.permute(0, 3, 1, 2)  # [B, 3, H, W]
    if cutout:
        middles = torch.randint(0, height, (count, 1)), torch.randint(0, width, (count, 1))
        inside = [
            (torch.arange(length) - middle + cutout // 2 >= 0)
            & (torch.arange(length) - middle < cutout - cutout // 2)
            for length, middle in zip((height, width), middles, strict=True)
        ]
        cropped = cropped.masked_fill((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0.0)
    return cropped.contiguous()


def smooth(labels: Tensor, num_classes: int, amount: float) -> Tensor:
    """Targets [B, classes] that sum to 1."""
    return F.one_hot(labels, num_classes) * (1 - amount) + amount / num_classes


@torch.inference_mode()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor, *, exact: bool = False) -> float:
    """Top-1 in percent; in float32 if ``exact``, otherwise in bfloat16 as in training."""
    model.eval()
    right = 0
    with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
        for batch, truth in zip(images.split(250), labels.split(250), strict=True):
            right += int((model(normalize(batch)).argmax(1) == truth).sum())
    return 100 * right / len(labels)


if __name__ == "__main__":
    main()
