"""Trains a small FLatten Transformer on CIFAR-10, to have something to prune.

    python examples/flatten_cifar/train.py --data-dir cifar10 --output run

``cifar10`` is an ImageFolder: ``train/<class>/*`` and ``val/<class>/*``, 32x32 pixels, drawn up to 64x64
here. Writes ``run/model/{config.json,model.safetensors}``, a timm folder that ``mhacut prune`` opens, and
after every epoch ``run/state.pt``. Stopped at any point, even in the middle of a write, the same command goes
on from the last epoch and ends at the same bytes: everything random is drawn from the seed and the number of
the step.

The default, a narrow FLatten-PVTv2 of 13 MFLOPs, takes about 3 minutes of one CPU core per epoch;
``--embed-dims 32 64 160 256`` is flatten_pvt_v2_b0 itself, 48 MFLOPs, and takes three times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional as F

import mhacut  # noqa: F401  (registers the FLatten models with timm)

ARCHITECTURE = "flatten_pvt_v2_b0"
SIZE = 64  # pixels
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)
SHIFT = 8  # pixels
BATCH = 128
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
WARM_UP = 0.1
"""Share of the steps."""


@dataclass(frozen=True)
class Recipe:
    """Whatever decides the result."""

    embed_dims: tuple[int, ...]
    epochs: int
    seed: int
    images: int
    """To train on."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data-dir", type=Path, required=True, help="ImageFolder with train/ and val/")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to, and to go on from")
    parser.add_argument("--embed-dims", type=int, nargs=4, default=(16, 32, 80, 128), metavar="C")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    # The number of threads decides how sums are split, and so how they round.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    pictures, labels, classes = read_split(arguments.data_dir, "train")
    recipe = Recipe(tuple(arguments.embed_dims), arguments.epochs, arguments.seed, len(pictures))
    print(f"{len(pictures)} images of {len(classes)} classes", flush=True)
    model = train(recipe, pictures, labels, len(classes), arguments.output)
    write_model(arguments.output / "model", model, recipe, classes)
    pictures, labels, _ = read_split(arguments.data_dir, "val")
    print(f"top-1 on {len(pictures)} images of val/: {top1(model, pictures, labels):.2f} %")


def read_split(data_dir: Path, split: str) -> tuple[Tensor, Tensor, list[str]]:
    """Pictures [n, 3, 64, 64] uint8, their labels [n], and the names of the classes."""
    classes = sorted(path.name for path in (data_dir / split).iterdir() if path.is_dir())
    pictures, labels = [], []
    for label, name in enumerate(classes):
        for path in sorted((data_dir / split / name).iterdir()):
            with Image.open(path) as picture:
                drawn = picture.convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            pictures.append(torch.from_numpy(np.asarray(drawn).copy()).permute(2, 0, 1))
            labels.append(label)
    return torch.stack(pictures), torch.tensor(labels), classes


def normalise(pictures: Tensor) -> Tensor:
    """Of uint8, [n, 3, H, W]."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (pictures.float() / 255 - mean) / std


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image shifted by up to 8 pixels, every other one mirrored."""
    padded = F.pad(images, (SHIFT,) * 4)
    moved = []
    for picture in padded:
        top, left, flip = torch.randint(2 * SHIFT + 1, (3,), generator=generator).tolist()
        picture = picture[:, top : top + SIZE, left : left + SIZE]
        moved.append(picture.flip(-1) if flip % 2 else picture)
    return torch.stack(moved)


def train(recipe: Recipe, pictures: Tensor, labels: Tensor, classes: int, output: Path) -> nn.Module:
    """The trained model; goes on from ``output/state.pt`` where there is one of the same recipe."""
    torch.manual_seed(recipe.seed)
    model = timm.create_model(ARCHITECTURE, num_classes=classes, img_size=SIZE, embed_dims=recipe.embed_dims)
    decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
    others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
    optimiser = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
    )
    per_epoch = -(-len(pictures) // BATCH)
    total = recipe.epochs * per_epoch
    first = load_state(output, recipe, model, optimiser)
    for epoch in range(first, recipe.epochs):
        began, losses = time.perf_counter(), 0.0
        model.train()
        order = torch.randperm(len(pictures), generator=drawn_from(recipe.seed, epoch, 0))
        for step, chosen in enumerate(order.split(BATCH)):
            generator = drawn_from(recipe.seed, epoch, step + 1)
            set_rate(optimiser, (epoch * per_epoch + step) / total)
            images = augment(normalise(pictures[chosen]), generator)
            loss = F.cross_entropy(model(images), labels[chosen], label_smoothing=0.1)
            optimiser.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            losses += loss.item()
        save_state(output, recipe, model, optimiser, epoch + 1)
        seconds = time.perf_counter() - began
        print(
            f"epoch {epoch + 1} of {recipe.epochs}: loss {losses / per_epoch:.4f}, {seconds:.0f} s",
            flush=True,
        )
    return model.eval()


def drawn_from(*numbers: int) -> torch.Generator:
    """A generator that these numbers decide."""
    seed = int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
    return torch.Generator().manual_seed(seed)


def set_rate(optimiser: torch.optim.Optimizer, done: float) -> None:
    """Up along a line, down along a cosine; ``done`` in 0..1."""
    rate = done / WARM_UP if done < WARM_UP else 0.5 + 0.5 * np.cos(np.pi * (done - WARM_UP) / (1 - WARM_UP))
    for group in optimiser.param_groups:
        group["lr"] = LEARNING_RATE * float(rate)


def save_state(
    output: Path, recipe: Recipe, model: nn.Module, optimiser: torch.optim.Optimizer, epoch: int
) -> None:
    """Whole or not at all."""
    output.mkdir(parents=True, exist_ok=True)
    state = {
        "recipe": asdict(recipe),
        "epoch": epoch,
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    torch.save(state, output / "state.pt.new")
    os.replace(output / "state.pt.new", output / "state.pt")


def load_state(output: Path, recipe: Recipe, model: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """The epoch to go on from."""
    if not (output / "state.pt").exists():
        return 0
    state = torch.load(output / "state.pt", weights_only=True)
    if state["recipe"] != asdict(recipe):
        raise SystemExit(f"{output} holds another run: {state['recipe']}, not {asdict(recipe)}")
    model.load_state_dict(state["model"])
    optimiser.load_state_dict(state["optimiser"])
    print(f"going on from epoch {state['epoch']}", flush=True)
    return int(state["epoch"])


@torch.inference_mode()
def top1(model: nn.Module, pictures: Tensor, labels: Tensor) -> float:
    """Percent right."""
    answers = torch.cat([model(normalise(batch)).argmax(dim=1) for batch in pictures.split(100)])
    return 100 * (answers == labels).float().mean().item()


def write_model(folder: Path, model: Any, recipe: Recipe, classes: Sequence[str]) -> None:
    """A folder as timm writes and reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": len(classes),
        "num_features": model.num_features,
        "global_pool": "avg",
        "model_args": {"img_size": SIZE, "embed_dims": list(recipe.embed_dims)},
        "pretrained_cfg": {
            "tag": "cifar10",
            "custom_load": False,
            "input_size": [3, SIZE, SIZE],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": MEAN,
            "std": STD,
            "num_classes": len(classes),
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "label_names": list(classes),
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


if __name__ == "__main__":
    main()
