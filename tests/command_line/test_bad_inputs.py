"""Bad inputs through the command line: refused with what to do, nothing written, the input untouched.

Outputs are in test_bad_outputs.py.
"""

from __future__ import annotations

import io
import json
import os
import struct
import warnings
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from helpers.checkpoints import torch_file, zipped
from helpers.cli import refusal, run, succeed, unchanged


def header(document: object, data: bytes = b"") -> bytes:
    text = document if isinstance(document, bytes) else json.dumps(document).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)) -> dict:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def torchscript() -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), buffer)
    return buffer.getvalue()


def quantised() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch deprecates them
        return torch_file({"a": torch.quantize_per_tensor(torch.ones(3), 1.0, 0, torch.qint8)})


ONE = {"a": entry()}
BOMB = {"m/data.pkl": b"\x80\x02N.", "m/data/0": bytes(10**6)}
TENSOR = torch.ones(2)
DAMAGED = "truncated or damaged ("
NO_CHECKPOINT = "not a safetensors or PyTorch checkpoint: begins with b"
QUANTISED = "Save the weights as dense float tensors"
FILES = {
    "3 empty": (b"", "file is empty (0 bytes)"),
    "5 cut in the header": (struct.pack("<Q", 5000) + b"{}", DAMAGED),
    "6 cut in the data": (header(ONE, b"1234"), DAMAGED),
    "7 trailing bytes": (header(ONE, b"0" * 11), DAMAGED),
    "8 header of 2^63 bytes": (struct.pack("<Q", 2**63) + b"{}", NO_CHECKPOINT),
    "9 git-lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "run git lfs pull"),
    "10 JSON": (b'{"a": {"weight_map": {}}}', NO_CHECKPOINT),
    "13 text": (b"just some text, too long to be small", NO_CHECKPOINT),
    "14 truncated zip": (torch_file({"a": TENSOR})[:-99], "damaged, or not a PyTorch checkpoint"),
    "15 plain zip": (zipped({"../evil.txt": b"x"}), "an uncompressed zip file with 1 data.pkl"),
    "16 TorchScript": (torchscript, "an uncompressed zip file with 1 data.pkl"),
    "18 pickled model": (lambda: torch_file(nn.Linear(2, 2)), "other than weights (torch.nn.modules.linear"),
    "18 protocol 4": (b"\x80\x04garbage", "objects other than weights"),
    "19 numpy arrays": (torch_file({"a": TENSOR, "best": np.ones(3)}), "other than weights (numpy"),
    "20 zip bomb": (zipped(BOMB, zipfile.ZIP_DEFLATED), "an uncompressed zip file with 1 data.pkl"),
    "20 large pickle": (zipped({"m/data.pkl": bytes(2**23 + 1)}), "a pickle is larger than 8388608 bytes"),
    "21 overlap": (header({**ONE, "b": entry(offsets=(4, 12))}, b"0" * 12), DAMAGED),
    "21 overflow": (header({"a": entry(shape=(2**40, 2**40))}), DAMAGED),
    "21 unknown dtype": (header({"a": entry("X9")}), DAMAGED),
    "21 deep": (header(b'{"a":' * 100_000), DAMAGED),
    "24 names": (header({"\x1b[2J\u202e[red]": entry("F8_E4M3", (8,))}, bytes(8)), r"\x1b[2J\u202e[red]"),
    "34 no tensors": (header({}), "holds no tensors"),
    "34 list": (torch_file([TENSOR]), "expected a dict of tensors, found list"),
    "34 nothing": (torch_file({"state_dict": None}), "expected a dict of tensors, found None"),
    "34 numbers": (torch_file({1: TENSOR}), "expected tensor names, found key 1"),
    "35 number": (torch_file({"a": TENSOR, "epoch": 3}), "'epoch': expected a tensor, found int"),
    "40 float8": (header({"a": entry("F8_E4M3", (8,))}, bytes(8)), QUANTISED),
    "40 complex": (torch_file({"a": TENSOR.cfloat()}), QUANTISED),
    "40 quantised": (quantised, "PyTorch checkpoint of dense float tensors"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_files_that_are_no_checkpoints(tmp_path, case):
    content, says = FILES[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(content() if callable(content) else content)
    for command in ("inspect", path), ("prune", path, "--flops", "50%", "-o", tmp_path / "out.safetensors"):
        message = refusal(tmp_path, *command)
        assert message.startswith(f"error: {path}: ")
        assert says in message
        assert message.count("\n") == 1


def test_a_device_that_is_not_there(slim, images, tmp_path):  # 55
    if torch.cuda.is_available():
        pytest.skip("it is there")
    message = refusal(tmp_path, "evaluate", slim, "--data-dir", images, "--device", "cuda")
    assert "--device cuda: this machine has no usable CUDA GPUs; use auto or cpu" in message


def test_narrow_terminals_and_odd_names(slim, tmp_path):  # 58
    path = tmp_path / "a [red] \u6f22.safetensors"
    path.write_bytes(slim.read_bytes())
    with unchanged(path):
        result = succeed("inspect", path, env={"COLUMNS": "20"})
        assert result.stdout == run("inspect", path).stdout
    missing = refusal(tmp_path, "inspect", tmp_path / os.fsdecode(b"no [red] \xff"))
    assert "no [red] \ufffd" in missing
    path.rename(tmp_path / os.fsdecode(b"[red] \xff.safetensors"))
    message = refusal(tmp_path, "inspect", tmp_path / os.fsdecode(b"[red] \xff.safetensors"))
    assert "[red] \ufffd.safetensors: truncated or damaged (" in message
