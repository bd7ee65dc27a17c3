"""Table of fingerprints: which architectures have the tensors of a file, found without building a model.

``python -m mhacut.commands.generate_fingerprints`` writes the table anew, for the timm that is installed.
"""

from __future__ import annotations

import base64
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path

Shapes = Mapping[str, tuple[int, ...]]

TABLE = Path(__file__).with_name("fingerprints.txt")
POSITIONS = re.compile(
    r"(positional_encoding|pos_embed\w*|relative_position_bias_table|rel_pos_[hw]|attention_biases)$"
)
"""Tensors whose shape depends on the image size."""
CLASSIFIERS = re.compile(
    r"((aux_)?head(_dist)?|heads\.\d+|fc|classif(ier)?|last_linear)"
    r"(\.(fc|fc2|fc\.fc2|l|linear|proj|\d|head\.l|head_dist\.l|classifier\.(4|linear)))?\.(weight|bias)"
)
"""Tensors of classifiers in timm; their shape depends on the classes, and a file may have none."""
_NUMBER = re.compile(r"\.\d+(?=\.)")
_SLOTS = 12
"""Minima of each of the two halves of a sketch."""
_MOST_SIMILAR = 12
_LEAST_LIKENESS = 2
"""Smallest likeness of an architecture that is worth building."""


@dataclass(frozen=True)
class Fingerprint:
    """Digests of the names and shapes of a model's tensors, without those of classifiers."""

    exact: str
    """Digest of all names and shapes; tables of positions count by their names only."""
    any_size: str
    """Digest of the kinds of tensors, blocks without their number, and of their shapes in blocks: equal
    whatever the depth, the input channels, the patches and the image size."""
    sketch: bytes
    """MinHash of the kinds, and of them with their shapes (a byte of each minimum; Li and König, 2010)."""
    width: int
    """Number of elements of one tensor of each kind and shape: grows with the width, not with the depth."""


@dataclass(frozen=True)
class Group:
    """Architectures with equal :attr:`Fingerprint.any_size`."""

    any_size: str
    sketch: bytes
    width: int
    architectures: Mapping[str, tuple[str, ...]]
    """Names of architectures, by :attr:`Fingerprint.exact`."""

    def names(self) -> tuple[str, ...]:
        """Names of all architectures of the group."""
        return tuple(name for names in self.architectures.values() for name in names)


@dataclass(frozen=True)
class Table:
    """Fingerprints of all prunable architectures of one version of timm."""

    timm: str
    groups: tuple[Group, ...]

    def exactly(self, shapes: Shapes) -> tuple[str, ...]:
        """Names of the architectures that have these tensors, classes and image size aside."""
        exact = fingerprint(shapes).exact
        return tuple(name for group in self.groups for name in group.architectures.get(exact, ()))

    def of_any_size(self, shapes: Shapes) -> tuple[str, ...]:
        """Names of those that may have them with another depth, patch size or number of input channels."""
        any_size = fingerprint(shapes).any_size
        return tuple(name for group in self.groups if group.any_size == any_size for name in group.names())

    def similar(self, shapes: Shapes) -> tuple[Group, ...]:
        """Groups with the most similar tensors, most similar first; none if no group is.

        Of equally similar ones, those come first whose width is nearest.
        """
        own = fingerprint(shapes)
        ranked = sorted(
            (-_likeness(group.sketch, own.sketch), abs(math.log(group.width / own.width)), number)
            for number, group in enumerate(self.groups)
        )
        return tuple(
            self.groups[number]
            for likeness, _, number in ranked[:_MOST_SIMILAR]
            if -likeness >= _LEAST_LIKENESS
        )


def fingerprint(shapes: Shapes) -> Fingerprint:
    """Return the fingerprint of a model, or of a file, from the shape of each of its tensors."""
    exact: set[str] = set()
    any_size: set[str] = set()
    elements: dict[str, int] = {}
    for name, shape in shapes.items():
        if CLASSIFIERS.fullmatch(name):
            continue
        sides = "" if POSITIONS.search(name) else "x".join(map(str, shape))
        kind = _NUMBER.sub("", name)
        exact.add(f"{name} {sides}")
        any_size.add(kind if kind == name else f"{kind} {sides}")
        elements[f"{kind} {sides}"] = math.prod(shape) if sides else 0
    kinds = {text.split(" ")[0] for text in elements}
    sketch = _sketch(kinds) + _sketch(elements)
    return Fingerprint(_digest(exact, 6), _digest(any_size, 4), sketch, 1 + sum(elements.values()))


def _digest(lines: Iterable[str], size: int) -> str:
    return blake2b("\n".join(sorted(lines)).encode(), digest_size=size).hexdigest()


def _sketch(features: Iterable[str]) -> bytes:
    digests = [blake2b(feature.encode(), digest_size=2 * _SLOTS).digest() for feature in features]
    slots = range(0, 2 * _SLOTS, 2)
    return bytes(min((digest[i : i + 2] for digest in digests), default=b"\0\0")[1] for i in slots)


def _likeness(one: bytes, other: bytes) -> int:
    """Return a grade from 0 to 8, coarse enough that the width decides between nearly equal sketches."""
    return sum(a == b for a, b in zip(one, other, strict=True)) // 3


def write_table(timm: str, fingerprints: Mapping[str, Fingerprint]) -> str:
    """Return the text of a table, from the fingerprint of each architecture.

    A line without indent begins a group: its digest, its width and its sketch. Below it, each line has a
    digest of all names and shapes and the architectures that share it.
    """
    groups: dict[str, dict[str, list[str]]] = {}
    firsts: dict[str, Fingerprint] = {}
    for name, found in sorted(fingerprints.items()):
        groups.setdefault(found.any_size, {}).setdefault(found.exact, []).append(name)
        firsts.setdefault(found.any_size, found)
    lines = [f"timm {timm}"]
    for any_size, by_exact in groups.items():
        sketch = base64.b64encode(firsts[any_size].sketch).decode()
        lines.append(f"{any_size} {firsts[any_size].width} {sketch}")
        lines += [" " + " ".join([exact, *names]) for exact, names in by_exact.items()]
    return "\n".join(lines) + "\n"


@cache
def read_table() -> Table:
    """Read the table that mhacut ships."""
    first, *lines = TABLE.read_text(encoding="ascii").splitlines()
    groups: list[Group] = []
    members: dict[str, tuple[str, ...]] = {}
    for line in lines:
        head, *rest = line.split()
        if line.startswith(" "):
            members[head] = tuple(rest)
        else:
            members = {}
            groups.append(Group(head, base64.b64decode(rest[1]), int(rest[0]), members))
    return Table(first.removeprefix("timm "), tuple(groups))
