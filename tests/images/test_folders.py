"""Folders of images: which are chosen, what is made of them, and what is refused."""

from __future__ import annotations

import os
import random
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from helpers.data import PLAIN, calibrated, evaluated, evaluation, levels, write_image, write_split
from mhacut.data import evaluation_loader, has_split, synthetic_images
from mhacut.errors import DataError, UsageError
from mhacut.options.base import DataOptions, LabelledImages


def test_labels_fit_the_images(root) -> None:
    chosen = calibrated(PLAIN, count=7, seed=0, data_dir=root, num_classes=3)
    assert chosen.description == "7 of 12 images under train/ (with labels)"
    assert chosen.images.shape == (7, 3, 16, 16)
    assert chosen.images.dtype == torch.float32
    assert [level // 20 for level in levels(chosen.images)] == chosen.labels.tolist()


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


def test_the_rest_is_every_image_that_was_not_chosen(root) -> None:
    for use_labels in (True, False):
        chosen = calibrated(PLAIN, count=7, seed=0, data_dir=root, use_labels=use_labels)
        others = torch.stack([chosen.rest[index][0] for index in range(len(chosen.rest))])
        all_levels = levels(chosen.images) + levels(others)
        assert sorted(all_levels) == [20 * c + k for c in range(3) for k in range(4)]


def test_asking_for_more_than_there_is_gives_all(root) -> None:
    chosen = calibrated(PLAIN, count=99, seed=0, data_dir=root)
    assert chosen.rest is None
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
    with pytest.raises(DataError, match=r"7 of 12 images under train/ cannot be read; 12 are needed"):
        calibrated(PLAIN, count=99, seed=0, data_dir=root)


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
    with pytest.raises(DataError, match=r"float\.tif: pixels are floats"):
        list(evaluation(root))


def test_every_image_comes_once_and_again_in_a_second_pass(root) -> None:
    loader = evaluation(root)
    for _ in range(2):
        batches = list(loader)
        assert len(batches) == len(loader) == 3
        assert levels(torch.cat([images for images, _ in batches])) == [
            20 * c + k for c in range(3) for k in range(4)
        ]
        assert torch.cat([labels for _, labels in batches]).tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_workers_read_the_same(root) -> None:
    alone, helped = (torch.cat([images for images, _ in evaluation(root, workers=n)]) for n in (0, 2))
    assert torch.equal(alone, helped)


def test_a_limit_is_spread_over_the_classes(root) -> None:
    loader = evaluation(root, limit=6)
    assert loader.images == 6
    assert loader.description == "6 of 12 images under val/"
    labels = torch.cat([labels for _, labels in loader])
    assert labels.bincount().tolist() == [2, 2, 2]
    assert evaluation(root, limit=99).images == 12


@pytest.mark.parametrize("workers", [0, 2])
def test_a_corrupt_image_fails_the_evaluation(root, workers) -> None:
    bad = root / "val" / "bee" / "1.png"
    bad.write_bytes(b"no image")
    (root / "val" / "cat" / "2.png").write_bytes(b"")
    seen = 0
    with pytest.raises(DataError, match=r"2 of 12 images cannot be read.*bee.1\.png"):  # noqa: PT012
        for images, labels in evaluation(root, workers=workers):
            assert len(images) == len(labels)
            seen += len(images)
    assert seen == 10


def test_missing_places_are_named(tmp_path) -> None:
    with pytest.raises(DataError, match="no such directory"):
        calibrated(PLAIN, count=1, seed=0, data_dir=tmp_path / "nowhere")
    file = write_image(tmp_path / "a.png")
    with pytest.raises(DataError, match="no such directory"):
        calibrated(PLAIN, count=1, seed=0, data_dir=file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no images found; folders there: none"):
        calibrated(PLAIN, count=1, seed=0, data_dir=tmp_path / "empty")
    with pytest.raises(UsageError, match="data_dir or dataset"):
        evaluated(PLAIN, batch_size=1, workers=0, num_classes=3)


def test_the_folder_that_one_is_in_has_a_name(root, monkeypatch) -> None:
    monkeypatch.chdir(root / "val")
    assert "under val/" in calibrated(PLAIN, count=1, seed=0, data_dir=".").description
    assert "under val/" in evaluation(".").description


def test_a_missing_split_is_not_the_whole_root(root) -> None:
    shutil.rmtree(root / "val")
    with pytest.raises(DataError, match=r"no split 'val'; folders there: train. Choose one with val_split"):
        evaluation(root)
    with pytest.raises(DataError, match=r"no split 'holdout'"):
        calibrated(PLAIN, count=1, seed=0, data_dir=root, train_split="holdout")


@pytest.mark.parametrize("split", ["vall", "validation", "holdout"])
def test_a_split_asked_for_by_name_is_not_the_whole_root(root, split) -> None:
    """Here the root is itself one split, folders of classes; it serves for the default names alone."""
    message = f"no split '{split}'; folders there: ant, bee, cat. Choose one with"
    with pytest.raises(DataError, match=f"{message} val_split"):
        evaluation(root / "val", val_split=split)
    with pytest.raises(DataError, match=f"{message} train_split"):
        calibrated(PLAIN, count=1, seed=0, data_dir=root / "val", train_split=split)
    assert evaluation(root / "val").images == 12


def test_an_empty_class_folder_does_not_shift_the_others(root, tmp_path) -> None:
    for path in (root / "val" / "bee").iterdir():
        path.unlink()
    with pytest.raises(DataError, match=r"class folders without images: bee\. .*class_map"):
        evaluation(root)
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n")
    labels = torch.cat([labels for _, labels in evaluation(root, class_map=names)])
    assert labels.tolist() == [0] * 4 + [2] * 4


def test_splits_whose_classes_differ_in_part_are_refused(root, tmp_path) -> None:
    """As many class folders in both, so that bee and cat of one would be ant and bee of the other."""
    (root / "val" / "ant").rename(root / "val" / "zebra")
    message = "class folders are not those of .*: {} only here, {} only there.* the same folders"
    with pytest.raises(DataError, match=message.format("ant", "zebra") + ".*labels=False"):
        calibrated(PLAIN, count=1, seed=0, data_dir=root, num_classes=3)
    alone = LabelledImages(data_dir=root)  # as evaluate has them
    with pytest.raises(DataError, match=message.format("zebra", "ant")):
        evaluation_loader(PLAIN, alone, num_classes=3, batch_size=1)
    # Without labels, and with names for all classes, no label is shifted.
    assert calibrated(PLAIN, count=1, seed=0, data_dir=root, use_labels=False).labels is None
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\nzebra\n")
    assert evaluation(root, class_map=names, num_classes=4).images == 12
    for name in ("bee", "cat", "zebra"):  # all others, maybe of the same classes in this order
        (root / "val" / name).rename(root / "val" / f"n{name}")
    calibrated(PLAIN, count=1, seed=0, data_dir=root, num_classes=3)


def test_processes_without_an_image_are_refused(root) -> None:
    message = "2 images under val/ are fewer than 3 processes. .*change eval_images"
    with pytest.raises(DataError, match=message):
        evaluation(root, limit=2, part=(0, 3))


def test_a_class_count_that_is_not_the_heads_is_refused(root) -> None:
    message = r"3 class folders \(ant, bee, cat\), the model's head has 10 classes.*class_map"
    with pytest.raises(DataError, match=message):
        evaluation(root, num_classes=10)
    with pytest.raises(DataError, match=message + ".*labels=False"):
        calibrated(PLAIN, count=1, seed=0, data_dir=root, num_classes=10)


def test_a_class_map_gives_the_heads_order(root, tmp_path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("cat\nzebra\nant\nbee\n")
    chosen = calibrated(PLAIN, count=12, seed=0, data_dir=root, class_map=names, num_classes=4)
    assert {
        level // 20: label for level, label in zip(levels(chosen.images), chosen.labels.tolist(), strict=True)
    } == {0: 2, 1: 3, 2: 0}
    names.write_text("\ufeffcat\nzebra\nant\nbee\n", encoding="utf-8")  # as editors on Windows write it
    again = calibrated(PLAIN, count=12, seed=0, data_dir=root, class_map=names, num_classes=4)
    assert torch.equal(again.labels, chosen.labels)
    for text, message in (
        ("cat\nant\n", "names 2 classes, the model's head has 4"),
        ("cat\ncat\nant\nbee\n", "names 3 classes"),
        ("a\nb\nc\nd\n", "class folders not in .*: ant, bee, cat"),
    ):
        names.write_text(text)
        with pytest.raises(DataError, match=message):
            evaluation(root, class_map=names, num_classes=4)
    with pytest.raises(DataError, match="class map cannot be read"):
        evaluation(root, class_map=tmp_path / "missing.txt")


def test_images_beside_class_folders_are_refused(root) -> None:
    write_image(root / "val" / "stray.png")
    with pytest.raises(DataError, match=r"stray.png lies next to the class folders ant, bee, cat"):
        evaluation(root)


def test_hidden_files_and_folders_are_not_looked_at(root) -> None:
    write_image(root / "val" / ".ipynb_checkpoints" / "x.png")
    (root / "val" / "ant" / "._0.png").write_bytes(b"resource fork")
    assert evaluation(root).images == 12


def test_evaluation_needs_labels(tmp_path) -> None:
    write_image(tmp_path / "val" / "0.png")
    with pytest.raises(DataError, match=r"images without class folders under val/: .* Folders in .*: val"):
        evaluation(tmp_path)


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\n%%EndComments\nshowpage\n%%EOF\n"


def test_no_image_runs_ghostscript(root, tmp_path, monkeypatch) -> None:
    program = tmp_path / "gs"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    (root / "val" / "ant" / "0.png").write_bytes(EPS)
    with pytest.raises(DataError, match=r"0\.png: is PostScript, which mhacut does not run"):
        list(evaluation(root))
    assert not (tmp_path / "ran").exists()


def test_links_are_followed_and_end(root) -> None:
    (root / "val" / "ant" / "back").symlink_to(root / "val" / "ant")
    (root / "val" / "dog").symlink_to(root / "train" / "cat")
    assert evaluation(root, num_classes=4).images == 16
