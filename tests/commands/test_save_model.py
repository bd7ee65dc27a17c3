"""Slim models that were changed and saved: ``save_model``, and what it refuses."""

from __future__ import annotations

import dataclasses

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

import mhacut
from helpers.pruning import BALANCED, QUICK, prune_quickly
from mhacut.checkpoint.load import read_model
from mhacut.errors import CheckpointError, OutputError


@pytest.mark.slow
def test_a_trained_slim_model_goes_back_into_a_file(pruned, tmp_path):
    slim = pruned.output
    model = mhacut.load_model(slim)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model.train()(x).square().mean().backward()
    optimiser.step()
    wrapped = torch.nn.DataParallel(model.eval())
    mhacut.save_model(wrapped, tmp_path / "tuned.safetensors", like=slim)
    again = mhacut.load_model(tmp_path / "tuned.safetensors")
    assert torch.equal(again(x), model(x))
    assert not torch.equal(again(x), mhacut.load_model(slim)(x))
    record = read_model(tmp_path / "tuned.safetensors").record
    assert [step["command"] for step in record.history] == ["prune", "save"]
    assert mhacut.prune(tmp_path / "tuned.safetensors", flops="80%", dry_run=True, **BALANCED).slim.flops > 0


@pytest.mark.parametrize("classes", [0, 3])
def test_names_of_other_classes_are_not_kept(pruned, tmp_path, classes):
    slim, before, tensors = tmp_path / "slim.safetensors", read_model(pruned.output), load_file(pruned.output)
    cfg = {**before.identity.pretrained_cfg, "label_names": list("abcdefg"), "label_descriptions": {"a": "A"}}
    record = dataclasses.replace(
        before.record, identity=dataclasses.replace(before.identity, pretrained_cfg=cfg)
    )
    save_file(tensors, slim, {"mhacut": record.to_json()})
    model = mhacut.load_model(slim)
    mhacut.save_model(model, tmp_path / "same.safetensors", like=slim)
    assert cfg.items() <= read_model(tmp_path / "same.safetensors").record.identity.pretrained_cfg.items()
    model.reset_classifier(classes)
    mhacut.save_model(model, tmp_path / "other.safetensors", like=slim)
    other = read_model(tmp_path / "other.safetensors")
    assert not {"label_names", "label_descriptions"} & other.record.identity.pretrained_cfg.keys()
    x = torch.zeros(1, 3, 32, 32)
    assert torch.equal(other.model(x), model.eval()(x))


@pytest.mark.slow
def test_saving_needs_the_file_the_model_came_from(tiny_vit, pruned, tmp_path):
    slim = pruned.output
    other = prune_quickly(tiny_vit, tmp_path / "other.safetensors", flops="90%", **BALANCED).output
    model = mhacut.load_model(slim)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        mhacut.save_model(model, tmp_path / "new.safetensors", like=other)
    with pytest.raises(CheckpointError, match="expected a slim file"):
        mhacut.save_model(model, tmp_path / "new.safetensors", like=tiny_vit.path)
    with pytest.raises(OutputError):
        mhacut.save_model(model, slim, like=slim, overwrite=True)
    model.reset_classifier(3)
    with pytest.raises(CheckpointError, match="does not fit this model"):
        mhacut.save_model(model, tmp_path / "new.safetensors", like=other)
    assert not (tmp_path / "new.safetensors").exists()


@pytest.mark.slow
def test_weights_of_a_slim_module_alone_are_refused_with_what_to_call(digits_vit, pruned, tmp_path):
    merging = {"scope": "attention+mlp+tokens", "dry_run": True, **QUICK}
    for model in (pruned.model(), mhacut.prune(digits_vit[1], flops="80%", **merging).model()):
        torch.save(model.state_dict(), tmp_path / "weights.pth")
        torch.save(model, tmp_path / "whole.pth")
        save_file(model.state_dict(), tmp_path / "weights.safetensors")
        for name in ("weights.pth", "weights.safetensors", "whole.pth"):
            with pytest.raises(CheckpointError, match=r"mhacut\.save_model\(model, FILE, like=SLIM_FILE\)"):
                mhacut.inspect(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"state dict of a slim model.*save_model"):
        mhacut.inspect(tmp_path / "weights.pth", model="vit_tiny_patch16_224", model_args={"num_heads": 3})


def test_a_pooling_that_the_file_does_not_state_is_not_lost(tiny_vit, tmp_path):
    slim = prune_quickly(tiny_vit, tmp_path / "slim.safetensors", flops="60%", keep_dead_tokens=True).output
    model = mhacut.load_model(slim)
    model.reset_classifier(7, "token")
    mhacut.save_model(model, tmp_path / "same.safetensors", like=slim)
    model.reset_classifier(7, "avg")
    with pytest.raises(CheckpointError, match=r"has global_pool='token', the model has 'avg'"):
        mhacut.save_model(model, tmp_path / "other.safetensors", like=slim)
    assert not (tmp_path / "other.safetensors").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "args"),
    [
        pytest.param("efficientvit_m0", {}, marks=pytest.mark.exhaustive),
        (
            "tiny_vit_5m_224",
            {"depths": (1, 1, 1, 1), "embed_dims": (32, 32, 64, 64), "num_heads": (1, 1, 2, 2)},
        ),
    ],
)
def test_pooling_may_be_a_module_or_the_head_s(architecture, args, tmp_path):
    torch.manual_seed(0)
    dense = timm.create_model(architecture, num_classes=7, **args).eval()
    slim = tmp_path / "slim.safetensors"
    mhacut.prune(dense, model_args=args, output=slim, **QUICK, flops="80%")
    model = mhacut.load_model(slim)
    mhacut.save_model(model, tmp_path / "same.safetensors", like=slim)
    model.reset_classifier(3)
    mhacut.save_model(model, tmp_path / "classes.safetensors", like=slim)
    model.reset_classifier(3, "max")
    with pytest.raises(CheckpointError, match=r"='avg', the model has 'max'. Call reset"):
        mhacut.save_model(model, tmp_path / "max.safetensors", like=slim)
