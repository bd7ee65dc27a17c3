"""Archives that Python and PyTorch would read in two ways are read in none."""

from __future__ import annotations

import io
import struct
import zipfile
from contextlib import suppress

import pytest
import torch

from helpers.checkpoints import refusal, torch_file, zipped
from mhacut.checkpoint import torch_archive
from mhacut.checkpoint.files import read_file_header, read_tensors
from mhacut.checkpoint.torch_file import load_plain
from mhacut.errors import CheckpointError

TENSORS = {"a.weight": torch.ones(2, 3), "b.weight": torch.zeros(4)}
END, MOST = struct.Struct("<4s4HLLH"), 2**32 - 1
ELSEWHERE = "the directory of this zip file is not where its end says"
CORRUPT = "truncated, or not a torch checkpoint (Corrupt zip64 end of central directory"  # as of Python 3.13
SAVED = torch_file(TENSORS)


def with_end(content: bytes, **changes: int) -> bytes:
    """The archive with other numbers at its end."""
    fields = dict(zip(("magic", "disk", "first", "here", "all", "length", "start", "comment"),
                      END.unpack(content[-END.size :]), strict=True))  # fmt: skip
    return content[: -END.size] + END.pack(*(fields | changes).values())


def repacked() -> bytes:
    """The same without the end that large archives have, and that torch always writes."""
    with zipfile.ZipFile(io.BytesIO(SAVED)) as reader:
        return zipped({name: reader.read(name) for name in reader.namelist()})


def moved() -> bytes:
    """An archive whose end names another place for the end of large archives."""
    at = len(SAVED) - END.size - 12
    return SAVED[:at] + bytes([SAVED[at] ^ 1]) + SAVED[at + 1 :]


@pytest.mark.parametrize("content", [SAVED, repacked(), with_end(SAVED, start=MOST, length=MOST)])
def test_archives_that_say_where_their_directory_is_are_read(tmp_path, content):
    (tmp_path / "model.pth").write_bytes(content)
    found = read_tensors(read_file_header(tmp_path / "model.pth"))
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize(
    "content",
    [
        with_end(SAVED, start=7),
        with_end(SAVED, length=7),
        SAVED[:-2] + b"\x01\x00x",
        with_end(repacked(), start=7),
        moved(),
        b"PK\x03\x04" + SAVED,
    ],
)
def test_archives_that_say_otherwise_are_refused(tmp_path, content):
    (tmp_path / "model.pth").write_bytes(content)
    message = refusal(tmp_path / "model.pth")
    assert ELSEWHERE in message or CORRUPT in message


def test_what_pytorch_alone_would_see_is_refused(tmp_path):
    """Python finds the second archive, before the end; PyTorch the first, where the end says."""
    hidden = zipped(
        {"m/data.pkl": b"\x80\x02]" + b"]" * 10**6 + b".", "m/version": b"3\n"}, zipfile.ZIP_DEFLATED
    )
    shown = zipped({"m/data.pkl": b"\x80\x02N.", "m/version": b"3\n"})
    start = END.unpack(hidden[-END.size :])[6]
    both = hidden + shown
    path = tmp_path / "model.pth"
    path.write_bytes(with_end(both, start=start))
    reader = torch._C.PyTorchFileReader(str(path))
    assert len(reader.get_record("data.pkl")) > 10**6
    with zipfile.ZipFile(path) as found:
        assert found.getinfo("m/data.pkl").file_size == 4
    assert ELSEWHERE in refusal(path)


def test_a_pickle_in_front_of_an_archive_is_followed_too(tmp_path):
    pairs = b"NN\x86q\x00" + b"h\x00\x86q\x00" * 40
    (tmp_path / "model.pth").write_bytes(b"\x80\x02}" + pairs + b"Ns." + SAVED)
    message = refusal(tmp_path / "model.pth")
    assert ELSEWHERE in message or "names again have more than" in message


def test_a_version_that_is_no_text_is_no_crash(tmp_path):
    """PyTorch's reader quotes it in its error, which Python cannot decode; found by fuzzing."""
    path = tmp_path / "model.pth"
    with zipfile.ZipFile(io.BytesIO(SAVED)) as reader:
        members = {name: reader.read(name) for name in reader.namelist()}
    (version,) = (name for name in members if name.endswith("/version"))
    path.write_bytes(zipped(members | {version: b"\xcc\xf5"}))
    for read in (read_file_header, load_plain):
        with suppress(CheckpointError):  # another version of torch may read it
            read(path)


@pytest.mark.parametrize("order", ["big", "little"])
def test_numbers_in_another_order_of_bytes_are_refused(tmp_path, monkeypatch, order):
    """To swap bytes that are not there ends torch's process."""
    monkeypatch.setattr(torch_archive.sys, "byteorder", order)  # in place of a file of another machine
    with zipfile.ZipFile(io.BytesIO(SAVED)) as reader:
        members = {name: reader.read(name) for name in reader.namelist()}
    path = tmp_path / "model.pth"
    path.write_bytes(
        zipped({name: b"little" if "byteorder" in name else data for name, data in members.items()})
    )
    if order == "little":
        read_file_header(path)
        return
    with pytest.raises(
        CheckpointError, match="its numbers are 'little'-endian, this machine's are 'big'; save"
    ):
        read_file_header(path)
