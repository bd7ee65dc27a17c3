"""Options: fields of dataclasses, from which flags, YAML keys, Python keywords, bounds and help follow."""

from __future__ import annotations

import ast
import copy
import difflib
import inspect
import json
import math
import os
import sys
from ast import literal_eval
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path
from reprlib import Repr
from types import UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    ClassVar,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from mhacut.errors import UsageError, option_name

if TYPE_CHECKING:
    from typing_extensions import Self

P = ParamSpec("P")
R = TypeVar("R")
T = TypeVar("T")
OptionsT = TypeVar("OptionsT", bound="Options")
PathLike = str | os.PathLike[str]
GIVEN: Any = ...
"""Stands in ``needs`` for any value but None, False, 0 and nothing."""
_NOUNS = {bool: "True or False", int: "a whole number", float: "a number", os.PathLike: "a path"}
_METAVARS: Mapping[Any, str] = {int: "N", float: "X", bool: "", os.PathLike: "PATH", Mapping: "KEY=VALUE"}
_MOST = {int: 2**31 - 1, float: 1e30}
"""Largest values where an option states no upper bound: the libraries overflow above."""
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 100


@dataclass(frozen=True, kw_only=True)
class Option:
    """Everything that is known about one option."""

    name: str
    """Name in Python and in YAML."""
    type: Any
    default: Any
    owner: type[Options]
    """Class that states the option; its docstring under the field is the help."""
    panel: str
    """Heading in ``--help``; "Arguments" stand on the command line without a flag."""
    metavar: str = ""
    """Placeholder of the value in ``--help``; by default it follows from the type."""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    """Bounds; they hold for each element of a tuple; None as a value is always within."""
    endings: tuple[str, ...] = ()
    """Endings of which a file's name must have one, in upper or lower case."""
    reads: Literal["checkpoint", "data_dir", "class_map"] | None = None
    """Kind of what is read from the path, or from each of several."""
    repeats: bool = False
    """Whether the flag may be given several times, for as many values."""
    off: str = ""
    """Help of the flag ``--no-NAME`` of a switch that is on by default."""
    needs: Mapping[str, Any] = field(default_factory=dict)
    """Values of other options, one of which must be given for this option to have an effect."""

    @property
    def help(self) -> str:
        """Sentences for ``--help`` and the reference."""
        return _field_docstrings(self.owner.__module__).get((self.owner.__name__, self.name), "")

    @property
    def flag(self) -> str:
        """Long flag. Each ``KEY=VALUE`` has one of its own: ``model_args`` is ``--model-arg``."""
        name = self.name.removesuffix("s") if self.takes_pairs else self.name.rstrip("_")  # as_
        return "--" + name.replace("_", "-")

    @property
    def switch(self) -> str:
        """Spelling of a switch that changes its default: ``--overwrite``, ``--no-labels``."""
        return self.flag if self.default is False else f"--no-{self.flag.removeprefix('--')}"

    @property
    def key(self) -> str:
        """Key in a YAML file: the name in Python, but ``as`` for ``as_``."""
        return self.name.rstrip("_")

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def is_argument(self) -> bool:
        """Whether the option stands on the command line without a flag."""
        return self.panel == "Arguments"

    @property
    def kind(self) -> Any:
        """Type without its alternatives: ``int`` for ``int | None``."""
        return _main(self.type)

    @property
    def takes_pairs(self) -> bool:
        """Whether the value is a mapping, ``KEY=VALUE`` on the command line."""
        return get_origin(self.kind) is Mapping

    @property
    def element(self) -> Any:
        """Type of each of several values; None where there is one value only."""
        return _main(get_args(self.kind)[0]) if get_origin(self.kind) is tuple else None

    @property
    def choices(self) -> tuple[str, ...]:
        """Possible values, where they can be listed."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def placeholder(self) -> str:
        """Placeholder of the value, ``N`` or ``PATH``; empty for a switch."""
        one = self.element or self.kind
        known = _METAVARS.get(get_origin(one) or one, "NAME")
        return self.metavar or (f"{known},{known}" if self.element and not self.repeats else known)

    @property
    def limits(self) -> str:
        """Bounds in words; empty if there are none."""
        bounds = {
            "at least": self.at_least,
            "above": self.above,
            "at most": self.at_most,
            "below": self.below,
        }
        return ", ".join(
            f"{words} {bound if isinstance(bound, int) else format(bound, '.10g')}"
            for words, bound in bounds.items()
            if bound is not None
        )

    def check(self, value: Any) -> Any:
        """Return ``value``, from a flag, YAML or Python, in the option's type.

        Text is read as a flag's: ``"0.5,0.4"`` are two numbers, ``"img_size=32"`` is a mapping. Numbers of
        NumPy become Python's, which JSON can hold.
        """
        value = _plain(value)
        if value is None and type(None) in get_args(self.type):
            return None
        if self.takes_pairs:
            return self._pairs(value)
        if self.element is None:
            return self._one(value, self.kind)
        # One text is one of several values, not several letters; one number is a list of one.
        if isinstance(value, str | os.PathLike) or not isinstance(value, Iterable):
            value = [value]
        if self.element is not os.PathLike and str not in _alternatives(self.type):  # names may have commas
            value = [text for one in value for text in (one.split(",") if isinstance(one, str) else [one])]
        return tuple(self._one(one, self.element) for one in value)

    def _one(self, value: Any, kind: Any) -> Any:
        """Return one value in its type, within the bounds."""
        value = _plain(value)
        if self.choices:
            require(self.name, value, value in self.choices, "one of " + ", ".join(self.choices))
        elif kind is bool:
            require(self.name, value, value in (True, False), _NOUNS[bool])
            value = bool(value)  # of 0 and 1, which are equal to them
        elif kind in (int, float):
            value = self._number(value, kind)
        else:
            if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
                value = str(value)  # a budget of 2000000000 needs no quotes in YAML
            path = kind is not str and isinstance(value, os.PathLike)
            require(self.name, value, path or isinstance(value, str), _NOUNS.get(kind, "text"))
            if self.endings:
                ends = os.fspath(value).lower().endswith(self.endings)
                require(self.name, value, ends, f"a name that ends in {self.endings[0]}")
        return value

    def _number(self, value: Any, kind: type) -> Any:
        number: Any = None
        # True is a whole number to Python, and 8.0 none; text is a number, since YAML reads 1e-3 as text.
        if isinstance(value, str | (Integral if kind is int else Real)) and not isinstance(value, bool):
            try:
                number = kind(value)
            except (ValueError, OverflowError):
                number = None
        valid = number is not None and math.isfinite(number)
        require(self.name, value, valid, ", ".join(filter(None, (_NOUNS[kind], self.limits))))
        within = (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )
        require(self.name, value, within, self.limits)
        if self.at_most is None and self.below is None:
            require(self.name, value, number <= _MOST[kind], f"at most {_MOST[kind]}")
        return number

    def _pairs(self, value: Any) -> dict[str, Any]:
        """Return a mapping, a ``KEY=VALUE``, or a list of them, as one mapping."""
        pairs: dict[str, Any] = {}
        for part in value if isinstance(value, list | tuple) else [value]:
            known = dict([key_value(self.name, part)]) if isinstance(part, str) else part
            valid = isinstance(known, Mapping) and all(isinstance(key, str) for key in known)
            require(self.name, part, valid, "a mapping of names to values, or KEY=VALUE")
            pairs |= known
        return pairs


def option(default: T, **facts: Any) -> T:
    """State an option, in more than type and default, as a field of an :class:`Options` dataclass.

    >>> @dataclass(frozen=True, kw_only=True)
    ... class CutOptions(Options, panel="Result"):
    ...     round_to: int = option(8, at_least=1)
    >>> CutOptions.options()["round_to"].flag
    '--round-to'
    >>> CutOptions(round_to=0)
    Traceback (most recent call last):
    mhacut.errors.UsageError: round_to=0: expected at least 1
    """
    made: Any = field(default=default, metadata=facts)
    return made  # type: ignore[no-any-return]


class Options:
    """Options of a command; flags, YAML keys and keywords have the names of the fields.

    A subclass is a frozen dataclass with a docstring, the help, under each field. Commands inherit options
    that they share. Types and bounds are checked when an object is made.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    _shared: ClassVar[dict[str, Any]]
    """Facts about every option that the class itself states; a field's own facts win."""

    def __init_subclass__(cls, panel: str = "", needs: Mapping[str, Any] | None = None) -> None:
        super().__init_subclass__()
        cls._shared = {"panel": panel, "needs": needs or {}}

    def __post_init__(self) -> None:
        for name, stated in self.options().items():  # frozen for everybody but this
            object.__setattr__(self, name, stated.check(getattr(self, name)))

    @classmethod
    @cache  # reading annotations takes milliseconds
    def options(cls) -> Mapping[str, Option]:
        """Every option by its name, in the order of the fields."""
        types = get_type_hints(cls)
        # A class's panel and needs go with what it states itself, not with what it inherits.
        owners: dict[str, Any] = {
            name: kind for kind in reversed(cls.__mro__) for name in inspect.get_annotations(kind)
        }
        return {
            one.name: Option(
                name=one.name,
                type=types[one.name],
                default=one.default if one.default_factory is MISSING else one.default_factory(),
                owner=owners[one.name],
                **{**owners[one.name]._shared, **one.metadata},
            )
            for one in fields(cls)
        }

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Values of the options that are not given; those that must be given are left out."""
        return {name: copy.copy(one.default) for name, one in cls.options().items() if not one.required}

    @classmethod
    def of(cls, **values: Any) -> Self:
        """Make the options from values by name.

        Raises:
            UsageError: a name that is no option, with the one it resembles; an option that must be given is
                missing; a value out of bounds.
        """
        known = cls.options()
        for name in values:
            if name not in known:
                raise UsageError(unknown_option(name, tuple(known)))
        for name, one in known.items():
            if one.required and name not in values:
                raise UsageError(f"{option_name(name)} is missing. {one.help}")
        return cls(**values)

    def values(self) -> dict[str, Any]:
        """Return the arguments of :meth:`of`; paths as text, for a record that JSON can hold."""
        values = {name: getattr(self, name) for name in self.options()}
        paths = {name: os.fspath(value) for name, value in values.items() if isinstance(value, os.PathLike)}
        return values | paths

    def only(self, kind: type[OptionsT]) -> OptionsT:
        """Return those of the options that ``kind``, one of the classes they inherit, has."""
        return kind(**{name: getattr(self, name) for name in kind.options()})

    def files_read(self) -> tuple[str, ...]:
        """Files, and folders of checkpoints, that the options name to be read; also names on the hub.

        Not folders of images: a file that is written can never be one, and may lie in one.
        """
        paths: list[str] = []
        for name, one in self.options().items():
            value = getattr(self, name)
            if one.reads not in (None, "data_dir") and value:
                paths += map(os.fspath, value if one.element else (value,))
        return tuple(paths)

    def changed(self) -> list[str]:
        """Names of the options that differ from their defaults."""
        return [name for name, one in self.options().items() if getattr(self, name) != one.default]

    def unmet_needs(self) -> dict[str, str]:
        """Options that were changed to no effect, each with a sentence about what it needs."""
        notes = {}
        for name in self.changed():
            needs = self.options()[name].needs
            if needs and not any(self._has(*need) for need in needs.items()):
                off = getattr(self, name) is False
                named = (option_name(*(need[:1] if need[1] is GIVEN else need)) for need in needs.items())
                shown = option_name(name, False) if off else option_name(name)
                notes[name] = f"{shown} has no effect without {' or '.join(named)}"
        return notes

    def _has(self, name: str, wanted: Any) -> bool:
        value = getattr(self, name)
        return bool(value) if wanted is GIVEN else value == wanted


@cache
def _field_docstrings(module: str) -> dict[tuple[str, str], str]:
    """Docstrings under the fields of a module's classes, by class and field."""
    # Python keeps no docstrings of fields, so they are read from the source, as pydantic does. Only help and
    # some messages need them: options work where sources are not shipped.
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {
        (kind.name, ast.unparse(above.target)): " ".join(str(below.value.value).split())
        for kind in tree.body
        if isinstance(kind, ast.ClassDef)
        for above, below in pairwise(kind.body)
        if isinstance(above, ast.AnnAssign)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
    }


def _plain(value: Any) -> Any:
    """Return a number or an array of NumPy or torch as Python's own numbers; anything else as it is."""
    return value.tolist() if hasattr(value, "tolist") else value


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """Return the types of which ``kind`` is one, without None."""
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(part for part in parts if part is not type(None))


def _main(kind: Any) -> Any:
    """Return the type that text is read as: of alternatives the tuple, else the last."""
    parts = _alternatives(kind)
    main = next((part for part in parts if get_origin(part) is tuple), parts[-1])
    return os.PathLike if get_origin(main) is os.PathLike else main


def unknown_option(name: str, known: tuple[str, ...], kind: str = "option") -> str:
    """Say that there is no option, or other ``kind`` of thing, ``name``, and which it resembles."""
    near = difflib.get_close_matches(name, known, n=1)
    return f"no {kind} {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise a :class:`UsageError` that names the option and its value unless ``holds``."""
    if not holds:
        # A whole model, or a list that aliases of YAML blow up, is shortened.
        short = isinstance(value, str | int | float | os.PathLike) and len(str(value)) <= 200
        shown = option_name(name, value) if short else f"{option_name(name)}={_SHORT.repr(value)}"
        raise UsageError(f"{shown}: expected {expected}")


def key_value(name: str, text: str) -> tuple[str, Any]:
    """Parse a ``KEY=VALUE``; the value is JSON, else a Python literal, else text.

    >>> [key_value("model_args", text) for text in ("img_size=32", "qk_norm=True", "global_pool=avg")]
    [('img_size', 32), ('qk_norm', True), ('global_pool', 'avg')]
    """
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UsageError(f"{option_name(name)} {text!r}: expected KEY=VALUE, like img_size=32")
    for read in (json.loads, literal_eval):  # true and [224,288] are JSON, True and (224, 288) are Python
        try:
            return key, read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return key, value


def yaml_value(text: str | bytes) -> Any:
    """Parse YAML. Raises a :class:`UsageError` for anything else."""
    import yaml

    try:
        return yaml.safe_load(text)
    except Exception as error:  # tags that do not fit their values raise errors of many types
        raise UsageError(f"is not YAML: {error!s:.500}") from None


def read_config(path: PathLike, options: Mapping[str, Option], where: str) -> dict[str, Any]:
    """Read the options in a YAML file, converted to their types."""
    text = Path(path).read_bytes()
    try:
        document = yaml_value(text)
    except UsageError as error:
        raise UsageError(f"{where}: {error}") from None
    if document is not None and not isinstance(document, dict):
        raise UsageError(f"{where}: expected lines of NAME: VALUE, found {type(document).__name__}")
    return read_options(document or {}, options, where)


def read_options(document: Mapping[Any, Any], options: Mapping[str, Option], where: str) -> dict[str, Any]:
    """Convert values by YAML key to values by option name, in the options' types."""
    names = {option.key: name for name, option in options.items()}
    values: dict[str, Any] = {}
    for key, value in document.items():
        try:
            if key not in names:
                raise UsageError(_unknown_key(str(key), options))
            values[names[key]] = options[names[key]].check(value)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
    return values


def _unknown_key(key: str, options: Mapping[str, Option]) -> str:
    """Say which key to write in place of a flag's spelling or a misspelled key."""
    flag = "--" + key.replace("_", "-")
    for option in options.values():
        if flag in (option.flag, f"--{option.key.replace('_', '-')}"):
            return f"no option {key!r}; write {option.key}: VALUE"
        if option.kind is bool and flag == f"--no-{option.flag.removeprefix('--')}":
            return f"no option {key!r}; write {option.key}: false"
    return unknown_option(key, tuple(option.key for option in options.values()))


def takes_keywords(call: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Give a function of ``**options`` the signature of the dataclass ``call``, and its docstring their help.

    Type checkers and editors see each keyword with its type; ``help()`` and notebooks also its default.
    """

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        written: Any = function
        returned = inspect.signature(function).return_annotation
        written.__signature__ = inspect.signature(call).replace(return_annotation=returned)
        options = next(base for base in call.__bases__ if issubclass(base, Options))  # type: ignore[attr-defined]
        return lists_options(options)(function)

    return decorate


def lists_options(options: type[Options]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Add the help of ``options`` to the docstring of a function that takes them as keywords."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        lines = [
            f"    {name}: {one.help}{'' if one.default is None else f' Default: {one.default!r}.'}"
            for name, one in options.options().items()
            if not one.required
        ]
        text = inspect.cleandoc(function.__doc__ or "")
        function.__doc__ = "\n".join([text, "", "Options:", *lines])
        return function

    return decorate
