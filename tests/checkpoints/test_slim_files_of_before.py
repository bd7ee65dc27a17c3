"""Slim files written by earlier versions open to the same logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mhacut

FOLDER = Path(__file__).parents[1] / "fixtures" / "slim_files"


@pytest.mark.parametrize("name", ["vit_principal", "swin", "flatten_unshared"])
def test_a_slim_file_of_an_earlier_version_opens_to_the_same_logits(name):
    model = mhacut.load_model(FOLDER / f"{name}.safetensors")
    images = (torch.arange(2 * 3 * 32 * 32) * 0.7).sin().view(2, 3, 32, 32)
    with torch.no_grad():
        logits = model(images)
    expected = torch.tensor(json.loads((FOLDER / f"{name}.json").read_text()))
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
