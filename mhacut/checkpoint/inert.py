"""Harmless values beside the weights of a torch file, read as nothing: scalars of numpy, paths, defaultdicts.

Training scripts save accuracies and folders of their own. PyTorch's safe unpickler refuses the whole file for
one of them. What stands in for them here knows no import, calls nothing and keeps nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_FACTORIES = ("list", "dict", "int", "float", "str", "bool")
_VALUES = (
    *(("numpy._core.multiarray", "scalar"), ("numpy.core.multiarray", "scalar"), ("numpy", "dtype")),
    *((module, name) for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *((module, name) for module in ("builtins", "__builtin__") for name in _FACTORIES),
)
"""Modules and names as pickles spell them; those of Python 2 are those of protocol 2."""
_DEFAULTDICT = ("collections", "defaultdict")
NAMES = frozenset(".".join(name) for name in (*_VALUES, _DEFAULTDICT))
"""The names that are read as nothing."""


class _Unread:
    """A value that was not read."""

    __slots__ = ()

    def __init__(self, *_: object) -> None:
        """Drop what it was made of."""

    def __setstate__(self, state: object) -> None:
        """Drop the attributes of the original."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


def stand_ins() -> dict[tuple[str, str], Callable[..., Any]]:
    """Return what is called in place of each module and name; made afresh, since a pickle may change them."""

    def defaultdict(*_: object) -> dict[Any, Any]:
        return {}

    values = {pair: type(pair[1], (_Unread,), {"__slots__": ()}) for pair in _VALUES}
    return {**values, _DEFAULTDICT: defaultdict}
