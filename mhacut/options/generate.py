"""``python -m mhacut.options.generate``: write ``keywords.py`` anew, after an option was added or changed."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from mhacut.options.bench import BenchOptions
from mhacut.options.evaluate import EvaluateOptions
from mhacut.options.export import ExportOptions
from mhacut.options.finetune import FinetuneOptions
from mhacut.options.inspect import InspectOptions
from mhacut.options.models import ModelsOptions
from mhacut.options.option import Option, Options
from mhacut.options.prune import PruneOptions

KEYWORDS = Path(__file__).with_name("keywords.py")
COMMANDS: Mapping[str, type[Options]] = {
    "prune": PruneOptions,
    "finetune": FinetuneOptions,
    "evaluate": EvaluateOptions,
    "inspect": InspectOptions,
    "bench": BenchOptions,
    "export": ExportOptions,
    "models": ModelsOptions,
}
"""Options of each command, in the order of ``mhacut --help``."""
_IN_THE_SIGNATURE = {"checkpoint", "checkpoints", "flops"}
_WIDTH = 110
_HEAD = '''"""Keyword arguments of mhacut's functions; written by ``python -m mhacut.options.generate``."""

# fmt: off
from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Literal, TypedDict
'''


def keywords_module() -> str:
    """Return the source of ``keywords.py``: a TypedDict for each class of options; groups become bases."""
    written: dict[type[Options], str] = {}
    for command in sorted(COMMANDS.keys() - {"models"}):  # mhacut.models is no function
        _write_typed_dict(COMMANDS[command], written)
    return _HEAD + "".join(written.values())


def _write_typed_dict(options: type[Options], written: dict[type[Options], str]) -> None:
    """Add the class of ``options`` to ``written``, after the classes it is made of."""
    bases = [base for base in options.__bases__ if base is not Options] + list(options.groups().values())
    for base in bases:
        if base not in written:
            _write_typed_dict(base, written)
    names = [*map(_name, bases), "total=False"] if bases else ["TypedDict", "total=False"]
    head = f"class {_name(options)}({', '.join(names)}):"
    if len(head) > _WIDTH:
        head = "\n".join([f"class {_name(options)}(", *(f"    {name}," for name in names), "):"])
    lines = ["", "", head, f'    """{options.__doc__}"""']
    for option in options.options().values():
        if option.name in options.__annotations__ and option.name not in _IN_THE_SIGNATURE:
            lines += [f"    {option.name}: {source_of(option.type)}", *_docstring(option)]
    written[options] = "\n".join(lines).rstrip() + "\n"


def _name(options: type[Options]) -> str:
    return options.__name__.removesuffix("Options") + "Keywords"


def _docstring(option: Option) -> list[str]:
    default = "" if option.default is None else f" Default: {option.default!r}."
    return textwrap.wrap(
        f'"""{option.help}{default}"""', _WIDTH, initial_indent=" " * 4, subsequent_indent=" " * 4
    )


def source_of(kind: Any) -> str:
    """Return the source of a type, alike in all versions of Python.

    >>> source_of(tuple[float, ...] | None), source_of(Literal["a", "b"])
    ('tuple[float, ...] | None', 'Literal["a", "b"]')
    """
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return " | ".join(map(source_of, parts))
    if origin is Literal:
        return f"Literal[{', '.join(_quoted(part) for part in parts)}]"
    if origin is not None:
        name = "os.PathLike" if origin is os.PathLike else origin.__name__
        return f"{name}[{', '.join(map(source_of, parts))}]"
    named = {type(None): "None", Any: "Any", ...: "..."}
    return named.get(kind) or str(kind.__name__)


def _quoted(text: str) -> str:
    return f'"{text}"'


if __name__ == "__main__":
    KEYWORDS.write_text(keywords_module())
