"""Datasets that timm opens by name."""

from __future__ import annotations

import gc
import io
import json
import tarfile
import warnings

import pytest
import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset
from torchvision.transforms.functional import to_tensor

import mhacut
from helpers.data import PLAIN, calibrated, evaluated, levels
from mhacut.data import named
from mhacut.data.named import NamedStream, ShardedSamples, open_named
from mhacut.errors import CheckpointError, DataError, UsageError
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
    """Makes timm open the given dataset whatever its name."""

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
    with pytest.raises(DataError, match="12 images were announced, 11 arrived; no accuracy"):
        list(evaluated(PLAIN, **options))


def test_a_dataset_without_images_is_refused(opens) -> None:
    opens(Pictures(per_class=0))
    with pytest.raises(DataError, match="torch/any', split 'train': holds no images"):
        calibrated(PLAIN, count=6, seed=0, dataset="torch/any", num_classes=3)
    with pytest.raises(DataError, match="torch/any', split 'val': holds no images"):
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
    with pytest.raises(DataError, match=r"found label 4, the model's head has 3 classes.*labels=False"):
        next(parts)


class Columns:
    """A reader of timm's, whose dataset has no column of labels."""

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


# -- tar files of samples --

NAME = "wds/any"


def png(level: int, size: int = 16) -> bytes:
    held = io.BytesIO()
    Image.new("RGB", (size, size), (level,) * 3).save(held, "PNG")
    return held.getvalue()


def write_shards(root, samples, *, shards=2, ending=".tar", label=lambda value: ("cls", str(value).encode())):
    """(key, image, label) in turn over ``shards`` files; train and val are the same ones."""
    root.mkdir(parents=True, exist_ok=True)
    names = [f"any-{number:04d}{ending}" for number in range(shards)]
    for number, name in enumerate(names):
        with tarfile.open(root / name, "w:gz" if ending.endswith("gz") else "w") as tar:
            for key, image, value in samples[number::shards]:
                for member, content in ((f"{key}.PNG", image), (f"{key}.{label(value)[0]}", label(value)[1])):
                    entry = tarfile.TarInfo(member)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    lengths = [len(samples[number::shards]) for number in range(shards)]
    split = {"num_samples": len(samples), "filenames": names, "shard_lengths": lengths}
    splits = {name: {"name": name, **split} for name in ("train", "val")}
    (root / "_info.json").write_text(json.dumps({"splits": splits}))
    return root


@pytest.fixture
def root(tmp_path):
    samples = [(f"part.d/{index:03d}", png(20 * (index % 3) + index), index % 3) for index in range(12)]
    return write_shards(tmp_path / "shards", samples)


def test_they_are_what_timm_streams(root):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves shards open
        streamed = create_dataset(NAME, root=str(root), split="train", is_training=False)
        assert isinstance(streamed, IterableDataset)
        expected = list(streamed)
        del streamed
        gc.collect()
    found = open_named(DataOptions(data_dir=root, dataset=NAME), "train", 3, check_classes=True)
    assert isinstance(found, ShardedSamples)
    assert found.targets == [label for _, label in expected]
    for (picture, label), (source, own) in zip(expected, (found[i] for i in range(12)), strict=True):
        assert own == label
        assert torch.equal(to_tensor(Image.open(source)), to_tensor(picture))


def test_calibration_and_evaluation_choose_among_all_of_them(root):
    chosen = calibrated(PLAIN, count=6, seed=0, dataset=NAME, data_dir=root, num_classes=3)
    assert chosen.labels.bincount().tolist() == [2, 2, 2]
    options = {"dataset": NAME, "data_dir": root, "batch_size": 5, "workers": 0, "num_classes": 3}
    parts = [
        torch.cat([labels for _, labels in evaluated(PLAIN, part=(part, 2), **options)]) for part in (0, 1)
    ]
    assert torch.cat(parts).bincount().tolist() == [4, 4, 4]


def test_labels_may_stand_in_json(tmp_path):
    root = write_shards(
        tmp_path / "shards",
        [(f"{index}", png(index), index) for index in range(3)],
        shards=1,
        label=lambda value: ("json", json.dumps({"kind": value}).encode()),
    )
    samples = ShardedSamples([root / "any-0000.tar"], ("jpg", "png"), "kind")
    assert samples.targets == [0, 1, 2]
    with pytest.raises(DataError, match=r"any-0000.tar: .*: sample 0: 'other' of its json is no label"):
        ShardedSamples([root / "any-0000.tar"], ("jpg", "png"), "other")


def test_what_is_not_a_sample_is_told_or_left_out(tmp_path):
    root = write_shards(tmp_path / "bad", [("0", png(1), "three")], shards=1)
    with pytest.raises(DataError, match=r"sample 0: its cls is no label, found b'three'"):
        open_named(DataOptions(data_dir=root, dataset=NAME), "train", 3, check_classes=True)
    (root / "any-0000.tar").write_bytes(b"no tar file at all" * 100)
    with pytest.raises(DataError, match=r"any-0000.tar: cannot be read as a tar file"):
        open_named(DataOptions(data_dir=root, dataset=NAME), "train", 3, check_classes=True)
    root = write_shards(tmp_path / "text", [("0", png(1), 0), ("1", png(2), 1)], shards=1)
    assert len(ShardedSamples([root / "any-0000.tar"], ("jpg",), "")) == 0


def test_fine_tuning_on_them_knows_them_again(tiny_vit, tmp_path):
    slim = tmp_path / "slim.safetensors"
    mhacut.prune(
        tiny_vit.path,
        flops="60%",
        model=tiny_vit.architecture,
        model_args=tiny_vit.args,
        output=slim,
        calibration_images=8,
        latency=False,
    )
    samples = [(f"{index:03d}", png(8 * index, 32), index % 7) for index in range(28)]
    root = write_shards(tmp_path / "shards", samples)
    asked = {"dataset": NAME, "data_dir": root, "batch_size": 7, "workers": 0}
    whole = mhacut.finetune(slim, output=tmp_path / "whole", epochs=2, **asked)
    assert whole.steps == 8
    assert whole.data == "28 images of wds/any train (with labels)"
    samples[0] = ("000", png(0, 32), 5)
    write_shards(root, samples)
    with pytest.raises(CheckpointError, match=r"training images .* validation images"):
        mhacut.finetune(resume=whole.folder)


def test_compressed_shards_stay_a_stream(tmp_path):
    samples = [(f"{index:03d}", png(8 * index, 32), index % 7) for index in range(14)]
    root = write_shards(tmp_path / "shards", samples, ending=".tar.gz")
    assert isinstance(
        open_named(DataOptions(data_dir=root, dataset=NAME), "val", 7, check_classes=True), IterableDataset
    )


def test_a_shard_that_is_cut_short_is_told(root, tmp_path):
    fewer = write_shards(tmp_path / "fewer", [("9", png(9), 0), ("8", png(8), 1)])
    (root / "any-0001.tar").write_bytes((fewer / "any-0001.tar").read_bytes())
    with pytest.raises(DataError, match=r"samples in 2 shards, 12 announced; one is truncated"):
        open_named(DataOptions(data_dir=root, dataset=NAME), "train", 3, check_classes=True)


@pytest.mark.parametrize("folder", ["", "."])
def test_no_shard_is_a_command(root, monkeypatch, folder):
    info = json.loads((root / "_info.json").read_text())
    info["splits"]["train"]["filenames"][0] = "pipe:touch ran"
    (root / "_info.json").write_text(json.dumps(info))
    monkeypatch.chdir(root)
    opened = open_named(DataOptions(data_dir=folder, dataset=NAME), "train", 3, check_classes=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves shards open
        list(NamedStream(NAME, opened, None, PLAIN))
        del opened
        gc.collect()
    assert not (root / "ran").exists()
