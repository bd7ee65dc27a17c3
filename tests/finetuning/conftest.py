"""A slim model, images and a run that learns from them."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
from PIL import Image

import mhacut
from helpers.finetuning import CLASSES, killed
from helpers.pruning import prune_quickly


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """Six training and two validation images of each class: three steps of 12 to an epoch."""
    root = tmp_path_factory.mktemp("images")
    generator = np.random.default_rng(0)
    for split, each in (("train", 6), ("val", 2)):
        for label in range(CLASSES):
            folder = root / split / f"c{label}"
            folder.mkdir(parents=True)
            for number in range(each):
                noise = generator.integers(0, 120, (32, 32, 3))
                pixels = noise + 18 * np.array([label, 6 - label, 3])  # a tint that tells the class
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
    return root


@pytest.fixture(scope="session")
def slim(tiny_vit, tmp_path_factory):
    path = tmp_path_factory.mktemp("slim") / "slim.safetensors"
    return prune_quickly(tiny_vit, path, flops="60%", keep_dead_tokens=True).output  # something is lost


@pytest.fixture(scope="session")
def tune_in(slim, images):
    """``mhacut.finetune`` on the small example; its steps are 12 of 42 images, 3 to an epoch."""
    given = {"data_dir": images, "batch_size": 12, "epochs": 2, "lr": 1e-3, "workers": 0}
    return lambda folder, **options: mhacut.finetune(slim, **{**given, "output": folder, **options})


@pytest.fixture
def tune(tune_in, tmp_path):
    return lambda name="run", **options: tune_in(tmp_path / name, **options)


@pytest.fixture(scope="session")
def finished_run(tune_in, tmp_path_factory):
    return tune_in(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def finished(finished_run, tmp_path):
    return shutil.copytree(finished_run.folder, tmp_path / "run")


@pytest.fixture
def at_call(monkeypatch):
    """Lets something happen at the n-th call of a function, by default the end of the process.

    What happens may return a function to call in place of the original.
    """

    def at(target, name, call, happens=killed):
        original, calls = getattr(target, name), []

        def stand_in(*args, **kwargs):
            calls.append(None)
            instead = happens() if len(calls) == call else None
            return (instead or original)(*args, **kwargs)

        monkeypatch.setattr(target, name, stand_in)
        return monkeypatch.undo

    return at
