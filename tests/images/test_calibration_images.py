"""Which images are chosen to calibrate on, and what is made of them."""

from __future__ import annotations

import os
import random
import shutil
import struct

import numpy as np
import pytest
import timm
import torch
from PIL import Image, features

from helpers.data import PLAIN, calibrated, evaluation, levels, write_image, write_split
from mhacut.data import Preprocessing, has_split, synthetic_images
from mhacut.errors import DataError, UsageError
from mhacut.options.base import DataOptions


def test_labels_fit_the_images(root) -> None:
    chosen = calibrated(PLAIN, count=7, seed=0, data_dir=root, num_classes=3)
    assert chosen.description == "7 of 12 images under train/ (with labels)"
    assert chosen.images.shape == (7, 3, 16, 16)
    assert chosen.images.dtype == torch.float32
    assert [level // 20 for level in levels(chosen.images)] == chosen.labels.tolist()


def test_normalisation_is_applied(root) -> None:
    normalised = Preprocessing((3, 16, 16), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), "bicubic", 1.0, "center")
    raw = calibrated(PLAIN, count=6, seed=0, data_dir=root).images
    seen = calibrated(normalised, count=6, seed=0, data_dir=root).images
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (normalised.mean, normalised.std))
    torch.testing.assert_close(seen, (raw - mean) / std)


def test_the_choice_is_balanced_and_depends_on_the_seed_alone(root, tmp_path) -> None:
    first = calibrated(PLAIN, count=7, seed=3, data_dir=root, num_classes=3)
    assert sorted(first.labels.bincount().tolist()) == [2, 2, 3]
    # the same files, made in another order
    files = sorted(path.relative_to(root) for path in root.rglob("*.png"))
    random.Random(1).shuffle(files)
    for file in files:
        (tmp_path / "copy" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / file, tmp_path / "copy" / file)
    again = calibrated(PLAIN, count=7, seed=3, data_dir=tmp_path / "copy", num_classes=3)
    assert torch.equal(first.images, again.images)
    assert torch.equal(first.labels, again.labels)
    other = calibrated(PLAIN, count=7, seed=4, data_dir=root, num_classes=3)
    assert levels(other.images) != levels(first.images)


def test_the_choice_does_not_depend_on_the_order_a_file_system_lists(root, monkeypatch) -> None:
    first = calibrated(PLAIN, count=7, seed=3, data_dir=root)
    walk = os.walk
    monkeypatch.setattr(
        os, "walk", lambda *a, **k: ((at, dirs, files[::-1]) for at, dirs, files in walk(*a, **k))
    )
    assert levels(calibrated(PLAIN, count=7, seed=3, data_dir=root).images) == levels(first.images)


def test_asking_for_more_than_there_is_gives_all(root) -> None:
    chosen = calibrated(PLAIN, count=99, seed=0, data_dir=root)
    assert sorted(levels(chosen.images)) == [20 * c + k for c in range(3) for k in range(4)]
    assert chosen.description.startswith("12 of 12 images")


def test_classes_are_in_timms_order(tmp_path) -> None:
    write_split(tmp_path / "train", ("10", "9", "b", "A"))
    chosen = calibrated(PLAIN, count=16, seed=0, data_dir=tmp_path, num_classes=4)
    written = {0: "10", 1: "9", 2: "b", 3: "A"}  # level // 20 tells the folder
    found = {
        written[level // 20]: label
        for level, label in zip(levels(chosen.images), chosen.labels.tolist(), strict=True)
    }
    assert found == timm.data.create_dataset("", root=str(tmp_path / "train")).reader.class_to_idx


def test_flat_folders_and_unasked_labels_give_none(root, tmp_path) -> None:
    for k in range(3):
        write_image(tmp_path / "flat" / f"{k}.png", k)
    flat = calibrated(PLAIN, count=2, seed=0, data_dir=tmp_path / "flat", num_classes=10)
    assert flat.labels is None
    assert flat.description == "2 of 3 images under flat/ (without labels)"
    # classes need not fit when labels are left out
    unasked = calibrated(PLAIN, count=2, seed=0, data_dir=root, num_classes=10, use_labels=False)
    assert unasked.labels is None


def test_a_split_itself_and_aliases_are_found(root, tmp_path) -> None:
    itself = calibrated(PLAIN, count=12, seed=0, data_dir=root / "train", num_classes=3)
    assert itself.labels is not None
    write_split(tmp_path / "other" / "training", per_class=2)
    write_split(tmp_path / "other" / "validation", per_class=3)
    assert len(calibrated(PLAIN, count=99, seed=0, data_dir=tmp_path / "other").images) == 6
    assert evaluation(tmp_path / "other").images == 9
    assert has_split(DataOptions(data_dir=tmp_path / "other"), "val")
    assert not has_split(DataOptions(data_dir=root / "train"), "val")
    assert not has_split(DataOptions(data_dir=None), "val")
    assert has_split(DataOptions(dataset="hfds/any"), "val")


def test_without_data_images_are_synthetic() -> None:
    made = calibrated(PLAIN, count=5, seed=7)
    assert made.labels is None
    assert made.description == "5 synthetic images of shapes (16x16)"
    assert torch.equal(made.images, synthetic_images(5, (3, 16, 16), PLAIN.mean, PLAIN.std, 7))


def test_unreadable_images_are_replaced_and_told_until_too_few_are_left(root) -> None:
    bad = root / "train" / "ant" / "0.png"
    bad.write_bytes(bad.read_bytes()[:40])
    chosen = calibrated(PLAIN, count=99, seed=0, data_dir=root)
    assert len(chosen.images) == 11
    assert "1 unreadable left out (first ant/0.png: " in chosen.description
    assert str(root) not in chosen.description
    for path in sorted((root / "train").rglob("*.png"))[:7]:
        path.write_bytes(b"no image")
    with pytest.raises(
        DataError, match=r"7 of 12 images under train/ cannot be read, which leaves 5 of the 12 needed"
    ):
        calibrated(PLAIN, count=99, seed=0, data_dir=root)


SPIDER = struct.pack(">27f", *(1, 1, 0, 0, 1, *[0] * 6, 1, 1, *[0] * 8, 4, 4, 0, 0, 0, 1))
DDS = b"DDS " + struct.pack("<20I4s10I", 124, 0, 16, 16, *[0] * 14, 32, 4, b"none", *[0] * 10)


@pytest.mark.parametrize(
    ("content", "kind"), [(SPIDER, AttributeError), (DDS, NotImplementedError), (None, RuntimeError)]
)
def test_whatever_pillow_raises_is_of_one_image(root, content, kind) -> None:
    bad = root / "train" / "ant" / "0.png"  # Pillow goes by what is in a file
    if content is None:
        if not features.check("avif"):
            pytest.skip("this Pillow reads no AVIF")
        Image.new("RGB", (16, 16)).save(bad, "AVIF")
        whole = bad.read_bytes()
        content = whole[:-20] + bytes(255 - byte for byte in whole[-20:])
    bad.write_bytes(content)
    with pytest.raises(kind), Image.open(bad) as opened:
        opened.load()
    chosen = calibrated(PLAIN, count=99, seed=0, data_dir=root)
    assert "1 unreadable left out (first ant/0.png: " in chosen.description


@pytest.mark.parametrize("count", [0, -3])
def test_a_count_below_one_is_a_usage_error(count) -> None:
    with pytest.raises(UsageError, match="calibration_images="):
        calibrated(PLAIN, count=count, seed=0)


def test_uncommon_files_are_read_as_what_they_show(tmp_path) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    grey = np.full((16, 16), 100, dtype=np.uint8)
    Image.fromarray(grey).save(folder / "a_grey.png")
    Image.fromarray(grey).convert("P").save(
        folder / "b_palette.png", transparency=b"\x00" * 100 + b"\xff" * 156
    )
    Image.fromarray(grey.astype(np.uint16) * 257).save(folder / "c_16_bit.png")
    Image.fromarray(np.stack([grey] * 3 + [grey * 0 + 255], -1)).save(folder / "d_alpha.png")
    Image.fromarray(grey).save(folder / "e.JPEG")
    Image.fromarray(np.stack([grey] * 3, -1)).convert("CMYK").save(folder / "f_cmyk.jpg")
    Image.fromarray(grey).save(folder / "g.bmp")
    seen = calibrated(PLAIN, count=7, seed=0, data_dir=folder)
    assert seen.description == "7 of 7 images under flat/ (without labels)"
    for level in levels(seen.images):
        assert abs(level - 100) <= 2


def test_pixels_without_a_range_are_unreadable(root) -> None:
    Image.new("F", (16, 16), 0.5).save(root / "val" / "ant" / "float.tif")
    with pytest.raises(DataError, match=r"float\.tif: pixels are floating point"):
        list(evaluation(root))


def test_an_absurdly_large_image_is_unreadable_not_a_crash(root, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    with pytest.raises(DataError, match=r"12 of 12 images cannot be read.*decompression bomb"):
        list(evaluation(root))
