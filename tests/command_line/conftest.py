"""Options that a command would have run with, a slim file, images."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.data import write_split
from mhacut.errors import MhacutError


@pytest.fixture(autouse=True)
def elsewhere(monkeypatch, tmp_path_factory):
    """An empty working directory: one's own may hold what the README's command has written."""
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))


@pytest.fixture
def instead_of_prune(monkeypatch):
    """Lets a function of its options do what ``prune`` does; then the command fails, unless that did."""

    def replace(body):
        def run_prune(options, reporter):
            body(options)
            raise MhacutError("far enough")

        monkeypatch.setattr("mhacut.commands.prune.run_prune", run_prune)

    return replace


@pytest.fixture
def captured(instead_of_prune, elsewhere):
    """The options objects that ``prune`` would have run with; the files that they name are there."""
    for name in ("a", "a.pth", "a.safetensors", "x.safetensors", "m.txt", "run=3.pth"):
        Path(name).write_text("x")
    Path("d").mkdir()
    seen = []
    instead_of_prune(seen.append)
    return seen


@pytest.fixture(scope="session")
def slim(pruned):
    return pruned.output


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    write_split(root / "val", classes=[f"class{label}" for label in range(7)], per_class=2)
    return root
