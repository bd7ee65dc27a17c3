"""The scripts that train and prune a FLatten model: the same bytes however often they were stopped."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mhacut

SCRIPTS = Path(__file__).parents[2] / "examples" / "flatten_cifar"


@pytest.fixture
def script(monkeypatch):
    def load(name: str):
        spec = importlib.util.spec_from_file_location(f"flatten_cifar_{name}", SCRIPTS / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)  # dataclasses look there
        spec.loader.exec_module(module)
        return module

    return load


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


@pytest.mark.slow
def test_a_run_that_was_stopped_ends_at_the_same_bytes(script, folder, monkeypatch, capsys):
    train = script("train")
    monkeypatch.setattr(train, "BATCH", 6)
    ending = ["--epochs", "3", "--embed-dims", "8", "16", "40", "64", "--data-dir", str(folder / "data")]

    def run(output: Path) -> bytes:
        monkeypatch.setattr("sys.argv", ["train.py", "--output", str(output), *ending])
        train.main()
        return (output / "model" / "model.safetensors").read_bytes()

    straight = run(folder / "straight")
    set_rate, seen = train.set_rate, []

    def stop(optimiser, done):
        seen.append(done)
        if len(seen) == 5:  # in the middle of the second epoch
            raise KeyboardInterrupt
        set_rate(optimiser, done)

    with monkeypatch.context() as stopped:
        stopped.setattr(train, "set_rate", stop)
        with pytest.raises(KeyboardInterrupt):
            run(folder / "stopped")
    assert run(folder / "stopped") == straight
    assert "going on from epoch 1" in capsys.readouterr().out
    model = mhacut.load_model(folder / "straight" / "model")
    assert model.pretrained_cfg["input_size"] == (3, 64, 64)
    ending[1] = "4"
    with pytest.raises(SystemExit, match="another run"):
        run(folder / "straight")


@pytest.mark.slow
def test_the_table_has_a_row_for_every_method_and_goes_on(script, folder, monkeypatch, capsys):
    train, table = script("train"), script("table")
    recipe = train.Recipe((8, 16, 40, 64), 1, 0, 16)
    model = train.train(recipe, *train.read_split(folder / "data", "train")[:2], 2, folder / "run")
    train.write_model(folder / "run" / "model", model, recipe, ["cat", "dog"])
    monkeypatch.setattr(table, "CALIBRATION_IMAGES", 8)
    monkeypatch.setattr(table, "BATCH", 4)
    monkeypatch.setattr(table, "LATENCY_SECONDS", 0.0)
    monkeypatch.setattr(table, "ROUND_TO", 4)
    argv = ["table.py", "--checkpoint", str(folder / "run" / "model"), "--data-dir", str(folder / "data")]
    argv += ["--keep", "60", "--json", str(folder / "cells.json"), "--seeds", "0", "--methods", "mhacut"]
    monkeypatch.setattr("sys.argv", argv)
    table.main()
    first = json.loads((folder / "cells.json").read_text())
    monkeypatch.setattr("sys.argv", [*argv, "Taylor", "magnitude"])
    table.main()
    cells = json.loads((folder / "cells.json").read_text())
    assert set(cells) == {f"{method} | 60 | 0" for method in ("mhacut", "Taylor", "magnitude")}
    assert all(0.5 < cell["flops"] <= 0.6 for cell in cells.values())
    assert {name: cells[name] for name in first} == first
    assert capsys.readouterr().out.count("| 60 % | mhacut |") == 2
