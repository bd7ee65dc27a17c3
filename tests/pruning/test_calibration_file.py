"""A calibration kept in a file is the same to the bit, and refused where it is stale."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mhacut
from helpers.cli import FAST, refusal
from helpers.jobs import Recorder, job_of
from helpers.models import ModelCase, build
from helpers.pruning import prune_quickly
from mhacut.commands.prune_calibration import (
    METADATA_KEY,
    _flat,
    check_run,
    fingerprint_of,
    read_calibration,
    write_calibration,
)
from mhacut.errors import DataError, OutputError
from mhacut.runtime import tensor_files
from properties.cases import FIRST_MODEL

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
    found = read_calibration(tmp_path / "kept.safetensors", fingerprint, job)
    assert equal(found, calibration)
    check_run(tmp_path / "kept.safetensors", found, job)


@pytest.mark.slow
@pytest.mark.parametrize("case", FIRST_MODEL.values(), ids=lambda case: case.architecture)
def test_every_class_has_the_tensors_that_are_expected(case, tmp_path):
    torch.manual_seed(0)
    job = job_of(build(case), torch.randn(2, *case.size))
    calibration = job.calibrate()
    write_calibration(tmp_path / "kept.safetensors", calibration, {})
    found = read_calibration(tmp_path / "kept.safetensors", {}, job)
    check_run(tmp_path / "kept.safetensors", replace(found, preserved=calibration.preserved), job)


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
    reporter, kept = Recorder(), tmp_path / "kept.safetensors"
    first, second = (
        prune(tiny_vit, tmp_path / f"{name}.safetensors", calibration=kept, reporter=reporter, **options)
        for name in ("first", "second")
    )
    assert f"calibration read from {kept}" in reporter.messages
    assert first.output.read_bytes() == second.output.read_bytes()


def test_tensors_are_copied_only_where_they_share_memory(monkeypatch):
    model = build(CASES[0])
    calibration = job_of(model, torch.randn(1, *CASES[0].size)).calibrate()  # to fit is to hold out
    saved: dict[str, torch.Tensor] = {}
    monkeypatch.setattr(tensor_files, "save_file", lambda tensors, path, metadata: saved.update(tensors))
    tensor_files.save_tensors(_flat(calibration)[0], "unused", {})
    places = [tensor.untyped_storage().data_ptr() for tensor in saved.values()]
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


def test_gradients_of_few_images_serve_every_effort(tiny_vit, tmp_path, monkeypatch):
    """``fast`` and ``balanced`` differentiate the same images, at most ``FISHER_IMAGES``."""
    monkeypatch.setattr("mhacut.pruning.job.FISHER_IMAGES", 2)
    kept = tmp_path / "kept.safetensors"
    assert prune(tiny_vit, tmp_path / "a.safetensors", calibration=kept, effort="fast").budget
    before = kept.read_bytes()
    with safe_open(kept, "pt") as file:
        assert "2 images, seed 42" in json.dumps(file.metadata())
    assert prune(
        tiny_vit, tmp_path / "b.safetensors", calibration=kept, effort="balanced", heal_steps=0
    ).budget
    assert kept.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration_images": 9}, "number of images: 8, now 9; images: not the same"),
        ({"calibration_images": 9}, "Give calibration_images=8 to use it, or name another file by"),
        ({"seed": 1}, "images: not the same; Fisher information: 6 images, seed 42, now 6 images, seed 1"),
        ({"batch_size": 5}, "batch_size: 4, now 5"),
        ({"token_weights": False}, "token_weights: on, now off"),
        ({"keep_dead_tokens": True}, "model: not the same"),
        ({"mean": (0.1,)}, "images: not the same"),
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
    with pytest.raises(DataError, match=r"under other conditions: model: not the same\. Name another file"):
        prune(
            tiny_vit, tmp_path / "x.safetensors", calibration=kept, checkpoint=tmp_path / "other.safetensors"
        )


@pytest.mark.parametrize("damage", ["text", "tensors", "metadata", "missing"])
def test_a_file_that_is_no_calibration_is_refused(tiny_vit, kept, tmp_path, damage):
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


def opened(path):
    """The tensors and the document of a kept calibration."""
    with safe_open(path, "pt") as file:
        return load_file(path), json.loads(file.metadata()[METADATA_KEY])


def in_unit(key, value):
    def change(tensors, document):
        document["units"][0][key] = value

    return change


def in_document(key, value):
    return lambda tensors, document: document.update({key: value})


def in_tensors(name, value):
    return lambda tensors, document: tensors.update({name: value(tensors[name])})


def of_nan(tensor):
    return torch.full_like(tensor, float("nan"))


SIDES = "expected 2 counts of rows, found"
WRONG = {
    "a held-out image": (in_document("held", 1), "held: expected 2, found 1"),
    "no unit": (in_document("units", []), "units: expected 6 of this model, found 0, or others"),
    "another unit": (in_unit("layer", "x"), "units: expected 6 of this model, found 6, or others"),
    "a unit": (in_document("units", [7]), "TypeError("),
    "no rows": (in_unit("fit", [0, 0]), f"blocks.0.attn.qk: fit: {SIDES} [0, 0]"),
    "one side": (in_unit("fit", [5]), f"blocks.0.attn.qk: fit: {SIDES} [5]"),
    "many sides": (in_unit("held", [5] * 1000), "KeyError('unit0.held2.total')"),
    "rows without end": (in_unit("fit", [1e999, 1]), "Infinity is not JSON"),
    "no fingerprint": (in_document("fingerprint", ["x"]), "fingerprint: expected texts by name, found list"),
    "a fingerprint": (in_document("fingerprint", {"model": 1}), "expected texts by name, found dict"),
    "a total": (
        in_tensors("unit0.fit0.total", lambda tensor: tensor[:2]),
        "blocks.0.attn.qk: fit total: expected float64 (3, 16), found float64 (2, 16)",
    ),
    "a dtype": (
        in_tensors("unit1.held0.second", torch.Tensor.float),
        "blocks.0.attn.v: held second: expected float64 (48, 48), found float32 (48, 48)",
    ),
    "NaN": (in_tensors("unit0.redundancy", of_nan), "qk: redundancy: values that are not finite"),
    "another grid": (
        lambda tensors, document: document["grids"][0].update(grid=[1, 3]),
        "importance: expected float64 (3,), found float64 (",
    ),
    "no grid": (
        lambda tensors, document: document["grids"][0].update(grid=[-1, -17]),
        "importance: expected a grid of positive numbers, found (-1, -17)",
    ),
    "no layer": (in_document("fisher", []), "Fisher information: expected 4 layers, found 0, or others"),
    "Fisher": (in_tensors("fisher0", lambda tensor: tensor[:1]), "information: expected float64 (48, 48)"),
    "no Fisher": (in_tensors("fisher0", of_nan), "Fisher information: values that are not finite"),
    "outputs": (in_tensors("teacher", lambda tensor: tensor[:, :5]), "dense model: expected float32 (8, 7)"),
    "images": (in_tensors("teacher", lambda tensor: tensor[:5]), "(8, 7), found float32 (5, 7)"),
    "infinite": (in_tensors("teacher", lambda tensor: tensor / 0), "dense model: values that are not"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_numbers_and_tensors_that_no_calibration_has_are_refused(tiny_vit, kept, tmp_path, case):
    change, says = WRONG[case]
    tensors, document = opened(kept)
    change(tensors, document)
    text = json.dumps(document)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, kept, {METADATA_KEY: text})
    with pytest.raises(DataError, match=re.escape(says)) as error:
        prune(tiny_vit, tmp_path / "slim.safetensors", calibration=kept)
    assert str(error.value).startswith(f"{kept}: is not a calibration file written by mhacut: ")
    assert not (tmp_path / "slim.safetensors").exists()


def with_header(change):
    """The file with the text of its header changed."""

    def changed(content):
        size = 8 + int.from_bytes(content[:8], "little")
        header = change(content[8:size])
        return len(header).to_bytes(8, "little") + header + content[size:]

    return changed


def deep(header):
    document = json.loads(header)
    document["__metadata__"] = {METADATA_KEY: '{"a":' * 100_000}
    return json.dumps(document).encode()


def twice(header):
    return header.replace(b'"__metadata__":{', b'"__metadata__":{"n":"","n":"",')


def in_lines(header):
    document = json.loads(header)
    kept = json.loads(document["__metadata__"][METADATA_KEY])
    kept["fingerprint"]["batch_size"] = "4\nerror: \x1b[2J"
    document["__metadata__"] = {METADATA_KEY: json.dumps(kept)}
    return json.dumps(document).encode()


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (with_header(deep), "mhacut-calibration: nested too deeply"),
        (with_header(lambda header: b'{"teacher":{},' + header[1:]), "damaged safetensors header"),
        (with_header(twice), "key 'n' appears twice"),
        (with_header(lambda header: header.replace(b"F64", b"C64", 1)), "found C64"),
        (with_header(in_lines), r"batch_size: 4\nerror: \x1b[2J, now 4"),
        (lambda content: content[:-5], "truncated"),
        (lambda content: b"", "file is empty (0 bytes)"),
        (lambda content: bytes(7) + b"\x01" + b"{}", "its header would be 72057594037927936 bytes"),
        (lambda content: b"PK" + content, "its header would be"),
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
