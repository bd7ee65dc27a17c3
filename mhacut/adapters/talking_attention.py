"""EfficientFormerV2's attention on maps: heads talk around the softmax, v is convolved beside it."""

from __future__ import annotations

from typing import Any

from timm.models import efficientformer_v2

from mhacut.adapters.per_head_attention import FreshBiases
from mhacut.adapters.rows import Projection
from mhacut.adapters.softmax import Layout, Rows, SoftmaxAdapter

_INTERPOLATION = 4
"""FLOPs per point of bilinear upsampling, as fvcore counts them."""


class SlimAttention2d(FreshBiases, efficientformer_v2.Attention2d):  # type: ignore[misc]
    """EfficientFormerV2's, cut. Made by ``resize``, never constructed, as the one below."""


class SlimAttention2dDownsample(FreshBiases, efficientformer_v2.Attention2dDownsample):  # type: ignore[misc]
    """EfficientFormerV2's between stages, cut."""


class TalkingMapAdapter(SoftmaxAdapter):
    """``q``, ``k``, ``v`` with batch norms, head-major; timm's own forward takes any widths.

    v passes a depthwise convolution and, attended or not, an activation: its channels are chosen.
    """

    def __init__(self, dense: type[Any], slim: type[Any], query: str) -> None:
        """Serve ``dense``, as ``slim`` once cut; ``query`` is what makes q."""
        self.module_classes = (dense, slim)
        self.slim, self.query = slim, query

    def layout(self, module: Any) -> Layout:
        return Layout(
            module.num_heads,
            module.key_dim,
            module.d,
            Rows(self.query),
            Rows("k"),
            Rows("v"),
            beside_value=(Rows("v_local"),),
            v_rotatable=False,
        )

    def tokens(self, module: Any, input_shape: tuple[int, ...]) -> tuple[int, int, int]:
        queries, keys = module.attention_bias_idxs.shape
        return input_shape[0], queries, keys

    def flops_of_v(self, module: Any, input_shape: tuple[int, ...]) -> int:
        _, queries, keys = self.tokens(module, input_shape)
        upsample = getattr(module, "upsample", None)
        read = queries if upsample is None else queries * int(upsample.scale_factor) ** 2
        total = Projection.of(module, "v").flops_per_row * keys + queries * keys
        total += Projection.of(module, "v_local").flops_per_row * queries
        total += Projection.of(module, "proj").flops_per_column * read
        return total if upsample is None else total + _INTERPOLATION * read

    def retell(self, module: Any, qk_width: int, v_width: int) -> None:
        module.__class__ = self.slim
        module.key_dim, module.d, module.dh = qk_width, v_width, v_width * module.num_heads


TALKING_MAPS: tuple[SoftmaxAdapter, ...] = (
    TalkingMapAdapter(efficientformer_v2.Attention2d, SlimAttention2d, "q"),
    TalkingMapAdapter(efficientformer_v2.Attention2dDownsample, SlimAttention2dDownsample, "q.proj"),
)
