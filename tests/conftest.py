"""What several tests need: a small model in a file."""

from __future__ import annotations

import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in a shell's background job. Commands that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@dataclass(frozen=True)
class ModelFile:
    """A checkpoint without metadata, and what must be said to open it."""

    path: Path
    architecture: str
    args: dict[str, Any]

    @property
    def flags(self) -> list[str]:
        """For the command line, the path first."""
        arguments = [str(self.path), "--model", self.architecture]
        for key, value in self.args.items():
            arguments += ["--model-arg", f"{key}={value}"]
        return arguments


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory) -> ModelFile:
    """A ViT of two blocks with 7 classes for images of 32 pixels; 1.2 MFLOPs."""
    args = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **args)
    path = tmp_path_factory.mktemp("models") / "tiny.safetensors"
    save_file(model.state_dict(), path)
    return ModelFile(path, "vit_tiny_patch16_224", args)
