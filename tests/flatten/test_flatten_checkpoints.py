"""Official FLatten checkpoints through mhacut's reader and through timm's own loader."""

from __future__ import annotations

import sys
from contextlib import contextmanager
from types import ModuleType

import pytest
import timm
import torch
from safetensors.torch import save_file

import mhacut
from helpers.flatten_official import official_state
from helpers.models import slow_except
from mhacut.checkpoint.load import open_checkpoint, read_model
from mhacut.errors import CheckpointError
from mhacut.flatten import checkpoint_filter

SMALL = {
    "flatten_pvt_tiny": {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 40, 64]},
    "flatten_pvt_v2_b0": {"depths": [1, 1, 1, 1], "embed_dims": [16, 32, 40, 64]},
    "flatten_swin_tiny_224": {"depths": [1, 1, 2, 1], "embed_dim": 24, "window_size": 2},
    "flatten_cswin_tiny_224": {"depths": [1, 1, 1, 1], "embed_dim": 16, "split_size": 2},
}
NAMES = tuple(SMALL)


@contextmanager
def yacs_installed():
    """A ``yacs.config.CfgNode`` as pickles see the real one: a dict with attributes of its own."""

    class CfgNode(dict):
        def __init__(self, entries=()):
            super().__init__(entries)
            self.__dict__["__immutable__"] = True
            self.__dict__["__deprecated_keys__"] = set()
            self.__dict__["__renamed_keys__"] = {}

    CfgNode.__module__, CfgNode.__qualname__ = "yacs.config", "CfgNode"
    before = {name: sys.modules.pop(name, None) for name in ("yacs", "yacs.config")}
    package, module = ModuleType("yacs"), ModuleType("yacs.config")
    package.config, module.CfgNode = module, CfgNode
    sys.modules.update({"yacs": package, "yacs.config": module})
    try:
        yield CfgNode
    finally:
        for name, old in before.items():
            del sys.modules[name]
            if old is not None:
                sys.modules[name] = old


def model_of(name, **args):
    model = timm.create_model(name, **{"img_size": 64, "num_classes": 5, **SMALL[name], **args}).eval()
    model.load_state_dict(checkpoint_filter(model)(official_state(model), model))
    return model


def official(name) -> dict[str, torch.Tensor]:
    return {
        key: tensor.float() if tensor.is_floating_point() else tensor
        for key, tensor in official_state(model_of(name)).items()
    }


def same(model, expected):
    batch = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(batch), expected(batch))


def test_training_checkpoints_open_without_yacs(tmp_path):
    """As the official training scripts write them."""
    name, path = NAMES[0], tmp_path / "ckpt.pth"
    with yacs_installed() as CfgNode:
        config = CfgNode({"MODEL": CfgNode({"NAME": "flatten", "DEPTHS": [2, 2]}), "TAG": "default"})
        optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 1e-3}]}
        more = {"optimizer": optimizer, "epoch": 299, "max_accuracy": 82.1, "config": config}
        torch.save({"model": official(name), **more}, path)
    loaded = read_model(path, model=name, model_args=SMALL[name])
    same(loaded.model, model_of(name))
    assert "img_size 64, from the shape of positional_encoding" in loaded.notes
    assert "read the part 'model' of the checkpoint" in loaded.notes
    assert any(note.startswith("num_classes 5, from the shape of head.") for note in loaded.notes)
    assert loaded.dtypes.keys() == loaded.model.state_dict().keys()


@pytest.mark.parametrize("name", slow_except({NAMES[0]}, NAMES))
def test_weights_alone_open_from_either_format(name, tmp_path):
    state = official(name)
    torch.save({"model": state}, tmp_path / "a.pth")
    save_file(state, tmp_path / "b.safetensors")
    save_file(model_of(name).state_dict(), tmp_path / "c.safetensors")  # timm's names
    for file in ("a.pth", "b.safetensors", "c.safetensors"):
        same(mhacut.load_model(tmp_path / file, model=name, **SMALL[name]), model_of(name))


@pytest.mark.parametrize("name", slow_except({"flatten_deit_tiny"}, [*NAMES[1:], "flatten_deit_tiny"]))
def test_which_model_a_file_is_shows_in_names_and_shapes(name, tmp_path):
    with torch.device("meta"):
        state = official_state(timm.create_model(name, num_classes=5))
    state = {key: torch.zeros(tensor.shape, dtype=tensor.dtype) for key, tensor in state.items()}
    torch.save({"model": state}, tmp_path / "a.pth")
    outline = open_checkpoint(tmp_path / "a.pth")
    assert outline.identity.architecture == name
    assert outline.identity.model_args == {"num_classes": 5}


def test_the_image_size_is_known_before_arguments_must_fit_it(tmp_path):
    # Stripes of 4 tile the map of these images, not that of the 224 pixels which the name stands for.
    name, args = "flatten_cswin_tiny_224", {**SMALL["flatten_cswin_tiny_224"], "split_size": 4}
    model = timm.create_model(name, img_size=128, num_classes=5, **args)
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    loaded = read_model(tmp_path / "a.safetensors", model=name, model_args=args)
    assert loaded.identity.model_args["img_size"] == 128


@pytest.mark.parametrize("name", slow_except({NAMES[0]}, ["flatten_pvt_tiny", "flatten_swin_tiny_224"]))
def test_another_resolution_is_resized_and_noted(name, tmp_path):
    save_file(official(name), tmp_path / "a.safetensors")
    args = {**SMALL[name], "img_size": 128}
    loaded = read_model(tmp_path / "a.safetensors", model=name, model_args=args)
    assert any("position embeddings were resized" in note for note in loaded.notes)
    with torch.no_grad():
        assert loaded.model(torch.randn(1, 3, 128, 128)).isfinite().all()
    # The same through timm's loader.
    model = timm.create_model(
        name,
        pretrained=True,
        pretrained_cfg_overlay={"file": str(tmp_path / "a.safetensors"), "num_classes": 5},
        num_classes=5,
        **args,
    )
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, loaded.model.state_dict()[key]), key


def test_windows_of_another_size_are_resized_too():
    name = "flatten_swin_tiny_224"
    model = timm.create_model(name, **{**SMALL[name], "img_size": 64, "num_classes": 5, "window_size": 4})
    state = official(name)
    table = "layers.2.blocks.0.attn.relative_position_bias_table"  # 3 x 3 offsets of 2 x 2 windows
    state[table] = torch.arange(3.0).repeat_interleave(3)[:, None].expand(-1, 12).clone()
    resized = checkpoint_filter(model)(state, model)[table].reshape(7, 7, 12)
    torch.testing.assert_close(resized, resized[:, :1].expand_as(resized))  # constant along the width
    assert (resized[1:, 0, 0] >= resized[:-1, 0, 0]).all()
    model.load_state_dict(checkpoint_filter(model)(state, model))


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("layers.2.blocks.9.attn.relative_position_bias_table", torch.zeros(9, 12)),
        ("layers.0.blocks.0.attn.positional_encoding", torch.zeros(1, 255, 24)),
        ("model", torch.zeros(3)),
    ],
)
def test_tensors_that_cannot_be_converted_are_named(name, tensor, tmp_path):
    state = {**official("flatten_swin_tiny_224"), name: tensor}
    save_file(state, tmp_path / "a.safetensors")
    args = {**SMALL["flatten_swin_tiny_224"], "img_size": 64}
    with pytest.raises(CheckpointError, match="do not fit") as error:
        read_model(tmp_path / "a.safetensors", model="flatten_swin_tiny_224", model_args=args)
    assert repr(name) in str(error.value)
