"""Harmless values beside the weights of a torch file: numbers of numpy, paths, defaultdicts.

Training scripts save accuracies and folders of their own. PyTorch's safe unpickler refuses the whole file for
one of them. What stands in for them here imports nothing and calls nothing that the file names: it makes
plain numbers and dicts, and keeps nothing of the rest.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

_SCALARS = (("numpy._core.multiarray", "scalar"), ("numpy.core.multiarray", "scalar"))
_DTYPE = ("numpy", "dtype")
_DEFAULTDICT = ("collections", "defaultdict")
_PATHS = ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
_FACTORIES = ("list", "dict", "int", "float", "str", "bool")
_UNREAD = (
    *((module, name) for module in ("pathlib", "pathlib._local") for name in _PATHS),
    *((module, name) for module in ("builtins", "__builtin__") for name in _FACTORIES),
)
"""Modules and names as pickles spell them, Python 2's too, as protocol 2 does. Nothing is kept of them."""
NAMES = frozenset(".".join(name) for name in (*_SCALARS, _DTYPE, _DEFAULTDICT, *_UNREAD))
"""The names that have a stand-in."""
# fmt: off
_FORMATS = {
    "f2": "e", "f4": "f", "f8": "d", "b1": "?",
    "i1": "b", "i2": "h", "i4": "i", "i8": "q", "u1": "B", "u2": "H", "u4": "I", "u8": "Q",
}
# fmt: on
"""Formats of :mod:`struct` by the codes of numpy's dtypes."""


class _Unread:
    """A value that was not read."""

    __slots__ = ()

    def __init__(self, *_: object) -> None:
        """Drop what it was made of."""

    def __setstate__(self, state: Any) -> None:
        """Drop the attributes of the original."""

    def __repr__(self) -> str:
        return f"<{type(self).__name__}>"


def stand_ins() -> dict[tuple[str, str], Callable[..., Any]]:
    """Return what is called in place of each module and name; made afresh, since a pickle may change them."""

    class dtype(_Unread):
        __slots__ = ("code", "order")

        def __init__(self, code: Any = None, *_: object) -> None:
            self.code, self.order = code, "<"

        def __setstate__(self, state: Any) -> None:
            self.order = ">" if state[1] == ">" else "<"

    def scalar(kind: object = None, data: object = b"", *_: object) -> object:
        if not isinstance(kind, dtype) or kind.code not in _FORMATS or not isinstance(data, bytes):
            return _Unread()
        number: object = struct.unpack(kind.order + _FORMATS[kind.code], data)[0]
        return number

    def defaultdict(*_: object) -> dict[Any, Any]:
        return {}

    unread = {name: type(name[1], (_Unread,), {"__slots__": ()}) for name in _UNREAD}
    return {**unread, **dict.fromkeys(_SCALARS, scalar), _DTYPE: dtype, _DEFAULTDICT: defaultdict}
