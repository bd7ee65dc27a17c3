"""Options from a YAML file, checked as strictly as flags are."""

from __future__ import annotations

import json
import math
import os
from ast import literal_eval
from collections import Counter
from collections.abc import Collection, Mapping
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

from mhacut.errors import UsageError
from mhacut.limits import is_int, is_number
from mhacut.options.base import PathLike
from mhacut.options.option import Option, unknown_option

if TYPE_CHECKING:
    import yaml

_MAX_BYTES = 2**16
_MAX_BITS = 1024
"""Largest size of a whole number: Python writes no numbers of many thousand digits."""
_MAX_VALUES = 10_000
"""Largest number of values in a file; a value that aliases repeat counts each time."""


def read_config(
    path: PathLike, options: Mapping[str, Option], where: str, *, flags_only: Collection[str] = ()
) -> dict[str, Any]:
    """Read the options in a YAML file, converted to their types.

    Args:
        path: of a mapping from option names, with dashes or underscores, to values.
        options: every option by its flat name.
        where: what a message calls the file.
        flags_only: names that are no options and stand on the command line only.

    Raises:
        OSError: the file cannot be read.
        UsageError: it holds something that is no option or of another type.
    """
    import yaml

    with Path(path).open("rb") as file:
        data = file.read(_MAX_BYTES + 1)
    if len(data) > _MAX_BYTES:
        raise UsageError(f"{where}: is larger than {_MAX_BYTES} bytes; expected a few lines of YAML")
    try:
        document = yaml.safe_load(data)
        twice = _repeated_key(yaml.compose(data, yaml.SafeLoader))
    except Exception as error:  # tags that do not fit their values fail in any way
        raise UsageError(f"{where}: is not YAML: {error!s:.500}") from None
    _check_size(document, where)
    if twice is not None:
        raise UsageError(f"{where}: {twice!r} appears twice")
    if document is None:
        return {}
    if not isinstance(document, dict):
        raise UsageError(f"{where}: expected lines of NAME: VALUE, found {type(document).__name__}")
    spelled = {option.flag.removeprefix("--").replace("-", "_"): name for name, option in options.items()}
    values: dict[str, Any] = {}
    for key, value in document.items():
        name = str(key).replace("-", "_")
        name = spelled.get(name, name)
        positive = name.removeprefix("no_")
        if name not in options and positive in options and options[positive].kind is bool:
            # `no-latency: true`, as the flag is spelled.
            name, value = positive, not convert(value, bool, f"{where}: {key}")
        if name in flags_only:
            raise UsageError(f"{where}: {str(key)!r} is given on the command line only, --{key}")
        if name not in options:
            raise UsageError(f"{where}: {unknown_option(str(key), _spelled_like(str(key), options))}")
        if name in values:
            raise UsageError(f"{where}: {name!r} appears twice, in two spellings")
        values[name] = convert(value, options[name].type, f"{where}: {key}")
    return values


def _repeated_key(root: yaml.Node | None) -> str | None:
    """Return a key that a mapping has twice, of which ``safe_load`` keeps the last; None if there is none."""
    import yaml

    todo, seen = [root], set()
    while todo:
        node = todo.pop()
        if id(node) in seen:  # by an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.MappingNode):
            counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
            for key, count in counts.items():
                if count > 1:
                    return str(key)
            todo += [value for _, value in node.value]
        elif isinstance(node, yaml.SequenceNode):
            todo += node.value
    return None


def _check_size(document: object, where: str) -> None:
    """Raise a :class:`UsageError` if aliases make a document refer to itself, or large."""
    sizes: dict[int, int | None] = {}

    def size(value: object) -> int:
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:
            raise UsageError(f"{where}: expected numbers of at most {_MAX_BITS} bits")
        if not isinstance(value, dict | list | tuple | set):
            return 1
        if id(value) not in sizes:
            sizes[id(value)] = None
            parts = [*value, *value.values()] if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(map(size, parts))
        found = sizes[id(value)]
        if found is None:
            raise UsageError(f"{where}: an alias refers to a value that contains it")
        if found > _MAX_VALUES:
            raise UsageError(f"{where}: aliases make it more than {_MAX_VALUES} values; expected a few lines")
        return found

    size(document)


def convert(value: object, kind: Any, where: str) -> Any:
    """Convert the value of a flag or of a YAML file to the type of its option.

    >>> convert("0.5,0.4,0.4", tuple[float, ...] | None, "--mean")
    (0.5, 0.4, 0.4)
    >>> convert("1,8", tuple[int, ...], "--batch-sizes")
    (1, 8)
    >>> convert("1e-2", float, "lr")  # text to YAML, which wants a dot in numbers
    0.01

    Raises:
        UsageError: it is of no such type.
    """
    kinds = _kinds(kind)
    if value is None and type(None) in kinds:
        return None
    if bool in kinds:
        return _checked(value, isinstance(value, bool), "true or false", where)
    if int in kinds:
        return _checked(value, is_int(value), "a whole number", where)
    if float in kinds:
        return _number(value, where)
    if any(get_origin(option) is tuple for option in kinds) and (str not in kinds or isinstance(value, list)):
        parts = value.split(",") if isinstance(value, str) else value if isinstance(value, list) else [value]
        (element, *_) = next(get_args(option) for option in kinds if get_origin(option) is tuple)
        return tuple(_element(part, element, where) for part in parts)
    if any(get_origin(option) not in (None, Literal, os.PathLike, tuple) for option in kinds):
        return _pairs(value, where)
    if is_number(value):
        value = str(value)  # a budget of 2000000000 needs no quotes
    return _checked(value, isinstance(value, str), "text", where)


def key_value(flag: str, text: str) -> tuple[str, Any]:
    """Parse a ``KEY=VALUE``; the value is JSON, else a Python literal, else text.

    >>> [key_value("--model-arg", text) for text in ("img_size=32", "qk_norm=True", "global_pool=avg")]
    [('img_size', 32), ('qk_norm', True), ('global_pool', 'avg')]
    """
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UsageError(f"{flag} {text!r}: expected KEY=VALUE, like img_size=32")
    for read in (json.loads, literal_eval):
        try:
            return key, read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return key, value


def _pairs(value: object, where: str) -> dict[str, Any]:
    """Convert a mapping, a ``KEY=VALUE``, or a list of them, to one mapping."""
    pairs: dict[str, Any] = {}
    for part in value if isinstance(value, list) else [value]:
        if isinstance(part, str):
            part = dict([key_value(where, part)])
        held = isinstance(part, dict) and all(isinstance(key, str) for key in part)
        pairs |= _checked(part, held, "NAME: VALUE pairs, or a list of KEY=VALUE", where)
    return pairs


def _kinds(kind: Any) -> tuple[Any, ...]:
    """Alternatives of a type."""
    return get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)


def _element(value: object, kind: Any, where: str) -> Any:
    """Convert one of several values, which is text where it stood among commas."""
    if kind is float:
        return _number(value, where)
    if kind is int and isinstance(value, str) and value.strip().isdecimal():
        return int(value)
    return convert(value.strip() if isinstance(value, str) else value, kind, where)


def _number(value: object, where: str) -> float:
    number = math.nan
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
    _checked(value, math.isfinite(number), "a number", where)
    return number


def _checked(value: object, holds: bool, expected: str, where: str) -> Any:
    if not holds:
        raise UsageError(f"{where}: expected {expected}, found {value!r:.100}")
    return value


def _spelled_like(key: str, names: Collection[str]) -> tuple[str, ...]:
    """Option names in the spelling of ``key``, to suggest one of them."""
    return tuple(name.replace("_", "-") if "-" in key else name for name in names)
