"""Values far out of the ordinary, files that are none and folders that vanish: refused in a line."""

from __future__ import annotations

import os

import pytest
import torch
from torch import nn

from helpers.cli import FAST, refusal, run
from mhacut.cli import running

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
    ],
)
def test_data_and_preprocessing_out_of_bounds(slim, images, given, says):
    result = run("evaluate", slim, "--data-dir", images, "-j", "0", *given)
    assert result.exit_code == (1 if "split" in given[0] else 2)
    assert says in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("command", "given", "says"),
    [
        ("evaluate", ["--batch-size", "9" * 20], "expected at most 2147483647"),
        ("prune", ["--model-arg", "depth=1", "--seed", "-" + "9" * 20], "expected at least "),
        ("evaluate", ["--workers", "1000000"], "--workers 1000000: expected at least 0, at most 1024"),
        ("bench", ["--batch-sizes", "9" * 20], "expected at most 2147483647"),
        ("bench", ["--threads", "50000"], "--threads 50000: expected at least 1, at most 1024"),
        ("export", ["--threads", "50000"], "--threads 50000: expected at least 1, at most 1024"),
        ("prune", ["--threads", "50000"], "--threads 50000: expected at least 1, at most 1024"),
        ("finetune", ["--warmup-epochs", "1e308"], "--warmup-epochs 1e+308: expected at most 1e+30"),
        ("finetune", ["--decay-epochs", "1e308"], "expected at most 1e+30"),
        ("finetune", ["--color-jitter", "1e308"], "expected at most 1e+30"),
    ],
)
def test_numbers_that_libraries_could_not_hold(slim, images, tmp_path, command, given, says):
    where = [] if command in ("bench", "export") else ["--data-dir", images]
    assert says in refusal(tmp_path, command, slim, *where, *given, code=2)


@pytest.mark.parametrize(
    ("command", "line"),
    [
        ("evaluate", 'class-map: "a\\0b"'),
        ("evaluate", 'class-map: "a\\ud800b"'),
        ("prune", 'output: "a\\0b.safetensors"'),
        ("prune", 'report: "a\\ud800.html"'),
        ("inspect", 'html: "a\\0b.html"'),
        ("inspect", 'compare: "a\\ud800"'),
        ("export", 'output: "a\\0b"'),
        ("finetune", 'output: "a\\ud800"'),
    ],
)
def test_text_that_is_no_path(slim, images, tmp_path, command, line):
    config = tmp_path / "config.yaml"
    config.write_text(line + "\n")
    more = {
        "prune": ["--flops", "90%"],
        "evaluate": ["--data-dir", images],
        "finetune": ["--data-dir", images],
    }
    message = refusal(tmp_path, command, slim, "--config", config, *more.get(command, []), code=2)
    assert "expected text without NUL that UTF-8 can encode" in message


def test_a_number_of_thousands_of_digits(slim, images, tmp_path):
    config = tmp_path / "config.yaml"
    config.write_text(f"lr: 0x{'f' * 9000}\n")
    message = refusal(tmp_path, "finetune", slim, "--data-dir", images, "--config", config, code=2)
    assert "expected numbers of at most 1024 bits" in message


@pytest.mark.parametrize("kind", ["fifo", "device", "large"])
def test_class_maps_that_never_end(slim, images, tmp_path, kind):
    path = tmp_path / "classes.txt"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(2**24 + 1)
    message = refusal(tmp_path, "evaluate", slim, "--data-dir", images, "-j", "0", "--class-map", path)
    assert "class map cannot be read: expected a file of at most 16777216 bytes" in message


def test_the_arguments_of_a_run_are_a_file(tmp_path):
    os.mkfifo(tmp_path / "args.yaml")
    message = refusal(tmp_path, "finetune", "--resume", tmp_path, code=2)
    assert "no run to continue, args.yaml: is not a regular file" in message


def test_the_arguments_of_a_run_name_its_checkpoint(tmp_path):
    (tmp_path / "args.yaml").touch()
    message = refusal(tmp_path, "finetune", "--resume", tmp_path, code=2)
    assert "no run to continue, args.yaml: names no checkpoint" in message


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory",
            "error: out of memory; use a smaller --batch-size",
        ),
        (
            "unable to open file <x> in read-only mode: Too many open files (24)",
            "error: too many open files; allow more, as with `ulimit -n 4096`",
        ),
    ],
)
def test_limits_of_the_system_that_libraries_report(slim, tmp_path, monkeypatch, error, says):
    def fail(self, *args):
        raise RuntimeError(error)

    monkeypatch.setattr(nn.Linear, "forward", fail)
    assert says in refusal(tmp_path, "prune", slim, "--flops", "90%", *FAST, "-o", tmp_path / "x.safetensors")


def test_memory_that_torch_cannot_have_is_out_of_memory():
    with pytest.raises(RuntimeError) as raised:
        torch.empty(2**60, dtype=torch.uint8)
    assert running._out_of_memory(raised.value)
