"""What callers set in torch does not reach into mhacut, and mhacut leaves all of it as it was."""

from __future__ import annotations

import contextlib

import pytest
import timm
import torch

import mhacut

ARGS = {"depth": 2, "embed_dim": 24, "num_heads": 3, "img_size": 16, "patch_size": 8, "num_classes": 5}
QUICK = {"flops": "60%", "effort": "fast", "latency": False, "progress": False, "overwrite": True}
QUICK |= {"model_args": ARGS}


@contextlib.contextmanager
def default_dtype(dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        assert torch.get_default_dtype() == dtype
        torch.set_default_dtype(before)


CONTEXTS = {
    "float64": lambda: default_dtype(torch.float64),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **ARGS).eval()


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    images = torch.randn(12, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("expected")
    slim = mhacut.prune(model, output=folder / "slim.safetensors", images=images, **QUICK).output
    return images, slim


@pytest.mark.slow
@pytest.mark.parametrize("context", CONTEXTS)
def test_a_context_changes_nothing(model, expected, tmp_path, context):
    images, slim = expected
    grad, autocast = torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")
    with CONTEXTS[context]():
        again = mhacut.prune(model, output=tmp_path / "slim.safetensors", images=images, **QUICK).output
        loaded = mhacut.load_model(slim)
        mhacut.save_model(loaded, tmp_path / "saved.safetensors", like=slim)
        labels = torch.zeros(12, dtype=torch.int64)
        measured = mhacut.evaluate(slim, images=(images, labels), progress=False)
    assert (torch.is_grad_enabled(), torch.is_autocast_enabled("cpu")) == (grad, autocast)
    assert again.read_bytes() == slim.read_bytes()
    assert {tensor.dtype for tensor in loaded.parameters()} == {torch.float32}
    assert not any(tensor.is_inference() for tensor in loaded.parameters())
    with torch.no_grad():
        right = int((loaded(images).argmax(1) == 0).sum())
    assert measured.evaluation.top1 == pytest.approx(100 * right / 12)
