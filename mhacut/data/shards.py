"""Tar files of samples, as webdataset writes them, read by index instead of from their beginning.

timm streams them, and a stream can neither be shuffled as a whole, nor resumed at a step, nor shared among
processes image by image. Files on a disk can: their members are found once, by headers.
"""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mhacut.errors import DataError
from mhacut.runtime.files import is_no_file, stays_inside

_MEMBER = re.compile(r"((?:.*/)?[^./][^.]*)\.([^/]*)")
"""A sample's key, and the part of the sample in the member, as webdataset splits names."""

_DAMAGED = (tarfile.TarError, OSError, ValueError, OverflowError, MemoryError, RecursionError)
"""Exceptions of :mod:`tarfile` for files that are damaged, or lie about the sizes of their members."""
_MAX_LABEL = 2**31
_MAX_LABEL_BYTES = 2**20
"""Number of bytes that are read of a label, or of the json that holds it."""


class ShardedSamples(Dataset[tuple[io.BytesIO, int]]):
    """Encoded image and label of every sample that has an image, in the order of the shards."""

    def __init__(self, shards: list[Path], image_endings: tuple[str, ...], label_field: str) -> None:
        """Index ``shards``; reads headers and labels, no images.

        Args:
            shards: uncompressed tar files.
            image_endings: endings of members that are images, the likeliest first.
            label_field: field of the member ``json`` with the label; empty for the member ``cls``.

        Raises:
            DataError: a file is no tar file, or a label no number.
        """
        self.shards = shards
        self.targets: list[int] = []
        """Labels; -1 where a sample has none."""
        self.left_out = 0
        """Number of samples whose json marks them as unlabelled."""
        self._places = array("q")  # shard, offset, size of every image: millions of them fit
        for number, shard in enumerate(shards):
            try:
                self._index(number, shard, image_endings, label_field)
            except _DAMAGED as error:
                raise DataError(f"{shard}: cannot be read as a tar file: {error}") from error

    def _index(self, number: int, shard: Path, image_endings: tuple[str, ...], label_field: str) -> None:
        # Members of one sample stand side by side.
        key, members = "", dict[str, tarfile.TarInfo]()
        with tarfile.open(shard, "r:") as tar:
            for member in (*_members(tar), None):
                parts = None if member is None or not member.isfile() else _MEMBER.fullmatch(member.name)
                if member is not None and parts is None:
                    continue
                if parts is None or parts[1] != key:
                    self._add(number, tar, key, members, image_endings, label_field)
                    key, members = "" if parts is None else parts[1], {}
                if parts is not None and member is not None:
                    members[parts[2].lower()] = member

    def _add(
        self,
        number: int,
        tar: tarfile.TarFile,
        key: str,
        members: dict[str, tarfile.TarInfo],
        image_endings: tuple[str, ...],
        label_field: str,
    ) -> None:
        image = next((members[ending] for ending in image_endings if ending in members), None)
        if image is None:
            return
        ending = "json" if label_field else "cls"
        label = -1
        if ending in members:
            held = tar.extractfile(members[ending])
            text = b"" if held is None else held.read(_MAX_LABEL_BYTES)
            try:
                label = int(json.loads(text)[label_field] if label_field else text)
                if abs(label) > _MAX_LABEL:
                    raise OverflowError
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                where = f"{label_field!r} of its json" if label_field else "its cls"
                raise DataError(
                    f"{self.shards[number]}: sample {key}: {where} is no label, found {text[:40]!r}"
                ) from None
            if label < 0 and label_field:  # timm's mark of unlabelled samples, which it leaves out too
                self.left_out += 1
                return
        elif label_field:
            raise DataError(f"{self.shards[number]}: sample {key}: has no json to hold its {label_field!r}")
        self._places.extend((number, image.offset_data, image.size))
        self.targets.append(label)

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[io.BytesIO, int]:
        number, offset, size = self._places[3 * index : 3 * index + 3]
        with open(self.shards[number], "rb") as shard:
            shard.seek(offset)
            return io.BytesIO(shard.read(size)), self.targets[index]


def _members(tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a shard, each of which must lie after the one before, or reading would not end."""
    end = 0
    for member in tar:
        if member.size < 0 or member.offset_data < end:
            raise tarfile.ReadError(f"member {member.name!r:.100} lies before the one that precedes it")
        end = member.offset_data
        yield member
    # To tarfile a header that it cannot read is the end, as of Python 3.13 one with a negative size, too.
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError(f"the header at byte {tar.offset} is damaged")


def by_index(opened: Any, asked: str) -> ShardedSamples | None:
    """Return the samples of timm's stream ``opened``; None where they cannot be indexed.

    That is the case if the shards are no plain tar files on this machine, or the labels no single number.

    Args:
        opened: the stream.
        asked: the split that was asked for: a name in ``_info.json``, or a pattern of names of shards, which
            may lie anywhere.

    Raises:
        DataError: a shard is damaged or no file, or ``_info.json`` names one outside its folder.
    """
    reader = getattr(opened, "reader", None)
    split: Any = getattr(reader, "split_info", None)
    names = getattr(split, "filenames", None)
    if reader is None or not names or not hasattr(split, "alt_label"):
        return None
    root = Path(getattr(reader, "root", None) or "")
    named = {name for name in names if isinstance(name, str) and stays_inside(name)}
    if len(named) < len(names):
        named |= _pattern(asked)
    for name in names:
        if not isinstance(name, str) or name not in named:
            raise DataError(
                f"{root}: _info.json names the shard {name!r:.200}; expected files in this folder"
            )
        if is_no_file(root / name):
            raise DataError(f"{root / name}: is not a regular file")
    shards = [root / name for name in names]
    plain = all(shard.suffix == ".tar" and os.path.isfile(shard) for shard in shards)
    if not plain or reader.remap_class or getattr(reader, "target_keys", None):
        return None
    endings = tuple(str(reader.input_key).lower().split(";"))
    samples = ShardedSamples(shards, endings, reader.target_key or split.alt_label)
    announced = int(split.num_samples or 0)
    found = len(samples) + samples.left_out
    if announced and announced != found:
        raise DataError(
            f"{shards[0].parent}: {found} samples in {len(shards)} shards, {announced} announced; a shard is "
            "truncated or damaged, or _info.json belongs to other shards"
        )
    return samples


def _pattern(asked: str) -> set[str]:
    """Shards that the user named: timm takes a pattern and, behind a bar, the number of samples."""
    shardlists = importlib.import_module("webdataset.shardlists")  # an extra, which the stream has imported
    return set(shardlists.expand_urls(asked.partition("|")[0]))
