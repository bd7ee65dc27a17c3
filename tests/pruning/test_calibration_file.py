"""A calibration kept in a file is the same to the bit, and refused where it is stale."""

from __future__ import annotations

import io
import re
import shutil
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.cli import FAST, refusal
from helpers.jobs import Recorder, job_of
from helpers.models import ModelCase, build
from helpers.pruning import prune_quickly
from mhacut.commands.prune_calibration import read_calibration, write_calibration
from mhacut.errors import DataError

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
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    if hasattr(one, "__dataclass_fields__"):
        return all(equal(getattr(one, name), getattr(other, name)) for name in one.__dataclass_fields__)
    return one == other


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.architecture)
@pytest.mark.parametrize("images", [1, 6])
def test_what_is_read_is_what_was_written(case, images, tmp_path):
    torch.manual_seed(0)
    job = job_of(build(case), torch.randn(images, *case.size))
    calibration = job.calibrate()
    write_calibration(tmp_path / "kept.pt", calibration, job)
    assert equal(read_calibration(tmp_path / "kept.pt", job), calibration)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {"preserve": "pooled"},
        {"preserve": "tokens"},
        {"token_weights": False},
        {"allocation": "uniform", "repair": False},
        {"scope": "attention"},
    ],
)
def test_whatever_is_asked_for_its_calibration_is_read_again(tiny_vit, tmp_path, options):
    reporter, kept = Recorder(), tmp_path / "kept.pt"
    first, second = (
        prune(tiny_vit, tmp_path / f"{name}.safetensors", calibration=kept, reporter=reporter, **options)
        for name in ("first", "second")
    )
    assert f"calibration read from {kept}" in reporter.messages
    assert first.output.read_bytes() == second.output.read_bytes()


@pytest.fixture(scope="module")
def kept_once(tiny_vit, tmp_path_factory):
    folder = tmp_path_factory.mktemp("kept")
    first = prune(tiny_vit, folder / "first.safetensors", calibration=folder / "kept.pt")
    assert "calibrating" in first.seconds
    return folder / "kept.pt"


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
        ({"calibration_images": 9}, "(number of images, images, "),
        ({"seed": 1}, "(images, Fisher information)"),
        ({"batch_size": 5}, "(batch_size)"),
        ({"token_weights": False}, "(token_weights)"),
        ({"keep_dead_tokens": True}, "(model)"),
        ({"mean": (0.1,)}, "(images)"),
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
    with pytest.raises(DataError, match=r"under other conditions \(model\)\. Name another file"):
        prune(
            tiny_vit, tmp_path / "x.safetensors", calibration=kept, checkpoint=tmp_path / "other.safetensors"
        )


def saved(content):
    """Bytes that ``torch.save`` writes of an object."""
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


def of_other_tensors(content):
    at = content.index(b"data/1") + 200  # within a storage
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda content: b"precious text", "is not a calibration file written by mhacut"),
        (lambda content: saved({"x": torch.zeros(3)}), "no 'conditions'"),
        (lambda content: saved([1]), "is not a calibration file"),
        (lambda content: content[:-5], "is not a calibration file"),
        (lambda content: b"", "file is empty (0 bytes)"),
        (of_other_tensors, "is damaged"),
    ],
)
def test_the_command_refuses_a_damaged_one_in_a_line(tiny_vit, kept, tmp_path, monkeypatch, damage, says):
    monkeypatch.chdir(tmp_path)
    kept.write_bytes(damage(kept.read_bytes()))
    flags = ["--calibration", kept, "--effort", "fast", *FAST, "-o", tmp_path / "slim.safetensors"]
    message = refusal(tmp_path, "prune", *tiny_vit.flags, "--flops", "60%", *flags)
    assert message.splitlines()[-1].startswith(f"error: {kept}: ")
    assert says in message.splitlines()[-1]
    assert "Name another file by --calibration" in message.splitlines()[-1]
