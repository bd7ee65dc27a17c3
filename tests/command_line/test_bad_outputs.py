"""Outputs that cannot be written: refused with what to do, nothing left behind, the input untouched."""

from __future__ import annotations

import errno
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from helpers.cli import FAST, refusal
from mhacut.runtime import files


def export_of(slim: Path, out: Path) -> list[object]:
    return ["export", slim, "--format", "timm", "-o", out]


def report_of(slim: Path, out: Path) -> list[object]:
    return ["inspect", slim, "--html", out]


def prune_of(slim: Path, out: Path) -> list[object]:
    return ["prune", slim, "--flops", "95%", "--effort", "fast", *FAST, "-o", out]


WRITERS = {
    "export": (export_of, "out"),
    "inspect": (report_of, "out.html"),
    "prune": (prune_of, "out.safetensors"),
}


def put_old(command: str, out: Path) -> None:
    """Let what the command is to replace be there."""
    file = out / "config.json" if command == "export" else out
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(b"old")


@contextmanager
def small_files():
    """The system lets no file grow beyond a thousand bytes, as if the disk were full then.

    For a command only: pytest may be writing to a file, too.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("command", WRITERS)
def test_writes_that_fail_midway(slim, tmp_path, command):  # 48
    arguments, name = WRITERS[command]
    put_old(command, tmp_path / name)
    with small_files():
        message = refusal(tmp_path, *arguments(slim, tmp_path / name), "--overwrite")
    line = message.splitlines()[-1]
    assert line.startswith(f"error: {tmp_path / name}: cannot be written: ")
    assert os.strerror(errno.EFBIG) in line  # of older safetensors, within what it says itself


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", WRITERS)
def test_interrupts_while_writing(slim, tmp_path, monkeypatch, command, number):  # 49
    arguments, name = WRITERS[command]
    monkeypatch.setattr(files, "sync", lambda _: signal.raise_signal(number))
    message = refusal(tmp_path, *arguments(slim, tmp_path / name), code=130)
    assert message.endswith("interrupted; no incomplete file was left\n")


def test_the_input_is_no_output(slim, tmp_path):  # 47
    source = tmp_path / "slim.safetensors"
    source.write_bytes(slim.read_bytes())
    os.link(source, tmp_path / "hard.onnx")
    (tmp_path / "link.html").symlink_to(source)
    for arguments in (
        ["export", source, "-o", tmp_path / "hard.onnx", "--overwrite"],
        ["export", source, "--format", "timm", "-o", source, "--overwrite"],
        ["inspect", source, "--html", tmp_path / "link.html", "--overwrite"],
    ):
        message = refusal(tmp_path, *arguments)
        assert "is the input" in message or "is a file; --format timm writes a folder" in message


def test_a_link_to_what_is_read_or_written_is_refused(slim, tiny_vit, images, tmp_path):
    dense, names = tmp_path / "dense.html", tmp_path / "names.html"
    dense.write_bytes(tiny_vit.path.read_bytes())
    names.write_text("".join(f"class{number}\n" for number in range(7)))
    for target in (dense, names):
        (tmp_path / f"to {target.name}").symlink_to(target)
    compared = [
        "inspect",
        slim,
        "--compare",
        dense,
        "--model",
        "vit_tiny_patch16_224",
        "--overwrite",
        "--html",
    ]
    for page in (dense, tmp_path / "to dense.html"):
        assert "is the input" in refusal(tmp_path, *compared, page)
    pruned = ["prune", *tiny_vit.flags, "--flops", "60%", *FAST, "--overwrite"]
    page = tmp_path / "to names.html"
    message = refusal(tmp_path, *pruned, "--data-dir", images, "--class-map", names, "--report", page)
    assert f"{page}: is the input {names}, which is never overwritten" in message
    out, page = tmp_path / "slim.safetensors", tmp_path / "slim.html"
    page.symlink_to(out)
    message = refusal(tmp_path, *pruned, "-o", out, "--report", page)
    assert f"{out}: is the same file as {page}; choose another name" in message
