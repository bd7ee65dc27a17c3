"""Options that several commands share, and how they are checked."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, get_type_hints

from mhacut.errors import UsageError

if TYPE_CHECKING:
    from typing_extensions import Self


ExportDtype = Literal["float32", "float16", "bfloat16"]


PathLike = str | os.PathLike[str]


@dataclass(frozen=True)
class PreprocessingOptions:
    """Overrides of what the checkpoint states about its images; None keeps that."""

    mean: tuple[float, ...] | None = None
    """Per channel, in units of a pixel range of 0..1."""
    std: tuple[float, ...] | None = None
    """Per channel."""
    crop_pct: float | None = None
    """Share of the image that the centre crop keeps."""
    interpolation: str | None = None
    """``bicubic``, ``bilinear``, ..."""
    img_size: int | None = None
    """Height and width in pixels."""


@dataclass(frozen=True)
class LabelledImages:
    """Where images to measure accuracy on come from."""

    data_dir: PathLike | None = None
    """An ImageFolder with ``train/`` and ``val/``, or a flat folder of unlabelled images."""
    dataset: str | None = None
    """A dataset as timm names it: ``hfds/NAME``, ``wds/NAME``, ``torch/NAME``, ``tfds/NAME``."""
    class_map: PathLike | None = None
    """Text file with the class names in the order of the model's head."""
    val_split: str = "val"
    """Split to measure accuracy on."""
    workers: int = 2
    """Processes that load images."""


@dataclass(frozen=True)
class DataOptions(LabelledImages):
    """Where images come from, those to search on too."""

    train_split: str = "train"
    """Split to search on."""


class Flat:
    """Options in groups that are also known by flat names, as flags and YAML keys have them."""

    __dataclass_fields__: ClassVar[dict[str, Any]]

    @classmethod
    def _groups(cls) -> dict[str, type[Any]]:
        """The fields that are dataclasses themselves, with their class."""
        return {
            name: kind
            for name, kind in get_type_hints(cls).items()
            if isinstance(kind, type) and is_dataclass(kind)
        }

    @classmethod
    def types(cls) -> dict[str, Any]:
        """Every name :meth:`from_flat` takes, with its type."""
        hints = get_type_hints(cls)
        types = {name: hints[name] for name in cls.__dataclass_fields__ if name not in cls._groups()}
        for group in cls._groups().values():
            types |= {name: get_type_hints(group)[name] for name in group.__dataclass_fields__}
        return types

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Per flat name what holds when it is not given; names that must be given are left out."""
        fields = {name: item for name, item in cls.__dataclass_fields__.items() if name not in cls._groups()}
        for group in cls._groups().values():
            fields |= group.__dataclass_fields__
        return {
            name: item.default if item.default is not MISSING else item.default_factory()
            for name, item in fields.items()
            if item.default is not MISSING or item.default_factory is not MISSING
        }

    @classmethod
    def from_flat(cls, **values: Any) -> Self:
        """Options from names as the flags have them, all on one level.

        >>> PruneOptions.from_flat(checkpoint="vit.safetensors", flops="50%", steps=10).search.steps
        10

        Raises:
            UsageError: a name that is no option, with the one it resembles.
        """
        own = dict(values)
        known = tuple(cls.types())
        for name in own:
            if name not in known:
                raise UsageError(unknown_option(name, known))
        groups = {
            name: group(**{key: own.pop(key) for key in list(own) if key in group.__dataclass_fields__})
            for name, group in cls._groups().items()
        }
        return cls(**own, **groups)

    def flat(self) -> dict[str, Any]:
        """The inverse of :meth:`from_flat`; paths as text, for a record that JSON can hold."""
        values: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            grouped = name in self._groups()
            values |= (
                {key: getattr(value, key) for key in value.__dataclass_fields__} if grouped else {name: value}
            )
        return {
            key: os.fspath(value) if isinstance(value, os.PathLike) else value
            for key, value in values.items()
        }


@dataclass(frozen=True)
class CheckpointOptions(Flat):
    """Which checkpoint, and what its file does not say."""

    checkpoint: PathLike
    """``.safetensors``, ``.pth``, a timm folder, a slim file, or ``timm:NAME``."""
    model: str | None = None
    """timm architecture of a bare checkpoint."""
    model_args: Mapping[str, Any] = field(default_factory=dict)
    """Arguments for that architecture, ``{"img_size": 32}``."""
    num_classes: int | None = None
    """Only asserted: the head's size is read from the file."""


def changed(options: Any) -> list[str]:
    """Fields that differ from their plain defaults."""
    return [
        field.name
        for field in fields(options)
        if field.default is not MISSING and getattr(options, field.name) != field.default
    ]


def unknown_option(name: str, known: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def require_page(flag: str, path: PathLike) -> None:
    name = os.fspath(path)
    require(flag, name, name.lower().endswith((".html", ".htm")), "a name that ends in .html")


def refuse_beside(flag: str, why: str, given: Mapping[str, bool]) -> None:
    """Raise a :class:`UsageError` that names what cannot stand beside ``flag``."""
    others = [name for name, there in given.items() if there]
    if others:
        raise UsageError(f"{flag} {why}, which {' and '.join(others)} would need: leave one of them out")


def require(flag: str, value: object, holds: bool, expected: str) -> None:
    """Raise a :class:`UsageError` that names the flag unless ``holds``."""
    if not holds:
        raise UsageError(f"{flag} {value}: expected {expected}")


def require_choice(flag: str, value: str, choices: tuple[str, ...]) -> None:
    require(flag, value, value in choices, "one of " + ", ".join(choices))
