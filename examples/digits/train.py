"""Trains the example model: a small timm ViT on scikit-learn's digits.

    pip install 'mhacut[example]'
    python examples/digits/train.py

writes, beside this file,

    model/{config.json,model.safetensors}   a timm folder, for timm.create_model("local-dir:.../model")
    images/train/<digit>/*.png              300 of the training images, 30 of each digit
    images/val/<digit>/*.png                300 other images, 30 of each digit, never trained on

The 1,797 digits are 8x8 pixels; they are drawn up to 32x32. Two runs on one machine write the same bytes;
another processor or another version of torch rounds differently and gives a slightly different model.

The digits are UCI's "Optical Recognition of Handwritten Digits" (E. Alpaydin, C. Kaynak; CC BY 4.0), in the
part that comes with scikit-learn.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import save
from sklearn.datasets import load_digits
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn import functional as F

ARCHITECTURE = "vit_tiny_patch16_224"
MODEL_ARGS = {"img_size": 32, "patch_size": 4, "embed_dim": 96, "depth": 4, "num_heads": 3}
SIZE = 32  # pixels
MEAN = STD = 0.5
PER_DIGIT = 30  # images of each digit in val/, and in train/
SEED = 0
BATCH = 64
LEARNING_RATE = 2e-3


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder to write to")
    parser.add_argument("--epochs", type=int, default=32)
    arguments = parser.parse_args()

    # The number of threads decides how sums are split, and so how they round. One is also the fastest here:
    # the matrices are small, and a second thread spends its time waiting wherever the cores are shared.
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    pictures, digits = draw_digits()
    train, val = split(digits)
    shown = train[: 10 * PER_DIGIT]
    for name, chosen in (("train", shown), ("val", val)):
        write_images(arguments.output / "images" / name, pictures, digits, chosen)
    print(f"{len(train)} digits to train on ({len(shown)} in images/train), {len(val)} in images/val")

    model = train_model(normalise(pictures[train]), torch.from_numpy(digits[train]), arguments.epochs)
    accuracy = top1(model, normalise(pictures[val]), torch.from_numpy(digits[val]))
    folder = arguments.output / "model"
    write_model(folder, model)
    size = (folder / "model.safetensors").stat().st_size
    print(f"top-1 on images/val {accuracy:.2f} %; wrote {folder} ({size / 1e6:.2f} MB)")


def draw_digits() -> tuple[np.ndarray, np.ndarray]:
    """Pictures [n, 32, 32] uint8, white ink on black, and their digits [n] int64."""
    data = load_digits()
    grey = np.round(data.images * (255 / 16)).astype(np.uint8)
    drawn = [Image.fromarray(picture).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for picture in grey]
    return np.stack([np.asarray(picture) for picture in drawn]), data.target.astype(np.int64)


def split(digits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on and to validate on; both begin with ``PER_DIGIT`` of each digit, val ends there."""
    order = np.random.default_rng(SEED).permutation(len(digits))
    by_digit = [order[digits[order] == digit] for digit in range(10)]
    val = np.concatenate([indices[:PER_DIGIT] for indices in by_digit])
    shown = np.concatenate([indices[PER_DIGIT : 2 * PER_DIGIT] for indices in by_digit])
    rest = np.concatenate([indices[2 * PER_DIGIT :] for indices in by_digit])
    return np.concatenate([shown, rest]), val


def write_images(folder: Path, pictures: np.ndarray, digits: np.ndarray, chosen: np.ndarray) -> None:
    for index in chosen:
        target = folder / str(digits[index]) / f"{index:04d}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pictures[index]).save(target, optimize=True)


def normalise(pictures: np.ndarray) -> Tensor:
    """[n, 3, 32, 32] float32: grey in three channels, as a reader that converts to RGB would give it."""
    pixels = torch.from_numpy(pictures).float().div(255).sub(MEAN).div(STD)
    return pixels[:, None].expand(-1, 3, -1, -1).contiguous()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each image turned by up to 12 degrees, stretched by up to 12 %, shifted by up to 3 pixels."""
    n = len(images)
    draw = torch.rand(5, n, generator=generator) * 2 - 1
    angle = draw[0] * (12 * torch.pi / 180)
    wide, high = 1 + 0.12 * draw[1], 1 + 0.12 * draw[2]
    right, down = draw[3] * (2 * 3 / SIZE), draw[4] * (2 * 3 / SIZE)
    rows = [angle.cos() * wide, -angle.sin() * high, right, angle.sin() * wide, angle.cos() * high, down]
    affine = torch.stack(rows, dim=1).view(n, 2, 3)
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    # Outside the picture there is paper: -1 after normalising, 0 in grid_sample's padding.
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def train_model(images: Tensor, labels: Tensor, epochs: int) -> nn.Module:
    torch.manual_seed(SEED)
    model = timm.create_model(ARCHITECTURE, num_classes=10, **MODEL_ARGS)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{ARCHITECTURE} with {MODEL_ARGS}: {parameters:,} parameters")
    optimizer = create_optimizer_v2(model, opt="adamw", lr=LEARNING_RATE, weight_decay=0.05)
    scheduler, _ = create_scheduler_v2(
        optimizer, sched="cosine", num_epochs=epochs, warmup_epochs=3, warmup_lr=1e-5, min_lr=1e-5
    )
    generator = torch.Generator().manual_seed(SEED)
    began = time.perf_counter()
    for epoch in range(epochs):
        model.train()
        scheduler.step(epoch)
        total = 0.0
        for chosen in torch.randperm(len(images), generator=generator).split(BATCH):
            outputs = model(augment(images[chosen], generator))
            loss = F.cross_entropy(outputs, labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += loss.item() * len(chosen)
        elapsed = time.perf_counter() - began
        print(
            f"epoch {epoch + 1:2d} of {epochs}: loss {total / len(images):.4f}, {elapsed:.0f} s", flush=True
        )
    return model.eval()


@torch.inference_mode()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Percent right."""
    answers = torch.cat([model(batch).argmax(dim=1) for batch in images.split(100)])
    return 100 * (answers == labels).float().mean().item()


def write_model(folder: Path, model: nn.Module) -> None:
    """A folder as timm writes and reads it."""
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "architecture": ARCHITECTURE,
        "num_classes": 10,
        "num_features": MODEL_ARGS["embed_dim"],
        "global_pool": "token",
        "model_args": MODEL_ARGS,
        "pretrained_cfg": {
            "tag": "digits",
            "custom_load": False,
            "input_size": [3, SIZE, SIZE],
            "fixed_input_size": True,
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "crop_mode": "center",
            "mean": [MEAN] * 3,
            "std": [STD] * 3,
            "num_classes": 10,
            "pool_size": None,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))


if __name__ == "__main__":
    main()
