"""A folder of labelled images."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.data import write_split


@pytest.fixture
def root(tmp_path) -> Path:
    write_split(tmp_path / "set" / "train")
    write_split(tmp_path / "set" / "val")
    return tmp_path / "set"
