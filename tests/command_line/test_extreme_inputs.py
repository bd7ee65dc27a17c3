"""Values far out of the ordinary, files that are none and folders that vanish: refused in a line."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from helpers.cli import FAST, refusal, run

pytestmark = pytest.mark.filterwarnings("error")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--std", "1e-300,1,1"], "expected 3 number(s) from 1e-06 to 1e+06, in units of a pixel range"),
        (["--std", "1,1e7,1"], "expected 3 number(s) from 1e-06 to 1e+06"),
        (["--mean", "1e7,1,1"], "expected 3 number(s) from -1e+06 to 1e+06"),
        (["--crop-pct", "1e-308"], "crop_pct 1e-308: expected at least 0.1, at most 1.25"),
        (["--crop-pct", "0.001"], "crop_pct 0.001: expected at least 0.1"),
        (["--val-split", "a" * 5000], "no split 'aaa"),
        (["--val-split", "/"], "--val-split /: expected the name of a folder in "),
        (["--val-split", "../val"], "--val-split ../val: expected the name of a folder in "),
        (["--val-split", "."], "--val-split .: expected the name of a folder in "),
        (["--val-split", ""], "expected the name of a folder in "),
    ],
)
def test_data_and_preprocessing_out_of_bounds(slim, images, given, says):
    result = run("evaluate", slim, "--data-dir", images, "-j", "0", *given)
    assert result.exit_code == (1 if "split" in given[0] else 2)
    assert says in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_class_maps_that_never_end(slim, images, tmp_path, kind):
    path = tmp_path / "classes.txt"
    if kind == "fifo":
        os.mkfifo(path)
    else:
        path.symlink_to("/dev/zero")
    message = refusal(tmp_path, "evaluate", slim, "--data-dir", images, "-j", "0", "--class-map", path)
    assert "class map cannot be read: no such file" in message


def test_memory_that_torch_cannot_have_is_out_of_memory(slim, tmp_path, monkeypatch):
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: torch.empty(2**60, dtype=torch.uint8))
    command = ["prune", slim, "--flops", "90%", *FAST, "-o", tmp_path / "x.safetensors"]
    assert "error: out of memory; use a smaller --batch-size" in refusal(tmp_path, *command)
