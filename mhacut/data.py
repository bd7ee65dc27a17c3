"""Images for calibration and evaluation: folders, timm's named datasets, or synthetic ones.

timm's own folder reader hides missing data: a missing split silently becomes the whole root, an empty class
folder vanishes and shifts the classes after it, a corrupt image is replaced by its neighbour. Folders are
therefore scanned and read here; transforms and named datasets are timm's.
"""

from __future__ import annotations

import importlib.util
import math
import os
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.utils.misc import natural_key
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from mhacut.errors import DataError, UsageError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".ppm", ".pgm"})
"""Files that count as images, in lower case."""
SPLIT_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "eval", "evaluation"),
}
"""Folder names tried for a split, in this order; any other split has only its own name."""
SMALL_IMAGE = 64
"""Pixels. Up to this size images are taken whole unless the model says otherwise for this very size."""

_INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
_CROP_MODES = ("center", "squash", "border")
_UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError)
"""What Pillow raises for files that are no images, cut short, or absurdly large."""
_EXTRAS = {
    "hfds": ("datasets", "mhacut[hfds]"),
    "hfids": ("datasets", "mhacut[hfds]"),
    "wds": ("webdataset", "mhacut[wds]"),
    "tfds": ("tensorflow_datasets", "tensorflow-datasets"),
}
"""Per prefix of a dataset name: the module it needs, and what to install for it."""
_TOLD = 10


# --- preprocessing ---


@dataclass(frozen=True)
class Preprocessing:
    """How a picture becomes a model's input."""

    input_size: tuple[int, int, int]
    """[C, H, W] in pixels."""
    mean: tuple[float, ...]
    """Per channel, subtracted from pixels in 0..1."""
    std: tuple[float, ...]
    """Per channel, divides what is left."""
    interpolation: str
    """Of resizing: ``bicubic``, ``bilinear``, ..."""
    crop_pct: float
    """Input size over the size images are resized to before the crop; 1.0 crops nothing off a square."""
    crop_mode: str
    """``center``, ``squash`` or ``border``, as in timm."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "input_size", tuple(int(size) for size in self.input_size))
        if len(self.input_size) != 3 or min(self.input_size) < 1 or self.input_size[0] not in (1, 3):
            raise DataError(
                f"input size {self.input_size}: expected (1 or 3 channels, height, width) (--img-size)"
            )
        channels = self.input_size[0]
        for name in ("mean", "std"):
            values = tuple(float(value) for value in getattr(self, name))
            values = values * channels if len(values) == 1 else values
            low = 0.0 if name == "std" else -math.inf
            if len(values) != channels or not all(low < value < math.inf for value in values):
                kind = "positive " if name == "std" else ""
                raise DataError(
                    f"{name} {getattr(self, name)}: expected {channels} {kind}number(s) for "
                    f"{channels} channel(s), in units of a pixel range of 0..1 (--{name})"
                )
            object.__setattr__(self, name, values)
        object.__setattr__(self, "crop_pct", float(self.crop_pct))
        if not 0 < self.crop_pct <= 1:
            raise DataError(f"crop_pct {self.crop_pct}: expected above 0, at most 1 (--crop-pct)")
        if self.interpolation not in _INTERPOLATIONS:
            raise DataError(
                f"interpolation {self.interpolation!r}: expected one of {', '.join(_INTERPOLATIONS)} "
                "(--interpolation)"
            )
        if self.crop_mode not in _CROP_MODES:
            raise DataError(f"crop_mode {self.crop_mode!r}: expected one of {', '.join(_CROP_MODES)}")

    @classmethod
    def resolve(
        cls,
        pretrained_cfg: Mapping[str, Any],
        model_input_size: tuple[int, int, int] | None,
        *,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        crop_pct: float | None = None,
        interpolation: str | None = None,
        img_size: int | None = None,
    ) -> Preprocessing:
        """What timm's record of a model says, made to fit the model, with explicit values on top.

        The model's own image size wins over the record's. ``crop_pct`` is, in this order: the explicit value;
        the record's, unless the model is small (64 pixels or less) and the record speaks of another image
        size; 1.0 for a small model; timm's default. So a ViT built at 32 pixels from the record of a
        224-pixel model takes a CIFAR image as it is: no resize, no crop.

        >>> made_for_224 = {"input_size": (3, 224, 224), "crop_pct": 0.9}
        >>> Preprocessing.resolve(made_for_224, (3, 224, 224)).crop_pct
        0.9
        >>> Preprocessing.resolve(made_for_224, (3, 32, 32)).crop_pct
        1.0

        Args:
            pretrained_cfg: timm's ``pretrained_cfg``, or what :meth:`to_json` gave.
            model_input_size: [C, H, W] that the model was built for; None if it does not say.
            mean: per channel, or one for all.
            std: likewise.
            crop_pct: in (0, 1].
            interpolation: by its name in timm.
            img_size: height and width in pixels.

        Raises:
            UsageError: the explicit values make no sense.
            DataError: the record does not.
        """
        explicit = {"mean": mean, "std": std, "crop_pct": crop_pct, "interpolation": interpolation}
        stated = pretrained_cfg.get("input_size")
        size = tuple(model_input_size or stated or (3, 224, 224))
        if len(size) != 3:
            raise DataError(f"input size {size}: expected (channels, height, width)")
        if img_size is not None:
            size = (size[0], img_size, img_size)
        # Explicit values are laid over the result: timm would assert on a wrong number of channels.
        config = resolve_data_config({"input_size": size}, pretrained_cfg=dict(pretrained_cfg))
        for name, value in explicit.items():
            if value is not None:
                config[name] = value
        small = max(size[1:]) <= SMALL_IMAGE
        says_so = pretrained_cfg.get("crop_pct") is not None and (
            stated is None or tuple(stated)[1:] == tuple(size[1:])
        )
        if crop_pct is None and small and not says_so:
            config["crop_pct"] = 1.0
        if size[0] == 1 and not pretrained_cfg.get("mean") and mean is None:
            config["mean"] = (0.5,)
        if size[0] == 1 and not pretrained_cfg.get("std") and std is None:
            config["std"] = (0.5,)
        try:
            return cls(**{name: config[name] for name in cls.__dataclass_fields__})
        except DataError as error:
            if img_size is not None or any(value is not None for value in explicit.values()):
                raise UsageError(str(error)) from None
            raise

    def to_json(self) -> dict[str, Any]:
        """Plain values, under the names of timm's ``pretrained_cfg``, that :meth:`from_json` reads back."""
        return {
            "input_size": list(self.input_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "interpolation": self.interpolation,
            "crop_pct": self.crop_pct,
            "crop_mode": self.crop_mode,
        }

    @classmethod
    def from_json(cls, document: Mapping[str, Any]) -> Preprocessing:
        """What :meth:`to_json` wrote; the document may come from an untrusted file.

        Raises:
            DataError: anything that is not such a document.
        """
        if not isinstance(document, Mapping) or set(document) != set(cls.__dataclass_fields__):
            raise DataError(f"preprocessing: expected {', '.join(cls.__dataclass_fields__)}")
        try:
            return cls(**document)
        except (TypeError, ValueError) as error:
            raise DataError(f"preprocessing: {error}") from None

    def transform(self) -> Callable[[Image.Image], Tensor]:
        """The evaluation transform of timm: picture to normalised [C, H, W] float32."""
        made: Callable[[Image.Image], Tensor] = create_transform(
            input_size=self.input_size,
            is_training=False,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return made


# --- folders ---


@dataclass(frozen=True)
class _Folder:
    """The images of one split, listed but not opened."""

    path: Path
    images: tuple[str, ...]
    """Relative to ``path``, with forward slashes, sorted."""
    names: tuple[str, ...]
    """Class folder of each image; empty text for images that lie in no class folder."""
    classes: tuple[str, ...]
    """Class folders in timm's order (2 before 10), empty ones included."""

    @property
    def empty(self) -> tuple[str, ...]:
        """Class folders without an image."""
        held = set(self.names)
        return tuple(name for name in self.classes if name not in held)


def has_split(data_dir: str | os.PathLike[str] | None, dataset: str | None, split: str) -> bool:
    """Whether images of ``split`` can be asked for: a folder of that name, or any named dataset."""
    if dataset is not None:
        return True
    return data_dir is not None and _split_folder(Path(data_dir), split) is not None


def _split_folder(root: Path, split: str) -> Path | None:
    """The folder of a split under its name or an alias of it."""
    synonyms = next((names for names in SPLIT_NAMES.values() if split in names), ())
    for name in (split, *synonyms):
        if (root / name).is_dir():
            return root / name
    return None


def _is_split_name(name: str) -> bool:
    return name in ("test", "testing") or any(name in names for names in SPLIT_NAMES.values())


def _subfolders(root: Path) -> list[str]:
    """Names of the visible folders in ``root``, in timm's order of classes."""
    names = [entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    # natural_key alone leaves the order of "a" and "A" to the file system
    return sorted(names, key=lambda name: (natural_key(name), name))


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _TOLD} more" if len(names) > _TOLD else ""
    return (", ".join(names[:_TOLD]) + more) or "none"


def _find_folder(root: Path, split: str, flag: str) -> Path:
    """The folder to read for ``split``: its own, or ``root`` itself if that holds no splits at all.

    Raises:
        DataError: no such directory, or a root of other splits.
    """
    if not root.exists():
        raise DataError(f"{root}: no such directory (--data-dir)")
    if not root.is_dir():
        raise DataError(f"{root}: is a file; --data-dir expects a directory with images")
    folder = _split_folder(root, split)
    if folder is not None:
        return folder
    folders = _subfolders(root)
    if any(_is_split_name(name) for name in folders):
        raise DataError(
            f"{root}: no split {split!r}; folders there: {_listed(folders)}. Choose one with {flag}"
        )
    return root


def _scan(folder: Path) -> _Folder:
    """Every image under ``folder``; the first folder on the way to an image is its class.

    Hidden files and folders (``._x.jpg``, ``.ipynb_checkpoints``) are not looked at.
    """
    found: list[tuple[str, str]] = []
    for at, folders, files in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(at).relative_to(folder)
        name = inside.parts[0] if inside.parts else ""
        for file in files:
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in IMAGE_SUFFIXES:
                found.append(((inside / file).as_posix(), name))
    # by name, so that no choice depends on the order in which a file system lists files
    found.sort()
    images, names = tuple(image for image, _ in found), tuple(name for _, name in found)
    return _Folder(folder, images, names, tuple(_subfolders(folder)))


def _read_class_map(path: Path, num_classes: int | None) -> dict[str, int]:
    """Class name to index: one name a line, in the order of the model's head.

    Raises:
        DataError: unreadable, a name twice, or not as many names as the head has classes.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path}: class map cannot be read: {error} (--class-map)") from None
    while lines and not lines[-1].strip():
        lines.pop()
    names = [line.strip() for line in lines]
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise DataError(
            f"{path}: class map names {twice[0]!r} twice; expected one class a line (--class-map)"
        )
    if num_classes is not None and len(names) != num_classes:
        raise DataError(
            f"{path}: class map names {len(names)} classes, the model's head has {num_classes}; "
            "expected one class a line in the head's order (--class-map)"
        )
    return {name: index for index, name in enumerate(names)}


def _label_images(folder: _Folder, class_map: Path | None, num_classes: int | None, hint: str) -> list[int]:
    """The class index of every image.

    Raises:
        DataError: images outside class folders, an empty class folder, or classes that are not the head's.
    """
    if "" in folder.names:
        stray = folder.images[folder.names.index("")]
        raise DataError(
            f"{folder.path}: {stray} lies beside the class folders {_listed(folder.classes)}; "
            f"expected every image in the folder of its class{hint}"
        )
    if class_map is not None:
        index = _read_class_map(class_map, num_classes)
        unknown = [name for name in folder.classes if name not in index and name not in folder.empty]
        if unknown:
            raise DataError(
                f"{folder.path}: class folders not in {class_map}: {_listed(unknown)} (--class-map)"
            )
        return [index[name] for name in folder.names]
    if folder.empty:
        raise DataError(
            f"{folder.path}: class folders without images: {_listed(folder.empty)}; without them the classes "
            "after them would shift. Fill them, or name the classes in the head's order with --class-map"
        )
    if num_classes is not None and len(folder.classes) != num_classes:
        raise DataError(
            f"{folder.path}: {len(folder.classes)} class folders ({_listed(folder.classes)}), "
            f"the model's head has {num_classes} classes. Name the classes in the head's order with "
            f"--class-map{hint}"
        )
    index = {name: number for number, name in enumerate(folder.classes)}
    return [index[name] for name in folder.names]


# --- reading ---


def _open_image(file: Any, channels: int) -> Image.Image:
    """The decoded picture as RGB or grey.

    Raises:
        OSError: or another of ``_UNREADABLE``.
    """
    with Image.open(file) as opened:
        opened.load()
        picture: Image.Image = opened
        if picture.mode.startswith("I"):
            # 16 bits: Pillow's own conversion would clip everything above 255 to white
            picture = Image.fromarray(
                (np.asarray(picture).astype(np.int64) >> 8).clip(0, 255).astype(np.uint8)
            )
        elif picture.mode == "F":
            raise ValueError("pixels are floating point, their range is unknown")
        elif picture.mode == "P" and "transparency" in picture.info:
            picture = picture.convert("RGBA")
        return picture.convert("RGB" if channels == 3 else "L")


@dataclass(frozen=True)
class _Unreadable:
    """An image that could not be read, in place of its tensor."""

    file: str
    reason: str


_Sample = tuple["Tensor | _Unreadable", int]


class _ImageFiles(Dataset[_Sample]):
    """Images of a folder by index, through the transform."""

    def __init__(
        self, root: Path, images: Sequence[str], labels: Sequence[int], preprocessing: Preprocessing
    ) -> None:
        self.root, self.images, self.labels = root, images, labels
        self._channels, self._transform = preprocessing.input_size[0], preprocessing.transform()

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> _Sample:
        path = self.root / self.images[index]
        try:
            picture = _open_image(path, self._channels)
        except _UNREADABLE as error:
            return _Unreadable(str(path), _reason(error, path)), self.labels[index]
        return self._transform(picture), self.labels[index]


def _reason(error: BaseException, path: object = "") -> str:
    """Pillow's message without the path, which is told anyway."""
    return str(error).replace(f" {str(path)!r}", "") or type(error).__name__


# --- calibration ---


@dataclass(frozen=True)
class CalibrationImages:
    """What calibration and search look at."""

    images: Tensor
    """[n, C, H, W] float32, normalised."""
    labels: Tensor | None
    """[n] int64, indices into the model's head; None without labels."""
    description: str
    """What they are, for readers: ``256 of 50000 images under train/ (with labels)``."""


def calibration_images(
    preprocessing: Preprocessing,
    *,
    count: int,
    seed: int,
    data_dir: Path | None = None,
    dataset: str | None = None,
    class_map: Path | None = None,
    split: str = "train",
    num_classes: int | None = None,
    use_labels: bool = True,
) -> CalibrationImages:
    """``count`` images to calibrate and search on, or all there are if fewer.

    They are a random choice with equally many of each class, drawn with ``seed``: it depends on the names of
    the files, not on the order in which a file system lists them. With neither ``data_dir`` nor ``dataset``
    they are :func:`synthetic_images`.

    Args:
        preprocessing: of the model.
        count: how many.
        seed: of the choice, or of the synthesis.
        data_dir: a folder of splits (``train/``, ``val/``), one split with a folder per class, or a flat
            folder of unlabelled images; with ``dataset``, where that keeps its files.
        dataset: a dataset as timm names it, ``hfds/NAME``, ``wds/NAME``, ``tfds/NAME`` or ``torch/NAME``.
        class_map: text file, one class name a line, in the order of the model's head.
        split: of the data.
        num_classes: of the model's head, to check the data against.
        use_labels: False leaves labels out, and asks nothing of class folders.

    Raises:
        DataError: images or labels that are missing, unreadable, or do not fit the model.
        UsageError: ``count`` below 1.
    """
    if count < 1:
        raise UsageError(f"--calibration-images {count}: expected at least 1")
    if dataset is not None:
        return _calibration_from_dataset(
            preprocessing, count, seed, data_dir, dataset, class_map, split, num_classes, use_labels
        )
    if data_dir is None:
        _, height, width = preprocessing.input_size
        images = synthetic_images(
            count, preprocessing.input_size, preprocessing.mean, preprocessing.std, seed
        )
        return CalibrationImages(images, None, f"{count} synthetic 1/f images ({height}x{width})")
    folder = _scan(_find_folder(data_dir, split, "--train-split"))
    if not folder.images:
        raise DataError(
            f"{folder.path}: no images; files that count end in {', '.join(sorted(IMAGE_SUFFIXES))}. "
            "Without --data-dir, synthetic images serve"
        )
    labelled = use_labels and any(folder.names)
    labels = [-1] * len(folder.images)
    if labelled:
        labels = _label_images(folder, class_map, num_classes, ", or leave labels out with --no-labels")
    files = _ImageFiles(folder.path, folder.images, labels, preprocessing)
    where = f"{folder.path.name}/"
    return _choose(files, folder.names, count, seed, where, labelled)


def _choose(
    files: Dataset[_Sample], groups: Sequence[object], count: int, seed: int, where: str, labelled: bool
) -> CalibrationImages:
    """The first ``count`` readable images in :func:`_balanced_order`."""
    images: list[Tensor] = []
    labels: list[int] = []
    bad: list[_Unreadable] = []
    for index in _balanced_order(groups, seed):
        image, label = files[index]
        if isinstance(image, _Unreadable):
            bad.append(image)
            continue
        images.append(image)
        labels.append(label)
        if len(images) == count:
            break
    if 2 * len(images) < min(count, len(groups)):
        raise DataError(
            f"{where}: {len(bad)} of {len(bad) + len(images)} images tried cannot be read, {len(images)} are "
            f"left of the {min(count, len(groups))} needed. First: {bad[0].file}: {bad[0].reason}"
        )
    told = f"{len(images)} of {len(groups)} images under {where} ({'with' if labelled else 'without'} labels)"
    if bad:
        told += f", {len(bad)} unreadable left out (first {bad[0].file}: {bad[0].reason})"
    return CalibrationImages(
        torch.stack(images).float(), torch.tensor(labels, dtype=torch.int64) if labelled else None, told
    )


def _balanced_order(groups: Sequence[object], seed: int) -> Iterator[int]:
    """All indices in a random order in which every group comes up equally often for as long as it lasts.

    >>> order = list(_balanced_order(["a"] * 6 + ["b"] * 2, seed=0))
    >>> sorted(order), sum(index >= 6 for index in order[:4])
    ([0, 1, 2, 3, 4, 5, 6, 7], 2)
    """
    generator = torch.Generator().manual_seed(seed)
    members: dict[object, list[int]] = {}
    for index in torch.randperm(len(groups), generator=generator).tolist():
        members.setdefault(groups[index], []).append(index)
    for turn in range(max(map(len, members.values()), default=0)):
        left = [indices[turn] for indices in members.values() if turn < len(indices)]
        for position in torch.randperm(len(left), generator=generator).tolist():
            yield left[position]


def synthetic_images(
    count: int, input_size: tuple[int, int, int], mean: Sequence[float], std: Sequence[float], seed: int
) -> Tensor:
    """Noise with the statistics of photographs, [count, C, H, W] float32, normalised.

    Amplitudes fall with spatial frequency as 1/f, the best known law of natural images (Field 1987), and the
    colour channels agree to nine tenths. Pixels have mean 0.5 and deviation 0.25 before they are clipped to
    0..1 and normalised. Image i depends on ``seed`` and i, not on ``count``.
    """
    channels, height, width = input_size
    rows, columns = torch.fft.fftfreq(height), torch.fft.rfftfreq(width)
    frequency = (rows[:, None] ** 2 + columns[None, :] ** 2).sqrt()
    # The mean of an image varies as its coarsest wave does: bright and dark pictures both exist.
    frequency[0, 0] = 1 / max(height, width)
    amplitude = 1 / frequency
    all_columns = torch.fft.fftfreq(width)
    power = 1 / (rows[:, None] ** 2 + all_columns[None, :] ** 2).clamp_min(1 / max(height, width) ** 2)
    amplitude = amplitude / power.mean().sqrt()  # white noise of deviation 1 keeps deviation 1
    generator = torch.Generator().manual_seed(seed)
    offset = torch.tensor(tuple(mean)).view(-1, 1, 1)
    scale = torch.tensor(tuple(std)).view(-1, 1, 1)
    images = torch.empty(count, channels, height, width)
    for image in images:
        white = torch.randn(channels + 1, height, width, generator=generator)
        pink = torch.fft.irfft2(torch.fft.rfft2(white) * amplitude, s=(height, width))
        mixed = math.sqrt(0.9) * pink[:1] + math.sqrt(0.1) * pink[1:]
        image.copy_((0.5 + 0.25 * mixed).clamp(0, 1).sub(offset).div(scale))
    return images


# --- evaluation ---


class EvaluationLoader:
    """Batches of (images [B, C, H, W], labels [B]) that never leave an image out in silence.

    It can be iterated more than once. At the end of a pass it raises :class:`DataError` if an image could not
    be read, so that no accuracy is worked out on what happened to be left.
    """

    def __init__(
        self,
        samples: Dataset[_Sample] | IterableDataset[_Sample],
        *,
        total: int,
        expected: int | None,
        batch_size: int,
        workers: int,
        num_classes: int | None,
        description: str,
    ) -> None:
        self.description = description
        """What is read, for readers."""
        self.images = total
        """How many images a pass gives; 0 if a stream does not say."""
        self._expected = expected
        self._batch_size, self._num_classes = batch_size, num_classes
        self._loader: DataLoader[_Sample] = DataLoader(
            samples, batch_size=batch_size, num_workers=workers, collate_fn=_collate
        )

    def __len__(self) -> int:
        """Batches of a pass; 0 if a stream does not say."""
        return math.ceil(self.images / self._batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        bad: list[_Unreadable] = []
        seen = 0
        for images, labels, unreadable in self._loader:
            bad += unreadable
            seen += len(labels)
            if not len(labels):
                continue
            low, high = int(labels.min()), int(labels.max())
            if low < 0 or (self._num_classes is not None and high >= self._num_classes):
                raise DataError(
                    f"{self.description}: found label {low if low < 0 else high}, the model's head has "
                    f"{self._num_classes} classes, counted from 0. Map the classes with --class-map"
                )
            yield images, labels
        if bad:
            raise DataError(
                f"{self.description}: {len(bad)} of {seen + len(bad)} images cannot be read, so no accuracy "
                f"is given. First: {bad[0].file}: {bad[0].reason}. Repair or remove them"
            )
        if self._expected is not None and seen != self._expected:
            raise DataError(
                f"{self.description}: {seen} images came of {self._expected} announced; no accuracy is given"
            )
        if not seen:
            raise DataError(f"{self.description}: no images came")


def _collate(samples: Sequence[_Sample]) -> tuple[Tensor, Tensor, list[_Unreadable]]:
    bad = [image for image, _ in samples if isinstance(image, _Unreadable)]
    good = [(image, label) for image, label in samples if not isinstance(image, _Unreadable)]
    images = torch.stack([image for image, _ in good]) if good else torch.empty(0)
    return images, torch.tensor([label for _, label in good], dtype=torch.int64), bad


def evaluation_loader(
    preprocessing: Preprocessing,
    *,
    data_dir: Path | None = None,
    dataset: str | None = None,
    batch_size: int,
    workers: int,
    split: str = "val",
    num_classes: int | None,
    class_map: Path | None = None,
    limit: int | None = None,
) -> EvaluationLoader:
    """Labelled images of ``split`` to measure accuracy on.

    Args:
        preprocessing: of the model.
        data_dir: a folder of splits, or one split with a folder per class.
        dataset: a dataset as timm names it.
        batch_size: images at a time.
        workers: processes that read images; 0 reads in this one.
        split: of the data.
        num_classes: of the model's head, to check the data against.
        class_map: text file, one class name a line, in the order of the model's head.
        limit: at most so many images, chosen evenly over the classes and always alike; None for all.

    Raises:
        DataError: images or labels that are missing or do not fit the model. Unreadable images come to light
            at the end of a pass, as the same error.
        UsageError: neither or no place to look.
    """
    if limit is not None and limit < 1:
        raise UsageError(f"limit {limit}: expected at least 1 image")
    if dataset is not None:
        return _loader_from_dataset(
            preprocessing, data_dir, dataset, batch_size, workers, split, num_classes, class_map, limit
        )
    if data_dir is None:
        raise UsageError("nothing to evaluate on: give --data-dir or --dataset")
    folder = _scan(_find_folder(data_dir, split, "--val-split"))
    if not folder.images:
        raise DataError(f"{folder.path}: no images; folders there: {_listed(folder.classes)}")
    if not any(folder.names):
        raise DataError(
            f"{folder.path}: images without class folders; accuracy needs {split}/<class>/<image>. "
            f"Folders in {data_dir}: {_listed(_subfolders(data_dir))}"
        )
    labels = _label_images(folder, class_map, num_classes, "")
    images: Sequence[str] = folder.images
    if limit is not None and limit < len(images):
        chosen = sorted(index for index, _ in zip(_balanced_order(labels, 0), range(limit), strict=False))
        images, labels = [images[index] for index in chosen], [labels[index] for index in chosen]
    files = _ImageFiles(folder.path, images, labels, preprocessing)
    return EvaluationLoader(
        files,
        total=len(images),
        expected=len(images),
        batch_size=batch_size,
        workers=workers,
        num_classes=num_classes,
        description=f"{len(images)} of {len(folder.images)} images under {folder.path.name}/",
    )


# --- timm's named datasets ---


class _DatasetImages(Dataset[_Sample]):
    """A dataset of timm's or torchvision's with random access, unreadable images told instead of replaced."""

    def __init__(self, name: str, opened: Any, indices: Sequence[int], preprocessing: Preprocessing) -> None:
        self.name, self.opened, self.indices = name, opened, indices
        self._channels, self._transform = preprocessing.input_size[0], preprocessing.transform()

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> _Sample:
        position = self.indices[index]
        reader = getattr(self.opened, "reader", None)
        target: Any = -1
        try:
            # Past timm's ImageDataset, which puts the next image in place of one it cannot read.
            source, target = (self.opened if reader is None else reader)[position]
            if isinstance(source, Image.Image):
                picture = source.convert("RGB" if self._channels == 3 else "L")
            else:
                picture = _open_image(source, self._channels)
        except _UNREADABLE as error:
            return _Unreadable(f"{self.name}[{position}]", _reason(error)), -1
        return self._transform(picture), -1 if target is None else int(target)


class _DatasetStream(IterableDataset[_Sample]):
    """A dataset of timm's that can only be read from its beginning."""

    def __init__(self, opened: Any, limit: int | None, preprocessing: Preprocessing) -> None:
        self.opened, self.limit = opened, limit
        self._channels, self._transform = preprocessing.input_size[0], preprocessing.transform()

    def __iter__(self) -> Iterator[_Sample]:
        for number, (picture, target) in enumerate(self.opened):
            if self.limit is not None and number == self.limit:
                return
            mode = "RGB" if self._channels == 3 else "L"
            yield self._transform(picture.convert(mode)), -1 if target is None else int(target)


def _open_dataset(
    name: str,
    root: Path | None,
    split: str,
    class_map: Path | None,
    num_classes: int | None,
    *,
    seed: int | None = None,
    check_classes: bool,
) -> Any:
    """The dataset timm knows by that name; shuffled with ``seed`` where it is a stream.

    Raises:
        DataError: an extra is missing, it cannot be opened, or its classes are not the head's.
    """
    prefix, slash, rest = name.partition("/")
    prefix = prefix.lower()
    if not (slash and rest) or prefix not in (*_EXTRAS, "torch"):
        raise UsageError(
            f"--dataset {name!r}: expected hfds/NAME, hfids/NAME, wds/NAME, tfds/NAME or torch/NAME; "
            "for a folder use --data-dir"
        )
    module, package = _EXTRAS.get(prefix, ("torchvision", "torchvision"))
    if importlib.util.find_spec(module) is None:
        raise DataError(f"--dataset {name}: needs the package {module}; pip install '{package}'")
    mapped = _read_class_map(class_map, num_classes) if class_map is not None else None
    if prefix == "torch" and mapped is not None:
        raise UsageError(f"--dataset {name}: torchvision's datasets take no --class-map")
    streamed = {} if prefix in ("torch", "hfds") else {"seed": seed or 0, "is_training": seed is not None}
    try:
        opened = create_dataset(
            name, root=None if root is None else str(root), split=split, class_map=mapped, **streamed
        )
    # Whatever a third party's loader raises, from a refused connection to an assertion, says what is wrong.
    except Exception as error:
        raise DataError(
            f"--dataset {name}, split {split!r}: cannot be opened: {type(error).__name__}: {error}"
        ) from error
    known = _class_count(opened)
    if check_classes and mapped is None and num_classes is not None and known not in (None, num_classes):
        raise DataError(
            f"--dataset {name}: {known} classes, the model's head has {num_classes}. "
            "Name the classes in the head's order with --class-map"
        )
    return opened


def _class_count(opened: Any) -> int | None:
    classes = getattr(opened, "classes", None) or getattr(
        getattr(opened, "reader", None), "class_to_idx", None
    )
    return len(classes) if classes else None


def _targets(opened: Any) -> list[object]:
    """A label per image where they are known without reading images; else one and the same for all."""
    reader: Any = getattr(opened, "reader", None)
    if hasattr(reader, "iter_targets"):
        return list(reader.iter_targets())
    targets = getattr(opened, "targets", None)
    if targets is not None and len(targets) == len(opened):
        return [int(target) for target in targets]
    return [0] * len(opened)


def _calibration_from_dataset(
    preprocessing: Preprocessing,
    count: int,
    seed: int,
    root: Path | None,
    name: str,
    class_map: Path | None,
    split: str,
    num_classes: int | None,
    use_labels: bool,
) -> CalibrationImages:
    opened = _open_dataset(name, root, split, class_map, num_classes, seed=seed, check_classes=use_labels)
    where = f"{name} {split}"
    if isinstance(opened, IterableDataset):
        samples = list(_DatasetStream(opened, count, preprocessing))
        if not samples:
            raise DataError(f"--dataset {name}, split {split!r}: gave no images")
        images, labels, _ = _collate(samples)
        told = f"the first {len(labels)} images of {where}, shuffled"
        chosen = CalibrationImages(images, labels, f"{told} ({'with' if use_labels else 'without'} labels)")
    else:
        everything = _DatasetImages(name, opened, range(len(opened)), preprocessing)
        chosen = _choose(everything, _targets(opened), count, seed, where, use_labels)
    if not use_labels or chosen.labels is None:
        return CalibrationImages(chosen.images, None, chosen.description)
    low, high = int(chosen.labels.min()), int(chosen.labels.max())
    if low < 0 or (num_classes is not None and high >= num_classes):
        raise DataError(
            f"--dataset {name}: label {low if low < 0 else high} is not a class of the model's head "
            f"({num_classes} classes). Map them with --class-map, or leave labels out with --no-labels"
        )
    return chosen


def _loader_from_dataset(
    preprocessing: Preprocessing,
    root: Path | None,
    name: str,
    batch_size: int,
    workers: int,
    split: str,
    num_classes: int | None,
    class_map: Path | None,
    limit: int | None,
) -> EvaluationLoader:
    opened = _open_dataset(name, root, split, class_map, num_classes, check_classes=True)
    samples: Dataset[_Sample] | IterableDataset[_Sample]
    if isinstance(opened, IterableDataset):
        total = len(opened)  # type: ignore[arg-type]  # 0 where a stream does not know
        total = total if limit is None or not total else min(limit, total)
        samples = _DatasetStream(opened, limit, preprocessing)
        # Shards are divided among workers unevenly, which would make the count below meaningless.
        workers = 0
    else:
        indices = list(range(len(opened)))
        if limit is not None and limit < len(indices):
            order = _balanced_order(_targets(opened), 0)
            indices = sorted(index for index, _ in zip(order, range(limit), strict=False))
        samples, total = _DatasetImages(name, opened, indices, preprocessing), len(indices)
    return EvaluationLoader(
        samples,
        total=total,
        expected=total or None,
        batch_size=batch_size,
        workers=workers,
        num_classes=num_classes,
        description=f"{total or 'all'} images of {name} {split}",
    )
