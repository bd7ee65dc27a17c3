"""Files and folders as they lie about: read by what is in them, and nothing in them runs.

Files that are no checkpoints are refused in tests/command_line/test_bad_inputs.py.
"""

from __future__ import annotations

import argparse
import os
import re
import warnings
from collections import OrderedDict, defaultdict
from pathlib import PosixPath

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from helpers.checkpoints import Hostile, torch_file
from helpers.models import same
from mhacut.checkpoint.files import read_file_header, read_tensors, sha256_of
from mhacut.checkpoint.training import read_training
from mhacut.errors import CheckpointError

TENSORS = {"a.weight": torch.arange(6.0).reshape(2, 3), "b": torch.ones(2, dtype=torch.float16)}


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.safetensors"
    save_file(TENSORS, path, {"format": "pt", "note": "hello"})
    return path


def refusal(path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_file_header(path)
    message = str(error.value)
    assert str(path) in message
    return message


def holds(header, tensors=TENSORS) -> bool:
    return same(read_tensors(header), tensors)


def test_a_safetensors_file_is_read(good):
    header = read_file_header(good)
    assert header.format == "safetensors"
    assert header.shapes == {"a.weight": (2, 3), "b": (2,)}
    assert header.tensors["b"].dtype == torch.float16
    assert header.metadata["note"] == "hello"
    assert holds(header)


def test_sha256_is_that_of_the_bytes(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"abc")
    assert sha256_of(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncations_of_a_file_are_refused(good, kind):
    content = good.read_bytes()
    if kind != "safetensors":
        content = torch_file(TENSORS, _use_new_zipfile_serialization=kind == "zip")
    for size in (*range(0, len(content), 7), len(content) - 1):
        good.write_bytes(content[:size])
        try:
            header = read_file_header(good)
        except CheckpointError:
            continue
        with pytest.raises(CheckpointError):  # the end of a legacy file is seen when it is read
            read_tensors(header)


def test_what_is_not_a_file_is_refused_without_opening_it(tmp_path):
    assert "no such file" in refusal(tmp_path / "none.safetensors")
    os.mkfifo(tmp_path / "fifo")
    assert "file is empty" in refusal(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert "a link to a missing file" in refusal(tmp_path / "loop")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    assert "a link to a missing file" in refusal(tmp_path / "dangling")


def test_a_folder_needs_timms_config(tmp_path, good):
    folder = tmp_path / "folder"
    folder.mkdir()
    assert refusal(folder).endswith("has no config.json. Give one of its files")
    good.rename(folder / "model.safetensors")
    assert "Give model.safetensors itself and model='NAME'" in refusal(folder)
    config = folder / "config.json"
    config.write_text('{"architecture": "a"}', encoding="utf-8-sig")
    assert read_file_header(folder).config == {"architecture": "a"}
    (folder / "model.safetensors").unlink()
    assert "has no weights" in refusal(folder)


@pytest.mark.parametrize("name", ["default.weight", "weight"])
def test_adapters_are_to_be_merged_first(tmp_path, name):
    (tmp_path / "adapter_config.json").touch()
    assert "holds an adapter without its model. Merge it into its model" in refusal(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    layer = "base_model.model.blocks.0.attn.qkv"
    save_file({f"{layer}.lora_{one}.{name}": torch.ones(2, 2) for one in "AB"}, path)
    assert "Merge it into its model first: merged = PeftModel" in refusal(path)


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("checkpoint", "part", "stripped"),
    [
        (TENSORS, None, False),
        ({"module." + name: tensor for name, tensor in TENSORS.items()}, None, True),
        (
            {"model": {"_orig_mod." + name: tensor for name, tensor in TENSORS.items()}, "epoch": 3},
            "model",
            True,
        ),
        ({"state_dict": TENSORS, "model": {}}, "state_dict", False),
        (
            {"model": TENSORS, "args": argparse.Namespace(lr=1e-3), "optimizer": {"m": [torch.ones(3)]}},
            "model",
            False,
        ),
        ({"state_dict": {}, "model_ema": TENSORS}, "model_ema", False),
        ({"state_dict": TENSORS, "state_dict_ema": None}, "state_dict", False),
        ({"model": TENSORS, "kind": OrderedDict}, "model", False),
    ],
)
def test_torch_files_are_read_and_say_which_part(tmp_path, checkpoint, part, stripped, zipped):
    path = tmp_path / "model.pth"
    torch.save(checkpoint, path, _use_new_zipfile_serialization=zipped)
    header = read_file_header(path)
    assert (header.format, header.part, "prefix" in (header.note or "")) == ("torch", part, stripped)
    assert holds(header)


def test_content_decides_not_the_suffix(tmp_path, good):
    torch.save(TENSORS, tmp_path / "torch.safetensors")
    header = read_file_header(tmp_path / "torch.safetensors")
    assert header.format == "torch"
    assert holds(header)
    header = read_file_header(good.rename(tmp_path / "good.pth"))
    assert header.format == "safetensors"
    assert holds(header)


@pytest.mark.parametrize("zipped", [True, False])
def test_the_advice_for_a_pickled_model_loads_it(tmp_path, zipped):
    path, model = tmp_path / "model.pth", nn.Linear(2, 2)
    torch.save(model, path, _use_new_zipfile_serialization=zipped)
    advice = re.search(r"c = (.*?\)); torch.save", refusal(path)).group(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = eval(advice, {"torch": torch, "FILE": path})
    assert torch.equal(loaded.weight, model.weight)


def beside_weights():
    numpy = pytest.importorskip("numpy")
    options = {"output": PosixPath("/tmp/run"), "model": "vit_tiny_patch16_224", "img_size": 32}
    options |= {"mean": [0.5] * 3, "std": [1.0] * 3, "amp": numpy.bool_(True)}
    return {
        "best": numpy.float64(3.0),
        "scores": defaultdict(list, {"top1": [numpy.float32(81.5)]}),
        "counts": defaultdict(int, {"a": 1}),
        "text": numpy.str_("a"),
        "args": argparse.Namespace(**options),
    }


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_harmless_values_beside_the_weights_do_not_matter(tmp_path, zipped):
    path = tmp_path / "model.pth"
    torch.save({"model": TENSORS, **beside_weights()}, path, _use_new_zipfile_serialization=zipped)
    header = read_file_header(path)
    assert holds(header)
    training = read_training(header.training)
    assert (training.model, training.side) == ("vit_tiny_patch16_224", 32)
    assert training.cfg == {"mean": [0.5, 0.5, 0.5], "std": [1.0, 1.0, 1.0], "input_size": [3, 32, 32]}
    torch.save({**TENSORS, **beside_weights()}, path, _use_new_zipfile_serialization=zipped)
    assert "'best': expected a tensor, found SkippedValue" in refusal(path)
    assert "pathlib" not in str(torch.serialization.get_safe_globals())


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    "wrong",
    [
        Hostile(os.mkdir, "side_effect"),
        defaultdict(os.getcwd),
        defaultdict(list, {"a": Hostile(os.mkdir, "side_effect")}),
        Hostile(PosixPath, Hostile(os.mkdir, "side_effect")),
        Hostile(dict, Hostile(os.mkdir, "side_effect")),
    ],
    ids=["code", "factory", "inside", "path", "dict"],
)
def test_code_in_a_pickle_is_not_run(tmp_path, monkeypatch, wrong, zipped):
    monkeypatch.chdir(tmp_path)
    torch.save({"model": TENSORS, "wrong": wrong}, "model.pth", _use_new_zipfile_serialization=zipped)
    assert "nothing was loaded" in refusal(tmp_path / "model.pth")
    assert not (tmp_path / "side_effect").exists()


@pytest.mark.parametrize("name", ["items", "get"])
def test_attributes_in_the_place_of_methods_are_one_error(tmp_path, name):
    class Shadowed:
        def __reduce__(self):
            return OrderedDict, (), {name: 1}, None, iter([("a", torch.ones(2))])

    torch.save(Shadowed(), tmp_path / "model.pth")
    assert "not a PyTorch checkpoint of dense float tensors ('int' object is not callable)" in refusal(
        tmp_path / "model.pth"
    )


def test_a_file_that_changed_after_its_header_was_read_is_refused(good):
    header = read_file_header(good)
    save_file({"a.weight": torch.ones(1)}, good)
    with pytest.raises(CheckpointError, match=r"cannot be read|changed while"):
        read_tensors(header)
