"""Every image of a split is measured once."""

from __future__ import annotations

import pytest
import torch

from helpers.data import evaluation, levels
from mhacut.errors import DataError


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
