"""The scripts in examples/benchmarks do what their first lines say, on images a few seconds old."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

BENCHMARKS = Path(__file__).parents[1] / "examples" / "benchmarks"


def script(name: str) -> Any:
    """The module of a script, not run."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def paint(folder: Path, *, classes: int = 2, per_class: int = 8, size: int = 32) -> Path:
    """A folder of images, each of the colour of its class and some noise."""
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for label in range(classes):
            (folder / split / f"class{label}").mkdir(parents=True)
            for index in range(per_class):
                pixels = generator.integers(0, 60, (size, size, 3)) + 180 * label // max(classes - 1, 1)
                Image.fromarray(pixels.astype(np.uint8)).save(
                    folder / split / f"class{label}" / f"{index}.png"
                )
    return folder


# --- train_cifar_vit.py ---


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return paint(tmp_path_factory.mktemp("images"))


@pytest.fixture
def train(monkeypatch):
    """The script, with a model small enough for a test."""
    module = script("train_cifar_vit")
    small = {"img_size": 32, "patch_size": 8, "depth": 1, "embed_dim": 12, "num_heads": 3}
    monkeypatch.setattr(module, "MODEL_ARGS", small)
    yield module
    torch.use_deterministic_algorithms(False)


def train_flags(images: Path, output: Path) -> list[str]:
    flags = f"--data-dir {images} --output {output} --epochs 2 --plain-epochs 1 --batch 4 --warmup 1"
    return [*flags.split(), "--save-every", "1", "--lr", "1e-2"]


def test_stopped_training_ends_with_the_bytes_of_one_that_was_not(
    train, images, tmp_path, monkeypatch
) -> None:
    train.main(train_flags(images, tmp_path / "whole"))
    step = train.Training.train_step
    for stop in (3, 6):  # in the distorted epoch, and in the plain one

        def stopping(self, stop=stop):
            if self.step == stop:
                raise KeyboardInterrupt
            return step(self)

        with monkeypatch.context() as patch:
            patch.setattr(train.Training, "train_step", stopping)
            with pytest.raises(KeyboardInterrupt):
                train.main(train_flags(images, tmp_path / "parts"))
    train.main(train_flags(images, tmp_path / "parts"))
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    told = (tmp_path / "parts" / "log.txt").read_text()
    assert "goes on at step 3 of 8" in told
    losses = [
        [
            line.split(",")[0]
            for line in (tmp_path / name / "log.txt").read_text().splitlines()
            if "epoch" in line
        ]
        for name in ("whole", "parts")
    ]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 2


def test_training_refuses_to_go_on_with_other_options(train, images, tmp_path) -> None:
    train.main(train_flags(images, tmp_path))
    with pytest.raises(SystemExit, match="--weight-decay"):
        train.main([*train_flags(images, tmp_path), "--weight-decay", "0.1"])


def test_training_starts_from_given_weights(train, images, tmp_path) -> None:
    train.main(train_flags(images, tmp_path / "first"))
    file = tmp_path / "first" / "model.safetensors"
    flags = [*train_flags(images, tmp_path / "second"), "--init", str(file), "--lr", "0"]
    train.main(flags)
    before, after = load_file(file), load_file(tmp_path / "second" / "model.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, msg=name)


def test_augmented_images_are_shifted_or_flipped_ones(train) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    changed = train.augment(images, cutout=0)
    padded = torch.nn.functional.pad(train.normalize(images), (4, 4, 4, 4))
    for before, after in zip(padded, changed, strict=True):
        views = [
            before[:, top : top + 32, left : left + 32].flip(-1)
            if flip
            else before[:, top : top + 32, left : left + 32]
            for top in range(9)
            for left in range(9)
            for flip in (False, True)
        ]
        assert any(torch.equal(after, view) for view in views)


def test_cutout_greys_at_most_its_square(train) -> None:
    torch.manual_seed(0)
    images = torch.full((64, 3, 32, 32), 255, dtype=torch.uint8)
    changed = train.augment(images, cutout=8, padding=0)
    areas = (changed == 0).all(1).sum((1, 2))
    assert int(areas.max()) == 64
    assert int(areas.min()) >= 16  # the centre is inside: a quarter of the square at least


def test_soft_targets_sum_to_one(train) -> None:
    targets = train.smooth(torch.tensor([0, 2]), 4, 0.2)
    torch.testing.assert_close(targets, torch.tensor([[0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05]]))
