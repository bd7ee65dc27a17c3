"""The example that is kept in the repository holds what its README says."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch

from mhacut.data import Preprocessing, evaluation_loader
from mhacut.measuring.accuracy import evaluate
from mhacut.options.base import LabelledImages

DIGITS = Path(__file__).parent


@pytest.fixture(scope="module")
def model():
    return timm.create_model(f"local-dir:{DIGITS / 'model'}", pretrained=True).eval()


def test_the_model_opens_in_timm_and_reads_the_validation_digits(model) -> None:
    preprocessing = Preprocessing.resolve(model.pretrained_cfg, (3, 32, 32))
    assert preprocessing == Preprocessing((3, 32, 32), (0.5,), (0.5,), "bicubic", 1.0, "center")
    loader = evaluation_loader(
        preprocessing, LabelledImages(data_dir=DIGITS / "images", workers=0), num_classes=10, batch_size=100
    )
    found = evaluate(model, loader, device=torch.device("cpu"))
    assert found.images == 300
    assert 97 <= found.top1 < 99.5  # not so easy that a cut could not be seen
    assert found.top5 is not None
    assert found.top5 > found.top1


def test_training_and_validation_images_differ() -> None:
    train, val = (
        {path.read_bytes() for path in (DIGITS / "images" / split).rglob("*.png")}
        for split in ("train", "val")
    )
    assert len(train) == len(val) == 300
    assert not train & val


def test_the_weights_stay_small() -> None:
    assert (DIGITS / "model" / "model.safetensors").stat().st_size < 2_000_000
