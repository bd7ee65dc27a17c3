"""Bounds on what loading a pickle takes, by its opcodes, none of which is run.

A pickle may name a value that it has made as often as it likes. Sixty pairs, each of the one before twice,
are a value of 2**60 parts, and Python hashes the key of a dict part by part. So parts are counted here as
often as they are named. And a tensor of one number may claim any shape, and would be as many tensors to a
function that takes it for a list.
"""

from __future__ import annotations

import _compat_pickle
import pickle
from contextlib import suppress

from mhacut.errors import CheckpointError

MAX_PICKLE_BYTES = 8 * 2**20
"""Largest pickle. That of a training state of 10,000 tensors has 2 MB; each byte can make an object of 64."""
_MAX_PARTS = 2**24
"""Largest number of parts of all values that a pickle names again or gives to a function. A checkpoint of
100,000 tensors has a tenth of them."""
_MAX_NESTING = 1000
"""Largest number of containers within each other. To hash tuples, Python calls itself as often, unchecked."""
_UNBOUNDED = {
    "builtins.bytearray": "it makes bytearrays, which are no weights",
    "torch._utils._rebuild_device_tensor_from_cpu_tensor": (
        "its tensors are those of an accelerator (XLA), move them to the CPU first"
    ),
}
"""Functions that the safe unpickler knows, and that fill as much memory as they are asked for."""
_COPIES = {"builtins.set", "collections.Counter", "collections.OrderedDict", "torch.Size"}
"""Classes that take every part of what they are given."""
_NO_TENSORS = {*_COPIES, "torch.device", "torch.serialization._get_layout"}
_DEPTHS = {
    **dict.fromkeys(_COPIES, 3),
    "torch._utils._rebuild_sparse_tensor": 2,
    "torch._tensor._rebuild_from_type_v2": 2,
}
"""Number of containers around a tensor, or one of :data:`_COPIES`, in what these are given; 1 for others."""
_FAR = 2**10
_PLAIN = {
    code[0]: size
    for size, codes in {
        0: (pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.EMPTY_TUPLE),
        1: (pickle.BININT1,),
        2: (pickle.BININT2,),
        4: (pickle.BININT,),
        8: (pickle.BINFLOAT,),
    }.items()
    for code in codes
}
"""Opcodes of values without parts, and the number of bytes of their argument."""
_COUNTED = {pickle.BINUNICODE[0]: 4, pickle.SHORT_BINSTRING[0]: 1, pickle.LONG1[0]: 1}
"""Opcodes of values whose argument begins with its length, and the number of bytes of that."""
_EMPTY = {code[0] for code in (pickle.EMPTY_LIST, pickle.EMPTY_DICT, pickle.EMPTY_SET)}
_GET = {pickle.BINGET[0]: 1, pickle.LONG_BINGET[0]: 4}
_PUT = {pickle.BINPUT[0]: 1, pickle.LONG_BINPUT[0]: 4}
_TUPLE = {pickle.TUPLE1[0]: 1, pickle.TUPLE2[0]: 2, pickle.TUPLE3[0]: 3, pickle.TUPLE[0]: 0}
_ADD = {pickle.APPEND[0]: 1, pickle.SETITEM[0]: 2, pickle.APPENDS[0]: 0, pickle.SETITEMS[0]: 0}
"""Numbers of values that become a tuple, or go into the value below them; 0 for all above the last mark."""
_CALL = {pickle.REDUCE[0], pickle.NEWOBJ[0]}
_MARK, _GLOBAL, _PROTO, _BINPERSID, _BUILD = (
    code[0] for code in (pickle.MARK, pickle.GLOBAL, pickle.PROTO, pickle.BINPERSID, pickle.BUILD)
)


def check_pickles(where: str, data: bytes, pickles: int = 1) -> None:
    """Refuse pickles whose loading may take far more time or memory than their size.

    The opcodes are those that PyTorch's safe unpickler knows; at any other, it ends.

    Args:
        where: the file, for messages.
        data: the pickles, one after the other; anything may follow.
        pickles: their number.

    Raises:
        CheckpointError: they name values, a function or numbers of values that no checkpoint needs.
    """
    at: int | None = 0
    with suppress(IndexError, KeyError, ValueError):  # broken, as loading it will show
        for _ in range(pickles):
            if at is not None:
                at = _Follower(where, data).end(at)


class _Made:
    """A value in place of the one that a pickle makes."""

    __slots__ = ("depth", "name", "named", "nesting", "parts")

    def __init__(self, parts: int = 1, depth: int = _FAR, name: str = "") -> None:
        self.parts = parts
        """Number of values in it, itself included, as often as they occur."""
        self.depth = depth
        """Number of containers around the tensor in it that is in the fewest; 0 for a tensor."""
        self.nesting = 0
        """Number of containers within each other."""
        self.name = name
        """Name of a function or class, with that of its module, as Python 3 spells it."""
        self.named = False
        """Whether the pickle has named it again."""


_ATOM = _Made()
"""Any value without parts."""


class _Follower:
    """Follows one pickle."""

    def __init__(self, where: str, data: bytes) -> None:
        self.where, self.data = where, data
        self.stack: list[_Made] = []
        self.marks: list[int] = []
        self.memo: dict[int, _Made] = {}
        self.parts = 0

    def end(self, at: int) -> int | None:
        """Follow the pickle that begins at byte ``at``; return its end, None where unpicklers end before."""
        data, stack = self.data, self.stack
        while (code := data[at]) != pickle.STOP[0]:
            at += 1
            if code in _PLAIN:
                at += _PLAIN[code]
                stack.append(_ATOM)
            elif code in _COUNTED:
                at += _COUNTED[code]
                at += int.from_bytes(data[at - _COUNTED[code] : at], "little")
                stack.append(_ATOM)
            elif code in _EMPTY:
                stack.append(_Made())
            elif code in _PUT or code in _GET:
                size = _PUT.get(code) or _GET[code]
                self._memo(code, int.from_bytes(data[at : at + size], "little"))
                at += size
            elif code == _MARK:
                self.marks.append(len(stack))
            elif code in _TUPLE:
                made = _Made()
                self._fill(made, self._taken(_TUPLE[code]))
                stack.append(made)
            elif code in _ADD:
                self._add(self._taken(_ADD[code]))
            elif code in _CALL:
                self._call(stack.pop())
            elif code == _BINPERSID:
                stack[-1] = _Made(depth=0)
            elif code == _BUILD:  # with attributes, which nothing hashes or copies
                self._check_depth(stack.pop(), 1)
            elif code == _GLOBAL:
                at = self._global(at)
            elif code == _PROTO:
                at += 1
            else:
                return None
        return at + 1

    def _memo(self, code: int, index: int) -> None:
        if code in _GET:
            value = self.memo[index]
            value.named = True
            self._count(value.parts)
            self.stack.append(value)
        elif index > len(self.data):  # Python's own unpickler makes room for as many
            raise self._refused(f"it numbers a value {index}, expected fewer than its {len(self.data)} bytes")
        else:
            self.memo[index] = self.stack[-1]

    def _taken(self, count: int) -> list[_Made]:
        start = len(self.stack) - count if count else self.marks.pop()
        if start < 0:
            raise IndexError(start)
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _add(self, values: list[_Made]) -> None:
        target = self.stack[-1]
        if target is _ATOM:
            return
        if target.named:  # it was counted without what now goes into it
            raise self._refused("a value is filled after it was named again")
        self._fill(target, values)

    def _fill(self, target: _Made, values: list[_Made]) -> None:
        target.parts += sum(value.parts for value in values)
        target.depth = min(target.depth, *(value.depth + 1 for value in values), _FAR)
        target.nesting = max(target.nesting, *(value.nesting + 1 for value in values), 0)
        if target.nesting > _MAX_NESTING:
            raise self._refused(f"it nests more than {_MAX_NESTING} values in each other")

    def _call(self, given: _Made) -> None:
        name = self.stack[-1].name
        self._check_depth(given, _DEPTHS.get(name, 1))
        self._count(given.parts)
        makes_tensor = name.startswith("torch.") and name not in _NO_TENSORS
        depth = 0 if makes_tensor else 1 if given.depth < _FAR else _FAR
        self.stack[-1] = _Made(given.parts + 1, depth)
        self.stack[-1].nesting = given.nesting + 1

    def _check_depth(self, given: _Made, least: int) -> None:
        if given.depth < least:
            raise self._refused("it gives a tensor to what takes a list")

    def _count(self, parts: int) -> None:
        self.parts += parts
        if self.parts > _MAX_PARTS:
            raise self._refused(f"the values that it names again have more than {_MAX_PARTS} parts")

    def _global(self, at: int) -> int:
        end = self.data.index(b"\n", self.data.index(b"\n", at) + 1) + 1
        module, name, _ = self.data[at:end].decode().split("\n")
        if (module, name) in _compat_pickle.NAME_MAPPING:
            module, name = _compat_pickle.NAME_MAPPING[module, name]
        else:
            module = _compat_pickle.IMPORT_MAPPING.get(module, module)
        name = f"{module}.{name}"
        if name in _UNBOUNDED:
            raise self._refused(_UNBOUNDED[name])
        self.stack.append(_Made(depth=0 if name in _COPIES else _FAR, name=name))
        return end

    def _refused(self, why: str) -> CheckpointError:
        return CheckpointError(
            f"{self.where}: its pickle may take too much time or memory: {why}; save the state dict alone: "
            "torch.save(model.state_dict(), ...)"
        )
