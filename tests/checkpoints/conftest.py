"""A dense file, and tensors of two models."""

from __future__ import annotations

import pytest

from helpers.checkpoints import save, tiny


@pytest.fixture
def dense(tmp_path):
    model = tiny()
    return model, save(model, tmp_path / "dense.safetensors")


@pytest.fixture(scope="session")
def states():
    one = tiny().state_dict()
    return one, {name: tensor + 0.01 for name, tensor in one.items()}
