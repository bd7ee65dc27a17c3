"""How images are prepared."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from PIL import Image

from helpers.data import PLAIN, calibrated, evaluated
from mhacut.data import Preprocessing
from mhacut.errors import DataError, UsageError
from mhacut.options.base import PreprocessingOptions


def test_explicit_values_win_over_the_record() -> None:
    record = timm.get_pretrained_cfg("vit_tiny_patch16_224").to_dict()
    stated = Preprocessing.resolve(record, (3, 224, 224))
    assert (stated.mean, stated.std, stated.crop_pct) == ((0.5,) * 3, (0.5,) * 3, 0.9)
    resolved = Preprocessing.resolve(
        record,
        (3, 224, 224),
        PreprocessingOptions(
            mean=(0.49, 0.48, 0.45), std=(0.25,), crop_pct=0.8, interpolation="bilinear", img_size=192
        ),
    )
    assert resolved == Preprocessing(
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


def test_preprocessing_survives_json_and_refuses_other_documents() -> None:
    assert Preprocessing.resolve(PLAIN.to_json(), PLAIN.input_size) == PLAIN
    for broken in (
        PLAIN.to_json() | {"std": [0, 0, 0]},
        PLAIN.to_json() | {"mean": [math.nan] * 3},
        PLAIN.to_json() | {"crop_pct": 2},
        PLAIN.to_json() | {"interpolation": "magic"},
        PLAIN.to_json() | {"crop_mode": ["center"]},
        PLAIN.to_json() | {"input_size": [3, 0, 8]},
    ):
        with pytest.raises(DataError):
            Preprocessing.resolve(broken, None)


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
    resolved = Preprocessing.resolve(RGB, (1, 16, 16), PreprocessingOptions(mean=(0.7,), std=(0.8,)))
    assert (resolved.mean, resolved.std) == ((0.7,), (0.8,))
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
    message = f"takes images of {channels} channels, and image files have 1 or 3"
    with pytest.raises(DataError, match=f"{message}. Leave data_dir and dataset out: no images"):
        calibrated(many, count=1, seed=0, data_dir=root)
    with pytest.raises(DataError, match=f"{message}$"):  # who measures accuracy needs images
        evaluated(many, data_dir=root, batch_size=1, workers=0, num_classes=3)
