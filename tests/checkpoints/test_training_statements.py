"""What a training script states beside its weights: its model, the model's arguments, the preprocessing."""

from __future__ import annotations

import argparse

import pytest
import timm
import torch

from checkpoints.test_original import beit
from helpers.checkpoints import ARGS, IMAGES, NAME, logits_with, opened, refusal, tiny, under
from mhacut.checkpoint.load import read_model
from mhacut.checkpoint.preprocessing import provenance
from mhacut.errors import CheckpointError
from mhacut.options.base import PreprocessingOptions

SIZES = {**ARGS, "num_classes": 10}


def timm_script(w, **args):
    options = {
        "model": NAME,
        "num_classes": 10,
        "img_size": 32,
        "in_chans": 3,
        "lr": 1e-3,
        "input_size": None,
    }
    kwargs = {key: value for key, value in ARGS.items() if key != "img_size"}
    options |= {
        "mean": None,
        "std": None,
        "interpolation": "",
        "crop_pct": None,
        "model_kwargs": kwargs,
        **args,
    }
    return {"arch": options["model"], "args": argparse.Namespace(**options), "state_dict": w, "epoch": 3}


def test_timms_script_states_model_arguments_and_preprocessing(tmp_path, states):
    path = tmp_path / "model_best.pth.tar"
    stated = {"mean": [0.5, 0.5, 0.4], "std": [0.2]}
    loaded = opened(path, timm_script(states[0], **stated))
    with torch.no_grad():
        assert torch.equal(loaded.model(IMAGES), logits_with(states[0]))
    assert f"architecture {NAME}, from its args.model" in loaded.notes
    assert loaded.identity.model_args == SIZES
    assert loaded.stem == "model_best"
    found = provenance(loaded, PreprocessingOptions()).origins
    assert {found[name] for name in ("mean", "std")} == {"file"}
    assert loaded.model.pretrained_cfg["mean"] == (0.5, 0.5, 0.4)
    assert loaded.model.pretrained_cfg["std"] == (0.2, 0.2, 0.2)
    plain = opened(path, timm_script(states[0]))
    assert provenance(plain, PreprocessingOptions()).origins["mean"] == "default"
    assert "license" not in plain.identity.pretrained_cfg
    # Of the architecture's own, all but what goes with 224 pixels.
    assert plain.identity.pretrained_cfg["mean"] == [0.5, 0.5, 0.5]
    assert "crop_pct" not in plain.identity.pretrained_cfg


def test_timms_script_states_how_outputs_are_pooled(tmp_path):
    model = tiny(global_pool="avg")
    found = opened(tmp_path / "last.pth", timm_script(model.state_dict(), gp="avg"))
    assert found.identity.model_args["global_pool"] == "avg"


def test_the_user_knows_better_than_the_script(tmp_path, states):
    path, other = tmp_path / "last.pth", "deit_tiny_patch16_224"
    loaded = opened(path, timm_script(states[0], mean=[0.1] * 3, std=[0.3] * 3), model=other, model_args=ARGS)
    assert loaded.identity.architecture == other
    assert loaded.model.pretrained_cfg["mean"] == (0.1, 0.1, 0.1)
    assert f"ignored args.model {NAME} because of model" in loaded.notes
    assert f"architecture {NAME}, as given" in opened(path, timm_script(states[0]), model=NAME).notes
    said = refusal(path, model_args={"depth": 3})
    assert f"args.model in the file says {NAME}. If this is wrong, give model='NAME'" in said


@pytest.mark.parametrize(
    ("entry", "origin"),
    [
        ({"args": argparse.Namespace(model="test_vit", nb_classes=5, input_size=64)}, "args.model"),
        ({"args": {"arch": "test_vit.r160_in1k"}}, "args.arch"),
        ({"arch": "test_vit"}, "arch"),
        (
            {"hyper_parameters": {"backbone": "timm/test_vit.r160_in1k", "std": 0.02}},
            "hyper_parameters.backbone",
        ),
        ({"hyper_parameters": {"model": {"name": "test_vit"}, "lr": 0.1}}, "hyper_parameters.model.name"),
        ({"hyper_parameters": {"name": "resnet18", "model_name": "test_vit"}}, "hyper_parameters.model_name"),
    ],
)
def test_scripts_name_their_model(tmp_path, entry, origin):
    model = timm.create_model("test_vit", num_classes=5, img_size=64)
    content = {"state_dict": under("model.", model.state_dict()), **entry}
    loaded = opened(tmp_path / "last.ckpt", content)
    assert f"architecture test_vit, from its {origin}" in loaded.notes
    assert loaded.identity.model_args == {"img_size": 64, "num_classes": 5}


@pytest.mark.parametrize(
    "args",
    [
        {"model": "my_vit"},
        {"mean": [float("nan")] * 3, "std": [0.1] * 3},
        {"mean": [[[[0.5]]]], "std": [0.1] * 3},
    ],
)
def test_what_a_script_says_is_not_trusted(tmp_path, states, args):
    content = timm_script(states[0], **args)
    if "model" in args:
        content["arch"] = args["model"]
    loaded = opened(tmp_path / "last.pth", content, model=NAME, model_args=ARGS)
    assert loaded.identity.model_args == SIZES
    assert loaded.cfg_origins.get("mean") != "file"


def test_arguments_that_describe_no_model_are_refused(tmp_path, states):
    kwargs = {"checkpoint_path": "/etc/passwd"}
    with pytest.raises(CheckpointError, match=r"args.model_kwargs: .*Save only the state dict"):
        opened(tmp_path / "last.pth", timm_script(states[0], model=NAME, model_kwargs=kwargs))


def test_moco_v3_has_small_heads(tmp_path):
    model = timm.create_model("vit_small_patch16_224", num_classes=10, num_heads=12, depth=2).eval()
    state = {f"module.{key}": tensor for key, tensor in model.state_dict().items()}
    torch.save({"epoch": 3, "arch": "vit_small", "state_dict": state}, tmp_path / "a.pth")
    found = read_model(tmp_path / "a.pth", model_args={"depth": 2})
    images = torch.randn(1, 3, 224, 224)
    assert torch.equal(found.model(images), model(images))
    assert found.identity.pretrained_cfg["mean"] == [0.485, 0.456, 0.406]


def test_names_of_models_in_scripts_are_no_other_models(tmp_path):
    model = timm.create_model("vit_large_patch16_224", depth=1, num_classes=10, global_pool="avg")
    args = {"model": "vit_large_patch16", "nb_classes": 10, "global_pool": True}
    torch.save({"model": model.state_dict(), "args": argparse.Namespace(**args)}, tmp_path / "a.pth")
    found = read_model(tmp_path / "a.pth", model_args={"depth": 1})
    assert found.identity.architecture == "vit_large_patch16_224"
    assert found.cfg_origins["mean"] == "library"
    # a name of a script may also be that of another model
    small = timm.create_model("vit_tiny_patch16_224", depth=2)
    torch.save(
        {"model": small.state_dict(), "args": argparse.Namespace(model="vit_large")}, tmp_path / "b.pth"
    )
    assert (
        read_model(tmp_path / "b.pth", model_args={"depth": 2}).identity.architecture
        == "vit_tiny_patch16_224"
    )


def vit_file(path, args=None, *, name="vit_small_patch16_224", rename=dict, **changes):
    model = timm.create_model(name, depth=2, **changes).eval()
    torch.save({"state_dict": rename(model.state_dict()), **(args or {})}, path)
    return model


@pytest.mark.slow
def test_what_a_script_states_counts_for_files_of_authors_too(tmp_path):
    stated = {"args": argparse.Namespace(model="beitv2_base_patch16_224", mean=[0.1] * 3, std=[0.2] * 3)}
    vit_file(tmp_path / "a.pth", stated, name="beitv2_base_patch16_224", rename=beit)
    found = read_model(tmp_path / "a.pth", model_args={"depth": 2})
    assert found.identity.architecture == "beitv2_base_patch16_224"
    assert found.identity.pretrained_cfg["mean"] == [0.1] * 3
    assert found.cfg_origins["mean"] == "file"


def test_a_scripts_preprocessing_goes_with_its_model_only(tmp_path):
    args = {"args": argparse.Namespace(arch="vit_base")}
    vit_file(tmp_path / "a.pth", args, name="vit_tiny_patch16_224")
    for given in ({}, {"model": "vit_tiny_patch16_224"}):
        found = read_model(tmp_path / "a.pth", model_args={"depth": 2}, **given)
        assert found.identity.pretrained_cfg["mean"] == [0.5] * 3
    assert any("ignored args.arch vit_base_patch16_224" in note for note in found.notes)
    vit_file(tmp_path / "b.pth", args, name="vit_base_patch16_224")
    cfg = read_model(tmp_path / "b.pth", model_args={"depth": 2}).identity.pretrained_cfg
    assert (cfg["mean"], cfg["crop_pct"]) == ([0.485, 0.456, 0.406], 0.875)
