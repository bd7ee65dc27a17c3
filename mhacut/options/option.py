"""Option stated once: flag, YAML key, bound, help, Python keyword and reference follow from it."""

from __future__ import annotations

import copy
import dataclasses
import difflib
import math
import os
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, field
from functools import cache
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    TypeVar,
    get_args,
    get_origin,
    get_type_hints,
)

from mhacut.errors import UsageError, option_name
from mhacut.options.values import is_one, is_text, plain, types

if TYPE_CHECKING:
    from typing_extensions import Self

T = TypeVar("T")

Panel = Literal[
    "Arguments",
    "Result",
    "Quantization",
    "What is shown",
    "Models",
    "Teacher",
    "Data",
    "Model",
    "Training",
    "Augmentation",
    "Preprocessing",
    "Measuring",
    "Computing",
    "Output",
    "Rarer options",
    "Research switches",
]
"""Headings of ``--help``, in this order."""

Reads = Literal["checkpoint", "data_dir", "class_map"]
"""Kinds of paths that are read."""

REQUIRED: Any = MISSING
"""Default of an option that must be given."""

_NOUNS: Mapping[Any, str] = {
    bool: "True or False",
    int: "a whole number",
    float: "a number",
    str: "text",
    os.PathLike: "a path",
    Mapping: "a mapping",
}
_MOST = {bool: 1, int: 2**31 - 1, float: 1e30}
"""Largest absolute values where an option states no bound: the libraries overflow above."""
_LONGEST = 200
"""Longest value, in characters, that a message about its type shows."""


@dataclass(frozen=True, kw_only=True)
class Option:
    """Everything that is known about one option."""

    help: str
    """Sentences for ``--help`` and the reference; the default is added to them."""
    panel: Panel
    """Heading in ``--help``; "Arguments" stand on the command line without a flag."""
    metavar: str | None = None
    """Placeholder of the value in ``--help``."""
    short: str | None = None
    """Second flag, ``-o``."""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    """Bounds; they hold for each element of a tuple; None as a value is always within."""
    endings: tuple[str, ...] = ()
    """Endings of which a file's name must have one, in upper or lower case."""
    reads: Reads | None = None
    """Kind of what is read from the path, or from each of several."""
    repeats: bool = False
    """Whether the flag may be given several times, for as many values."""
    once: bool = False
    """Whether a flag that is given again is refused; of others that do not repeat, the last value counts."""
    name: str = ""
    """Name in Python and in YAML; filled in by :class:`Options`, as are type and default."""
    type: Any = None
    default: Any = None

    @property
    def flag(self) -> str:
        """Long flag. Each ``KEY=VALUE`` has one of its own: ``model_args`` is ``--model-arg``."""
        name = self.name.removesuffix("s") if self.takes_pairs else self.name
        return "--" + name.replace("_", "-")

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def is_argument(self) -> bool:
        """Whether the option stands on the command line without a flag."""
        return self.panel == "Arguments"

    @property
    def kind(self) -> Any:
        """Type without None: ``int`` for ``int | None``."""
        known = [part for part in get_args(self.type) if part is not type(None)]
        return known[0] if self.takes_none and len(known) == 1 else self.type

    @property
    def takes_none(self) -> bool:
        return type(None) in get_args(self.type)

    @property
    def takes_pairs(self) -> bool:
        """Whether the value is a mapping, ``KEY=VALUE`` on the command line."""
        return get_origin(self.kind) in (Mapping, dict)

    @property
    def element(self) -> Any:
        """Type of each of several values; None where there is one value only."""
        return get_args(self.kind)[0] if get_origin(self.kind) is tuple else None

    @property
    def choices(self) -> tuple[str, ...]:
        """Possible values, where they can be listed."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def limits(self) -> str:
        """Bounds in words; empty if there are none."""
        bounds = {
            "at least": self.at_least,
            "above": self.above,
            "at most": self.at_most,
            "below": self.below,
        }
        known = {words: bound for words, bound in bounds.items() if bound is not None}
        return ", ".join(
            f"{words} {bound}" if isinstance(bound, int) else f"{words} {bound:.10g}"
            for words, bound in known.items()
        )

    def check(self, value: Any) -> Any:
        """Return ``value`` in the option's type; numbers of NumPy become Python's, which JSON can hold.

        Raises:
            UsageError: it is none of the option's values; the message names the option.
        """
        value = plain(value)
        if value is None:
            require(self.name, value, self.takes_none, "a value")
            return None
        if self.choices:
            require(self.name, value, value in self.choices, "one of " + ", ".join(self.choices))
            return value
        if self.element is None:
            return self._checked(value, self.kind)
        numbers = self.element in (int, float)
        if isinstance(value, str | os.PathLike) and not numbers:
            value = (value,)  # one text is one of several
        if isinstance(value, str) or not isinstance(value, Iterable):
            expected = "a list of numbers" if numbers else "text, or a list of texts"
            raise UsageError(f"{self._shown(value)}: expected {expected}")
        return tuple(self._checked(plain(part), self.element) for part in value)

    def _checked(self, value: Any, kind: Any) -> Any:
        """Return one value in its type, within the bounds."""
        known = types(kind)
        if tuple in known:
            return value  # one budget, or several
        if not is_one(value, known):
            limits = f", {self.limits}" if self.limits else ""
            raise UsageError(f"{self._shown(value)}: expected {_NOUNS[known[-1]]}{limits}")
        if isinstance(value, str | os.PathLike):
            require(self.name, value, is_text(os.fspath(value)), "text without NUL that UTF-8 can encode")
        for ending in self.endings[:1]:
            name = os.fspath(value)
            require(self.name, name, name.lower().endswith(self.endings), f"a name that ends in {ending}")
        if kind not in (bool, int, float):
            return value
        try:
            number = kind(value)
        except OverflowError:  # a whole number beyond all others
            raise UsageError(f"{self._shown(value)}: expected {_NOUNS[kind]}") from None
        require(self.name, value, self._holds(number), self.limits)
        if self.at_most is None and self.below is None and math.isfinite(number):
            most = _MOST[kind]
            require(self.name, value, number <= most, f"at most {most}")
            require(self.name, value, number >= -most, f"at least {-most}")
        return number

    def _shown(self, value: Any) -> str:
        """Return the option with its value, or without a long one, such as a whole model."""
        return option_name(self.name, value) if len(repr(value)) <= _LONGEST else option_name(self.name)

    def _holds(self, amount: float) -> bool:
        return (
            (self.at_least is None or amount >= self.at_least)
            and (self.above is None or amount > self.above)
            and (self.at_most is None or amount <= self.at_most)
            and (self.below is None or amount < self.below)
            and (not self.limits or -math.inf < amount < math.inf)
        )


def option(
    default: T,
    help: str,
    *,
    panel: Panel,
    metavar: str | None = None,
    short: str | None = None,
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    endings: tuple[str, ...] = (),
    reads: Reads | None = None,
    repeats: bool = False,
    once: bool = False,
) -> T:
    """State an option as a field of an :class:`Options` dataclass; see :class:`Option` for the arguments.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class CutOptions(Options):
    ...     round_to: int = option(8, "Round widths to multiples of N.", panel="Result", at_least=1)
    >>> CutOptions.options()["round_to"].flag
    '--round-to'
    >>> CutOptions(round_to=0)
    Traceback (most recent call last):
    mhacut.errors.UsageError: round_to=0: expected at least 1
    """
    stated = Option(
        help=help,
        panel=panel,
        metavar=metavar,
        short=short,
        at_least=at_least,
        above=above,
        at_most=at_most,
        below=below,
        endings=endings,
        reads=reads,
        repeats=repeats,
        once=once,
    )
    metadata = {"option": stated}
    made: Any
    if isinstance(default, dict):
        made = field(default_factory=default.copy, metadata=metadata)
    else:
        made = field(default=default, metadata=metadata)
    return made  # type: ignore[no-any-return]


class Options:
    """Options of a command, in groups or on one level; flags, YAML keys and keywords are flat names.

    A subclass is a frozen dataclass. Its fields are made by :func:`option`, or are groups, which are
    :class:`Options` themselves. Types and bounds are checked when an object is made.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]

    def __post_init__(self) -> None:
        for name, stated in self.own_options().items():
            object.__setattr__(self, name, stated.check(getattr(self, name)))

    @classmethod
    def options(cls) -> dict[str, Option]:
        """Every option by its flat name, in the order of the fields."""
        own, groups = cls.own_options(), cls.groups()
        found: dict[str, Option] = {}
        for name in cls.__dataclass_fields__:
            found |= groups[name].options() if name in groups else {name: own[name]}
        return found

    @classmethod
    @cache  # reading annotations takes milliseconds
    def groups(cls) -> Mapping[str, type[Options]]:
        """Fields that hold options themselves, with their class."""
        return {
            name: kind
            for name, kind in get_type_hints(cls).items()
            if isinstance(kind, type) and issubclass(kind, Options)
        }

    @classmethod
    @cache
    def own_options(cls) -> Mapping[str, Option]:
        """Options that belong to no group, by name."""
        types = get_type_hints(cls)
        return {
            name: dataclasses.replace(
                stated.metadata["option"],
                name=name,
                type=types[name],
                default=stated.default if stated.default_factory is MISSING else stated.default_factory(),
            )
            for name, stated in cls.__dataclass_fields__.items()
            if "option" in stated.metadata
        }

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Values of the options that are not given; those that must be given are left out."""
        return {
            name: copy.copy(stated.default) for name, stated in cls.options().items() if not stated.required
        }

    @classmethod
    def from_flat(cls, **values: Any) -> Self:
        """Make the options from values by flat names.

        >>> from mhacut.options.prune import PruneOptions
        >>> PruneOptions.from_flat(checkpoint="vit.safetensors", flops="50%", steps=10).search.steps
        10

        Raises:
            UsageError: a name that is no option, with the one it resembles; an option that must be given is
                missing; a value out of bounds.
        """
        known = cls.options()
        for name in values:
            if name not in known:
                raise UsageError(unknown_option(name, tuple(known)))
        for name, stated in known.items():
            if stated.required and name not in values:
                raise UsageError(f"{option_name(name)} is missing. {stated.help}")
        groups = {
            name: group(**{key: values.pop(key) for key in list(values) if key in group.options()})
            for name, group in cls.groups().items()
        }
        return cls(**values, **groups)

    def flat(self) -> dict[str, Any]:
        """Return the arguments of :meth:`from_flat`; paths as text, for a record that JSON can hold."""
        values: dict[str, Any] = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if isinstance(value, Options):
                values |= value.flat()
            else:
                values[name] = os.fspath(value) if isinstance(value, os.PathLike) else value
        return values

    def files_read(self) -> tuple[str, ...]:
        """Files, and folders of checkpoints, that the options name to be read; also names on the hub.

        Not folders of images: a file that is written can never be one, and may lie in one.
        """
        values = self.flat()
        found: list[str] = []
        for name, stated in self.options().items():
            value = values[name]
            if stated.reads not in (None, "data_dir") and value:
                found += map(os.fspath, value if stated.element else (value,))
        return tuple(found)

    def changed(self) -> list[str]:
        """Names of the options, those of groups excepted, that differ from their defaults."""
        return [name for name, stated in self.own_options().items() if getattr(self, name) != stated.default]

    def all_changed(self) -> set[str]:
        """Names of the options, those of groups included, that differ from their defaults."""
        groups = [getattr(self, name).all_changed() for name in self.groups()]
        return set(self.changed()).union(*groups)


def unknown_option(name: str, known: tuple[str, ...]) -> str:
    """Say that there is no option ``name``, and which it resembles."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"no option {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise a :class:`UsageError` that names the option and its value unless ``holds``."""
    if not holds:
        raise UsageError(f"{option_name(name, value)}: expected {expected}")
