"""Adapters of attention and MLPs of Hugging Face's transformers, recognised by their structure.

mhacut does not import transformers. Attention is supported if it has 4 linear layers with common names, an
attribute ``head_dim``, and no inputs except tokens and a mask. A cut layer keeps its class. Every pruning run
checks the outputs of the cut model (:mod:`mhacut.pruning.check`).
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from mhacut.adapters.attend import attend
from mhacut.adapters.base import Adapter, Layer
from mhacut.adapters.mlp import Mlp
from mhacut.adapters.softmax import Hook, Softmax, Twin
from mhacut.adapters.softmax_hooks import of_windows
from mhacut.adapters.softmax_special import KEPT, Rope
from mhacut.plan import UnitKind

_FORWARD = ["self", "hidden_states", "attention_mask"]
"""Names that the first parameters of ``forward`` may have in an attention class of transformers."""
_CLIP_FORWARD = [*_FORWARD, "causal_attention_mask", "output_attentions"]
_DINOV2_FORWARD = ["self", "hidden_states", "head_mask"]
"""First parameters of ``forward`` in the DINOv2 attention of transformers 4."""
_MLPS = {
    frozenset({"fc1", "fc2"}): (("fc1",), "fc2"),
    frozenset({"up_proj", "down_proj"}): (("up_proj",), "down_proj"),
    frozenset({"gate_proj", "up_proj", "down_proj"}): (("gate_proj", "up_proj"), "down_proj"),
}
"""Names of linear layers in MLPs of transformers: layers that write the hidden channels, and the layer that
reads the hidden channels."""


def _masked(m: Any, q: Tensor, k: Tensor, x: Tensor, mask: Tensor | None, *_: Any) -> tuple[Any, ...]:
    windows = getattr(m, "relative_position_bias", None)
    return q, k, of_windows(windows(), q, mask) if isinstance(windows, nn.Module) else mask


def _rotated(
    m: Any, q: Tensor, k: Tensor, x: Tensor, mask: Tensor | None, positions: Any, *_: Any
) -> tuple[Any, ...]:
    """Rotate q and k of the patch tokens by the position angles of the channels that a cut layer keeps."""
    cos, sin = positions  # [patches, d] each
    kept = getattr(m, KEPT, None)  # (H, d)
    if kept is not None:
        cos, sin = (table[:, kept].transpose(0, 1) for table in (cos, sin))  # (H, N, d)
    first = q.shape[2] - cos.shape[-2]

    def turned(part: Tensor) -> Tensor:
        prefix, rest = part[:, :, :first], part[:, :, first:]
        a, b = rest.chunk(2, dim=-1)
        return torch.cat((prefix, rest * cos + torch.cat((-b, a), dim=-1) * sin), dim=2)

    return turned(q), turned(k), mask


def _attended(m: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    dropout = getattr(m, "attention_dropout", getattr(m, "dropout", 0.0)) if m.training else 0.0
    scale = getattr(m, "scaling", None) or m.scale
    return attend(q, k, v, scale=scale, fused=True, attn_mask=mask, dropout_p=dropout)


def _without_weights(m: Any, y: Tensor, *_: Any) -> tuple[Tensor, None]:
    return getattr(m, m.spec.read_by)(y), None


class _Named(Twin):
    """Mixin that gives attention classes of transformers a forward pass with transformers' argument names."""

    def forward(self, hidden_states: Tensor, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        """Map tokens [B, N, C] to a tuple of tokens [B, N, C] and None in place of the attention weights."""
        return super().forward(hidden_states, *args, **options)


@dataclass(eq=False)
class Linears(Softmax):
    """Attention class of transformers with 4 linear layers (q, k, v, output) and an attribute ``head_dim``.

    A cut layer with equal q, k and v widths keeps the forward pass of its class.
    """

    written_by: Mapping[str, str] = field(
        default_factory=lambda: {"q_proj": "q", "k_proj": "k", "v_proj": "v"}
    )
    logits: Hook = _masked
    weigh: Hook = _attended
    finish: Hook = _without_weights
    mixins: tuple[type, ...] = (_Named,)
    fits: Callable[[Any, int, int], bool] = lambda m, qk, v: qk == v and not hasattr(m, KEPT)
    one_width = True

    def heads(self, module: Any) -> int:
        heads: int = getattr(module, "num_attention_heads", None) or module.num_heads
        return heads

    def describe(self, name: str, module: Any) -> Layer:
        # The layer returns its attention weights too; errors are those of what it projects.
        return replace(super().describe(name, module), result=self.reader(module).name)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        before = module.head_dim
        super().resize(module, widths)
        module.head_dim = self.sizes(module)["q"][1]
        if hasattr(module, "scaling"):  # else scale, which timm's classes have too
            module.scaling *= (before / module.head_dim) ** 0.5


@dataclass(eq=False)
class RotaryLinears(Linears, Rope):
    """Attention class of transformers with rotary positions.

    Each head keeps its own channel pairs, so mhacut replaces the class of a cut layer.
    """

    logits: Hook = _rotated
    one_width = False


@dataclass(eq=False)
class Nested(Linears):
    """DINOv2 attention of transformers 4: 1 submodule for q, k and v, 1 for the output projection."""

    written_by: Mapping[str, str] = field(
        default_factory=lambda: {"attention.query": "q", "attention.key": "k", "attention.value": "v"}
    )
    read_by: str = "output.dense"
    weigh: Hook = lambda m, *args: _attended(m.attention, *args)
    finish: Hook = lambda m, y, *_: m.output.dense(y)

    def heads(self, module: Any) -> int:
        return super().heads(module.attention)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        Softmax.resize(self, module, widths)
        inner, (heads, width) = module.attention, self.sizes(module)["q"]
        inner.scaling *= (inner.attention_head_size / width) ** 0.5
        inner.attention_head_size, inner.all_head_size = width, heads * width


def is_old() -> bool:
    """Whether transformers 4 is installed. Layers of transformers 5 have another structure."""
    return str(getattr(sys.modules.get("transformers"), "__version__", "")).startswith("4.")


def adapter_of(module: nn.Module) -> Adapter | None:
    spec = getattr(module, "spec", None)
    if isinstance(spec, Linears):  # a cut layer
        return spec
    cls: Any = type(module)
    if cls.__module__.partition(".")[0] in ("timm", "torch", "mhacut"):
        return None
    linears = {name for name, part in module.named_children() if isinstance(part, nn.Linear)}
    if cls.__name__.endswith("Attention"):
        reader = linears - {"q_proj", "k_proj", "v_proj"}
        heads = getattr(module, "num_attention_heads", None) or getattr(module, "num_heads", None)
        width = getattr(module, "head_dim", None)
        if len(linears) == 4 and reader <= {"o_proj", "out_proj"} and isinstance(heads, int) and width:
            rows = {module.get_submodule(f"{letter}_proj").out_features for letter in "qkv"}
            return _attention(cls, *reader) if rows == {heads * width} else None
        if "Dinov2" in cls.__name__ and hasattr(getattr(module, "attention", None), "all_head_size"):
            return _nested(cls) if [*inspect.signature(cls.forward).parameters] == _DINOV2_FORWARD else None
    elif re.search("MLP|FFN|Mlp", cls.__name__):
        known = _MLPS.get(frozenset(linears))
        others = [part for part in module.children() if not isinstance(part, nn.Linear)]
        if known is not None and not any(list(part.parameters()) for part in others):
            return _mlp(cls, *known)
    return None


@cache
def _attention(cls: Any, reader: str) -> Adapter | None:
    parameters = [name for name in inspect.signature(cls.forward).parameters if name != "kwargs"]
    if parameters in (_FORWARD, _CLIP_FORWARD):
        # CLIP and SigLIP of transformers 4 give heads the width of their input.
        narrows = "embed_dim" not in cls.forward.__code__.co_varnames
        return Linears(cls, read_by=reader, fits=Linears.fits if narrows else Softmax.fits)
    # Other classes may rotate neighbours, or all tokens.
    if parameters == [*_FORWARD, "position_embeddings"] and "DINOv3" in cls.__name__:
        return RotaryLinears(cls, read_by=reader)
    return None


_nested = cache(Nested)
_mlp = cache(Mlp)
