"""Attention and MLP branches of unknown block classes, found by a recorded run and tested, for token merging.

The run records which submodule reads which output. The test duplicates some tokens: the block must then
compute what :class:`MergingLayer` computes for tokens that stand for 2 patches.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from mhacut.adapters.base import library_class
from mhacut.adapters.mlp import Mlp
from mhacut.adapters.registry import adapter_for
from mhacut.adapters.softmax import Softmax
from mhacut.adapters.structure import are_equal, is_registered_library, mlp_of_block, with_random_weights
from mhacut.surgery.merging_blocks import Branches, MergingLayer, Projections, apply_part
from mhacut.surgery.token_merging import SizedTokens

_LENGTHS = 8, 13
"""Numbers of random tokens with which a block is tested."""
_FOUND: dict[tuple[Any, ...], Branches | None] = {}
"""Cache of branches by block structure. Blocks on the meta device have no weights to test and use the
cache."""


def branches_of(block: nn.Module) -> Branches | None:
    """Return the attention and MLP branches of a ViT block; None if a test on random tokens fails."""
    if isinstance(block, MergingLayer):
        return block.branches
    if is_registered_library(block):
        return None
    key = _structure_of(block)
    if key not in _FOUND:
        if any(parameter.is_meta for parameter in block.parameters()):
            return None
        _FOUND[key] = _found(block)
    return _FOUND[key]


def projections_of(attention: nn.Module) -> Projections | None:
    """Return the names of the weights that compute q and k; None if q or k is more than a projection."""
    adapter = adapter_for(attention)
    assert isinstance(adapter, Softmax)
    heads, reader = adapter.heads(attention), adapter.reader(attention).name
    if isinstance(attention, nn.MultiheadAttention):
        return Projections("in_proj_weight", "in_proj_weight", reader, heads)
    writers = adapter.writers(attention)
    others = [part for name, part in attention.named_modules() if name not in (*writers, reader)]
    normed = any(list(part.parameters(recurse=False)) for part in others)
    if normed or adapter.per_head or {*writers.values()} not in ({"qkv"}, {"q", "k", "v"}, {"q", "kv"}):
        return None
    names = {letter: f"{name}.weight" for name, letters in writers.items() for letter in letters}
    return Projections(names["q"], names["k"], reader, heads)


def block_width(block: nn.Module, branches: Branches) -> int:
    attention = block.get_submodule(branches.attention)
    adapter = adapter_for(attention)
    assert isinstance(adapter, Softmax)
    return adapter.reader(attention).writes


def _structure_of(block: nn.Module) -> tuple[Any, ...]:
    switches = [
        (name, key, value)
        for name, part in block.named_modules()
        for key, value in vars(part).items()
        # Cuts change numbers in attention and MLP, but not in the block around them.
        if isinstance(value, bool | str | (bool if name else float | int))
        and key not in ("training", "patches")
        and not key.startswith("_")
    ]
    return (*((name, library_class(part)) for name, part in block.named_modules()), *switches)


@torch.no_grad()
def _found(block: nn.Module) -> Branches | None:
    adapters = {name: adapter_for(part) for name, part in block.named_modules()}
    attention = [name for name, adapter in adapters.items() if adapter and adapter.family == "attention"]
    inner = [name for name in attention if name.startswith(f"{attention[0]}.")]
    if len(attention) - len(inner) != 1 or not attention[0]:
        return None
    adapter = adapters[attention[0]]
    if not isinstance(adapter, Softmax) or adapter.mask_name is None:
        return None
    plain = with_random_weights(block)
    merging: Any = copy.deepcopy(plain)
    adapter.resize(merging.get_submodule(attention[0]), {})
    width = adapter.reader(merging.get_submodule(attention[0])).writes
    has_mlp = any(other is not None and other.family == "mlp" for other in adapters.values())
    mlp = None if has_mlp else mlp_of_block(block, attention[:1])
    noise = _noise(_LENGTHS[0], width)
    branches = _Trace(merging, attention[0]).branches(noise, adapter.mask_name, mlp)
    if branches is None:
        return None
    merging.__class__ = type("Trial", (MergingLayer, type(block)), {})
    merging.branches, merging.matcher, merging.gives_sizes, merging.unmerge = branches, None, True, True
    merging.projections = None
    return branches if all(_merges_exactly(plain, merging, length, width) for length in _LENGTHS) else None


def _merges_exactly(plain: nn.Module, merging: Any, length: int, width: int) -> bool:
    x, doubled = _noise(length, width), torch.arange(0, length, 3)
    sizes = x.new_ones(2, length, 1)
    sizes[:, doubled] = 2
    expected = _run(plain, merging.laid_out(torch.cat((x, x[:, doubled]), 1)))
    if not isinstance(expected, Tensor):
        return False
    expected = merging.laid_out(expected)[:, :length]
    try:
        actual = merging(SizedTokens(x, sizes)).x
    except Exception:  # of any kind: this code is not known
        return False
    return are_equal(actual, expected)


def _noise(length: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, length, width, generator=generator, dtype=torch.float64)


def _run(block: nn.Module, x: Tensor) -> Any:
    further = list(inspect.signature(block.forward).parameters.values())[1:]
    needed = [p for p in further if p.default is p.empty and not p.kind.name.startswith("VAR")]
    try:
        return block(x, *[None] * len(needed))
    except Exception:  # of any kind: this code is not known
        return None


@dataclass
class _Call:
    """Recorded call of a submodule that reads 1 tensor and returns 1 tensor."""

    name: str
    x: Tensor | None
    y: Tensor | None = None


@dataclass
class _Trace:
    """Recorded run of a block, with the calls of its submodules."""

    block: nn.Module
    attention: str
    calls: list[_Call] = field(default_factory=list)
    """Calls of submodules, in the order in which the calls start."""

    def branches(self, x: Tensor, mask_name: str, mlp: Mlp | None) -> Branches | None:
        handles = [*self._hooks()]
        output = _run(self.block, x)
        for handle in handles:
            handle.remove()
        if not isinstance(output, Tensor):
            return None
        first, x, place = self._chain(x, 0, output)
        second, x, place = self._chain(x, place, output)
        if self.attention not in first or not second or not are_equal(x, output):
            return None
        # DINOv2's drop paths run in training only.
        called = {call.name for call in self.calls}
        drops = [name for name, part in self.block.named_children() if type(part).__name__ == "DropPath"]
        if len(drops) == 2 and not called & set(drops):
            first, second = (*first, drops[0]), (*second, drops[1])
        tokens_first = not getattr(self.block.get_submodule(self.attention), "batch_first", True)
        return Branches(first, second, self.attention, mask_name, tokens_first, mlp)

    def _hooks(self) -> Iterator[Any]:
        for name, part in self.block.named_modules():
            if (
                name
                and not self.attention.startswith(f"{name}.")
                and not name.startswith(f"{self.attention}.")
            ):
                yield part.register_forward_pre_hook(partial(self._begin, name), with_kwargs=True)
                yield part.register_forward_hook(partial(self._end, name))

    def _begin(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        one = len({id(tensor) for tensor in tensors}) == 1
        self.calls.append(_Call(name, tensors[0] if one else None))

    def _end(self, name: str, module: nn.Module, args: Any, output: Any) -> None:
        if name == self.attention:
            output = tree_leaves(output)[0]
        call = next(call for call in reversed(self.calls) if call.name == name)
        call.y = output if isinstance(output, Tensor) else None

    def _chain(self, x: Tensor, place: int, output: Tensor) -> tuple[tuple[str, ...], Tensor, int]:
        """Follow ``x`` to the residual addition.

        Return the submodules on the way, the sum and the next call.
        """
        y, parts = x, list[str]()
        while True:
            found = self._reader_of(y, place)
            if found is not None:
                name, y = self.calls[found].name, self.calls[found].y  # type: ignore[assignment]
                parts.append(name)
                # Its own submodules are no further parts.
                inside = (call.name.startswith(f"{name}.") for call in self.calls[found + 1 :])
                place = (
                    found + 1 + next((n for n, within in enumerate(inside) if not within), len(self.calls))
                )
            elif parts and not self._ends(x, y, place, output) and (glue := self._glue(x, y, place, output)):
                parts.append(glue)
                y = apply_part(attrgetter(glue)(self.block), y)
            else:
                return tuple(parts), x + y if y.shape == x.shape else y, place

    def _reader_of(self, x: Tensor, place: int) -> int | None:
        for number, call in enumerate(self.calls[place:], place):
            if call.x is not None and call.y is not None and are_equal(call.x, x):
                return number
        return None

    def _ends(self, x: Tensor, y: Tensor, place: int, output: Tensor) -> bool:
        return y.shape == x.shape and (are_equal(x + y, output) or self._reader_of(x + y, place) is not None)

    def _glue(self, x: Tensor, y: Tensor, place: int, output: Tensor) -> str | None:
        for owner, part in self.block.named_modules():
            for name, value in (*vars(part).items(), *part.named_parameters(recurse=False)):
                if name.startswith("_") or (not callable(value) and not isinstance(value, nn.Parameter)):
                    continue
                try:
                    z = apply_part(value, y)
                except Exception:  # of any kind: this code is not known
                    continue
                read = isinstance(z, Tensor) and self._reader_of(z, place) is not None
                if read or (isinstance(z, Tensor) and self._ends(x, z, place, output)):
                    return f"{owner}.{name}".lstrip(".")
        return None
