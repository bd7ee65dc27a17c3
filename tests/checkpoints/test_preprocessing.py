"""What images go through before a checkpoint sees them, and which sizes its model takes."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import save_file

from mhacut.checkpoint.load import read_model
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.write import write_slim
from mhacut.data import Preprocessing
from mhacut.errors import UsageError
from mhacut.inspection.layers import inspect_model
from mhacut.options.base import PreprocessingOptions
from mhacut.plan import Plan
from mhacut.surgery.find import model_input_size
from mhacut.surgery.flops import measure_flops


def opened(tmp_path, name, **args):
    path = tmp_path / f"{name}.safetensors"
    model = timm.create_model(name, num_classes=7, **args)
    save_file({key: value.clone() for key, value in model.state_dict().items()}, path)
    return read_model(path, model=name, model_args=args)


def slim(loaded, path, **preprocessing):
    stated = resolve_preprocessing(loaded, PreprocessingOptions()).to_json() | preprocessing
    record = SlimRecord(loaded.identity, Plan(()), stated, ())
    write_slim(path, loaded.model, record, dtypes={}, overwrite=False, input_path=None)
    return read_model(path)


@pytest.mark.slow
def test_a_slim_file_is_read_at_the_size_it_was_cut_for(tmp_path):
    dense = opened(tmp_path, "mobilevit_xxs")
    assert resolve_preprocessing(dense, PreprocessingOptions()).input_size == (3, 256, 256)
    made = slim(dense, tmp_path / "slim.safetensors", input_size=[3, 64, 96], crop_pct=0.5)
    seen = inspect_model(made)
    assert seen.input_size == seen.preprocessing.input_size == (3, 64, 96)
    assert seen.flops == measure_flops(dense.model, (3, 64, 96))
    assert resolve_preprocessing(made, PreprocessingOptions()) == Preprocessing(
        **{**seen.preprocessing.to_json(), "crop_pct": 0.5}
    )
    assert resolve_preprocessing(made, PreprocessingOptions(img_size=128)).input_size == (3, 128, 128)


@pytest.mark.parametrize(
    ("args", "size"), [({"img_size": 64}, 64), ({"img_size": (64, 64)}, 64), ({}, 224), (None, 224)]
)
def test_a_model_that_does_not_keep_its_size_was_built_for_that_in_its_arguments(args, size):
    with torch.device("meta"):
        model = timm.create_model("levit_128s")
    assert model_input_size(model, model.pretrained_cfg, args) == (3, size, size)
    assert model_input_size(model, {}, args) == (3, size, size)


@pytest.mark.parametrize(
    ("size", "crop"), [(32, 1.0), ([32, 64], 1.0), (128, 0.9), (224, 0.9)], ids=["32", "32x64", "128", "224"]
)
def test_timm_and_commands_work_out_the_same_preprocessing(tmp_path, size, crop):
    args = {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": size, "in_chans": 1}
    loaded = opened(tmp_path, "vit_tiny_patch16_224", **args)
    seen = resolve_preprocessing(loaded, PreprocessingOptions())
    assert (seen.crop_pct, seen.mean) == (crop, (0.5,))
    assert Preprocessing(**timm.data.resolve_data_config({}, model=loaded.model)) == seen


def test_a_model_that_cannot_take_a_size_says_so_at_once(tmp_path):
    dense = opened(tmp_path, "levit_128s")
    with pytest.raises(UsageError, match="img_size=128: the model takes only images of 224x224"):
        resolve_preprocessing(dense, PreprocessingOptions(img_size=128))
    assert resolve_preprocessing(dense, PreprocessingOptions(img_size=224)).input_size == (3, 224, 224)
