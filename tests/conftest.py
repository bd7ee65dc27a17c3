"""Fixtures that several test modules use."""

from __future__ import annotations

import gc
import os
import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import settings

import mhacut
from helpers.clocks import Counting
from helpers.files import ModelFile, make_slim, save_dense
from helpers.fixtures import brief_times, few_digits, programs, short_stacks  # noqa: F401
from helpers.pruning import BALANCED, prune_quickly

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    # As in a shell's background job. Commands that tests interrupt would inherit it.
    signal.signal(signal.SIGINT, signal.default_int_handler)

# No deadline: machines are slow at times. The profile "ci" tries the same examples in every run.
settings.register_profile("fast", deadline=None, max_examples=10)
settings.register_profile("thorough", deadline=None, max_examples=100)
settings.register_profile("ci", settings.get_profile("ci"), max_examples=10)
settings.load_profile("fast")

if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 0)):
    # Each worker gets its share of the cores, and what it starts too: threads that fight for cores crawl.
    share = max((os.cpu_count() or 1) // workers, 1)
    torch.set_num_threads(share)
    os.environ["OMP_NUM_THREADS"] = str(share)


LONG = {"test_docs.py", "test_notebook.py", "test_walkthroughs.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the longest tests: at the end, one worker would run them while the other waits."""
    items.sort(key=lambda item: item.path.name not in LONG)


def pytest_collection_finish() -> None:
    """Keep the garbage collector from walking through torch, timm and the tests again and again."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 10)


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory) -> ModelFile:
    """A ViT of two blocks with 7 classes for images of 32 pixels; 1.2 MFLOPs."""
    args = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("vit_tiny_patch16_224", num_classes=7, **args)
    path = save_dense(model, tmp_path_factory.mktemp("models") / "tiny.safetensors")
    return ModelFile(path, "vit_tiny_patch16_224", args)


@pytest.fixture(scope="session")
def pruned(tiny_vit, tmp_path_factory) -> mhacut.PruneResult:
    """What pruning ``tiny_vit`` to 60% of its FLOPs gives; its file is only read."""
    output = tmp_path_factory.mktemp("pruned") / "slim.safetensors"
    return prune_quickly(tiny_vit, output, flops="60%", **BALANCED)


@pytest.fixture(scope="session")
def digits_vit() -> tuple[Path, Path]:
    folder = Path(__file__).parents[1] / "examples" / "digits"
    return folder / "images", folder / "model"


@pytest.fixture(scope="session")
def slim_of(tmp_path_factory) -> Callable[[str], Path]:
    return cache(lambda name: make_slim(name, tmp_path_factory.mktemp(name)))


@pytest.fixture
def clock(monkeypatch, tmp_path) -> Counting:
    return Counting(monkeypatch, tmp_path)


@pytest.fixture
def compiles_by(monkeypatch):
    real = torch.compile

    def set_to(compiler):
        monkeypatch.setattr(torch, "compile", lambda model: real(model, backend=compiler))

    yield set_to
    torch._dynamo.reset()
