"""Arguments of timm models that the names and shapes in a file show."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from mhacut.checkpoint.build import shapes_of

Shapes = Mapping[str, tuple[int, ...]]

PIXELS = frozenset({"num_classes", "img_size", "in_chans"})
"""Arguments that every user changes: they come with the images."""
SIZES = frozenset({"depth", "depths", "patch_size"})


@dataclass(frozen=True)
class Shown:
    """Value of one argument, and what in the file shows it."""

    name: str
    value: Any
    origin: str

    def __str__(self) -> str:
        return f"{self.name} {self.value}, from {self.origin}"


@dataclass(frozen=True)
class _Comparison:
    """A model built with its defaults, compared with the file."""

    model: Any
    expected: Shapes
    found: Shapes
    given: Mapping[str, Any]

    def differs(self, name: str) -> bool:
        """Whether just one of the two has the tensor."""
        return (name in self.found) != (name in self.expected)


def visible_args(model: nn.Module, shapes: Shapes, given: Mapping[str, Any]) -> tuple[Shown, ...]:
    """Return the arguments in which the file differs from ``model``, as far as its shapes show them.

    Classes and image size aside, which need the model that these arguments build. Only norms of q and k show
    the number of heads, so a width is inferred only together with it.

    Args:
        model: built with ``given``, on any device.
        shapes: shape of each tensor of the file, by the model's names.
        given: arguments that are not to be inferred.
    """
    pair = _Comparison(model, shapes_of(model), shapes, given)
    accepted = _parameters(type(model)) - set(given)
    shown = (one for rule in _RULES for one in rule(pair))
    return tuple(one for one in shown if one.name in accepted)


def _parameters(kind: type) -> set[str]:
    """Names of the arguments of a class of models, and of those that it passes on to its bases."""
    names: set[str] = set()
    for base in kind.__mro__[:-1]:
        if "__init__" in vars(base):
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            names |= {parameter.name for parameter in parameters}
            if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
                break
    return names


def _stem(pair: _Comparison) -> Iterator[Shown]:
    first = pair.model.pretrained_cfg.get("first_conv") or "patch_embed.proj"
    name = f"{first if isinstance(first, str) else first[0]}.weight"
    expected, found = pair.expected.get(name, ()), pair.found.get(name, ())
    if len(expected) != 4 or len(found) != 4:
        return
    if found[1] != expected[1] == getattr(pair.model, "in_chans", 3):
        yield Shown("in_chans", found[1], f"the shape of {name}")
    if name == "patch_embed.proj.weight" and found[2:] != expected[2:] and found[2] == found[3]:
        yield Shown("patch_size", found[2], f"the shape of {name}")


def _depth(pair: _Comparison) -> Iterator[Shown]:
    count, expected = (
        _count(r"blocks\.(\d{1,4})\.", pair.found),
        _count(r"blocks\.(\d{1,4})\.", pair.expected),
    )
    if count and expected and count != expected:
        yield Shown("depth", count, "the numbers of its blocks")
    for stages in ("layers", "stages"):
        many = [
            [_count(rf"{stages}\.{stage}\.blocks\.(\d{{1,4}})\.", names) for stage in range(stage_count)]
            for names in (pair.found, pair.expected)
            if (stage_count := _count(rf"{stages}\.(\d{{1,4}})\.", names))
        ]
        if len(many) == 2 and len(many[0]) == len(many[1]) and many[0] != many[1] and all(many[0]):
            yield Shown("depths", many[0], "the numbers of its blocks")


def _count(pattern: str, names: Iterable[str]) -> int:
    """Number of blocks, whose numbers the pattern finds; 0 if some are missing between."""
    numbers = {int(match[1]) for name in names if (match := re.match(pattern, name))}
    return len(numbers) if numbers == set(range(len(numbers))) else 0


def _width(pair: _Comparison) -> Iterator[Shown]:
    width, expected = (_rows(shapes, "patch_embed.proj.weight") for shapes in (pair.found, pair.expected))
    if width in (0, expected):
        return
    head = _rows(pair.found, "blocks.0.attn.q_norm.weight")
    heads = width // head if head and head < width and width % head == 0 else None
    if heads is not None:
        yield Shown("num_heads", heads, "the shape of blocks.0.attn.q_norm.weight")
    if heads is not None or "num_heads" in pair.given:
        yield Shown("embed_dim", width, "the shape of patch_embed.proj.weight")


def _rows(shapes: Shapes, name: str) -> int:
    """First dimension of a tensor; 0 if there is no such tensor, or it has no dimensions."""
    return next(iter(shapes.get(name, ())), 0)


def _hidden(pair: _Comparison) -> Iterator[Shown]:
    of_hidden = re.compile(r"blocks\.\d+\.mlp\.fc1\.weight")
    found = {shape for name, shape in pair.found.items() if of_hidden.fullmatch(name)}
    expected = pair.expected.get("blocks.0.mlp.fc1.weight", ())
    if len(found) != 1 or len(expected) != 2 or type(pair.model.blocks[0].mlp).__name__ != "Mlp":
        return
    hidden, width = next(iter(found)) if len(next(iter(found))) == 2 else (0, 0)
    if width and hidden and hidden * expected[1] != expected[0] * width:
        ratio = hidden / width
        if int(width * ratio) != hidden:  # timm rounds down
            ratio = math.nextafter(ratio, math.inf)
        yield Shown("mlp_ratio", ratio, "the shape of blocks.0.mlp.fc1.weight")


def _block(pair: _Comparison) -> Iterator[Shown]:
    if "blocks.0.attn.qkv.weight" in pair.found and pair.differs("blocks.0.attn.qkv.bias"):
        bias = "blocks.0.attn.qkv.bias" in pair.found
        yield Shown("qkv_bias", bias, "blocks.0.attn.qkv.bias" if bias else "the lack of a bias of qkv")
    if pair.differs("blocks.0.ls1.gamma"):
        scaled = "blocks.0.ls1.gamma" in pair.found
        # The value initialises what the file overwrites.
        origin = "blocks.0.ls1" if scaled else "the lack of blocks.0.ls1"
        yield Shown("init_values", 1e-5 if scaled else None, origin)
    if pair.differs("norm_pre.weight"):
        yield Shown("pre_norm", "norm_pre.weight" in pair.found, "norm_pre")


def _tokens(pair: _Comparison) -> Iterator[Shown]:
    has_class = "cls_token" in pair.found
    if pair.differs("cls_token"):
        yield Shown("class_token", has_class, "cls_token" if has_class else "the lack of a cls_token")
    registers = pair.found.get("reg_token", (1, 0, 0))[1:2]
    expected = pair.expected.get("reg_token", (1, 0, 0))[1:2]
    if registers and registers != expected:
        for name in ("reg_tokens", "num_reg_tokens"):
            yield Shown(name, registers[0], "the shape of reg_token")
    yield from _embedded_tokens(pair, has_class + sum(registers))


def _embedded_tokens(pair: _Comparison, prefix: int) -> Iterator[Shown]:
    """Whether class and register tokens have positions: the others are a square of patches."""
    found, expected = pair.found.get("pos_embed", ()), pair.expected.get("pos_embed", ())
    without = getattr(pair.model, "no_embed_class", None)
    if not isinstance(without, bool) or len(found) != 3 or len(expected) != 3 or "img_size" in pair.given:
        return
    if "dist_token" in pair.found or not prefix or found[1] == expected[1]:
        return
    patches = {True: found[1], False: found[1] - prefix}
    square = {flag: count > 0 and math.isqrt(count) ** 2 == count for flag, count in patches.items()}
    if square[not without] and not square[without]:
        yield Shown("no_embed_class", not without, "the shape of pos_embed")


def _pooling(pair: _Comparison) -> Iterator[Shown]:
    pool = getattr(pair.model, "global_pool", None)
    averaged, normed = "fc_norm.weight" in pair.found, "norm.weight" in pair.found
    if pair.differs("attn_pool.latent") and "attn_pool.latent" in pair.found:
        yield Shown("global_pool", "map", "attn_pool")
    elif averaged and not normed and pair.differs("norm.weight"):
        yield Shown("global_pool", "avg", "fc_norm")
    elif normed and not averaged and pair.differs("fc_norm.weight") and "cls_token" in pair.found:
        yield Shown("global_pool", "token", "norm, in place of fc_norm")
    elif pool == "token" and "cls_token" not in pair.found and pair.differs("cls_token"):
        yield Shown("global_pool", "avg", "the lack of a cls_token")
        if normed and not averaged:
            yield Shown("fc_norm", False, "norm, in place of fc_norm")


_RULES: tuple[Callable[[_Comparison], Iterator[Shown]], ...] = (
    _stem,
    _depth,
    _width,
    _hidden,
    _block,
    _tokens,
    _pooling,
)
