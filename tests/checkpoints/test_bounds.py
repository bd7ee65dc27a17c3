"""Hostile files take bounded memory and time, which a process of their own measures."""

from __future__ import annotations

import io
import json
import struct
import zipfile
from collections.abc import Callable

import pytest
import torch

from helpers.data import lying_png, write_split
from mhacut.checkpoint.record import MAX_RECORD_CHARS

MEASURED = """
import resource, sys
from contextlib import suppress
from mhacut.cli.app import app

def usage():
    found = resource.getrusage(resource.RUSAGE_SELF)
    return found.ru_maxrss / 1024, found.ru_utime + found.ru_stime

memory, spent = usage()
code = 0
try:
    app(sys.argv[1:])
except SystemExit as error:
    code = error.code
after, total = usage()
print(code, after - memory, total - spent)
"""
UNCOUNTED = f"""
from mhacut.checkpoint import pickle_bounds
pickle_bounds._MAX_PARTS = 10**99
{MEASURED}
"""
"""The same where the parts of a pickle's values are not counted before it is loaded."""


def header(text: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def many_tensors(count: int) -> bytes:
    entry = '"blocks.%d.attn.qkv.weight":{"dtype":"F32","shape":[1],"data_offsets":[%d,%d]}'
    text = "{" + ",".join(entry % (n, 4 * n, 4 * n + 4) for n in range(count)) + "}"
    return header(text.encode(), bytes(4 * count))


def _entry(start: int) -> dict:
    return {"dtype": "F32", "shape": [1], "data_offsets": [start, start + 4]}


def deep_metadata() -> bytes:
    nested = '{"a":' * (MAX_RECORD_CHARS // 5)
    return header(json.dumps({"__metadata__": {"mhacut": nested}, "a": _entry(0)}).encode(), bytes(4))


def pickled(count: int) -> bytes:
    return b"\x80\x02]" + b"]" * count + b"."


def inflating() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("m/data.pkl", b"\x80\x02N.")
        archive.writestr("m/data/0", bytes(2**28))
    return buffer.getvalue()


def shared() -> bytes:
    buffer = io.BytesIO()
    torch.save({str(n): tensor for n, tensor in enumerate(torch.ones(2**20).expand(2000, 2**20))}, buffer)
    return buffer.getvalue()


CHECKPOINTS: dict[str, tuple[Callable[[], bytes], int, int]] = {
    "500,000 tensors": (lambda: many_tensors(500_000), 100, 2),
    "100,000 tensors": (lambda: many_tensors(100_000), 400, 20),
    "header of 100 MB of spaces": (lambda: header(b"{" + b" " * 99_999_998 + b"}"), 400, 5),
    "the deepest metadata": (deep_metadata, 200, 5),
    "pickle of 7 MB of lists": (lambda: pickled(7 * 2**20), 900, 60),
    "pickle of 64 MB of lists": (lambda: pickled(64 * 2**20), 100, 10),
    "zip of 256 MB in 1": (inflating, 50, 2),
    "2,000 tensors of one storage": (shared, 50, 2),
}
"""Content of a checkpoint, the MB that it may take, and the seconds of CPU time."""


@pytest.mark.slow
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(programs, tmp_path, case):
    make, megabytes, seconds = CHECKPOINTS[case]
    path = tmp_path / "model.safetensors"
    path.write_bytes(make())
    measure(programs, megabytes, seconds, "inspect", path)


def nested(times: int, depth: int) -> list:
    """A list of lists of lists, each of which occurs ``times`` times in the next."""
    value: list = []
    for _ in range(depth):
        value = [value] * times
    return value


def of_dicts(levels: int) -> dict:
    value: dict = {}
    for _ in range(levels):
        value = {f"k{number}": value for number in range(2000)}
    return value


STATES = {"state_dict": {"a.weight": torch.ones(2), "b.weight": torch.ones(2)}}
SHARING: dict[str, dict] = {
    "mean and std": {**STATES, "args": {"mean": nested(2, 60), "std": nested(2, 60)}},
    "an argument": {**STATES, "args": {"model_kwargs": {"x": nested(100, 8)}}},
    "arguments": {**STATES, "args": {"model_kwargs": {f"x{n}": nested(20, 4) for n in range(500)}}},
    "an entry": {"epoch": 1, "x": of_dicts(3)},
    "entries": {f"x{number}": value for value in [of_dicts(3)] for number in range(500)},
}


@pytest.mark.parametrize("case", SHARING)
def test_values_of_a_pickle_that_share_others(programs, tmp_path, case):
    path = tmp_path / "model.pth"
    torch.save(SHARING[case], path)
    assert path.stat().st_size < 300_000
    measure(programs, 100, 5, "inspect", path, script=UNCOUNTED)


def zipped(pickle: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("m/data.pkl", pickle)
        archive.writestr("m/version", b"3\n")
    return buffer.getvalue()


NESTED = b"NN\x86q\x00" + b"h\x00\x86q\x00" * 40
"""A pair of None, and 40 times a pair of the one before twice."""
CONFIG = b"cyacs.config\nCfgNode\n)\x81"
PICKLES = {
    "a key of 2^40 parts": b"\x80\x02}" + NESTED + b"Ns.",
    "bytes by their number": b"\x80\x02cbuiltins\nbytearray\nJ\x00\x00\x00\x40\x85R.",
    "a number of a value, with yacs": b"\x80\x02}N" + CONFIG + b"r\x00\x00\x00\x04s.",
}


@pytest.mark.slow
@pytest.mark.parametrize("case", PICKLES)
def test_pickles_that_ask_for_much(programs, tmp_path, case):
    path = tmp_path / "model.pth"
    path.write_bytes(zipped(PICKLES[case]))
    message = measure(programs, 60, 5, "inspect", path)
    assert "its pickle may take too much time or memory: " in message


def measure(programs, megabytes: int, seconds: int, *arguments: object, script: str = MEASURED) -> str:
    done = programs.run(script, *arguments)
    code, memory, spent = map(float, done.stdout.split())
    print(f"{memory:.0f} MB, {spent:.1f} s: {done.stderr.strip():.200}")
    assert code in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    assert memory < megabytes
    assert spent < seconds
    return done.stderr


@pytest.mark.slow
def test_images_that_say_they_are_large(programs, slim_of, tmp_path):
    write_split(tmp_path / "val", [str(n) for n in range(5)], 1)
    (tmp_path / "val" / "0" / "lies.png").write_bytes(lying_png(13_000, 13_000))
    (tmp_path / "val" / "0" / "huge.png").write_bytes(lying_png(60_000, 60_000))
    measure(programs, 700, 10, "evaluate", slim_of("vit"), "--data-dir", tmp_path, "-j", "0")
