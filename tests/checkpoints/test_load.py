"""Dense and slim files are opened to the model they hold, with its dtypes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file
from timm.data import resolve_data_config
from torch import nn

from helpers.checkpoints import ARGS, IMAGES, NAME, make_slim, refusal, save, tiny
from mhacut.checkpoint.build import allocate
from mhacut.checkpoint.load import load_model, read_model
from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.write import write_slim
from mhacut.plan import Plan
from mhacut.surgery.find import find_prunable_layers


def test_a_dense_file_with_its_model_named(dense):
    model, path = dense
    loaded = read_model(path, model=NAME, model_args=ARGS)
    with torch.no_grad():
        assert torch.equal(loaded.model(IMAGES), model(IMAGES))
    assert not loaded.model.training
    assert loaded.identity.architecture == NAME
    assert loaded.identity.model_args == {**ARGS, "num_classes": 10}
    assert loaded.identity.pretrained_cfg["input_size"] == [3, 224, 224]  # of timm's weights
    assert (loaded.record, loaded.stem, loaded.path) == (None, "dense", path)
    assert set(loaded.dtypes.values()) == {torch.float32}
    assert "num_classes 10, from the shape of head.weight" in loaded.notes


def test_opening_a_model_leaves_the_seed_alone(dense):
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    read_model(dense[1], model=NAME, model_args=ARGS)
    assert torch.equal(torch.rand(3), expected)


def test_img_size_is_read_from_a_square_pos_embed(dense):
    _, path = dense
    args = {key: value for key, value in ARGS.items() if key != "img_size"}
    loaded = read_model(path, model=NAME, model_args=args)
    assert loaded.identity.model_args["img_size"] == 32
    assert "img_size 32, from the shape of pos_embed" in loaded.notes
    for use_test_size in (False, True):
        seen = resolve_data_config({}, model=loaded.model, use_test_size=use_test_size)
        # the crop of the architecture's 224-pixel weights says nothing of 32 pixels
        assert (seen["input_size"], seen["crop_pct"]) == ((3, 32, 32), 1.0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtypes_go_round(tmp_path, dtype):
    model = tiny().to(dtype)
    model.norm.float()  # a mixed file keeps each tensor's own
    path = save(model, tmp_path / "dense.safetensors")
    loaded = read_model(path, model=NAME, model_args=ARGS)
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    assert loaded.dtypes["norm.weight"] == torch.float32
    assert loaded.dtypes["head.weight"] == dtype
    name = str(dtype).removeprefix("torch.")
    assert any(name in note and "computes in float32" in note for note in loaded.notes)
    make_slim(path, tmp_path / "slim.safetensors", model=NAME, model_args=ARGS)
    stored = load_file(tmp_path / "slim.safetensors")
    assert {key: tensor.dtype for key, tensor in stored.items()} == loaded.dtypes
    slim = read_model(tmp_path / "slim.safetensors")
    assert slim.dtypes == loaded.dtypes
    assert all(
        torch.equal(tensor.to(stored[key].dtype), stored[key])
        for key, tensor in slim.model.state_dict().items()
    )


@pytest.mark.parametrize(
    "widths",
    [{"qk": 5, "v": 11, "hidden": 77}, {"qk": 16, "v": 3, "hidden": 192}, {"qk": 8, "v": 8, "hidden": 1}],
)
def test_a_slim_file_goes_round_bit_for_bit(dense, tmp_path, widths):
    path = tmp_path / "slim.safetensors"
    slim, record = make_slim(dense[1], path, widths, model=NAME, model_args=ARGS)
    loaded = read_model(path)
    assert loaded.record == record
    assert loaded.identity == record.identity
    with torch.no_grad():
        assert torch.equal(loaded.model(IMAGES), slim(IMAGES))
    assert {
        unit.key: unit.width for unit in find_prunable_layers(loaded.model).units()
    } == record.plan.widths()


def test_a_buffer_that_is_in_no_file_is_not_left_without_values():
    module = nn.Module()
    module.register_buffer("index", torch.zeros(2, device="meta"), persistent=False)
    with pytest.raises(AssertionError, match="has no init_non_persistent_buffers"):
        allocate(module)


def test_the_preprocessing_of_the_cut_is_what_timm_resolves(dense, tmp_path):
    loaded = read_model(dense[1], model=NAME, model_args=ARGS)
    preprocessing = {
        "input_size": (3, 32, 32),
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "interpolation": "bilinear",
        "crop_pct": 0.5,
        "crop_mode": "squash",
    }
    record = SlimRecord(loaded.identity, Plan(()), preprocessing, ())
    path = tmp_path / "slim.safetensors"
    write_slim(path, loaded.model, record, dtypes={}, overwrite=False, input_path=None)
    for use_test_size in (False, True):
        assert resolve_data_config({}, model=load_model(path), use_test_size=use_test_size) == preprocessing


def test_a_slim_file_says_itself_what_it_is(dense, tmp_path):
    path = tmp_path / "slim.safetensors"
    make_slim(dense[1], path, model=NAME, model_args=ARGS)
    assert read_model(path, model=NAME, model_args=ARGS, num_classes=10).record is not None
    message = refusal(path, model="deit_tiny_patch16_224", model_args={"depth": 3}, num_classes=5)
    assert "Leave out model='deit_tiny_patch16_224' (it is vit_tiny_patch16_224)" in message
    assert "depth=3 (it has 2), num_classes=5 (it has 10)" in message
    message = refusal(path, model_args={"in_chans": 1, "qkv_bias": False, "global_pool": "avg"})
    assert (
        "in_chans=1 (it has 3), qkv_bias=False (it has timm's default), global_pool='avg' (it has token)"
        in (message)
    )
    assert read_model(path, model_args={"in_chans": 3}).record is not None
