"""Writing: whole or not at all, never over the input, readable like any other file."""

from __future__ import annotations

import errno
import os
import stat

import pytest
import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from helpers.models import same
from mhacut.checkpoint import write
from mhacut.checkpoint.folder import INDEXES, WEIGHT_FILES
from mhacut.checkpoint.record import ModelIdentity, SlimRecord
from mhacut.checkpoint.write import write_slim
from mhacut.errors import OutputError
from mhacut.plan import Plan
from mhacut.runtime.files import READ_IN_FOLDERS, check_output

ARGS = {"depth": 1, "embed_dim": 24, "num_heads": 3, "img_size": 16, "patch_size": 8, "num_classes": 2}
RECORD = SlimRecord(
    ModelIdentity("vit_tiny_patch16_224", ARGS),
    Plan(()),
    {
        "input_size": (3, 16, 16),
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "crop_mode": "center",
    },
    (),
)


@pytest.fixture(scope="module")
def model():
    return timm.create_model("vit_tiny_patch16_224", **ARGS)


@pytest.fixture
def put(model, tmp_path):
    def run(path, *, overwrite=False, input_path=None, dtypes=None):
        given = {"dtypes": dtypes or {}, "overwrite": overwrite, "input_path": input_path}
        return write_slim(path, model, RECORD, **given)

    return run


def names(folder) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


def test_the_file_holds_the_model_and_nothing_else_is_left(put, model, tmp_path):
    path = tmp_path / "new" / "deep" / "slim.safetensors"
    put(path)
    assert same(load_file(path), model.state_dict())
    assert names(path.parent) == ["slim.safetensors"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_the_mode_follows_the_umask(put, tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        put(tmp_path / "slim.safetensors")
        assert os.umask(umask) == umask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "slim.safetensors").stat().st_mode) == mode


def test_an_existing_file_is_kept_unless_it_may_be_overwritten(put, tmp_path):
    path = tmp_path / "slim.safetensors"
    path.write_text("old")
    with pytest.raises(OutputError, match="exists already; choose another name with output, or overwrite"):
        put(path)
    assert path.read_text() == "old"
    put(path, overwrite=True)
    assert "head.weight" in load_file(path)
    assert names(tmp_path) == ["slim.safetensors"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "how", ["same", "other spelling", "symlink to it", "hard link to it", "it is a symlink"]
)
def test_the_input_is_never_overwritten(put, tmp_path, how, overwrite):
    source = tmp_path / "dense.safetensors"
    source.write_text("precious")
    target, given = source, source
    if how == "other spelling":
        target = tmp_path / ".." / tmp_path.name / "dense.safetensors"
    elif how == "symlink to it":
        target = tmp_path / "link.safetensors"
        target.symlink_to(source)
    elif how == "hard link to it":
        target = tmp_path / "link.safetensors"
        os.link(source, target)
    elif how == "it is a symlink":
        given = tmp_path / "link.safetensors"
        given.symlink_to(source)
    with pytest.raises(OutputError, match="which is never overwritten"):
        put(target, overwrite=overwrite, input_path=given)
    assert source.read_text() == "precious"


def test_weights_of_an_input_folder_are_never_overwritten(put, tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_text("precious")
    with pytest.raises(OutputError, match="which is never overwritten"):
        put(weights, overwrite=True, input_path=tmp_path)
    for overwrite in (False, True):  # what was written there before is no input
        put(tmp_path / "slim.safetensors", overwrite=overwrite, input_path=tmp_path)
    assert weights.read_text() == "precious"


def test_every_file_that_is_read_from_a_folder_is_an_input():
    configurations = [
        "config.json",
        "open_clip_config.json",
        "preprocessor_config.json",
        "processor_config.json",
    ]
    shards = [INDEXES[0], "model-00002-of-00003.safetensors"]
    assert all(map(READ_IN_FOLDERS.fullmatch, [*WEIGHT_FILES, *configurations, *shards]))
    assert not any(
        map(READ_IN_FOLDERS.fullmatch, ["slim.safetensors", "report.html", "model-2.0G.safetensors"])
    )


def test_overwriting_a_link_replaces_what_it_points_to(put, tmp_path):
    (tmp_path / "real").mkdir()
    link, real = tmp_path / "link.safetensors", tmp_path / "real" / "slim.safetensors"
    link.symlink_to(real)
    with pytest.raises(OutputError, match="exists already"):
        put(link)
    put(link, overwrite=True)
    assert link.is_symlink()
    assert "head.weight" in load_file(real)


def test_places_that_cannot_be_written(tmp_path):
    def refusal(path) -> str:
        with pytest.raises(OutputError) as error:
            check_output(path, overwrite=True, input_path=None)
        return str(error.value)

    assert "is a directory" in refusal(tmp_path)
    assert "is a directory" in refusal(f"{tmp_path}/new/")
    os.mkfifo(tmp_path / "fifo")
    assert "is a device, pipe or socket" in refusal(tmp_path / "fifo")
    (tmp_path / "file").write_text("x")
    assert "is not a directory" in refusal(tmp_path / "file" / "slim.safetensors")
    check_output(tmp_path / "new" / "slim.safetensors", overwrite=False, input_path=None)
    assert names(tmp_path) == ["fifo", "file"]


@pytest.mark.parametrize(
    ("value", "dtype", "says"),
    [
        (1e6, torch.float16, "has values too large for float16"),
        (float("nan"), torch.float32, "is not finite"),
    ],
)
def test_numbers_the_file_could_not_hold_are_not_written(tmp_path, value, dtype, says):
    model = timm.create_model("vit_tiny_patch16_224", **ARGS)
    model.norm.bias.data[0] = value
    with pytest.raises(OutputError, match=f"'norm.bias' {says}"):
        write_slim(
            tmp_path / "x", model, RECORD, dtypes={"norm.bias": dtype}, overwrite=False, input_path=None
        )
    assert names(tmp_path) == []


def test_shared_and_strided_tensors_are_written_whole(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", **ARGS)
    model.norm.weight = model.norm.bias
    model.head.weight.data = torch.arange(48.0).reshape(24, 2).t()
    numbers = torch.arange(200.0)
    model.cls_token.data = numbers[10:34].view(1, 1, 24)
    model.blocks[0].norm1.bias.data = numbers[20:44]
    path = tmp_path / "slim.safetensors"
    write_slim(path, model, RECORD, dtypes={}, overwrite=False, input_path=None)
    assert same(load_file(path), model.state_dict())


@pytest.mark.parametrize("failure", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_other(put, tmp_path, monkeypatch, failure):
    path = tmp_path / "slim.safetensors"
    path.write_text("old")

    def fail(_):
        raise failure

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OutputError if isinstance(failure, OSError) else KeyboardInterrupt) as error:
        put(path, overwrite=True)
    if isinstance(failure, OSError):
        assert str(error.value) == f"{path}: cannot be written: No space left on device"
    assert path.read_text() == "old"
    assert names(tmp_path) == ["slim.safetensors"]


def test_a_disk_that_the_library_finds_full_is_an_error_like_any_other(put, tmp_path, monkeypatch):
    def fail(tensors, path, metadata):
        path.with_name(".tmpHaLf").write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(write, "save_file", fail)
    with pytest.raises(OutputError, match=r"slim\.safetensors: cannot be written: .*No space left on device"):
        put(tmp_path / "slim.safetensors")
    assert names(tmp_path) == []
