"""Images in memory in place of a folder: tensors, pairs and loaders; what is refused, and in which words."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

import mhacut
from helpers.jobs import Recorder
from mhacut.data import Preprocessing, calibration_images
from mhacut.data.in_memory import Expected, InMemoryBatches, split_in_memory
from mhacut.errors import DataError, UsageError
from mhacut.options.base import DataOptions

DIGITS = Path(__file__).parents[2] / "examples" / "digits"
SIZE = (3, 4, 4)
EXPECTED = Expected(SIZE, 5)
QUICK = {"effort": "fast", "latency": False, "batch_size": 8}


def numbered(count):
    return torch.arange(float(count))[:, None, None, None].expand(count, *SIZE).clone()


def numbers(images):
    return images[:, 0, 0, 0].int().tolist()


def split(images, **options):
    options = {"count": 8, "measured": 100, "seed": 0, "batch_size": 3, **options}
    return split_in_memory(images, options.pop("expected", EXPECTED), **options)


def measured(validation):
    return [] if validation is None else [n for images, _ in validation for n in numbers(images)]


@given(
    total=st.integers(1, 40),
    count=st.integers(1, 40),
    most=st.integers(0, 40),
    seed=st.integers(0, 3),
    labelled=st.booleans(),
)
def test_no_image_is_both_calibrated_on_and_measured(total, count, most, seed, labelled):
    labels = torch.arange(total) % 5
    images = numbered(total)
    options = {"count": count, "measured": most, "seed": seed}
    found, validation = split((images, labels) if labelled else images, **options)
    fitted, others = numbers(found.images), measured(validation)
    unread = [] if found.rest is None else [int(image[0, 0, 0]) for image, _ in found.rest]
    assert sorted(fitted + others + unread) == list(range(total))
    left = min(most, max(total - count, total // 4)) if labelled else 0
    assert len(others) == left
    assert len(fitted) == min(count, total - left)
    if labelled:
        assert found.labels.tolist() == [number % 5 for number in fitted]
        assert all(their.tolist() == [n % 5 for n in numbers(some)] for some, their in validation or ())
    else:
        assert found.labels is None


def test_classes_are_drawn_evenly():
    labels = torch.tensor([0] * 30 + [1] * 6 + [2] * 4)
    found, _ = split((numbered(40), labels), count=9)
    assert torch.bincount(found.labels).tolist() == [3, 3, 3]


def test_each_way_to_give_the_same_images_gives_the_same():
    images, labels = numbered(30), torch.arange(30) % 5
    loader = DataLoader(TensorDataset(images, labels), batch_size=7)
    ways = [(images, labels), loader, list(loader), iter(loader), (images.double(), labels.int())]
    ways += [(images.clone().requires_grad_(), labels), [images, labels]]
    ways += [[{"pixel_values": some, "labels": theirs} for some, theirs in loader]]  # of transformers
    wanted, wanted_validation = split(ways[0])
    for way in ways[1:]:
        found, validation = split(way)
        assert torch.equal(found.images, wanted.images)
        assert (found.images.dtype, found.images.requires_grad) == (torch.float32, False)
        assert measured(validation) == measured(wanted_validation)
    assert numbers(split(ways[0], seed=1)[0].images) != numbers(wanted.images)


def test_batches_are_read_only_until_there_are_enough():
    read = []

    def endless():
        for number in range(10**6):
            read.append(number)
            yield numbered(4)

    found, validation = split(endless(), count=10)
    assert (len(read), validation) == (3, None)
    assert found.description == "10 of the first 12 images in memory (without labels)"


NAN = numbered(4)
NAN[2, 1, 0, 0] = float("nan")
LABELS = torch.tensor([0, 1, 2, 3])
WRONG = [
    (torch.zeros(4, 3, 5, 4), r"expected images \[N, 3, 4, 4\], found \[4, 3, 5, 4\]. Resize them or"),
    (torch.zeros(3, 4, 4), r"expected images \[N, 3, 4, 4\], found \[3, 4, 4\]"),
    (
        torch.zeros(4, 3, 4, 4, dtype=torch.uint8),
        r"found uint8. Convert bytes with \(images / 255 - mean\) / std",
    ),
    (torch.zeros(0, 3, 4, 4), "images: expected at least 1 image, found none"),
    ([], "images: expected at least 1 image, found none"),
    (NAN, "an image holds NaN or infinite values"),
    ((numbered(4), LABELS[:3]), r"expected integer labels \[4\], found a tensor \[3\]"),
    ((numbered(4), LABELS.float()), "found a tensor .4. of float32"),
    ((numbered(4), [0, 1, 2, 3]), "found list of 4"),
    ((numbered(4), LABELS + 3), "found label 6, expected 0 to 4"),
    ((numbered(4), LABELS - 1), "found label -1"),
    ([numbered(4).numpy()], "batch 1: expected a tensor of images or .* found ndarray. Convert arrays"),
    ([numbered(4), (numbered(4), LABELS)], "batch 2: expected labels in all batches or in none"),
    ([{"pictures": numbered(4)}], "batch 1: .* found dict"),
    (zip(numbered(4), LABELS, strict=True), "batch 1: expected images"),
]


@pytest.mark.parametrize(("images", "message"), WRONG)
def test_what_does_not_fit_is_refused(images, message):
    with pytest.raises(DataError, match=message):
        split(images)


@pytest.mark.parametrize("images", ["photos/", 3, {"images": numbered(4)}, TensorDataset(numbered(4))])
def test_what_holds_no_images_at_all_is_refused(images):
    with pytest.raises(UsageError, match=r"images: expected a tensor, \(images, labels\), or a DataLoader"):
        split(images)


def test_batches_to_measure_on_come_as_they_are_or_in_the_size_asked_for():
    images, labels = numbered(7), torch.arange(7) % 5
    for given_images, sizes, length in (
        ((images, labels), [3, 3, 1], 3),
        (DataLoader(TensorDataset(images, labels), batch_size=5), [5, 2], 2),
        (((images[i : i + 2], labels[i : i + 2]) for i in range(0, 7, 2)), [2, 2, 2, 1], 0),
    ):
        batches = InMemoryBatches(given_images, EXPECTED, 3)
        assert len(batches) == length
        assert [len(some) for some, _ in batches] == sizes
    with pytest.raises(DataError, match=r"accuracy needs labels. Give images=\(images, labels\)"):
        list(InMemoryBatches(images, EXPECTED, 3))
    with pytest.raises(DataError, match="holds NaN"):
        list(InMemoryBatches((NAN, LABELS), EXPECTED, 2))


@pytest.fixture(scope="module")
def digits():
    preprocessing = Preprocessing((3, 32, 32), (0.5,) * 3, (0.5,) * 3, "bicubic", 1.0, "center")
    data = DataOptions(data_dir=DIGITS / "images", train_split="val")
    found = calibration_images(preprocessing, data, count=300, seed=0, num_classes=10)
    return found.images, found.labels


@pytest.mark.slow
def test_pruning_on_images_in_memory(digits, tmp_path):
    images, labels = digits
    model = mhacut.load_model(DIGITS / "model")
    args = {"embed_dim": 96, "num_heads": 3, "depth": 4, "patch_size": 4}
    recorder = Recorder()
    options = {**QUICK, "flops": "50%", "calibration_images": 64, "model_args": args}
    found = mhacut.prune(
        model, images=(images, labels), output=tmp_path / "a.safetensors", reporter=recorder, **options
    )
    loader = DataLoader(TensorDataset(images, labels), batch_size=50)
    again = mhacut.prune(model, images=loader, output=tmp_path / "b.safetensors", **options)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert found.data == again.data == "64 of 300 images in memory (with labels)"
    assert "calibrating on 64 of 300 images in memory (with labels)" in recorder.messages
    assert found.dense.evaluation.images == found.slim.evaluation.images == 300 - 64
    assert found.dense.evaluation.top1 > 95
    assert found.slim.evaluation.top1 > 90
    # The model in memory is that of the file.
    loaded, slim = mhacut.load_model(found.output), found.model()
    assert torch.equal(slim(images[:4]), loaded(images[:4]))
    assert not slim.training
    assert all(parameter.requires_grad for parameter in slim.parameters())
    torch.nn.init.zeros_(slim.head.weight)
    assert torch.equal(found.model()(images[:4]), loaded(images[:4]))
    accuracy = mhacut.evaluate(found.model(), images=(images, labels))
    assert accuracy.evaluation.top1 == mhacut.evaluate(found.output, images=loader).evaluation.top1
    assert accuracy.data == "300 images in memory"
    # Python prints both as tables, and notebooks show them.
    assert repr(found).splitlines()[2].split() == [found.architecture, "dense", "slim", "ratio"]
    assert f"<td>{accuracy.evaluation.top1:.2f}% (± " in accuracy._repr_html_()
    hostile = replace(found, architecture="<script>\x1b[2J")
    assert "\x1b" not in repr(hostile)
    assert r"<th>&lt;script&gt;\x1b[2J</th>" in hostile._repr_html_()


@pytest.mark.slow
def test_without_labels_no_accuracy_is_measured(digits):
    images, labels = digits
    for given_images, more, reason in (
        (images, {}, "no labels"),
        ((images, labels), {"labels": False}, "labels=False"),
        ((images[:3], labels[:3]), {}, "too few images"),
    ):
        recorder = Recorder()
        options = {**QUICK, "flops": "60%", "dry_run": True, "calibration_images": 16, **more}
        found = mhacut.prune(DIGITS / "model", images=given_images, reporter=recorder, **options)
        assert found.dense.evaluation is found.slim.evaluation is None
        assert f"accuracy is not measured: {reason}" in recorder.messages
    assert found.output is None
    assert found.model()(images[:2]).shape == (2, 10)


def test_images_are_given_once(digits, few_digits):
    for verb, more in ((mhacut.prune, {"flops": "50%"}), (mhacut.evaluate, {})):
        with pytest.raises(UsageError, match="images and data_dir are both given"):
            verb(DIGITS / "model", images=digits, data_dir=few_digits, **more)
