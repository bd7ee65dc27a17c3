"""Likeness to the dense model, as ``prune`` states it: of which images, and the same as a script finds."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader, TensorDataset
from torchvision.transforms.functional import to_pil_image

import mhacut
from helpers.cli import document_of, research, run
from helpers.data import write_image
from helpers.jobs import Recorder
from helpers.pruning import last_step, prune_quickly

prune = partial(prune_quickly, flops="60%", allocation="uniform", repair=False, gain_steps=0)


@pytest.fixture(scope="module")
def tiny_vit(tiny_vit, tmp_path_factory):
    """The same with larger weights: else a cut model of random weights answers as the dense one does."""
    tensors = {name: (1 + 7 * (each.ndim == 2)) * each for name, each in load_file(tiny_vit.path).items()}
    path = tmp_path_factory.mktemp("models") / "sharp.safetensors"
    save_file(tensors, path)
    return replace(tiny_vit, path=path)


@pytest.fixture(scope="module")
def images():
    return torch.randn(40, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def labels():
    return torch.arange(40) % 7


@pytest.fixture
def dense(tiny_vit):
    return mhacut.load_model(tiny_vit.path, model=tiny_vit.architecture, **tiny_vit.args)


@torch.no_grad()
def likeness(dense, slim, images):
    p, q = dense(images).log_softmax(1), slim(images).log_softmax(1)
    same = (p.argmax(1) == q.argmax(1)).float().mean()
    return float(F.kl_div(q, p, log_target=True, reduction="batchmean")), float(same)


@pytest.mark.slow
@pytest.mark.parametrize("labelled", [True, False])
def test_a_result_is_judged_on_the_validation_images(tiny_vit, dense, images, labels, tmp_path, labelled):
    given = (images[16:], labels[16:]) if labelled else images[16:]
    output = tmp_path / "slim.safetensors"
    result = prune(tiny_vit, output, images=images[:16], val_images=given)
    fidelity, slim = result.fidelity, mhacut.load_model(output)
    kl, same = likeness(dense, slim, images[16:])
    assert fidelity.divergence == result.divergence == pytest.approx(kl, rel=1e-4)
    assert fidelity.agreement == pytest.approx(same)
    assert fidelity.judged_on == "24 validation images"
    assert "KL to dense, nats (24 validation images)  " in repr(result)
    stated = last_step(output)["fidelity"]
    assert (stated["images"], stated["sample"]) == (24, "validation images")
    assert (stated["divergence"], stated["agreement"]) == pytest.approx((kl, same), rel=1e-3)
    if labelled:
        accuracy = mhacut.evaluate(output, images=given).evaluation
        assert result.slim.evaluation.top1 == accuracy.top1
        assert "top-1, % of 24 validation images (± " in repr(result)
    else:
        assert result.slim.evaluation is None


@pytest.mark.slow
def test_a_folder_needs_no_labels_to_judge_on(tiny_vit, images, tmp_path):
    for number, image in enumerate(images[:24]):
        path = tmp_path / ("train" if number < 12 else "val") / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        to_pil_image(image.sigmoid()).save(path)
    arguments = ["--data-dir", tmp_path, "--workers", "0", "--effort", "fast", "--no-latency"]
    arguments += research(allocation="uniform", repair=False, gain_steps=0)
    output = tmp_path / "slim.safetensors"
    found = document_of("prune", *tiny_vit.flags, "--flops", "60%", *arguments, "-o", output)
    assert (found["judged_on"], found["judged_images"]) == (12, "validation images")
    compared = ["--compare", tiny_vit.path, "--data-dir", tmp_path, "--train-split", "val"]
    again = document_of("inspect", output, *compared)["comparison"]
    assert found["divergence"] == pytest.approx(again["divergence"], rel=1e-4)
    assert found["agreement"] == again["agreement"]
    assert again["data"].startswith("12 of 12 images under val/")
    stated = f"divergence {found['divergence']:.2g} on 12 validation images"
    assert stated in " ".join(run("inspect", output).stdout.split())


def test_accuracy_on_images_like_those_searched_on_is_called_so(tiny_vit, images, labels, tmp_path):
    result = prune(tiny_vit, None, images=(images, labels), dry_run=True)
    assert "top-1, % of 32 images of the set searched on" in repr(result)
    assert "KL to dense, nats (32 images of the set searched on)" in repr(result)
    for label in range(7):
        for number in range(2):
            write_image(tmp_path / "val" / f"{label}" / f"{number}.png", 20 * label + number)
    options = {"data_dir": tmp_path, "train_split": "val", "workers": 0, "dry_run": True}
    assert "top-1, % of 14 images of the set searched on" in repr(prune(tiny_vit, None, **options))


def test_a_loader_in_the_order_of_classes_is_read_from_all_over(tiny_vit, images, labels):
    labels = labels.sort().values
    options = {"dry_run": True, "eval_images": 6, "val_images": (images, labels)}
    loader = DataLoader(TensorDataset(images, labels), batch_size=4)
    recorder = Recorder()
    result = prune(tiny_vit, None, images=loader, reporter=recorder, **options)
    assert result.data == "8 of 40 images in memory (with labels)"
    assert not [message for message in recorder.messages if message.startswith("calibration images cover")]
    # Batches that come one after the other cannot be chosen from.
    prune(tiny_vit, None, images=iter(loader), reporter=recorder, **options)
    warning = "calibration images cover 2 of 7 classes; accuracy on the other classes may drop more"
    assert recorder.messages.count(warning) == 1
