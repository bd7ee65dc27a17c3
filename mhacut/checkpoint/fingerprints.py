"""Fingerprints of timm's architectures: find the architecture of a file without building models.

``tests/tools/generate_fingerprints.py`` writes the table for the installed timm.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import cache
from hashlib import blake2b
from pathlib import Path

Shapes = Mapping[str, tuple[int, ...]]

TABLE = Path(__file__).with_name("fingerprints.txt")
POSITIONS = re.compile(
    r"(positional_encoding|pos_embed\w*|relative_position_bias_table|rel_pos_[hw]|attention_biases)$"
)
"""Pattern for names of tensors whose shape depends on the image size."""
CLASSIFIERS = re.compile(
    r"((aux_)?head(_dist)?|heads\.\d+|fc|classif(ier)?|last_linear)"
    r"(\.(fc|fc2|fc\.fc2|l|linear|proj|\d|head\.l|head_dist\.l|classifier\.(4|linear)))?\.(weight|bias)"
)
_OPTIONAL = re.compile(r"cls_token|reg_token|norm_pre\.\w+|blocks\.(ls[12]\.gamma|attn\.qkv\.bias)")
"""Pattern for names of tensors that a timm argument adds or removes. The any-size digest of
:func:`fingerprint` ignores these tensors."""
_NUMBER = re.compile(r"\.\d+(?=\.)")


def fingerprint(shapes: Shapes) -> tuple[str, str]:
    """Return an exact digest and an any-size digest of the names and shapes, without classifiers.

    The exact digest ignores the shapes of position tables. The any-size digest also ignores depth, image
    channels, patch size, pooling and registers.
    """
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
    return _digest(exact, 6), _digest(any_size, 4)


def _digest(lines: Iterable[str], size: int) -> str:
    return blake2b("\n".join(sorted(lines)).encode(), digest_size=size).hexdigest()


def exact_matches(shapes: Shapes) -> tuple[str, ...]:
    exact, any_size = fingerprint(shapes)
    return read_table()[1].get(any_size, {}).get(exact, ())


def matches_of_any_size(shapes: Shapes) -> list[str]:
    group = read_table()[1].get(fingerprint(shapes)[1], {})
    return [name for names in group.values() for name in names if not name.startswith("test_")]


@cache
def read_table() -> tuple[str, Mapping[str, Mapping[str, tuple[str, ...]]]]:
    """Return timm's version and {any-size digest: {exact digest: architecture names}}."""
    first, *lines = TABLE.read_text(encoding="ascii").splitlines()
    groups: dict[str, dict[str, tuple[str, ...]]] = {}
    group: dict[str, tuple[str, ...]] = {}
    for line in lines:
        digest, *names = line.split()
        if line.startswith(" "):
            group[digest] = tuple(names)
        else:
            group = groups.setdefault(digest, {})
    return first.removeprefix("timm "), groups
