"""Files among images that would run a program, block, or never end."""

from __future__ import annotations

import os

import pytest
from PIL import Image

from mhacut.data import Preprocessing
from mhacut.data.folders import scan
from mhacut.data.reading import ImageFiles, Unreadable

PLAIN = Preprocessing((3, 16, 16), (0.0,), (1.0,), "bicubic", 1.0, "center")
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_image_runs_ghostscript(tmp_path, monkeypatch):
    programs = tmp_path / "programs"
    programs.mkdir()
    (programs / "gs").write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    (programs / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None)
    (tmp_path / "0.png").write_bytes(EPS)
    found, label = ImageFiles(tmp_path, ["0.png"], [3], PLAIN)[0]
    assert not (tmp_path / "ran").exists()
    assert isinstance(found, Unreadable)
    assert found.reason == "cannot identify image file"
    assert label == 3


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
