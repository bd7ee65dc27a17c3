"""A dense file, and weights of full-size models."""

from __future__ import annotations

import pytest
import timm
import torch

from helpers.checkpoints import save, tiny


@pytest.fixture
def dense(tmp_path):
    model = tiny()
    return model, save(model, tmp_path / "dense.safetensors")


@pytest.fixture(scope="session")
def zeros():
    """Weights of a registered model at full size, cheaply: recognition looks at names and shapes alone."""

    def make(name, **args):
        with torch.device("meta"):
            model = timm.create_model(name, **args)
        return {key: torch.zeros(tensor.shape) for key, tensor in model.state_dict().items()}

    return make


@pytest.fixture(scope="session")
def states():
    """Tensors of a model, and others of the same shapes."""
    one = tiny().state_dict()
    return one, {name: tensor + 0.01 for name, tensor in one.items()}
