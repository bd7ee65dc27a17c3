"""Options as fields of dataclasses: source of flags, YAML keys, Python keywords, bounds and help."""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import math
import os
import sys
from ast import literal_eval
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
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
"""In ``Option.needs``: matches any value of the other option except None, False, 0 and an empty value."""
_NOUNS = {bool: "True or False", int: "a whole number", float: "a number", os.PathLike: "a path"}
_METAVARS: Mapping[Any, str] = {int: "N", float: "X", bool: "", os.PathLike: "PATH", Mapping: "KEY=VALUE"}
_MOST = {int: 2**31 - 1, float: 1e30}
"""Upper bound, by type, of options without their own bound. Larger values overflow in libraries."""
_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 100


@dataclass(frozen=True, kw_only=True)
class Option:
    name: str
    """Name in Python. The name in YAML files is :attr:`key`."""
    type: Any
    default: Any
    owner: type[Options]
    """Dataclass that declares the option as a field. The docstring under the field is the option's help."""
    panel: str
    """Heading of the option in ``--help-all``. Positional arguments have the panel "Arguments"."""
    metavar: str = ""
    """Placeholder of the value in the help, such as ``DIR``. If empty, the type sets the placeholder."""
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    endings: tuple[str, ...] = ()
    """Allowed endings of the file name, in upper or lower case."""
    reads: Literal["checkpoint", "data_dir", "class_map"] | None = None
    """Kind of files that the option's path names, such as images. None for options without a path."""
    repeats: bool = False
    """Whether the flag can be repeated."""
    off: str = ""
    """Help of the flag ``--no-NAME``, for a switch that is on by default."""
    needs: Mapping[str, Any] = field(default_factory=dict)
    """Names and values of other options. The option has an effect only if at least 1 of these options has the
    value listed here."""

    @property
    def help(self) -> str:
        return _field_docstrings(self.owner.__module__).get((self.owner.__name__, self.name), "")

    @property
    def flag(self) -> str:
        """Long flag, such as ``--round-to``.

        The flag of a mapping sets 1 pair: ``--model-arg img_size=32`` for ``model_args``.
        """
        name = self.name.removesuffix("s") if self.takes_pairs else self.name.rstrip("_")  # as_
        return "--" + name.replace("_", "-")

    @property
    def negative(self) -> str:
        return f"--no-{self.flag.removeprefix('--')}"

    @property
    def switch(self) -> str:
        """Flag that reverses the default of a yes/no option: ``--overwrite``, ``--no-labels``."""
        return self.flag if self.default is False else self.negative

    @property
    def key(self) -> str:
        """Key in a YAML file: the name in Python, but ``as`` for ``as_``."""
        return self.name.rstrip("_")

    @property
    def required(self) -> bool:
        return self.default is MISSING

    @property
    def is_argument(self) -> bool:
        return self.panel == "Arguments"

    @property
    def kind(self) -> Any:
        """Type of the values other than None: ``int`` for ``int | None``."""
        return _main(self.type)

    @property
    def takes_pairs(self) -> bool:
        """Whether the value is a mapping (``KEY=VALUE`` on the command line)."""
        return get_origin(self.kind) is Mapping

    @property
    def element(self) -> Any:
        """Type of the elements of a tuple; None for other types."""
        return _main(get_args(self.kind)[0]) if get_origin(self.kind) is tuple else None

    @property
    def choices(self) -> tuple[str, ...]:
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def placeholder(self) -> str:
        """Placeholder of the value in the help: ``N``, ``PATH``; empty for a switch."""
        spec = self.element or self.kind
        known = _METAVARS.get(get_origin(spec) or spec, "NAME")
        return self.metavar or (f"{known},{known}" if self.element and not self.repeats else known)

    @property
    def limits(self) -> str:
        bounds = {name: getattr(self, name) for name in ("at_least", "above", "at_most", "below")}
        return ", ".join(
            f"{name.replace('_', ' ')} {bound if isinstance(bound, int) else format(bound, '.10g')}"
            for name, bound in bounds.items()
            if bound is not None
        )

    def check(self, value: Any) -> Any:
        """Convert ``value`` to the option's type, or raise a :class:`UsageError`.

        Text is parsed: ``"0.5,0.4"`` becomes 2 numbers, ``"img_size=32"`` a mapping.
        """
        # NumPy's numbers become Python's, because JSON cannot hold them.
        value = _plain(value)
        if value is None and type(None) in get_args(self.type):
            return None
        if self.takes_pairs:
            return self._pairs(value)
        if self.element is None:
            return self._single(value, self.kind)
        # A string is iterable, but a single value.
        single = isinstance(value, str | os.PathLike) or not isinstance(value, Iterable)
        parts = [value] if single else [*value]
        if self.element is not os.PathLike and str not in _alternatives(self.type):  # names may have commas
            parts = [
                text for part in parts for text in (part.split(",") if isinstance(part, str) else [part])
            ]
        return tuple(self._single(part, self.element) for part in parts)

    def _single(self, value: Any, kind: Any) -> Any:
        value = _plain(value)
        if self.choices:
            require(self.name, value, value in self.choices, "one of " + ", ".join(self.choices))
        elif kind is bool:
            require(self.name, value, value in (True, False), _NOUNS[bool])
            value = bool(value)  # 0 and 1 are allowed
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
        # bool is a subclass of int. YAML reads 1e-3 as text, so text is allowed.
        if isinstance(value, str | (Integral if kind is int else Real)) and not isinstance(value, bool):
            with suppress(ValueError, OverflowError):
                number = kind(value)
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
        pairs: dict[str, Any] = {}
        for part in value if isinstance(value, list | tuple) else [value]:
            known = dict([key_value(self.name, part)]) if isinstance(part, str) else part
            valid = isinstance(known, Mapping) and all(isinstance(key, str) for key in known)
            require(self.name, part, valid, "a mapping of names to values, or KEY=VALUE")
            pairs |= known
        return pairs


def option(default: T, **facts: Any) -> T:
    """Declare a field of an :class:`Options` dataclass.

    ``facts`` are attributes of :class:`Option`, such as ``at_least``.
    """
    made: Any = field(default=default, metadata=facts)
    return made  # type: ignore[no-any-return]


class Options:
    """Base class for the options of a command.

    Each field is a flag, a YAML key and a Python keyword. A subclass is a frozen dataclass with the help as a
    docstring under each field. Commands share options by inheritance. Creating an object checks types and
    bounds.
    """

    __dataclass_fields__: ClassVar[dict[str, Any]]
    _shared: ClassVar[dict[str, Any]]
    """Default ``panel`` and ``needs`` of the options that this class declares."""

    def __init_subclass__(cls, panel: str = "", needs: Mapping[str, Any] | None = None) -> None:
        super().__init_subclass__()
        cls._shared = {"panel": panel, "needs": needs or {}}

    def __post_init__(self) -> None:
        for name, option in self.options().items():  # the dataclass is frozen
            object.__setattr__(self, name, option.check(getattr(self, name)))

    @classmethod
    @cache  # reading annotations takes milliseconds
    def options(cls) -> Mapping[str, Option]:
        types = get_type_hints(cls)
        # Panel and needs of a class apply to its own fields, not to inherited fields.
        owners: dict[str, Any] = {
            name: kind for kind in reversed(cls.__mro__) for name in inspect.get_annotations(kind)
        }
        return {
            spec.name: Option(
                name=spec.name,
                type=types[spec.name],
                default=spec.default if spec.default_factory is MISSING else spec.default_factory(),
                owner=owners[spec.name],
                **{**owners[spec.name]._shared, **spec.metadata},
            )
            for spec in fields(cls)
        }

    @classmethod
    def of(cls, **values: Any) -> Self:
        known = cls.options()
        for name in values:
            if name not in known:
                raise UsageError(unknown_option(name, tuple(known)))
        for name, spec in known.items():
            if spec.required and name not in values:
                raise UsageError(f"{option_name(name)} is missing. {spec.help}")
        return cls(**values)

    def values(self) -> dict[str, Any]:
        values = {name: getattr(self, name) for name in self.options()}
        paths = {name: os.fspath(value) for name, value in values.items() if isinstance(value, os.PathLike)}
        return values | paths

    def only(self, kind: type[OptionsT]) -> OptionsT:
        return kind(**{name: getattr(self, name) for name in kind.options()})

    def files_read(self) -> tuple[str, ...]:
        """Return the paths and hub names of all inputs except image folders."""
        paths: list[str] = []
        for name, spec in self.options().items():
            value = getattr(self, name)
            # An output file may be in an image folder.
            if spec.reads not in (None, "data_dir") and value:
                paths += map(os.fspath, value if spec.element else (value,))
        return tuple(paths)

    def changed(self) -> list[str]:
        return [name for name, spec in self.options().items() if getattr(self, name) != spec.default]

    def unmet_needs(self) -> dict[str, str]:
        """Return a warning for each changed option that has no effect, by option name."""
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
    # Python drops docstrings of fields, so they are parsed from the source, as pydantic does. Options work
    # without the source; help and some messages do not.
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
    return value.tolist() if hasattr(value, "tolist") else value


def _alternatives(kind: Any) -> tuple[Any, ...]:
    parts = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    return tuple(part for part in parts if part is not type(None))


def _main(kind: Any) -> Any:
    parts = _alternatives(kind)
    main = next((part for part in parts if get_origin(part) is tuple), parts[-1])
    return os.PathLike if get_origin(main) is os.PathLike else main


def unknown_option(name: str, known: tuple[str, ...], kind: str = "option") -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"no {kind} {name!r}" + (f"; did you mean {near[0]!r}?" if near else "")


def require(name: str, value: object, holds: bool, expected: str) -> None:
    """Raise a :class:`UsageError` with the option, its value and ``expected`` if ``holds`` is false."""
    if not holds:
        # Models, and lists that YAML aliases expand to millions of elements, are shortened.
        short = isinstance(value, str | int | float | os.PathLike) and len(str(value)) <= 200
        shown = option_name(name, value) if short else f"{option_name(name)}={_SHORT.repr(value)}"
        raise UsageError(f"{shown}: expected {expected}")


def key_value(name: str, text: str) -> tuple[str, Any]:
    """Parse ``KEY=VALUE``. The value is read as JSON, else as a Python literal, else as text."""
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UsageError(f"{option_name(name)} {text!r}: expected KEY=VALUE, like img_size=32")
    for read in (json.loads, literal_eval):  # true and [224,288] are JSON, True and (224, 288) are Python
        with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
            return key, read(value)
    return key, value


def yaml_value(text: str | bytes) -> Any:
    import yaml

    try:
        return yaml.safe_load(text)
    except Exception as error:  # tags that do not fit their values raise errors of many types
        raise UsageError(f"invalid YAML: {error!s:.500}") from None


def read_config(path: PathLike, options: Mapping[str, Option], where: str) -> dict[str, Any]:
    try:
        document = yaml_value(Path(path).read_bytes())
    except (OSError, UsageError) as error:
        raise UsageError(f"{where}: {getattr(error, 'strerror', None) or error}") from None
    if document is not None and not isinstance(document, dict):
        raise UsageError(f"{where}: expected lines of NAME: VALUE, found {type(document).__name__}")
    return read_options(document or {}, options, where)


def read_options(document: Mapping[Any, Any], options: Mapping[str, Option], where: str) -> dict[str, Any]:
    """Replace YAML keys by option names, and convert the values to the options' types."""
    names = {option.key: name for name, option in options.items()}
    values: dict[str, Any] = {}
    for key, value in document.items():
        try:
            if key not in names:
                raise UsageError(unknown_option(str(key), tuple(names)))
            values[names[key]] = options[names[key]].check(value)
        except UsageError as error:
            raise UsageError(f"{where}: {error}") from None
    return values


_FIRST = ("checkpoint", "flops", "images", "val_images", "data_dir", "output", "effort", "scope")
"""Keywords that most users need, which signatures and docstrings show first."""


def _by_use(name: str) -> int:
    return _FIRST.index(name) if name in _FIRST else len(_FIRST)


def takes_keywords(call: Callable[P, Any]) -> Callable[[Callable[..., R]], Callable[P, R]]:
    """Give a function of ``**options`` the signature of the dataclass ``call``, and the options' help.

    Editors and ``help()`` then show each keyword with its type and default.
    """

    def decorate(function: Callable[..., R]) -> Callable[P, R]:
        written: Any = function
        returned = inspect.signature(function).return_annotation
        shown = inspect.signature(call)
        parameters = sorted(shown.parameters.values(), key=lambda parameter: _by_use(parameter.name))
        written.__signature__ = shown.replace(parameters=parameters, return_annotation=returned)
        options = next(base for base in call.__bases__ if issubclass(base, Options))  # type: ignore[attr-defined]
        return lists_options(options)(function)

    return decorate


def lists_options(options: type[Options]) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Add the help of ``options`` to the docstring of a function that takes them as keywords."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        lines = [
            f"    {name}: {spec.help}{'' if spec.default is None else f' Default: {spec.default!r}.'}"
            for name, spec in sorted(options.options().items(), key=lambda item: _by_use(item[0]))
            if not spec.required
        ]
        text = inspect.cleandoc(function.__doc__ or "")
        function.__doc__ = "\n".join([text, "", "Options:", *lines])
        return function

    return decorate
