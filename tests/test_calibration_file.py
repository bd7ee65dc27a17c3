"""A calibration kept in a file is the same to the bit, and refused where it is stale."""

from __future__ import annotations

import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import mhacut
from helpers.jobs import Recorder, job_of
from helpers.models import ModelCase, build
from helpers.pruning import prune_quickly
from mhacut.errors import DataError, OutputError
from mhacut.pruning import calibration_file
from mhacut.pruning.calibration_file import fingerprint_of, read_calibration, write_calibration

prune = partial(prune_quickly, flops="60%")
CASES = [
    ModelCase("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32}),
    ModelCase("swin_tiny_patch4_window7_224", {"img_size": 64, "depths": (1, 1), "embed_dim": 24}),
    ModelCase(
        "flatten_swin_tiny_224", {"img_size": 64, "depths": (1, 1, 1, 1), "embed_dim": 24, "window_size": 4}
    ),
]


def equal(one, other):
    """Whether two objects hold the same numbers, in dataclasses, mappings and tuples."""
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return list(one) == list(other) and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if hasattr(one, "__dataclass_fields__"):
        return all(equal(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__)
    return one == other


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.architecture)
@pytest.mark.parametrize("images", [1, 6])
def test_what_is_read_is_what_was_written(case, images, tmp_path):
    torch.manual_seed(0)
    model = build(case)
    job = job_of(model, torch.randn(images, *case.size))
    calibration = job.calibrate()
    fingerprint = fingerprint_of(job)
    write_calibration(tmp_path / "kept.safetensors", calibration, fingerprint)
    found = read_calibration(tmp_path / "kept.safetensors", fingerprint, torch.device("cpu"))
    assert equal(found, calibration)


def test_tensors_are_copied_only_where_they_share_memory():
    model = build(CASES[0])
    calibration = job_of(model, torch.randn(1, *CASES[0].size)).calibrate()  # to fit is to hold out
    tensors, _ = calibration_file._flat(calibration)
    places = [tensor.untyped_storage().data_ptr() for tensor in tensors.values()]
    assert len(set(places)) == len(places)
    (side, *_) = calibration.moments[next(iter(calibration.moments))].fit
    assert side.second.untyped_storage().data_ptr() in places


def test_equal_bytes_of_another_shape_are_other_images():
    model = build(CASES[0])
    wide, high = (fingerprint_of(job_of(model, torch.zeros(2, 3, *sides))) for sides in ((32, 64), (64, 32)))
    assert [name for name in wide if wide[name] != high[name]] == ["images"]


@pytest.fixture(scope="module")
def kept_once(tiny_vit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    first = prune(tiny_vit, folder / "first.safetensors", calibration=folder / "kept.safetensors")
    assert "calibrating" in first.seconds
    return folder / "kept.safetensors"


@pytest.fixture
def kept(kept_once, tmp_path):
    """A file with the calibration of a run, which a second run uses."""
    return Path(shutil.copy(kept_once, tmp_path))


@pytest.mark.slow
def test_a_second_run_takes_it_and_writes_the_same_file(tiny_vit, kept, tmp_path):
    plain = prune(tiny_vit, tmp_path / "plain.safetensors")
    reporter, before = Recorder(), kept.read_bytes()
    second = prune(tiny_vit, tmp_path / "second.safetensors", calibration=kept, reporter=reporter)
    assert any(line.startswith("calibration read from") for line in reporter.messages)
    assert "calibrating" not in reporter.stages
    assert second.output.read_bytes() == plain.output.read_bytes()
    assert kept.read_bytes() == before
    # What does not depend on the calibration may differ.
    assert prune(tiny_vit, tmp_path / "other.safetensors", calibration=kept, flops="80%", round_to=4).budget


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration_images": 9}, "number of images: 8, now 9; another images"),
        ({"seed": 1}, "another images; Fisher information: 3 images, seed 42, now 3 images, seed 1"),
        ({"batch_size": 5}, "batch_size: 4, now 5"),
        ({"token_weights": False}, "token_weights: on, now off"),
        ({"effort": "balanced", "heal_steps": 0}, "Fisher information: 3 images, seed 42, now 6 images"),
        ({"keep_dead_tokens": True}, "another model"),
        ({"mean": (0.1,)}, "another images"),
    ],
)
def test_a_stale_one_is_refused_with_what_differs(tiny_vit, kept, tmp_path, options, message):
    with pytest.raises(DataError, match=re.escape(message)):
        prune(tiny_vit, tmp_path / "slim.safetensors", calibration=kept, **options)
    assert not (tmp_path / "slim.safetensors").exists()


def test_one_of_other_weights_is_refused(tiny_vit, kept, tmp_path):
    tensors = load_file(tiny_vit.path)
    tensors["head.bias"][0] += 1e-3
    save_file(tensors, tmp_path / "other.safetensors")
    with pytest.raises(DataError, match=r"made under other conditions: another model\. Name another file"):
        prune(
            tiny_vit, tmp_path / "x.safetensors", calibration=kept, checkpoint=tmp_path / "other.safetensors"
        )


@pytest.mark.parametrize("damage", ["text", "tensors", "metadata", "missing"])
def test_a_file_that_is_no_calibration_is_refused(tiny_vit, kept, tmp_path, damage):
    from safetensors import safe_open

    with safe_open(kept, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(kept)
    if damage == "text":
        kept.write_bytes(b"precious text")
    elif damage == "tensors":
        save_file({"x": torch.zeros(3)}, kept)
    elif damage == "metadata":
        save_file(tensors, kept, {"mhacut-calibration": "[1]"})
    else:
        tensors.pop("unit0.redundancy")
        save_file(tensors, kept, metadata)
    with pytest.raises(DataError, match=r"kept\.safetensors: is not a calibration file written by mhacut"):
        prune(tiny_vit, tmp_path / "slim.safetensors", calibration=kept)


def test_the_calibration_is_not_written_over_the_model(tiny_vit, tmp_path):
    with pytest.raises(
        mhacut.UsageError, match=r"calibration='same\.safetensors': expected another file than"
    ):
        prune(tiny_vit, "same.safetensors", calibration="same.safetensors")


def test_the_output_is_never_the_kept_calibration(tiny_vit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "kept.safetensors"
    prune(tiny_vit, tmp_path / "first.safetensors", calibration=path)
    before = path.read_bytes()
    with pytest.raises(OutputError, match="never overwritten"):
        prune(tiny_vit, "kept.safetensors", calibration=path, overwrite=True)
    assert path.read_bytes() == before
