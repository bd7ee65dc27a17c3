"""Datasets that timm opens by name."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from helpers.data import PLAIN, calibrated, evaluated, levels
from mhacut.data import named
from mhacut.errors import DataError, UsageError
from mhacut.finetuning.images import StepBatches, training_images, training_loader
from mhacut.options.base import DataOptions
from mhacut.options.finetune import AugmentationOptions


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
    def set_to(opened):
        monkeypatch.setattr(named, "create_dataset", lambda *_, **__: opened)

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
    with pytest.raises(DataError, match="expected 12 images, read 11"):
        list(evaluated(PLAIN, **options))


def test_a_dataset_without_images_is_refused(opens) -> None:
    opens(Pictures(per_class=0))
    with pytest.raises(DataError, match="torch/any', split 'train': found no images"):
        calibrated(PLAIN, count=6, seed=0, dataset="torch/any", num_classes=3)
    with pytest.raises(DataError, match="torch/any', split 'val': found no images"):
        evaluated(PLAIN, dataset="torch/any", batch_size=5, workers=0, num_classes=3)


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


def test_labels_outside_the_head_are_refused_while_training(opens) -> None:
    silent = Pictures(classes=5)
    silent.classes = []
    opens(silent)
    options = {"num_classes": 3, "need_labels": True}
    for use_labels in (False, True):
        found = training_images(
            DataOptions(dataset="torch/any"), PLAIN, AugmentationOptions(), use_labels=use_labels, **options
        )
        batches = StepBatches(found.count, batch_size=20, parts=1, seed=0)
        parts = training_loader(found, batches, start=0, stop=1, mine=[0], workers=0, pin_memory=False)
        if not use_labels:
            assert len(next(parts).images) == 20
    with pytest.raises(DataError, match=r"found label 4, the model's head has 3 classes.*class_map"):
        next(parts)


class Columns:
    def iter_targets(self):
        yield {"labels": 1}["label"]


def test_a_dataset_without_a_column_of_labels_is_refused(opens) -> None:
    pictures = Pictures()
    pictures.reader = Columns()
    opens(pictures)
    given = {"dataset": "torch/any", "num_classes": 3}
    message = "^dataset='torch/any': its labels cannot be read: there is no 'label'; expected a column"
    with pytest.raises(DataError, match=message):
        calibrated(PLAIN, count=6, seed=0, **given)
    with pytest.raises(DataError, match=message):
        evaluated(PLAIN, batch_size=5, workers=0, **given)


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
