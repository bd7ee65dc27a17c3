"""timm's ``WindowAttention``: softmax within windows of Swin, with a bias per head and pair of positions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.models.swin_transformer import WindowAttention
from torch import Tensor, nn

from mhacut.adapters.attend import attend
from mhacut.adapters.base import ActivationHook, Adapter, ChannelAxis, Layer, Unit
from mhacut.adapters.rows import fused_qk, rows
from mhacut.plan import UnitKind


class SlimWindowAttention(WindowAttention):  # type: ignore[misc]
    """``WindowAttention`` whose heads have other widths for q/k than for v.

    Parameters keep timm's names: qkv rows are q, k, v, each head-major. Made by
    :meth:`WindowAttentionAdapter.resize`, never constructed.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """[windows, N, C] to [windows, N, C_out]; ``mask``, [windows per image, N, N], is added to logits."""
        windows, tokens, _ = x.shape
        v_dim = self.proj.in_features
        qk_dim = (self.qkv.out_features - v_dim) // 2
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B * windows, H, N, d)
            for part in self.qkv(x).split((qk_dim, qk_dim, v_dim), dim=-1)
        )
        bias = self._get_rel_pos_bias()  # (1, H, N, N)
        if mask is not None:
            repeats = windows // mask.shape[0]
            bias = (bias + mask.unsqueeze(1)).repeat(repeats, 1, 1, 1)
        out = attend(
            q,
            k,
            v,
            scale=self.scale,
            fused=self.fused_attn,
            attn_mask=bias,
            dropout_p=self.attn_drop.p if self.training else 0.0,
        )
        projected: Tensor = self.proj_drop(self.proj(out.transpose(1, 2).reshape(windows, tokens, v_dim)))
        return projected


class WindowAttentionAdapter(Adapter):
    """Fused ``qkv`` with rows [q | k | v], each head-major; biases of positions hold no channels."""

    family = "attention"
    module_classes = (WindowAttention, SlimWindowAttention)

    def describe(self, name: str, module: Any) -> Layer:
        heads, (qk_width, v_width) = module.num_heads, _widths(module)
        v_at, columns = 2 * heads * qk_width, ChannelAxis("proj.weight", 1)
        qk = fused_qk(name, module, heads, qk_width)
        v = Unit(
            name,
            "v",
            heads,
            v_width,
            axes=(*rows(module, "qkv", v_at), columns),
            scale_axes=(columns,),
            hooks={"value": ActivationHook("qkv", "output", v_at), "output": ActivationHook("proj", "input")},
            output_projection=columns,
            output_bias="proj.bias" if module.proj.bias is not None else None,
            mixing="rotate",
        )
        return Layer(name, self, (qk, v))

    def flops(self, module: Any, input_shape: tuple[int, ...], widths: Mapping[UnitKind, Any]) -> Any:
        windows, tokens, dim = input_shape
        per_qk, per_v = 2 * dim + tokens, dim + module.proj.out_features + tokens
        return windows * tokens * module.num_heads * (widths["qk"] * per_qk + widths["v"] * per_v)

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        module.scale = widths["qk"] ** -0.5
        module.__class__ = WindowAttention if widths["qk"] == widths["v"] else SlimWindowAttention
        slim: nn.Module = module
        return slim


def _widths(module: Any) -> tuple[int, int]:
    """Of q/k and v, per head."""
    v_dim = module.proj.in_features
    return (module.qkv.out_features - v_dim) // (2 * module.num_heads), v_dim // module.num_heads
