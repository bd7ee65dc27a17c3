"""Files among images that would run a program, block, or never end."""

from __future__ import annotations

import gc
import io
import os
import struct
import warnings

import numpy as np
import pytest
from PIL import Image, WmfImagePlugin

from images.test_shards import png, write_shards
from mhacut.data import Preprocessing
from mhacut.data.folders import scan, subfolders
from mhacut.data.named import NamedImages, NamedStream, open_named
from mhacut.data.reading import ImageFiles, Unreadable
from mhacut.options.base import DataOptions

PLAIN = Preprocessing((3, 16, 16), (0.0,), (1.0,), "bicubic", 1.0, "center")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"


def iptc(content: bytes) -> bytes:
    """An IPTC stream, which Pillow opens as a second image, of any format."""

    def field(record: int, number: int, data: bytes) -> bytes:
        return bytes([0x1C, record, number]) + struct.pack(">H", len(data)) + data

    size = struct.pack(">H", 16)
    header = field(3, 60, b"\x01\x00") + field(3, 20, size) + field(3, 30, size) + field(3, 120, b"\x05")
    return header + field(8, 10, content)


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """What appears if Ghostscript runs."""
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    return tmp_path / "ran"


@pytest.mark.parametrize("content", [EPS, iptc(EPS)], ids=["EPS", "IPTC"])
def test_no_image_runs_ghostscript(tmp_path, ran, content):
    (tmp_path / "0.png").write_bytes(content)
    found, label = ImageFiles(tmp_path, ["0.png"], [3], PLAIN)[0]
    assert not ran.exists()
    assert isinstance(found, Unreadable)
    assert found.reason == "is PostScript, which mhacut does not run"
    assert label == 3


def test_no_image_of_a_stream_runs_ghostscript(tmp_path, ran, monkeypatch):
    root = write_shards(tmp_path / "gz", [("a", EPS, 0), ("b", png(4), 1)], ending=".tar.gz")
    opened = open_named(DataOptions(data_dir=root, dataset="wds/any"), "train", 2, check_classes=True)
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)  # as in a process that has just started
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves shards open
        assert [label for _, label in NamedStream("wds/any", opened, None, PLAIN)] == [1]
        del opened
        gc.collect()
    assert not ran.exists()


def test_no_image_that_torchvision_opens_runs_ghostscript(tmp_path, ran):
    class Opening:
        def __getitem__(self, index):
            return Image.open(io.BytesIO(EPS)).convert("RGB"), 0

    found, _ = NamedImages("torch/any", Opening(), [0], PLAIN)[0]
    assert not ran.exists()
    assert found.reason == "is PostScript, which mhacut does not run"


def test_windows_is_handed_no_metafile(tmp_path):
    class Windows:
        asked = False

        def open(self, image):
            self.asked = True

        load = open

    windows = Windows()
    WmfImagePlugin.register_handler(windows)
    size = struct.pack("<4hH", 0, 0, 16, 16, 72)
    content = b"\xd7\xcd\xc6\x9a\0\0" + size + bytes(6) + b"\x01\0\t\0" + bytes(40)
    (tmp_path / "0.png").write_bytes(content)
    found, _ = ImageFiles(tmp_path, ["0.png"], [0], PLAIN)[0]
    assert "WMF" in found.reason
    assert not windows.asked


@pytest.mark.parametrize("suffix", ["bmp", "gif", "jpg", "jp2", "png", "ppm", "tif", "tga", "webp"])
def test_formats_are_known_by_their_content(tmp_path, suffix):
    written = tmp_path / f"0.{suffix}"
    Image.new("RGB", (16, 16), (40, 40, 40)).save(written)
    written.rename(tmp_path / "0.png")
    found, _ = ImageFiles(tmp_path, ["0.png"], [0], PLAIN)[0]
    assert abs(float(found.mean()) - 40 / 255) < 0.01


def test_a_pipe_among_images_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "0.png")
    found, _ = ImageFiles(tmp_path, ["0.png"], [0], PLAIN)[0]
    assert found.reason == "is not a regular file"


def test_links_in_a_circle_end(tmp_path):
    """Two links of a folder to itself make 2**40 paths."""
    root, other = tmp_path / "images", tmp_path / "other"
    for folder in (root / "a", root / "b", other):
        folder.mkdir(parents=True)
        (folder / "0.png").touch()
    for name in ("one", "two"):
        (root / "a" / name).symlink_to(".")
        (root / "b" / name).symlink_to(root)
    (root / "c").symlink_to(other)  # no circle
    (root / "d").symlink_to(other)
    (other / "back").symlink_to(root)
    found = scan(root)
    assert found.images == ("a/0.png", "b/0.png", "c/0.png", "d/0.png")
    assert found.names == ("a", "b", "c", "d")


def test_folders_that_link_to_each_other_are_read_once(tmp_path):
    """Each of five has 65 paths in it; of eight, 13,700."""
    root = tmp_path / "images"
    names = "abcde"
    for name in names:
        (root / name).mkdir(parents=True)
        (root / name / "0.png").touch()
        for other in names:
            (root / name / f"to-{other}").symlink_to(root / other)
    found = scan(root)
    assert len(found.images) == 25
    assert found.images[:3] == ("a/0.png", "a/to-b/0.png", "a/to-c/0.png")


def test_a_folder_counts_under_its_own_name_rather_than_a_link(tmp_path):
    inner = tmp_path / "ant" / "b"
    inner.mkdir(parents=True)
    (inner / "0.png").touch()
    (inner / "1").symlink_to(tmp_path / "ant" / "c")
    (tmp_path / "ant" / "a").symlink_to(inner)
    (tmp_path / "ant" / "c").mkdir()
    (tmp_path / "ant" / "c" / "2.png").touch()
    assert scan(tmp_path).images == ("ant/b/0.png", "ant/c/2.png")


def test_an_image_that_is_far_too_narrow_is_unreadable(tmp_path):
    """Its shorter side would be brought to the model's size, and the longer one with it."""
    Image.new("L", (1, 257)).save(tmp_path / "0.png")
    Image.new("L", (1, 256)).save(tmp_path / "1.png")
    images = ImageFiles(tmp_path, ["0.png", "1.png"], [0, 0], PLAIN)
    assert images[0][0].reason == "has 1x257 pixels, too narrow to be resized"
    assert images[1][0].shape == (3, 16, 16)


def test_such_an_image_of_a_stream_is_counted():
    stream = NamedStream(
        "wds/x", [(Image.new("RGB", (1000, 1)), 3), (Image.new("RGB", (9, 9)), 4)], None, PLAIN
    )
    (bad, label), (good, _) = stream
    assert (bad.file, bad.reason, label) == ("wds/x[0]", "has 1000x1 pixels, too narrow to be resized", 3)
    assert good.shape == (3, 16, 16)


@pytest.mark.parametrize("dtype", ["int32", "uint16"])
def test_integers_of_which_nobody_knows_the_range_are_unreadable(tmp_path, dtype):
    written = np.full((16, 16), 100 if dtype == "int32" else 25700).astype(dtype)
    Image.fromarray(written).save(tmp_path / "0.tif")
    found, _ = ImageFiles(tmp_path, ["0.tif"], [0], PLAIN)[0]
    if dtype == "int32":
        assert found.reason.startswith("pixels are whole numbers of 32 bits or with signs, their range is")
    else:
        assert abs(float(found.mean()) - 100 / 255) < 0.01


def test_classes_may_be_named_by_any_digits(tmp_path):
    for name in ("10", "2", "1\u00b2", "\u2462", "\u0663"):
        (tmp_path / name).mkdir()
    assert subfolders(tmp_path) == ["1\u00b2", "2", "\u0663", "10", "\u2462"]
