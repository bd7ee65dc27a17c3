"""Families of other libraries' models: recognise a file, and rename its tensors for timm."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mhacut.checkpoint.build import known_model
from mhacut.checkpoint.foreign.config import Config
from mhacut.errors import CheckpointError
from mhacut.text import listed

Shapes = Mapping[str, tuple[int, ...]]
Names = Mapping[str, tuple[str, ...]]
"""Patterns of another library's tensor names, mapped to timm's names. The first matching pattern is used."""

TABLE = Path(__file__).with_name("names.txt")
ACTIVATIONS = {
    **{name: name for name in ("gelu", "quick_gelu", "relu", "silu")},
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "swish": "silu",
}
VIT_SIZES = {
    (192, 12, 3): "tiny",
    (384, 12, 6): "small",
    (768, 12, 12): "base",
    (1024, 24, 16): "large",
    (1280, 32, 16): "huge",
}
"""Size in the names of timm's ViTs, by (width, depth, number of heads)."""
_BUFFERS = re.compile(
    r"(.*\.)?(relative_position_index|relative_coords_table|attn_mask|attention_bias_idxs|bias_mask|position_ids"
    r"|rope(_embed)?\.(periods|freqs_cos|freqs_sin))"
)
"""Pattern for names of buffers that older files contain. timm computes these buffers, so they are dropped."""
_PART = re.compile(r"(.+)#(\d)(.*)")
_NUMBER = re.compile(r"\*(?:([-+/])(\d))?|\{(\d)\}")
"""Placeholder for a block number in a timm name. ``*`` is the next number of the source name, ``*+1`` adds 1
to this number, and ``{0}`` is the first number of the source name."""
_MAX_NAMES = 5


@dataclass(frozen=True)
class TimmSpec:
    architecture: str
    args: dict[str, Any]
    """Arguments of ``timm.create_model``, without ``num_classes``: the classifier's shape shows it."""
    cfg: dict[str, Any] = field(default_factory=dict)
    side: int | None = None
    """Image side in pixels, only for timm models that have no argument ``img_size``."""


@dataclass(frozen=True)
class Family:
    """Models of another library whose files have the same tensor names."""

    title: str
    """Name of the family in messages, for example ``ViT of transformers``."""
    names: Names
    """Tensor names in the file, mapped to timm's names. With several timm names, the tensor is split."""
    signs: tuple[tuple[str, ...], ...] = ()
    """Rows of tensor-name endings. A file belongs to the family if it has all endings of at least 1 row."""
    unlike: tuple[str, ...] = ()
    """Tensor-name endings. A file with one of these endings does not belong to the family."""
    prefixes: tuple[str, ...] = ()
    """Prefixes that tensor names may have. The first matching prefix is removed."""
    others: bool = False
    """Whether tensor names that are missing in ``names`` already are timm's names."""
    left_out: Mapping[str, str] = field(default_factory=dict)
    """Names of tensors that timm does not use, mapped to a description for the log."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Names of classifier tensors that timm cannot represent, mapped to the reason in the error message."""
    finish: Callable[[dict[str, Tensor]], None] | None = None
    """Function that changes the renamed tensors in place, for example splits or reshapes them."""
    model_types: tuple[str, ...] = ()
    """Values of ``model_type`` in ``config.json`` that belong to the family."""
    build: Callable[[Config, Shapes], TimmSpec] | None = None
    named: str = ""
    """Prefix of timm's model names. The family is only used if ``--model`` starts with this prefix."""
    cfg: Mapping[str, Any] = field(default_factory=dict)

    def recognises(self, names: Mapping[str, object]) -> bool:
        def has(end: str) -> bool:
            return any(name == end or name.endswith(f".{end}") for name in names)

        return any(all(map(has, sign)) for sign in self.signs) and not any(map(has, self.unlike))

    def convert(self, tensors: Mapping[str, Tensor], *, headless: bool = False) -> dict[str, Tensor]:
        """Return ``tensors`` renamed and reshaped for timm, in the same dtypes. Meta tensors are allowed."""
        converted: dict[str, Tensor] = {}
        parts: dict[str, dict[int, Tensor]] = {}
        unknown: list[str] = []
        # The shapes are untrusted: any misfit becomes a CheckpointError.
        try:
            for name, tensor in tensors.items():
                targets = self.targets(name, headless=headless)
                if targets is None:
                    unknown.append(name)
                    continue
                pieces = tensor.chunk(len(targets)) if len(targets) > 1 else (tensor,)
                for target, piece in zip(targets, pieces, strict=bool(targets)):
                    part = _PART.fullmatch(target)
                    if part is not None:
                        parts.setdefault(part[1] + part[3], {})[int(part[2])] = piece
                    elif target in converted:
                        raise ValueError(f"2 tensors map to timm's {target!r:.150}, one is {name!r:.150}")
                    elif target:
                        converted[target] = piece
            for name, pieces_of in parts.items():
                converted[name] = torch.cat([pieces_of[number] for number in sorted(pieces_of)])
            if self.finish is not None and not unknown:
                self.finish(converted)
        except (RuntimeError, IndexError, ValueError, KeyError) as error:
            reason = str(error).strip().split("\n")[0]
            raise CheckpointError(f"the file's tensor shapes contradict each other ({reason:.200})") from None
        if unknown:
            names = listed([f"{name!r:.150}" for name in unknown], _MAX_NAMES)
            raise CheckpointError(f"found {len(unknown)} tensors that the model does not have: {names}")
        return converted

    def targets(self, name: str, *, headless: bool = False) -> tuple[str, ...] | None:
        """Return timm's names for tensor ``name``: several if it is split, () if dropped, None if unknown."""
        base = self._without_prefix(name)
        for pattern, reason in self._refused:
            if pattern.fullmatch(base):
                if headless:
                    return ()
                raise CheckpointError(f"{name!r:.150} cannot be converted: {reason}")
        if _BUFFERS.fullmatch(base) or any(pattern.fullmatch(base) for pattern, _ in self._left_out):
            return ()
        for pattern, target in self._names:
            match = pattern.fullmatch(base)
            if match is not None:
                *numbers, rest = match.groups()
                return tuple(one and _filled(one, numbers) + (rest or "") for one in target)
        # Names behind the prefix of a wrapped model are timm's. Other names are unknown.
        inside = not self.prefixes or base != name
        return (base,) if self.others and inside else None

    def described_as_left_out(self, names: Mapping[str, object]) -> list[str]:
        bases = [self._without_prefix(name) for name in names]
        labels = [text for pattern, text in self._left_out if any(map(pattern.fullmatch, bases))]
        return [text for text in dict.fromkeys(labels) if text]

    def _without_prefix(self, name: str) -> str:
        return next((name.removeprefix(prefix) for prefix in self.prefixes if name.startswith(prefix)), name)

    @cached_property
    def _names(self) -> list[tuple[re.Pattern[str], tuple[str, ...]]]:
        return [(_pattern(name), target) for name, target in self.names.items()]

    @cached_property
    def _left_out(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(name), text) for name, text in self.left_out.items()]

    @cached_property
    def _refused(self) -> list[tuple[re.Pattern[str], str]]:
        return [(_pattern(name), text) for name, text in self.refused.items()]


def _pattern(name: str) -> re.Pattern[str]:
    return re.compile(re.escape(name).replace(r"\*", r"(\d{1,6})") + r"(\..+)?")


def _filled(target: str, numbers: Sequence[str]) -> str:
    following = iter(numbers)

    def number(place: re.Match[str]) -> str:
        operator, amount, index = place[1], int(place[2] or 1), place[3]
        value = int(next(following) if index is None else numbers[int(index)])
        return str({"+": value + amount, "-": value - amount, "/": value // amount}.get(operator, value))

    return _NUMBER.sub(number, target)


def read_families(functions: Mapping[str, Mapping[str, Any]]) -> tuple[Family, ...]:
    sections: dict[str, dict[str, Any]] = {}
    current: dict[str, Any] = {}
    for line in TABLE.read_text(encoding="ascii").splitlines():
        word, _, rest = line.strip().partition(" ")
        values = rest.split()
        if line.startswith("["):
            current = sections[line.strip("[]")] = {"names": {}, "left_out": {}, "refused": {}, "signs": ()}
        elif line.startswith(" "):
            current["names"][word] = tuple("" if name == "_" else name for name in values)
        elif word in ("without", "refused"):
            field_name = "left_out" if word == "without" else word
            current[field_name][values[0]] = " ".join(values[1:])
        elif word == "use":
            for kind in ("names", "left_out"):
                current[kind] |= sections[" ".join(values)][kind]
        elif word == "sign":
            current["signs"] += (tuple(values),)
        elif word in ("types", "prefixes", "unlike"):
            current["model_types" if word == "types" else word] = tuple(values)
        elif line and not line.startswith("#"):
            current[word] = True if word == "others" else values[0]
    recognisable = {title: one for title, one in sections.items() if one["signs"] or "model_types" in one}
    return tuple(Family(title, **one, **functions.get(title, {})) for title, one in recognisable.items())


def move(tensors: dict[str, Tensor], prefix: str, to: str | None) -> None:
    """Rename tensors that start with ``prefix``, in place. If ``to`` is None, delete these tensors."""
    for name in [name for name in tensors if name.startswith(prefix)]:
        tensor = tensors.pop(name)
        if to is not None:
            tensors[to + name.removeprefix(prefix)] = tensor


def timm_name(patterns: tuple[str, ...], args: Mapping[str, Any], **further: Any) -> str:
    """Format ``patterns`` with ``args``. Return the first result that is a timm model, else the last."""
    names = [pattern.format_map({**args, **further}) for pattern in patterns]
    return next((name for name in names if known_model(name)), names[-1])


def vit_size(args: Mapping[str, Any]) -> str | None:
    return VIT_SIZES.get((args["embed_dim"], args["depth"], args["num_heads"]))


def vit_name(args: Mapping[str, Any], suffix: str = "") -> str:
    stem = "vit_{size}_patch{patch_size}{suffix}_"
    patterns = (stem + "{img_size}", stem + "224", "vit_base_patch16{suffix}_224")
    return timm_name(patterns, args, size=vit_size(args), suffix=suffix)


def mlp_ratio(hidden: int, width: int) -> float:
    ratio = hidden / width
    # If the quotient rounds down, int(width * ratio) is 1 too small.
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width
