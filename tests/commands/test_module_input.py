"""Commands on a timm module in place of a checkpoint."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import mhacut
from helpers.models import same
from mhacut.checkpoint.identity import ModelHints
from mhacut.checkpoint.load import read_model
from mhacut.checkpoint.module import copy_of_module, rebuilt_module
from mhacut.errors import CheckpointError

QUICK = {"calibration_images": 8, "batch_size": 4, "latency": False, "flops": "60%"}
TINY = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8, "img_size": 16, "num_classes": 5}


def module_of(tiny_vit):
    args = {**tiny_vit.args, "num_classes": 7}
    model = timm.create_model(tiny_vit.architecture, **args)
    model.load_state_dict(load_file(tiny_vit.path))
    return model


@pytest.mark.slow
def test_a_module_gives_the_file_that_its_checkpoint_gives(tiny_vit, tmp_path):
    options = {"model_args": tiny_vit.args, **QUICK}
    model = module_of(tiny_vit).train()
    before = copy.deepcopy(model.state_dict())
    found = mhacut.prune(model, output=tmp_path / "module.safetensors", **options)
    output = tmp_path / "file.safetensors"
    expected = mhacut.prune(tiny_vit.path, model=tiny_vit.architecture, output=output, **options)
    assert found.plan == expected.plan
    assert same(load_file(found.output), load_file(expected.output))
    records = [read_model(result.output).record for result in (found, expected)]
    assert records[0].identity == records[1].identity
    assert records[0].preprocessing == records[1].preprocessing
    # And leaves the module as it was.
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.slow
def test_what_load_model_gives_needs_no_arguments(tiny_vit, tmp_path):
    model = mhacut.load_model(tiny_vit.path, tiny_vit.architecture, **tiny_vit.args)
    found = mhacut.prune(model, output=tmp_path / "module.safetensors", **QUICK)
    slim = mhacut.load_model(found.output)
    assert slim(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    # timm's own changes are seen, also on a copy.
    changed = copy.deepcopy(model)
    changed.reset_classifier(5)
    changed.set_input_size(img_size=64)
    args = rebuilt_module(changed).identity.model_args
    assert args == {**tiny_vit.args, "num_classes": 5, "img_size": 64}


@pytest.mark.slow
def test_the_file_is_named_after_the_architecture(tiny_vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = mhacut.prune(module_of(tiny_vit).half(), model_args=tiny_vit.args, **QUICK)
    assert result.output == Path("vit_tiny_patch16_224-60pct.safetensors")
    assert {tensor.dtype for tensor in load_file(result.output).values()} == {torch.float16}
    assert mhacut.load_model(result.output)(torch.zeros(1, 3, 32, 32)).isfinite().all()


@pytest.mark.parametrize(
    ("architecture", "args"),
    [
        ("vit_tiny_patch16_224", {"img_size": 32, "num_classes": 3}),
        ("vit_tiny_patch16_224", {"img_size": (32, 48), "num_classes": 0}),
        pytest.param("swin_tiny_patch4_window7_224", {"img_size": 112}, marks=pytest.mark.slow),
        pytest.param("flatten_deit_tiny", {"num_classes": 4}, marks=pytest.mark.slow),
    ],
)
def test_classes_and_image_size_are_read_off_the_module(architecture, args):
    model = timm.create_model(architecture, **args).eval()
    found = rebuilt_module(model)
    assert found.identity.architecture == architecture
    for name, value in args.items():
        assert found.identity.model_args[name] == (list(value) if isinstance(value, tuple) else value)
    assert found.model is not model
    assert same(found.model.state_dict(), model.state_dict())


@pytest.mark.parametrize("left_out", ["num_heads", "act_layer"])
def test_another_model_than_the_arguments_say_is_refused(left_out):
    args = {**TINY, "act_layer": "relu"}
    model = timm.create_model("vit_tiny_patch16_224", **args)
    torch.nn.init.normal_(model.head.weight)
    assert rebuilt_module(model, ModelHints(model_args=args)).identity.model_args["act_layer"] == "relu"
    del args[left_out]
    with pytest.raises(CheckpointError, match=r"(?s)vit_tiny_patch16_224 in memory: .* model_args"):
        rebuilt_module(model, ModelHints(model_args=args))


def test_what_cannot_be_built_again_is_refused(slim_of):
    with pytest.raises(CheckpointError, match="found a Linear"):
        mhacut.prune(torch.nn.Linear(2, 2), **QUICK)
    slim = mhacut.load_model(slim_of("vit"))
    with pytest.raises(CheckpointError, match="For a slim model, give its file"):
        mhacut.prune(slim, **QUICK)


def test_another_number_of_classes_is_refused(tiny_vit):
    hints = ModelHints(num_classes=4)
    for opened in (rebuilt_module, copy_of_module):
        with pytest.raises(CheckpointError, match="in memory: expected num_classes=4, found 7"):
            opened(module_of(tiny_vit), hints)


@pytest.mark.slow
@pytest.mark.parametrize("wrapped", [torch.compile, nn.DataParallel])
def test_wrappers_of_torch_are_looked_through(tiny_vit, wrapped):
    model = module_of(tiny_vit)
    plain, found = (
        mhacut.prune(given, model_args=tiny_vit.args, dry_run=True, **QUICK)
        for given in (model, wrapped(model))
    )
    assert found.plan == plain.plan
