"""Outputs that cannot be written: refused with what to do, nothing left behind, the input untouched."""

from __future__ import annotations

import signal

import pytest

from helpers.cli import FAST, refusal
from mhacut.runtime import files

WRITERS = {
    "export": (["--format", "timm", "-o"], "out"),
    "inspect": (["--html"], "out.html"),
    "prune": (["--flops", "95%", "--effort", "fast", *FAST, "-o"], "out.safetensors"),
}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("command", WRITERS)
def test_interrupts_while_writing(slim, tmp_path, monkeypatch, command, number):  # 49
    flags, name = WRITERS[command]
    monkeypatch.setattr(files, "sync", lambda _: signal.raise_signal(number))
    message = refusal(tmp_path, command, slim, *flags, tmp_path / name, code=130)
    assert message.endswith("interrupted; no incomplete file was left\n")


def test_a_link_to_what_is_read_or_written_is_refused(slim, tiny_vit, images, tmp_path):
    dense, names = tmp_path / "dense.html", tmp_path / "names.html"
    dense.write_bytes(tiny_vit.path.read_bytes())
    names.write_text("".join(f"class{number}\n" for number in range(7)))
    for target in (dense, names):
        (tmp_path / f"to {target.name}").symlink_to(target)
    compared = ["inspect", slim, "--compare", dense, *tiny_vit.flags[1:], "--overwrite", "--html"]
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
