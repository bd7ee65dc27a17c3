"""Images reach the model as they are, or an error says which do not."""

from __future__ import annotations

import itertools
import math
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from helpers.data import calibrated, evaluated
from mhacut.data import Preprocessing, has_split, named, synthetic_images
from mhacut.errors import DataError, UsageError
from mhacut.options.base import DataOptions, PreprocessingOptions

PLAIN = Preprocessing((3, 16, 16), (0.0,), (1.0,), "bicubic", 1.0, "center")
CLASSES = ("ant", "bee", "cat")


def write_image(path: Path, level: int = 128) -> Path:
    """A grey 16x16 PNG; its level tells which image it is after reading."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (16, 16), (level, level, level)).save(path)
    return path


def write_split(folder: Path, classes=CLASSES, per_class: int = 4) -> Path:
    """Image k of class c has grey level 20 c + k."""
    for number, name in enumerate(classes):
        for k in range(per_class):
            write_image(folder / name / f"{k}.png", 20 * number + k)
    return folder


@pytest.fixture
def root(tmp_path) -> Path:
    write_split(tmp_path / "set" / "train")
    write_split(tmp_path / "set" / "val")
    return tmp_path / "set"


def levels(images: torch.Tensor) -> list[int]:
    return (images[:, 0, 0, 0] * 255).round().int().tolist()


def evaluation(root: Path, **changes):
    options = {"batch_size": 5, "workers": 0, "num_classes": 3} | changes
    return evaluated(PLAIN, data_dir=root, **options)


# --- preprocessing ---


def test_explicit_values_win_over_the_record() -> None:
    record = timm.get_pretrained_cfg("vit_tiny_patch16_224").to_dict()
    stated = Preprocessing.resolve(record, (3, 224, 224))
    assert (stated.mean, stated.std, stated.crop_pct) == ((0.5,) * 3, (0.5,) * 3, 0.9)
    told = Preprocessing.resolve(
        record,
        (3, 224, 224),
        PreprocessingOptions(
            mean=(0.49, 0.48, 0.45), std=(0.25,), crop_pct=0.8, interpolation="bilinear", img_size=192
        ),
    )
    assert told == Preprocessing(
        (3, 192, 192), (0.49, 0.48, 0.45), (0.25, 0.25, 0.25), "bilinear", 0.8, "center"
    )


@pytest.mark.parametrize(
    ("record", "size", "explicit", "expected"),
    [
        ({"input_size": (3, 224, 224), "crop_pct": 0.9}, (3, 224, 224), None, 0.9),
        ({"input_size": (3, 224, 224), "crop_pct": 0.9}, (3, 384, 384), None, 0.9),
        ({"input_size": (3, 224, 224), "crop_pct": 0.9}, (3, 32, 32), None, 1.0),
        ({"input_size": (3, 32, 32), "crop_pct": 0.9}, (3, 32, 32), None, 0.9),
        ({"crop_pct": 0.9}, (3, 32, 32), None, 0.9),
        ({}, (3, 32, 32), None, 1.0),
        ({}, (3, 224, 224), None, 0.875),
        ({"input_size": (3, 224, 224), "crop_pct": 0.9}, (3, 32, 32), 0.95, 0.95),
    ],
)
def test_a_small_model_takes_images_whole_unless_told_otherwise(record, size, explicit, expected) -> None:
    resolved = Preprocessing.resolve(record, size, PreprocessingOptions(crop_pct=explicit))
    assert resolved.input_size == size
    assert resolved.crop_pct == expected


def test_an_image_of_the_models_size_is_neither_resized_nor_cropped() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    small = Preprocessing.resolve(
        {"crop_pct": 0.9, "input_size": (3, 224, 224)}, (3, 32, 32), PreprocessingOptions(mean=(0,), std=(1,))
    )
    seen = small.transform()(Image.fromarray(pixels))
    assert torch.equal((seen * 255).round().to(torch.uint8), torch.from_numpy(pixels).permute(2, 0, 1))


def test_preprocessing_survives_json_and_refuses_other_documents() -> None:
    assert Preprocessing.from_json(PLAIN.to_json()) == PLAIN
    assert Preprocessing.resolve(PLAIN.to_json(), PLAIN.input_size) == PLAIN
    for broken in (
        {},
        PLAIN.to_json() | {"mean": None},
        PLAIN.to_json() | {"std": [0, 0, 0]},
        PLAIN.to_json() | {"mean": [math.nan] * 3},
        PLAIN.to_json() | {"crop_pct": 0},
        PLAIN.to_json() | {"interpolation": "magic"},
        PLAIN.to_json() | {"crop_mode": ["center"]},
        PLAIN.to_json() | {"input_size": [4, 8, 8]},
        PLAIN.to_json() | {"import": "os"},
    ):
        with pytest.raises(DataError):
            Preprocessing.from_json(broken)


@pytest.mark.parametrize(
    ("values", "flag"),
    [
        ({"mean": (0.1, 0.2)}, r"mean .*\(mean\)$"),
        ({"std": (0.0,)}, r"std .*\(std\)$"),
        ({"crop_pct": 1.5}, r"crop_pct 1.5: .*\(crop_pct\)$"),
        ({"interpolation": "cubic"}, r"\(interpolation\)$"),
        ({"img_size": 0}, r"\(img_size\)$"),
        ({"img_size": 2049}, r"at most 4194304 pixels .* found 2049x2049 \(img_size\)"),
    ],
)
def test_senseless_flags_are_usage_errors_that_name_the_flag(values, flag) -> None:
    with pytest.raises(UsageError, match=flag):
        Preprocessing.resolve({}, (3, 32, 32), PreprocessingOptions(**values))


def test_a_crop_beyond_the_image_puts_a_border_around_it() -> None:
    cfg = timm.models.get_pretrained_cfg("volo_d4_448").to_dict()
    assert cfg["crop_pct"] > 1
    seen = Preprocessing.resolve(cfg, (3, 448, 448)).transform()(Image.new("RGB", (600, 600), "white"))
    assert seen.shape == (3, 448, 448)
    border = (448 - math.floor(448 / 1.15)) // 2
    assert seen[0, :, 200].unique().numel() == 2
    assert seen[0, border - 1, 200] < 0 < seen[0, border + 1, 200]


RGB = {"mean": (0.2, 0.4, 0.6), "std": (0.1, 0.2, 0.6)}


def test_a_grey_model_gets_one_channel_and_averaged_statistics(root) -> None:
    grey = Preprocessing.resolve({"mean": (0.0,), "std": (1.0,)}, (1, 16, 16))
    raw = calibrated(grey, count=12, seed=0, data_dir=root).images
    assert raw.shape == (12, 1, 16, 16)
    averaged = Preprocessing.resolve(RGB, (1, 16, 16))
    seen = calibrated(averaged, count=12, seed=0, data_dir=root).images
    torch.testing.assert_close(seen, (raw - 0.4) / 0.3)
    told = Preprocessing.resolve(RGB, (1, 16, 16), PreprocessingOptions(mean=(0.7,), std=(0.8,)))
    assert (told.mean, told.std) == ((0.7,), (0.8,))
    with pytest.raises(UsageError, match=r"mean .* expected 1 number.*\(mean\)"):
        Preprocessing.resolve(RGB, (1, 16, 16), PreprocessingOptions(mean=(0.7,) * 3))


@pytest.mark.parametrize("channels", [2, 4, 12])
def test_other_channels_are_synthetic_or_refused(root, channels) -> None:
    many = Preprocessing.resolve(RGB, (channels, 16, 16))
    assert many.mean == pytest.approx((0.4,) * channels)
    images = calibrated(many, count=3, seed=0).images
    assert images.shape == (3, channels, 16, 16)
    assert torch.isfinite(images).all()
    own = Preprocessing.resolve({"mean": range(channels), "std": [1.0] * channels}, (channels, 16, 16))
    assert own.mean == tuple(range(channels))
    message = f"takes images of {channels} channels; pictures are read with 1 or 3. .*synthetic"
    with pytest.raises(DataError, match=message):
        calibrated(many, count=1, seed=0, data_dir=root)
    with pytest.raises(DataError, match=message):
        evaluated(many, data_dir=root, batch_size=1, workers=0, num_classes=3)


# --- calibration images ---


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
        DataError, match=r"7 of 12 images tried under train/ cannot be read, 5 are left of the 12 needed"
    ):
        calibrated(PLAIN, count=99, seed=0, data_dir=root)


@pytest.mark.parametrize("count", [0, -3])
def test_a_count_below_one_is_a_usage_error(count) -> None:
    with pytest.raises(UsageError, match="calibration_images="):
        calibrated(PLAIN, count=count, seed=0)


# --- what is missing is told ---


def test_missing_places_are_named(tmp_path) -> None:
    with pytest.raises(DataError, match="no such directory"):
        calibrated(PLAIN, count=1, seed=0, data_dir=tmp_path / "nowhere")
    file = write_image(tmp_path / "a.png")
    with pytest.raises(DataError, match="is a file"):
        calibrated(PLAIN, count=1, seed=0, data_dir=file)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="no images"):
        calibrated(PLAIN, count=1, seed=0, data_dir=tmp_path / "empty")
    with pytest.raises(UsageError, match="data_dir or dataset"):
        evaluated(PLAIN, batch_size=1, workers=0, num_classes=3)


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


# --- evaluation ---


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


def test_a_batch_of_corrupt_images_alone_is_told_too(root) -> None:
    for path in (root / "val").rglob("*.png"):
        path.write_bytes(b"no image")
    with pytest.raises(DataError, match=r"12 of 12 images cannot be read"):
        list(evaluation(root, batch_size=2))


# --- kinds of files ---


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


# --- synthetic images ---


def test_shapes_have_edges_and_their_power_falls_as_that_of_photographs() -> None:
    size = 64
    images = synthetic_images(64, (3, size, size), (0.0,) * 3, (1.0,) * 3, 0)
    power = torch.fft.fft2(images - images.mean(dim=(2, 3), keepdim=True)).abs().square().mean(dim=(0, 1))
    row = torch.fft.fftfreq(size)
    radius = (row[:, None] ** 2 + row[None, :] ** 2).sqrt()
    edges = torch.logspace(math.log10(2 / size), math.log10(0.4), 9)
    bands = [(radius >= low) & (radius < high) for low, high in itertools.pairwise(edges)]
    x = torch.stack([radius[band].mean().log() for band in bands])
    y = torch.stack([power[band].mean().log() for band in bands])
    slope = float(((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum())
    assert slope == pytest.approx(-2.5, abs=0.5)  # photographs: -2, with blur -2.5 to -3
    steps = images.diff(dim=-1).abs()
    assert float((steps < 1e-6).float().mean()) > 0.7  # plain inside, unlike noise of the same spectrum
    assert float((steps > 0.1).float().mean()) > 0.03


@pytest.mark.parametrize("size", [(3, 32, 32), (3, 48, 80), (1, 31, 31), (5, 8, 8)])
def test_pixels_are_plausible_and_channels_agree(size) -> None:
    images = synthetic_images(64, size, (0.0,) * size[0], (1.0,) * size[0], 1)
    assert images.shape == (64, *size)
    assert images.min() >= 0
    assert images.max() <= 1
    assert float(images.mean()) == pytest.approx(0.5, abs=0.05)
    assert float(images.std()) == pytest.approx(0.22, abs=0.05)
    if size[0] == 3:
        agreement = torch.corrcoef(images.transpose(0, 1).flatten(1))
        assert float(agreement[~torch.eye(3, dtype=torch.bool)].min()) > 0.7
        assert float(agreement[~torch.eye(3, dtype=torch.bool)].max()) < 0.98


def test_shapes_scale_with_the_image() -> None:
    small, large = (synthetic_images(4, (3, size, size), (0.0,) * 3, (1.0,) * 3, 3) for size in (32, 128))
    shrunk = torch.nn.functional.avg_pool2d(large, 4)
    assert float((small - shrunk).abs().mean()) < 0.02


def test_an_image_depends_on_the_seed_and_its_number_alone() -> None:
    few, many = (synthetic_images(count, (3, 16, 16), (0.5,) * 3, (0.5,) * 3, 5) for count in (3, 8))
    assert torch.equal(few, many[:3])
    assert not torch.equal(few, synthetic_images(3, (3, 16, 16), (0.5,) * 3, (0.5,) * 3, 6))
    assert not torch.equal(few[0], few[1])


def test_synthetic_images_are_normalised() -> None:
    raw = synthetic_images(4, (3, 16, 16), (0.0,) * 3, (1.0,) * 3, 5)
    normalised = synthetic_images(4, (3, 16, 16), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3), 5)
    mean, std = torch.tensor((0.5, 0.4, 0.3)).view(3, 1, 1), torch.tensor((0.1, 0.2, 0.3)).view(3, 1, 1)
    torch.testing.assert_close(normalised, (raw - mean) / std)


# --- named datasets ---


class Pictures(torch.utils.data.Dataset):
    """What timm hands out for torch/NAME: pictures and classes, by index."""

    def __init__(self, per_class: int = 4, classes: int = 3) -> None:
        self.classes = [str(number) for number in range(classes)]
        self.targets = [number for number in range(classes) for _ in range(per_class)]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index):
        if index >= len(self.targets):
            raise IndexError
        level = 20 * self.targets[index] + index % 4
        return Image.new("RGB", (16, 16), (level,) * 3), self.targets[index]


class Stream(torch.utils.data.IterableDataset):
    """What timm hands out for wds/NAME; it loses the last ``lost`` samples."""

    def __init__(self, lost: int = 0) -> None:
        self.pictures, self.lost = Pictures(), lost

    def __len__(self) -> int:
        return len(self.pictures)

    def __iter__(self):
        for index in range(len(self.pictures) - self.lost):
            yield self.pictures[index]


@pytest.fixture
def opens(monkeypatch):
    """Makes timm open the given dataset whatever its name."""

    def set_to(opened):
        monkeypatch.setattr(named, "create_dataset", lambda *_, **__: opened)
        monkeypatch.setattr(named.importlib.util, "find_spec", lambda _: object())

    return set_to


def test_a_dataset_by_index_gives_a_balanced_choice_and_every_image(opens) -> None:
    opens(Pictures())
    chosen = calibrated(PLAIN, count=6, seed=0, dataset="torch/any", num_classes=3)
    assert chosen.description == "6 of 12 images of torch/any train (with labels)"
    assert chosen.labels.bincount().tolist() == [2, 2, 2]
    assert [level // 20 for level in levels(chosen.images)] == chosen.labels.tolist()
    loader = evaluated(PLAIN, dataset="torch/any", batch_size=5, workers=0, num_classes=3)
    assert torch.cat([labels for _, labels in loader]).tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_a_stream_gives_its_beginning_and_must_give_what_it_announced(opens) -> None:
    opens(Stream())
    assert calibrated(PLAIN, count=5, seed=0, dataset="wds/any", num_classes=3).labels.tolist() == [0] * 4 + [
        1
    ]
    options = {"dataset": "wds/any", "batch_size": 5, "workers": 2, "num_classes": 3}
    assert sum(len(labels) for _, labels in evaluated(PLAIN, **options)) == 12
    assert sum(len(labels) for _, labels in evaluated(PLAIN, limit=7, **options)) == 7
    opens(Stream(lost=1))
    with pytest.raises(DataError, match="11 images came of 12 announced"):
        list(evaluated(PLAIN, **options))


def test_a_dataset_without_images_is_told(opens) -> None:
    opens(Pictures(per_class=0))
    with pytest.raises(DataError, match="torch/any', split 'train': holds no images"):
        calibrated(PLAIN, count=6, seed=0, dataset="torch/any", num_classes=3)
    with pytest.raises(DataError, match="no images came"):
        list(evaluated(PLAIN, dataset="torch/any", batch_size=5, workers=0, num_classes=3))


def test_a_dataset_of_other_classes_is_refused(opens) -> None:
    opens(Pictures(classes=5))
    with pytest.raises(DataError, match="5 classes, the model's head has 3"):
        calibrated(PLAIN, count=6, seed=0, dataset="torch/any", num_classes=3)
    assert calibrated(PLAIN, count=6, seed=0, dataset="torch/any", use_labels=False).labels is None


def test_labels_outside_the_head_are_refused(opens) -> None:
    silent = Pictures(classes=5)
    silent.classes = []
    opens(silent)
    loader = evaluated(PLAIN, dataset="torch/any", batch_size=50, workers=0, num_classes=3)
    with pytest.raises(DataError, match="found label 4, the model's head has 3 classes"):
        list(loader)


def test_a_missing_extra_says_what_to_install(monkeypatch) -> None:
    monkeypatch.setattr(named.importlib.util, "find_spec", lambda _: None)
    for name, package in (("hfds/cifar10", r"mhacut\[hfds\]"), ("wds/imagenet", r"mhacut\[wds\]")):
        with pytest.raises(DataError, match=f"pip install '{package}'"):
            calibrated(PLAIN, count=1, seed=0, dataset=name)


@pytest.mark.parametrize("name", ["cifar10", "hfds/", "zip/x", ""])
def test_an_unknown_kind_of_dataset_is_a_usage_error(name) -> None:
    with pytest.raises(UsageError, match="expected hfds/NAME"):
        calibrated(PLAIN, count=1, seed=0, dataset=name)


def test_a_dataset_that_cannot_be_opened_says_why(tmp_path) -> None:
    with pytest.raises(DataError, match=r"torch/cifar10', split 'train': cannot be opened: RuntimeError"):
        calibrated(PLAIN, count=1, seed=0, dataset="torch/cifar10", data_dir=tmp_path)
