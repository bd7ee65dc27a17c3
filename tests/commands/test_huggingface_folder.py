"""Folders of transformers, dense and pruned, with the commands after ``prune``."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

import mhacut
from helpers.cli import refusal, run
from helpers.data import write_image, write_split
from helpers.huggingface import SIZES, dense_folder
from mhacut.checkpoint.part_file import cut_part
from mhacut.plan import Plan, TokenPlan
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.slice import cut


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("folders")
    dense = dense_folder(root / "dense", "ViTForImageClassification", num_labels=3)
    write_split(root / "images" / "train", per_class=16)
    write_split(root / "images" / "val")
    quick = ("--effort", "fast", "--no-latency", "--set", "tuning_steps=0", "--data-dir", root / "images")
    result = run("prune", dense, "--as", "huggingface", "--flops", "60%", *quick, "-o", root / "slim")
    assert result.exit_code == 0, result.stderr
    return root


def document(*arguments):
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_a_pruned_folder_is_evaluated_timed_and_inspected(folders):
    slim, dense, images = folders / "slim", folders / "dense", folders / "images"
    measured = document("evaluate", slim, "--data-dir", images)
    assert measured["architecture"] == "ViTForImageClassification"
    assert measured["flops"] <= 0.6 * document("evaluate", dense, "--data-dir", images)["flops"]
    benched = document("bench", dense, slim, "--seconds", "0.1", "--batch-sizes", "1")["models"]
    # Both are timed as models of transformers: the dense folder is not converted to timm.
    assert {model["architecture"] for model in benched} == {"ViTForImageClassification"}
    assert benched[1]["file_bytes"] < benched[0]["file_bytes"]
    inspected = document("inspect", slim, "--compare", dense, "--data-dir", images)
    assert inspected["layers"][0]["name"] == "model.vit.layers.0.attention"
    assert inspected["history"][0]["source"] == "dense"
    assert 0 <= inspected["comparison"]["agreement"] <= 1


def test_a_folder_of_another_model_is_not_written_to(folders):
    model = mhacut.load_pruned(folders / "slim")
    with pytest.raises(mhacut.OutputError, match="transformers would open this file"):
        mhacut.save_pruned(model, folders / "dense", overwrite=True)


def test_training_keeps_the_preprocessing_of_the_folder(folders, tmp_path):
    slim, data = folders / "slim", ("--data-dir", folders / "images", "-o", tmp_path / "run")
    message = refusal(tmp_path, "finetune", slim, "--img-size", "64", *data, code=2)
    assert "--img-size: a transformers folder has its own preprocessing" in message


def test_config_has_no_private_attributes(folders):
    stated = json.loads((folders / "slim" / "config.json").read_text())["mhacut"]
    assert not [key for values in stated["attributes"].values() for key in values if key.startswith("_")]


def test_training_writes_a_folder_of_the_same_class(folders, tmp_path):
    run_folder, data = tmp_path / "run", ("--data-dir", folders / "images", "--lr", "1e-3")
    note = run_folder / "best" / "note.txt"  # of the user, whose folder has the name of a run's folder
    note.parent.mkdir(parents=True)
    note.touch()
    tuned = document("finetune", folders / "slim", *data, "--epochs", "1", "-o", run_folder)
    assert note.exists()
    assert tuned["output"] == str(run_folder / "best")
    assert tuned["steps"] == 3
    assert document("inspect", run_folder / "last", "--shapes")["history"][1]["teacher_sha256"] is not None
    models = [mhacut.load_pruned(path) for path in (folders / "slim", run_folder / "last")]
    assert type(models[0]) is type(models[1])
    weights = [model.classifier.weight for model in models]
    assert not torch.equal(*weights)
    again = ("finetune", run_folder / "best", *data, "-o", run_folder, "--overwrite")
    assert "is the input" in refusal(tmp_path, *again)
    more = (*data, "--epochs", "1", "-o", run_folder, "--overwrite")
    assert document("finetune", folders / "slim", *more)["steps"] == 3


def test_the_exported_file_has_the_outputs_of_the_class(folders, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'mhacut[onnx]'")
    document("export", folders / "slim", "-o", tmp_path / "slim.onnx")
    images = np.random.default_rng(0).standard_normal((3, 3, 28, 28), dtype=np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "slim.onnx")
    (served,) = session.run(None, {session.get_inputs()[0].name: images})
    expected = mhacut.load_pruned(folders / "slim")(torch.from_numpy(images)).logits.detach().numpy()
    assert np.abs(served - expected).max() <= 1e-5 * np.abs(expected).max()
    refused = refusal(tmp_path, "export", folders / "slim", "--format", "timm", code=2)
    assert "holds a model of transformers" in refused


def test_a_class_that_timm_lacks_is_opened_as_it_is(tmp_path, folders):
    folder = dense_folder(tmp_path / "yolos", "YolosModel", num_detection_tokens=4, image_size=[28, 28])
    result = mhacut.inspect(folder)
    assert result.inspection.architecture == "YolosModel"
    assert not result.inspection.slim
    assert "--as huggingface" in refusal(tmp_path, "prune", folder, "--flops", "50%", code=2)


def test_options_of_timm_are_refused(folders, tmp_path):
    message = refusal(tmp_path, "inspect", folders / "slim", "--model", "vit_tiny_patch16_224")
    assert "Leave out --model, " in message
    assert "was pruned already" in refusal(tmp_path, "prune", folders / "slim", "--flops", "50%", code=2)


WITHOUT_MHACUT = """
import sys

sys.modules["mhacut"] = None
import torch
import transformers

folder, auto, file = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder, trust_remote_code=True).eval()
images, expected = torch.load(file)
output = next(iter(model(pixel_values=images).values()))
assert (output - expected).abs().max() <= 1e-6 * expected.abs().max()
output.sum().backward()
assert all(p.grad is not None for name, p in model.named_parameters() if "layer" in name)
if auto == "AutoModelForImageClassification":  # a step of transformers' Trainer, which needs accelerate
    labels, count = torch.tensor([0, 1]), torch.tensor(2)
    model.train()(pixel_values=images, labels=labels, num_items_in_batch=count).loss.backward()
    torch.optim.SGD(model.parameters(), 0.01).step()
    model.eval().save_pretrained(file + " trained")
    again = getattr(transformers, auto).from_pretrained(file + " trained", trust_remote_code=True).eval()
    assert torch.equal(again(pixel_values=images).logits, model(pixel_values=images).logits)
if auto == "AutoModelForImageClassification":
    classify = transformers.pipeline("image-classification", folder, trust_remote_code=True)
    picture = transformers.image_utils.load_image(sys.argv[0])
    assert len(classify(picture)) == 3
"""


def opened_without_mhacut(folder, auto, model, tmp_path):
    """Compare the outputs of ``model`` with those of ``folder`` in a process that cannot import mhacut."""
    images = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        torch.save((images, next(iter(model(pixel_values=images).values()))), tmp_path / "outputs.pt")
    picture = write_image(tmp_path / "picture.png")
    code = WITHOUT_MHACUT.replace("sys.argv[0]", repr(str(picture)))
    environment = {**os.environ, "HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code, str(folder), auto, str(tmp_path / "outputs.pt")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_transformers_opens_a_classifier_without_mhacut(folders, tmp_path):
    model = mhacut.load_pruned(folders / "slim")
    opened_without_mhacut(folders / "slim", "AutoModelForImageClassification", model, tmp_path)
    card = (folders / "slim" / "README.md").read_text()
    assert 'AutoModelForImageClassification.from_pretrained("slim", trust_remote_code=True)' in card


def test_transformers_opens_a_backbone_that_merges_tokens_without_mhacut(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install 'mhacut[interop]'")
    model = transformers.Dinov2Model(transformers.Dinov2Config(**SIZES, initializer_range=0.2)).eval()
    narrow = [unit.keep_first(unit.width // 2) for unit in find_prunable_layers(model).units()]
    plan = Plan(tuple(narrow), TokenPlan(merged=(0, 5, 3), unmerge=True))
    outline = copy.deepcopy(model)
    cut(outline, plan)
    cut_part(model, "", plan, outline.state_dict(), flops_before=2, flops_after=1)
    mhacut.save_pruned(model, tmp_path / "folder")
    opened_without_mhacut(tmp_path / "folder", "AutoModel", mhacut.load_pruned(tmp_path / "folder"), tmp_path)


def test_a_folder_with_layers_of_mhacut_has_no_code(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install 'mhacut[interop]'")
    model = transformers.DINOv3ViTModel(transformers.DINOv3ViTConfig(**SIZES, initializer_range=0.2)).eval()
    plan = Plan(tuple(unit.keep_first(unit.width // 2) for unit in find_prunable_layers(model).units()))
    outline = copy.deepcopy(model)
    cut(outline, plan)
    cut_part(model, "", plan, outline.state_dict(), flops_before=2, flops_after=1)
    mhacut.save_pruned(model, tmp_path / "folder")
    assert not (tmp_path / "folder" / "modeling_mhacut.py").exists()
    assert 'mhacut.load_pruned("folder")' in (tmp_path / "folder" / "README.md").read_text()
