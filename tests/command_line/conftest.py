"""Options that a command would have run with, a slim file, images."""

from __future__ import annotations

import pytest
from PIL import Image

from helpers.cli import FAST, run
from mhacut.errors import MhacutError


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path_factory):
    """An empty working directory: one's own may hold what the README's command has written."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture
def captured(monkeypatch):
    """The options objects that ``prune`` would have run with."""
    seen = []

    def run_prune(options, reporter):
        seen.append(options)
        raise MhacutError("far enough")

    monkeypatch.setattr("mhacut.commands.prune.run_prune", run_prune)
    monkeypatch.setattr("mhacut.cli.flags.check_paths", lambda options: None)  # there are none
    return seen


@pytest.fixture(scope="session")
def slim(tiny_vit, tmp_path_factory):
    path = tmp_path_factory.mktemp("slim") / "slim.safetensors"
    result = run("prune", *tiny_vit.flags, "--flops", "60%", "-o", path, *FAST)
    assert result.exit_code == 0, result.stderr
    return path


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """An ImageFolder with a val split of 7 classes, two images each."""
    root = tmp_path_factory.mktemp("images")
    for label in range(7):
        folder = root / "val" / f"class{label}"
        folder.mkdir(parents=True)
        for number in range(2):
            Image.new("RGB", (32, 32), (30 * label, 100 * number, 50)).save(folder / f"{number}.png")
    return root
