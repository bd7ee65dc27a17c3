"""Hostile files end in one line, with memory that the system bounds, as `ulimit -v` does."""

from __future__ import annotations

import json
import struct
import zipfile
from collections.abc import Callable

import pytest
import torch

from helpers.checkpoints import torch_file, zipped

BOUNDED = """
import resource, sys
from mhacut.cli.app import app

resource.setrlimit(resource.RLIMIT_AS, (12 * 2**30, 12 * 2**30))
resource.setrlimit(resource.RLIMIT_CPU, (60, 60))
app(sys.argv[1:])
"""


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def many_tensors() -> bytes:
    entry = '"blocks.%d.attn.qkv.weight":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    entries = ",".join(entry % (n, 4 * n, 4 * n + 4) for n in range(10**5))
    return header(f"{{{entries}}}".encode(), bytes(4 * 10**5))


def deep_metadata() -> bytes:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    return header(json.dumps({"__metadata__": {"mhacut": '{"a":' * 10**6}, "a": entry}).encode(), bytes(4))


def shared() -> bytes:
    return torch_file({str(n): tensor for n, tensor in enumerate(torch.ones(2**20).expand(2000, 2**20))})


CHECKPOINTS: dict[str, Callable[[], bytes]] = {
    "100,000 tensors": many_tensors,
    "deep metadata": deep_metadata,
    "zip of 256 MB in 1": lambda: zipped({"m/data.pkl": b"N.", "m/0": bytes(2**28)}, zipfile.ZIP_DEFLATED),
    "2,000 tensors of one storage": shared,
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_hostile_checkpoints(programs, tmp_path, case):
    (tmp_path / "model.pth").write_bytes(CHECKPOINTS[case]())
    done = programs.run(BOUNDED, "inspect", tmp_path / "model.pth")
    assert (done.returncode, done.stdout) == (1, ""), done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1 or "do not fit" in done.stderr
    assert "Traceback" not in done.stderr
