"""What several tests need: a small model in a file."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import mhacut

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in a shell's background job. Commands that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # Each worker gets its share of the cores, and what it starts too: threads that fight for cores crawl.
    share = max((os.cpu_count() or 1) // workers, 1)
    torch.set_num_threads(share)
    os.environ["OMP_NUM_THREADS"] = str(share)


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


SLIM: dict[str, tuple[str, dict[str, Any]]] = {
    "vit": (
        "vit_tiny_patch16_224",
        {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8},
    ),
    "distilled": ("deit_tiny_distilled_patch16_224", {"depth": 2, "img_size": 32, "embed_dim": 96}),
    "swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 64, "depths": (1, 2, 1, 1), "embed_dim": 24, "window_size": 2},
    ),
    "coat": (
        "coat_tiny",
        {"img_size": 64, "embed_dims": (32,) * 4, "serial_depths": (2, 1, 1, 1), "parallel_depth": 1},
    ),
    "flatten": (
        "flatten_swin_tiny_224",
        {"img_size": 64, "depths": (1, 2, 1, 1), "embed_dim": 24, "window_size": 4},
    ),
}
"""Models that :func:`slim_of` cuts."""


@pytest.fixture(scope="session")
def slim_of(tmp_path_factory) -> Callable[[str], Path]:
    """The slim file of one of SLIM, made when first asked for; in "swin" and others q/k and v differ."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name in made:
            return made[name]
        folder = tmp_path_factory.mktemp(name)
        architecture, args = SLIM[name]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(architecture, num_classes=5, **args)
        tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}  # CoaT shares some
        save_file(tensors, folder / "dense.safetensors")
        made[name] = folder / "slim.safetensors"
        options = {"calibration_images": 4, "round_to": 4, "latency": False, "output": made[name]}
        options |= {"model": architecture, "model_args": args, "overwrite": True}
        # Of random weights, rounding decides what goes: which budget gives unequal widths is the machine's.
        for flops in ("70%", "60%", "65%", "75%", "80%"):
            widths = mhacut.prune(folder / "dense.safetensors", flops=flops, **options).plan.widths()
            unequal = [
                layer for layer, kind in widths if kind == "qk" and widths[layer, kind] != widths[layer, "v"]
            ]
            if unequal or name in {"vit", "coat"}:
                return made[name]
        raise AssertionError(f"{name}: q/k and v are of equal widths at every budget")

    return make
