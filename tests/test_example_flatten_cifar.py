"""The script that trains a FLatten model: the same bytes however often it was stopped."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mhacut

SCRIPT = Path(__file__).parent.parent / "examples" / "flatten_cifar" / "train.py"


@pytest.fixture
def script(monkeypatch):
    spec = importlib.util.spec_from_file_location("flatten_cifar_train", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path):
    pixels = np.random.default_rng(0)
    for split in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for number in range(8):
                picture = Image.fromarray(pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8))
                picture.save(tmp_path / "data" / split / name / f"{number}.png")
    return tmp_path


def test_a_run_that_was_stopped_ends_at_the_same_bytes(script, folder, monkeypatch, capsys):
    monkeypatch.setattr(script, "BATCH", 6)
    ending = ["--epochs", "3", "--embed-dims", "8", "16", "40", "64", "--data-dir", str(folder / "data")]

    def run(output: Path) -> bytes:
        monkeypatch.setattr("sys.argv", ["train.py", "--output", str(output), *ending])
        script.main()
        return (output / "model" / "model.safetensors").read_bytes()

    straight = run(folder / "straight")
    set_rate, seen = script.set_rate, []

    def stop(optimiser, done):
        seen.append(done)
        if len(seen) == 5:  # in the middle of the second epoch
            raise KeyboardInterrupt
        set_rate(optimiser, done)

    with monkeypatch.context() as stopped:
        stopped.setattr(script, "set_rate", stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder / "stopped")
    assert run(folder / "stopped") == straight
    assert "going on from epoch 1" in capsys.readouterr().out
    model = mhacut.load_model(folder / "straight" / "model")
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)
    ending[1] = "4"
    with pytest.raises(SystemExit, match="another run"):
        run(folder / "straight")
