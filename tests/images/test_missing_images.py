"""Folders that are not what they should be are named."""

from __future__ import annotations

import shutil
from pathlib import PurePosixPath, PureWindowsPath

import pytest
import torch

from helpers.data import PLAIN, calibrated, evaluated, evaluation, levels, write_image
from mhacut.data import evaluation_loader
from mhacut.errors import CheckpointError, DataError, UsageError
from mhacut.finetuning.images import training_images
from mhacut.options.augmentation import AugmentationOptions
from mhacut.options.base import DataOptions, LabelledImages
from mhacut.runtime import files


def test_missing_places_are_named(tmp_path) -> None:
    with pytest.raises(DataError, match="no such directory"):
        calibrated(PLAIN, count=1, seed=0, data_dir=tmp_path / "nowhere")
    file = write_image(tmp_path / "a.png")
    with pytest.raises(DataError, match="is a file"):
        calibrated(PLAIN, count=1, seed=0, data_dir=file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no images found; .*; without data_dir, none are needed$"):
        calibrated(PLAIN, count=1, seed=0, data_dir=tmp_path / "empty")
    with pytest.raises(UsageError, match="data_dir or dataset"):
        evaluated(PLAIN, batch_size=1, workers=0, num_classes=3)


def test_a_place_that_may_not_be_read_is_named(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(files.os, "access", lambda *_: False)
    with pytest.raises(DataError, match=r"no permission to read it \(data_dir\)$"):
        files.check_data_dir(tmp_path)
    with pytest.raises(CheckpointError, match="no permission to read the folder"):
        files.check_checkpoint(tmp_path)


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
    with pytest.raises(DataError, match=r"class folders without images: bee; .*class_map"):
        evaluation(root)
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n")
    labels = torch.cat([labels for _, labels in evaluation(root, class_map=names)])
    assert labels.tolist() == [0] * 4 + [2] * 4


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
    } == {
        0: 2,
        1: 3,
        2: 0,
    }
    names.write_text("\ufeffcat\nzebra\nant\nbee\n", encoding="utf-8")  # as editors on Windows write it
    again = calibrated(PLAIN, count=12, seed=0, data_dir=root, class_map=names, num_classes=4)
    assert torch.equal(again.labels, chosen.labels)
    for text, message in (
        ("cat\nant\n", "names 2 classes, the model's head has 4"),
        ("cat\ncat\nant\nbee\n", "'cat' twice"),
        ("a\nb\nc\nd\n", "class folders not in .*: ant, bee, cat"),
    ):
        names.write_text(text)
        with pytest.raises(DataError, match=message):
            evaluation(root, class_map=names, num_classes=4)
    with pytest.raises(DataError, match="class map cannot be read"):
        evaluation(root, class_map=tmp_path / "missing.txt")


def test_images_beside_class_folders_are_refused(root) -> None:
    write_image(root / "val" / "stray.png")
    with pytest.raises(DataError, match=r"stray.png lies beside the class folders ant, bee, cat"):
        evaluation(root)


def test_hidden_files_and_folders_are_not_looked_at(root) -> None:
    write_image(root / "val" / ".ipynb_checkpoints" / "x.png")
    (root / "val" / "ant" / "._0.png").write_bytes(b"resource fork")
    assert evaluation(root).images == 12


def test_evaluation_needs_labels(tmp_path) -> None:
    write_image(tmp_path / "val" / "0.png")
    with pytest.raises(DataError, match=r"images without class folders; .* Folders in .*: val"):
        evaluation(tmp_path)


@pytest.fixture
def shifted(root):
    """As many class folders in both splits, not the same ones: ant and bee of one are bee and zebra there."""
    (root / "val" / "ant").rename(root / "val" / "zebra")
    return root


DIFFER = "class folders are not those of .*: {} only here, {} only there. Labels are the places of the sorted"


def test_splits_with_other_classes_are_refused(shifted, tmp_path) -> None:
    with pytest.raises(DataError, match=DIFFER.format("ant", "zebra") + ".*labels=False"):
        calibrated(PLAIN, count=1, seed=0, data_dir=shifted, num_classes=3)
    alone = LabelledImages(data_dir=shifted)  # as evaluate has them
    with pytest.raises(DataError, match=DIFFER.format("zebra", "ant")):
        evaluation_loader(PLAIN, alone, num_classes=3, batch_size=1)
    # Without labels, and with names for all classes, no label is shifted.
    assert calibrated(PLAIN, count=1, seed=0, data_dir=shifted, use_labels=False).labels is None
    assert evaluation(shifted).images == 12
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\nzebra\n")
    chosen = calibrated(PLAIN, count=1, seed=0, data_dir=shifted, num_classes=4, class_map=names)
    assert chosen.labels is not None
    (shifted / "val").rename(shifted / "valid")
    (shifted / "valid" / ".hidden").mkdir()
    with pytest.raises(DataError, match=r"those of .*valid"):
        calibrated(PLAIN, count=1, seed=0, data_dir=shifted, num_classes=3)
    calibrated(PLAIN, count=1, seed=0, data_dir=shifted, num_classes=3, val_split="test")  # not there
    for name in ("bee", "cat", "zebra"):  # all others, maybe of the same classes in this order
        (shifted / "valid" / name).rename(shifted / "valid" / f"n{name}")
    calibrated(PLAIN, count=1, seed=0, data_dir=shifted, num_classes=3)


def test_images_to_train_on_have_the_classes_of_the_others(shifted) -> None:
    with pytest.raises(DataError, match=DIFFER.format("ant", "zebra")):
        training_images(
            DataOptions(data_dir=shifted),
            PLAIN,
            AugmentationOptions(),
            num_classes=3,
            use_labels=True,
            need_labels=False,
        )


@pytest.mark.parametrize("kind", [PurePosixPath, PureWindowsPath])
def test_names_that_leave_a_folder_are_known_on_every_system(monkeypatch, kind) -> None:
    monkeypatch.setattr(files, "PurePath", kind)
    assert files.stays_inside("part/a..tar")
    assert not any(map(files.stays_inside, ("/a.tar", "../a.tar", "part/../../a.tar", "..")))
    on_windows = ("\\a.tar", "C:a.tar", "C:\\a.tar", "..\\a.tar", "\\\\host\\share\\a.tar")
    assert {files.stays_inside(name) for name in on_windows} == {kind is PurePosixPath}
