"""Table of fingerprints: which architectures have the tensors of a file, found without building a model.

``tests/tools/generate_fingerprints.py`` writes the table anew, for the timm that is installed.
"""

from __future__ import annotations

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
_OPTIONAL = re.compile(r"cls_token|reg_token|norm_pre\.\w+|blocks\.(ls[12]\.gamma|attn\.qkv\.bias)")
"""Kinds of tensors that are there, or are not, by an argument that the others show."""
_NUMBER = re.compile(r"\.\d+(?=\.)")


@dataclass(frozen=True)
class Fingerprint:
    """Digests of the names and shapes of a model's tensors, without those of classifiers."""

    exact: str
    """Digest of all names and shapes; tables of positions count by their names only."""
    any_size: str
    """Digest of the kinds of tensors, blocks without their number, and of their shapes in blocks: equal
    whatever the depth, the input channels, the patches, the image size, the pooling and the registers."""


@dataclass(frozen=True)
class Table:
    """Fingerprints of all prunable architectures of one version of timm."""

    timm: str
    groups: Mapping[str, Mapping[str, tuple[str, ...]]]
    """Names of architectures, by :attr:`Fingerprint.any_size`, then by :attr:`Fingerprint.exact`."""

    def exact_matches(self, shapes: Shapes) -> tuple[str, ...]:
        """Names of the architectures that have these tensors, classes and image size aside."""
        digests = fingerprint(shapes)
        return self.groups.get(digests.any_size, {}).get(digests.exact, ())

    def matches_of_any_size(self, shapes: Shapes) -> tuple[str, ...]:
        """Names of those that may have them with other arguments."""
        group = self.groups.get(fingerprint(shapes).any_size, {})
        return tuple(name for names in group.values() for name in names)


def fingerprint(shapes: Shapes) -> Fingerprint:
    """Return the fingerprint of a model, or of a file, from the shape of each of its tensors."""
    exact: set[str] = set()
    any_size: set[str] = set()
    for name, shape in shapes.items():
        if CLASSIFIERS.fullmatch(name):
            continue
        # Tables of positions grow with the image, which every user changes.
        sides = "" if POSITIONS.search(name) else "x".join(map(str, shape))
        kind = _NUMBER.sub("", name)
        exact.add(f"{name} {sides}")
        if not _OPTIONAL.fullmatch(kind):
            # A model that averages its tokens has its last norm behind that, under another name.
            kind = re.sub(r"^fc_norm\.", "norm.", kind)
            # Outside of blocks lie the stem and the norms, whose shapes follow from channels and patches.
            any_size.add(f"{kind} {sides}" if _NUMBER.search(name) else kind)
    return Fingerprint(_digest(exact, 6), _digest(any_size, 4))


def _digest(lines: Iterable[str], size: int) -> str:
    return blake2b("\n".join(sorted(lines)).encode(), digest_size=size).hexdigest()


@cache
def read_table() -> Table:
    """Read the table that mhacut ships."""
    first, *lines = TABLE.read_text(encoding="ascii").splitlines()
    groups: dict[str, dict[str, tuple[str, ...]]] = {}
    group: dict[str, tuple[str, ...]] = {}
    for line in lines:
        digest, *names = line.split()
        if line.startswith(" "):
            group[digest] = tuple(names)
        else:
            group = groups.setdefault(digest, {})
    return Table(first.removeprefix("timm "), groups)
