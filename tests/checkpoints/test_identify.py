"""Which model a file holds: what it states, what its names and shapes show, what does not fit."""

from __future__ import annotations

import argparse
import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from timm.models import save_for_hf

import mhacut
from helpers.checkpoints import ARGS, IMAGES, NAME, refusal, save, tiny
from helpers.files import ModelFile, save_dense
from helpers.pruning import prune_quickly
from mhacut.checkpoint.load import read_model
from mhacut.checkpoint.timm_cfg import completed_cfg


def test_a_timm_folder(tmp_path):
    model = tiny(global_pool="avg")
    save_for_hf(model, tmp_path / "folder", model_args={**ARGS, "global_pool": "avg"})
    loaded = read_model(tmp_path / "folder")
    with torch.no_grad():
        assert torch.equal(loaded.model(IMAGES), model(IMAGES))
    assert loaded.stem == "folder"
    assert f"architecture {NAME}, from config.json" in loaded.notes
    assert "config.json says vit_tiny_patch16_224, not model='deit" in refusal(
        tmp_path / "folder", model="deit_tiny_patch16_224"
    )


@pytest.mark.parametrize(
    ("stated", "crop"),
    [
        ({"input_size": [3, 32, 32], "num_classes": 10}, None),
        ({"input_size": [3, 224, 224]}, 0.9),
        ({"input_size": [3, 32, 32], "crop_pct": 0.8, "mean": [0.1, 0.2, 0.3]}, 0.8),
    ],
)
def test_what_a_config_leaves_out_is_the_architectures_own(tmp_path, stated, crop):
    model = tiny()
    save_for_hf(model, tmp_path / "folder", model_args=ARGS)
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    config["pretrained_cfg"] = stated
    (tmp_path / "folder" / "config.json").write_text(json.dumps(config))
    loaded = read_model(tmp_path / "folder")
    with torch.no_grad():
        assert torch.equal(loaded.model(IMAGES), model(IMAGES))
    cfg = loaded.identity.pretrained_cfg
    assert cfg["classifier"] == "head"
    assert cfg["mean"] == stated.get("mean", [0.5] * 3)
    # the crop of one size says nothing of another
    assert completed_cfg(NAME, stated).get("crop_pct") == crop
    # the weights are not timm's: neither are their license and origin
    assert completed_cfg(NAME, stated).keys().isdisjoint({"license", "origin_url", "tag", "architecture"})


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architecture": "vit_tiny_patch16_225"}, "did you mean vit_tiny_patch16_224"),
        ({"architecture": "os.system"}, "timm has no model"),
        ({"architecture": None}, "expected timm's config with an architecture"),
        ({"model_args": {**ARGS, "depth": 10**6}}, "is far too large for the tensors"),
        ({"model_args": {**ARGS, "embed_dim": 10**9}}, "timm cannot build vit_tiny_patch16_224"),
        ({"model_args": {**ARGS, "img_size": 30_000}}, "'img_size': at most 4194304 pixels (2048x2048)"),
        ({"pretrained_cfg": {"input_size": [3, 32, 32], "crop_pct": 9}}, "pretrained_cfg: crop_pct 9"),
        ({"model_args": {**ARGS, "checkpoint_path": "/x"}}, "'checkpoint_path' is not allowed"),
        ({"model_args": {**ARGS, "block_fn": "os.system"}}, "timm cannot build"),
    ],
)
def test_a_config_that_lies_is_refused(tmp_path, changes, says):
    folder = tmp_path / "folder"
    save_for_hf(tiny(), folder, model_args=ARGS)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    assert says in refusal(folder)


@pytest.mark.parametrize(
    ("name", "changes", "classes"),
    [
        ("deit_tiny_distilled_patch16_224", {}, 10),
        ("vit_base_patch16_siglip_224", {}, 10),
        ("vit_base_patch16_siglip_224", {"num_classes": 0}, 0),
        ("vit_small_patch14_reg4_dinov2", {}, 10),
    ],
)
def test_classes_are_read_from_the_classifier(tmp_path, name, changes, classes):
    model = tiny(name, **changes)
    path = save(model, tmp_path / "model.safetensors")
    loaded = read_model(path, model=name, model_args=ARGS)
    assert loaded.identity.model_args["num_classes"] == classes
    assert loaded.model.num_classes == classes
    assert any(note.startswith(f"num_classes {classes}, from") for note in loaded.notes)
    with torch.no_grad():
        assert torch.equal(loaded.model(IMAGES), model(IMAGES))


def test_an_unknown_model_name_gets_close_matches(dense):
    message = refusal(dense[1], model="vit_tiny_patch16_242")
    assert "timm has no model 'vit_tiny_patch16_242'" in message
    assert "vit_tiny_patch16_224" in message
    assert "has no pretrained tag 'nope'. Known tags: augreg" in refusal(dense[1], model=f"{NAME}.nope")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"depth": 4}, ["24 missing, 0 unexpected, 0 of another shape", "model_args={'KEY': 'VALUE'}"]),
        ({"depth": 1}, ["0 missing, 12 unexpected, 0 of another shape"]),
        (
            {"patch_size": 16},
            ["expected [48, 3, 16, 16], found [48, 3, 8, 8]"],
        ),
        ({"img_size": 64}, ["1 of another shape"]),
        ({"num_classes": 5}, ["2 of another shape"]),
        ({"global_pool": "avg"}, ["missing: 'fc_norm.weight', 'fc_norm.bias'"]),
    ],
)
def test_shapes_that_do_not_fit_are_counted(dense, changes, says):
    message = refusal(dense[1], model=NAME, model_args={**ARGS, **changes})
    assert "its tensors do not fit vit_tiny_patch16_224" in message
    assert all(text in message for text in says), message


def test_a_file_of_another_model_is_refused_in_one_line(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({f"encoder.{i}": torch.ones(1) for i in range(2000)}, path)
    message = refusal(path, model=NAME)
    assert "Most names are of another architecture (first 'encoder.0')" in message
    assert "\n" not in message


def test_the_model_that_a_file_is_of_is_named(tmp_path):
    model = timm.create_model("deit_tiny_distilled_patch16_224")
    message = refusal(save_dense(model, tmp_path / "model.safetensors"), model=NAME)
    assert "names and shapes are those of deit_tiny_distilled_patch16_224" in message


def test_integer_weights_are_refused(tmp_path):
    path = save(
        tiny(),
        tmp_path / "x.safetensors",
        **{"norm.weight": torch.ones(48, dtype=torch.int8), "extra": IMAGES},
    )
    message = refusal(path, model=NAME, model_args=ARGS)
    assert "expected float weights, found 1 tensors" in message
    assert "'norm.weight' (int8)" in message


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_tiny_patch16_224", {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32}),
        ("deit_tiny_distilled_patch16_224", {"depth": 1, "embed_dim": 48, "num_heads": 3, "img_size": 32}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1), "embed_dim": 24, "num_heads": (2, 2)}),
        ("levit_128s", {}),
    ],
)
@pytest.mark.parametrize(
    "asked", [{"num_classes": 0}, {"model_args": {"num_classes": 0}}], ids=["flag", "argument"]
)
def test_no_classes_leave_the_classifier_of_a_file_out(name, args, asked, tmp_path):
    dense = timm.create_model(name, num_classes=7, **args).eval()
    path = save_dense(dense, tmp_path / "dense.safetensors")
    given = {**asked, "model_args": {**args, **asked.get("model_args", {})}}
    found = read_model(path, model=name, **given)
    assert (found.model.num_classes, found.identity.model_args["num_classes"]) == (0, 0)
    assert found.identity.pretrained_cfg["num_classes"] == 0
    assert "its classifier of 7 classes is left out" in found.notes
    size = dense.pretrained_cfg["input_size"][-1] if "img_size" not in args else args["img_size"]
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(found.model.forward_features(x), dense.forward_features(x))
    bare = save_dense(found.model, tmp_path / "bare.safetensors")
    again = read_model(bare, model=name, **given)  # a file without one
    assert not any("left out" in note for note in again.notes)
    assert again.model.state_dict().keys() == found.model.state_dict().keys()


def test_a_training_file_of_another_image_size_loses_its_classifier_too(tmp_path):
    dense = timm.create_model(NAME, num_classes=7, depth=1)
    args = argparse.Namespace(model=NAME, model_kwargs={"depth": 1}, img_size=384)
    torch.save({"model": dense.state_dict(), "args": args}, tmp_path / "model.pth")
    for classes, expected in ((None, 7), (0, 0)):
        assert read_model(tmp_path / "model.pth", num_classes=classes).model.num_classes == expected


def test_a_file_without_a_classifier_need_not_be_built_with_one(tmp_path):
    given = {"model": "efficientvit_m0", "num_classes": 0, "model_args": {"global_pool": ""}}
    dense = timm.create_model("efficientvit_m0", num_classes=0, global_pool="")
    path = save_dense(dense, tmp_path / "dense.safetensors")
    assert read_model(path, **given).model.num_classes == 0


@pytest.mark.slow
def test_the_dense_file_of_a_headless_slim_one_is_read_without_its_classifier(tmp_path):
    dense = save_dense(tiny(), tmp_path / "dense.safetensors")
    file, output = ModelFile(dense, NAME, ARGS), tmp_path / "slim.safetensors"
    slim = prune_quickly(file, output, num_classes=0, flops="90%")
    seen = mhacut.inspect(slim.output, compare=dense, calibration_images=4)
    assert slim.dense.flops in seen.comparison.flops
