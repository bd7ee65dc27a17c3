"""Adapters of torchvision's Swin attention, which splits its map into shifted windows.

mhacut does not import torchvision.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mhacut.adapters.attend import attend
from mhacut.adapters.base import Adapter, Mixing
from mhacut.adapters.softmax import Hook, Softmax
from mhacut.adapters.softmax_hooks import of_windows


def _shift(m: Any, x: Tensor) -> list[int]:
    """Return the shift of the windows for a map [B, height, width, C]. A single window has no shift."""
    sizes = zip(m.window_size, m.shift_size, x.shape[1:3], strict=True)
    return [shift if side < size else 0 for side, shift, size in sizes]


def _windows(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Split a map into padded, shifted windows [B, rows, columns, height, width, C]."""
    height, width = m.window_size
    x = F.pad(x, (0, 0, 0, -x.shape[2] % width, 0, -x.shape[1] % height))
    x = x.roll([-shift for shift in _shift(m, x)], (1, 2))
    x = x.unflatten(2, (-1, width)).unflatten(1, (-1, height)).transpose(2, 3)
    return x, x


def _map(m: Any, y: Tensor, query: Tensor, x: Tensor) -> Tensor:
    y = m.proj(y.reshape(*query.shape[:-1], -1)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
    y = F.dropout(y.roll(_shift(m, y), (1, 2)), m.dropout, m.training)
    return y[:, : x.shape[1], : x.shape[2]].contiguous()


def _mask(m: Any, x: Tensor) -> Tensor | None:
    """Return the mask [windows, N, N] between the parts of a map that a shift puts into one window."""
    height, width = (size + -size % side for size, side in zip(x.shape[1:3], m.window_size, strict=True))
    shift = _shift(m, x.new_empty(0, height, width, 0))
    if not any(shift):
        return None
    sides = []
    for size, side, by in zip((height, width), m.window_size, shift, strict=True):
        place = torch.arange(size, device=x.device)
        sides.append((place >= size - side).int() + (place >= size - by).int())
    part = (3 * sides[0][:, None] + sides[1])[None, ..., None]
    part = part.unflatten(2, (-1, m.window_size[1])).unflatten(1, (-1, m.window_size[0])).transpose(2, 3)
    part = part.flatten(3).flatten(0, 2)
    return (part[:, None] != part[:, :, None]).to(x.dtype) * -100.0


def _logits(m: Any, q: Tensor, k: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return q, k, of_windows(m.get_relative_position_bias(), q, _mask(m, x))


def _cosine_logits(m: Any, q: Tensor, k: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads, width = q.shape[1], q.shape[3]
    if m.qkv.bias is not None:  # torchvision leaves out the bias of k
        bias = m.qkv.bias[heads * width : 2 * heads * width]
        k = k - bias.view(heads, 1, width)
    q = F.normalize(q, dim=-1) * m.logit_scale.clamp(max=math.log(100)).exp()
    return _logits(m, q, F.normalize(k, dim=-1), x)


def _attended(m: Any, q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    dropout = m.attention_dropout if m.training else 0.0
    scale = 1.0 if m.spec.cosine else q.shape[-1] ** -0.5
    return attend(q, k, v, scale=scale, fused=True, attn_mask=bias, dropout_p=dropout)


@dataclass(eq=False)
class ShiftedWindows(Softmax):
    """Attention of torchvision's Swin. A cut layer calls its projections as modules, so hooks run."""

    inputs: Hook = _windows
    spread: Hook = lambda m, x: x.flatten(0, 2)
    logits: Hook = _logits
    weigh: Hook = _attended
    finish: Hook = _map

    def prepare(self, module: Any) -> None:
        self.resize(module, {})


def torchvision_swin_adapter(module: nn.Module) -> Adapter | None:
    spec = getattr(module, "spec", None)
    if isinstance(spec, ShiftedWindows):  # a cut layer
        return spec
    cls: Any = type(module)
    if cls.__module__ != "torchvision.models.swin_transformer" or not hasattr(module, "shift_size"):
        return None
    return _adapter(cls, hasattr(module, "logit_scale"))


@cache
def _adapter(cls: Any, cosine: bool) -> ShiftedWindows:
    mixing: Mixing = "select" if cosine else "rotate"
    logits = _cosine_logits if cosine else _logits
    return ShiftedWindows(cls, logits=logits, cosine=cosine, scaled=not cosine, qk_mixing=lambda m: mixing)
