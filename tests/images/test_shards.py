"""Tar files of samples are looked up by index, and give what timm's stream of them gives."""

from __future__ import annotations

import gc
import io
import json
import os
import tarfile
import warnings

import pytest
import torch
from PIL import Image
from timm.data import create_dataset
from torch.utils.data import IterableDataset
from torchvision.transforms.functional import to_tensor

import mhacut
from helpers.data import calibrated, evaluated
from mhacut.data import Preprocessing
from mhacut.data.named import NamedStream, open_named
from mhacut.data.shards import ShardedSamples
from mhacut.errors import CheckpointError, DataError
from mhacut.options.base import DataOptions

PLAIN = Preprocessing((3, 16, 16), (0.0,), (1.0,), "bicubic", 1.0, "center")
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
    with pytest.raises(DataError, match=r"any-0000.tar: sample 0: 'other' of its json is no label"):
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


def test_a_shard_that_is_cut_short_or_says_too_much_is_named(root, tmp_path):
    fewer = write_shards(tmp_path / "fewer", [("9", png(9), 0), ("8", png(8), 1)])
    (root / "any-0001.tar").write_bytes((fewer / "any-0001.tar").read_bytes())
    with pytest.raises(DataError, match=r"samples in 2 shards, 12 announced; a shard is truncated"):
        open_named(DataOptions(data_dir=root, dataset=NAME), "train", 3, check_classes=True)

    def labelled(text):
        samples = [("0", png(0), 0), ("1", png(1), 1)]
        texts = ['{"kind": 1}', text]
        folder = write_shards(
            tmp_path / "labels", samples, shards=1, label=lambda value: ("json", texts[value].encode())
        )
        return ShardedSamples([folder / "any-0000.tar"], ("png",), "kind")

    assert labelled('{"kind": -1}').targets == [1]  # as timm: a sample without a label
    for text in ('{"kind": 1e999}', "[" * 100_000):
        with pytest.raises(DataError, match="is no label"):
            labelled(text)
    plain = write_shards(tmp_path / "plain", [("0", png(0), 0)], shards=1)
    with pytest.raises(DataError, match="has no json to hold its 'kind'"):
        ShardedSamples([plain / "any-0000.tar"], ("png",), "kind")


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


def member(name: str, size: int, content: bytes = b"", kind: bytes = tarfile.REGTYPE) -> bytes:
    """A header that may say anything of its size, and content."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.type = size, kind
    return entry.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % 512)


@pytest.mark.parametrize(
    "content",
    [
        member("a.png", 512, bytes(512)) + member("b.png", -1024),  # back to itself, for ever
        member("a.png", 512, bytes(512)) + b"no header".ljust(512, b"x"),
        member("a.png", -(2**60)),
        member("a.png", 2**60),
        member("a.png", 4, b"data") + member("a.cls", 2**62, b"1"),
        member("a.png", -1024, kind=tarfile.XHDTYPE) * 2,
        member("a.png", 2**62, kind=tarfile.GNUTYPE_LONGNAME) * 2,
        member("a.png", 4, b"data") + member("a.cls", 2**30, b"1" * 2**11),
    ],
)
def test_shards_that_lie_about_sizes_are_refused_in_no_time(tmp_path, content):
    path = tmp_path / "a.tar"
    path.write_bytes(content + bytes(1024))
    with pytest.raises(DataError, match=r"a\.tar: "):
        ShardedSamples([path], ("png",), "")


def test_members_outside_and_links_are_neither_followed_nor_unpacked(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "a.tar").write_bytes(
        member("../evil.png", 4, b"evil") + member("../evil.cls", 1, b"2")
        + member("/etc/b.png", 0, kind=tarfile.SYMTYPE) + bytes(1024)
    )  # fmt: skip
    samples = ShardedSamples([inside / "a.tar"], ("png",), "")
    assert [(source.read(), label) for source, label in map(samples.__getitem__, range(len(samples)))] == [
        (b"evil", 2)
    ]
    assert list(tmp_path.rglob("*")) == [inside, inside / "a.tar"]


def renamed(root, name):
    """Shards of which the first has another name in ``_info.json``."""
    info = json.loads((root / "_info.json").read_text())
    for split in info["splits"].values():
        split["filenames"][0] = name
    (root / "_info.json").write_text(json.dumps(info))
    (root.parent / "outside.tar").write_bytes((root / "any-0000.tar").read_bytes())
    return DataOptions(data_dir=root, dataset=NAME)


@pytest.mark.parametrize("name", ["../outside.tar", "/tmp/outside.tar", 1, ["a.tar"], "a/../../outside.tar"])
def test_shards_outside_the_folder_are_refused(root, name):
    says = r"_info\.json names the shard .*; expected files in this folder"
    if not isinstance(name, str):  # some versions of timm refuse what is no text themselves
        says += "|cannot be opened: TypeError"
    with pytest.raises(DataError, match=says):
        open_named(renamed(root, name), "train", 3, check_classes=True)


def test_a_pattern_of_the_user_may_lead_anywhere(root):
    data = renamed(root, "../outside.tar")
    outside = root.parent / "outside.tar"
    for pattern in ("../outside.tar|6", f"{outside}|6", f"{root}/any-{{0000..0001}}.tar|12"):
        found = open_named(data, pattern, 3, check_classes=True)
        assert isinstance(found, ShardedSamples)
        assert len(found) == int(pattern.partition("|")[2])


@pytest.mark.parametrize("folder", ["", "."])
def test_no_shard_is_a_command(root, monkeypatch, folder):
    renamed(root, "pipe:touch ran")
    monkeypatch.chdir(root)
    opened = open_named(DataOptions(data_dir=folder, dataset=NAME), "train", 3, check_classes=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves shards open
        list(NamedStream(NAME, opened, None, PLAIN))
        del opened
        gc.collect()
    assert not (root / "ran").exists()


def test_a_name_that_no_file_can_have_ends_in_no_traceback(root):
    opened = open_named(renamed(root, "a" * 300 + ".tar"), "train", 3, check_classes=True)
    assert isinstance(opened, IterableDataset)  # which counts what arrives


@pytest.mark.parametrize("name", ["_info.json", "info.json", "any-0000.tar"])
def test_pipes_in_place_of_files_do_not_block(root, name):
    (root / name).unlink(missing_ok=True)
    os.mkfifo(root / name)
    with pytest.raises(DataError, match=f"{name}: is not a regular file"):
        open_named(DataOptions(data_dir=root, dataset=NAME), "train", 3, check_classes=True)


def test_a_label_beyond_all_classes_is_none(tmp_path):
    root = write_shards(tmp_path / "huge", [("a", png(3), 10**30), ("b", png(4), 1)])
    with pytest.raises(DataError, match="its cls is no label, found"):
        open_named(DataOptions(data_dir=root, dataset=NAME), "train", 3, check_classes=True)
