"""``train_cifar_vit.py``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from helpers.benchmarks import paint, script


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


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_stopped_training_ends_with_the_bytes_of_one_that_was_not(
    train, images, tmp_path, monkeypatch, optimizer
) -> None:
    train.main([*train_flags(images, tmp_path / "whole"), "--optimizer", optimizer])
    step = train.Training.train_step
    for stop in (3, 6):  # in the distorted epoch, and in the plain one

        def stopping(self, stop=stop):
            if self.step == stop:
                raise KeyboardInterrupt
            return step(self)

        with monkeypatch.context() as patch:
            patch.setattr(train.Training, "train_step", stopping)
            with pytest.raises(KeyboardInterrupt):
                train.main([*train_flags(images, tmp_path / "parts"), "--optimizer", optimizer])
    train.main([*train_flags(images, tmp_path / "parts"), "--optimizer", optimizer])
    whole, parts = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "parts"))
    assert whole == parts
    log = (tmp_path / "parts" / "log.txt").read_text()
    assert "goes on at step 3 of 8" in log
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


def test_training_goes_on_along_another_schedule(train, images, tmp_path) -> None:
    train.main(train_flags(images, tmp_path))
    flags = [*train_flags(images, tmp_path), "--epochs", "3"]
    train.main(flags)
    log = (tmp_path / "log.txt").read_text()
    assert "from step 8 on with {'epochs': 3" in log
    assert "epoch 3 of 3" in log


def test_training_starts_from_given_weights(train, images, tmp_path) -> None:
    train.main(train_flags(images, tmp_path / "first"))
    file = tmp_path / "first" / "model.safetensors"
    flags = [*train_flags(images, tmp_path / "second"), "--init", str(file), "--lr", "0"]
    train.main(flags)
    before, after = load_file(file), load_file(tmp_path / "second" / "model.safetensors")
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, msg=name)


@pytest.mark.slow
def test_a_vit_learns_from_a_network_trained_before(train, images, tmp_path) -> None:
    train.main([*train_flags(images, tmp_path / "teacher"), "--network", "resnet"])
    teacher = tmp_path / "teacher" / "model.safetensors"
    teaching = ["--teachers", str(teacher), "--teacher-share", "1"]
    train.main([*train_flags(images, tmp_path / "distilled"), *teaching])
    train.main(train_flags(images, tmp_path / "alone"))
    model, alone = (train.build_vit(2).eval() for _ in range(2))
    model.load_state_dict(load_file(tmp_path / "distilled" / "model.safetensors"))
    alone.load_state_dict(load_file(tmp_path / "alone" / "model.safetensors"))
    resnet = train.load_network(teacher, 2)
    held = train.normalize(train.read_split(images / "val", 32)[0])
    with torch.no_grad():
        wanted, own, others = (net(held).softmax(1) for net in (resnet, model, alone))
    assert (own - wanted).abs().mean() < (others - wanted).abs().mean()
    with pytest.raises(SystemExit, match="--teachers"):
        train.main(train_flags(images, tmp_path / "distilled"))


def test_augmented_images_are_shifted_or_flipped_ones(train) -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    changed = train.augment(train.normalize(images), cutout=0)
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
    changed = train.augment(train.normalize(images), cutout=8, padding=0)
    areas = (changed == 0).all(1).sum((1, 2))
    assert int(areas.max()) == 64
    assert int(areas.min()) >= 16  # the centre is inside: a quarter of the square at least


def test_soft_targets_sum_to_one(train) -> None:
    targets = train.smooth(torch.tensor([0, 2]), 4, 0.2)
    torch.testing.assert_close(targets, torch.tensor([[0.85, 0.05, 0.05, 0.05], [0.05, 0.05, 0.85, 0.05]]))
