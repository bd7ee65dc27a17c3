"""Images that are made where there are none."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mhacut.data import synthetic_images


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


@pytest.mark.slow
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
