"""The script that trains a FLatten model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mhacut

TRAIN = Path(__file__).with_name("train.py")


@pytest.mark.exhaustive
def test_it_trains_what_mhacut_opens_and_no_other_run_goes_on(tmp_path):
    pixels = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(8):
                picture = Image.fromarray(pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                picture.save(tmp_path / "data" / split / name / f"{number}.png")
    size = ["--embed-dims", "8", "16", "40", "64", "--data-dir", str(tmp_path / "data")]

    def train(output, epochs):
        command = [sys.executable, TRAIN, "--output", output, "--epochs", str(epochs), *size]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert train(tmp_path / "run", 2).returncode == 0
    model = mhacut.load_model(tmp_path / "run" / "model")
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)
    assert "another run" in train(tmp_path / "run", 3).stderr
