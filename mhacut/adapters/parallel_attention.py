"""Blocks of attention and an MLP side by side: ``ParallelScalingBlock`` and its differential twin.

One ``in_proj`` has the rows of the hidden channels, of q, of k and of v; one ``out_proj``, or a projection
for each, reads v and the hidden channels. All three units are those of a single layer, the block.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from timm.models.vision_transformer import DiffParallelScalingBlock, ParallelScalingBlock
from torch import Tensor, nn

from mhacut.adapters.base import ActivationHook, ChannelAxis, Layer, Unit
from mhacut.adapters.diff_attention import DiffAdapter, DiffForward
from mhacut.adapters.fused import FusedAdapter, FusedForward, Part, Source, by_head, head_count
from mhacut.plan import UnitKind


class ParallelForward(FusedForward):
    """How the slim twins compute."""

    def forward(self: Any, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, N, C] to the same."""
        hidden, q, k, v = self.in_proj(self.in_norm(x)).split(self.in_split, dim=-1)
        if self.mlp_bias is not None:
            hidden = hidden + self.mlp_bias
        attended = self.attended(q, k, v, attn_mask, is_causal)
        hidden = self.mlp_drop(self.mlp_act(hidden))
        if self.out_proj is not None:
            out = self.out_proj(torch.cat((attended, hidden), dim=-1))
        else:
            out = self.attn_out_proj(attended) + self.mlp_out_proj(hidden)
        added: Tensor = x + self.drop_path(self.ls(out))
        return added

    def attended(
        self: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool
    ) -> Tensor:
        """Of q, k and v, each [B, N, channels], the heads beside each other, [B, N, H * d_v]."""
        q, k, v = (by_head(part, head_count(self)) for part in (q, k, v))
        out: Tensor = self.weigh(self.q_norm(q), self.k_norm(k), v, attn_mask, is_causal=is_causal)
        return out


class SlimParallelScalingBlock(ParallelForward, ParallelScalingBlock):  # type: ignore[misc]
    """timm's, at any widths."""


class SlimDiffParallelScalingBlock(ParallelForward, DiffForward, DiffParallelScalingBlock):  # type: ignore[misc]
    """timm's, at any widths of q/k and of the MLP."""

    attended = DiffForward.difference


class ParallelAdapter(FusedAdapter):
    """Rows of ``in_proj`` are [hidden | q | k | v], as ``in_split`` says; ``out_proj`` reads [v | hidden]."""

    def describe(self, name: str, module: Any) -> Layer:
        attention = super().describe(name, module)
        return replace(attention, units=(*attention.units, self.hidden(name, module)))

    def hidden(self, name: str, module: Any) -> Unit:
        """The unit of the MLP."""
        rows = [ChannelAxis("in_proj.weight", 0)]
        rows += [ChannelAxis("in_proj.bias", 0)] if module.in_proj.bias is not None else []
        rows += [ChannelAxis("mlp_bias", 0)] if module.mlp_bias is not None else []
        reader, first = self._reader(module, "mlp_out_proj")
        columns = ChannelAxis(f"{reader}.weight", 1, first)
        return Unit(
            name,
            "hidden",
            1,
            module.in_split[0],
            axes=(*rows, columns),
            scale_axes=(columns,),
            hooks={"hidden": ActivationHook(reader, "input", first)},
            output_projection=columns,
            output_bias=self._bias(module, reader),
            output_scale=_layer_scale(module),
        )

    def v(self, name: str, module: Any) -> Unit | str:
        """As everywhere, but for where it is read."""
        reader, _ = self._reader(module, "attn_out_proj")
        columns = ChannelAxis(f"{reader}.weight", 1)
        return Unit(
            name,
            "v",
            self.heads(module),
            self.widths(module)[1],
            axes=(*self.rows(module, "v"), columns),
            scale_axes=(columns,),
            hooks={"value": self.hook(module, "v"), "output": ActivationHook(reader, "input")},
            output_projection=columns,
            output_bias=self._bias(module, reader),
            output_scale=_layer_scale(module),
            mixing="rotate",
        )

    def source(self, module: Any, part: Part) -> Source:
        """Rows behind those of the MLP."""
        offset = sum(module.in_split[: 1 + "qkv".index(part)])
        bias = ChannelAxis("in_proj.bias", 0, offset) if module.in_proj.bias is not None else None
        return Source("in_proj", offset, bias)

    def widths(self, module: Any) -> tuple[int, int]:
        """Rows of q, and of v, per head."""
        heads = self.heads(module)
        return module.in_split[1] // heads, module.in_split[3] // heads

    def flops(self, module: Any, input_shape: tuple[int, ...], widths: Mapping[UnitKind, Any]) -> Any:
        count, dim = self.tokens(module, input_shape), module.in_proj.in_features
        heads = self.heads(module)
        total: Any = 2 * dim * count.read * widths["hidden"]
        if "qk" in widths:
            total += heads * widths["qk"] * (2 * dim * count.read + count.pairs)
        if "v" in widths:
            total += heads * widths["v"] * (2 * dim * count.read + count.pairs)
        return total

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        heads, (qk_width, v_width) = self.heads(module), self.widths(module)
        qk_width, v_width = widths.get("qk", qk_width), widths.get("v", v_width)
        module.in_split = [widths["hidden"], heads * qk_width, heads * qk_width, heads * v_width]
        module.head_dim, module.scale = qk_width, qk_width**-0.5
        module.__class__ = self.slim
        slim: nn.Module = module
        return slim

    def _reader(self, module: Any, own: str) -> tuple[str, int]:
        """What reads v, or the hidden channels: ``own`` if each has a projection; and its first column."""
        if module.out_proj is None:
            return own, 0
        return "out_proj", module.in_split[3] if own == "mlp_out_proj" else 0

    def _bias(self, module: Any, reader: str) -> str | None:
        return None if module.get_submodule(reader).bias is None else f"{reader}.bias"


class DiffParallelAdapter(ParallelAdapter, DiffAdapter):
    """q and k have two heads for each of v, which stays whole."""

    def v(self, name: str, module: Any) -> Unit | str:
        """Left whole."""
        return DiffAdapter.v(self, name, module)


def _layer_scale(module: Any) -> str | None:
    return None if type(module.ls) is nn.Identity else "ls.gamma"


PARALLEL_ATTENTION = (
    ParallelAdapter(ParallelScalingBlock, SlimParallelScalingBlock),
    DiffParallelAdapter(DiffParallelScalingBlock, SlimDiffParallelScalingBlock),
)
