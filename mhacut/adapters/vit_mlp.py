"""The MLPs beside the attention: ``Mlp``, ``GluMlp`` (``SwiGLUPacked`` is one), ``SwiGLU``, and PVTv2's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from timm.layers import GluMlp, Mlp, SwiGLU
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import nn

from mhacut.adapters.base import Adapter, ChannelAxis, Layer, Tap, Unit
from mhacut.adapters.rows import rows
from mhacut.plan import UnitKind

_NORM_OVER_HIDDEN = "a norm runs over all hidden channels"


class _MlpAdapter(Adapter):
    """Any MLP whose ``fc2`` reads the hidden channels; what writes them is each class's own."""

    family = "mlp"

    def writers(self, module: Any) -> tuple[tuple[str, int], ...]:
        """(linear layer, row of hidden channel 0) for each block of rows that makes the hidden channels."""
        raise NotImplementedError

    def between(self, module: Any) -> tuple[str, ...]:
        """Depthwise convolutions that the hidden channels pass, each by itself."""
        return ()

    def hidden_width(self, module: Any) -> int:
        width: int = module.fc2.weight.shape[1]
        return width

    def describe(self, name: str, module: Any) -> Layer:
        if type(getattr(module, "norm", None)) not in (nn.Identity, type(None)):
            return Layer(name, self, (), {"hidden": _NORM_OVER_HIDDEN})
        columns = ChannelAxis("fc2.weight", 1)
        axes = [columns]
        for linear, offset in (*self.writers(module), *((conv, 0) for conv in self.between(module))):
            axes += rows(module, linear, offset)
        channel_dim = -1 if isinstance(module.fc2, nn.Linear) else 1
        hidden = Unit(
            name,
            "hidden",
            heads=1,
            width=self.hidden_width(module),
            axes=tuple(axes),
            gain_axes=(columns,),
            taps={"hidden": Tap("fc2", "input", channel_dim=channel_dim)},
            readout=columns,
            readout_bias="fc2.bias" if module.fc2.bias is not None else None,
        )
        return Layer(name, self, (hidden,), channel_dim=channel_dim)

    def flops(self, module: Any, input_shape: tuple[int, ...], widths: Mapping[UnitKind, Any]) -> Any:
        if "hidden" not in widths:
            return 0
        first = module.get_submodule(self.writers(module)[0][0])
        in_features, out_features = first.weight.shape[1], module.fc2.weight.shape[0]
        positions = 1
        for size in input_shape:
            positions *= size
        positions //= in_features
        between = sum(module.get_submodule(conv).weight[0].numel() for conv in self.between(module))
        each = len(self.writers(module)) * in_features + between + out_features
        return widths["hidden"] * positions * each

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> nn.Module:
        slim: nn.Module = module
        return slim  # reads its width from its tensors


class MlpAdapter(_MlpAdapter):
    module_classes = (Mlp,)

    def writers(self, module: Any) -> tuple[tuple[str, int], ...]:
        return (("fc1", 0),)


class GluMlpAdapter(_MlpAdapter):
    """One ``fc1`` holds both halves, value and gate (in either order): channel i is rows i and i + hidden."""

    module_classes = (GluMlp,)

    def writers(self, module: Any) -> tuple[tuple[str, int], ...]:
        return (("fc1", 0), ("fc1", self.hidden_width(module)))


class SwiGLUAdapter(_MlpAdapter):
    module_classes = (SwiGLU,)

    def writers(self, module: Any) -> tuple[tuple[str, int], ...]:
        return (("fc1_g", 0), ("fc1_x", 0))


class DepthwiseMlpAdapter(_MlpAdapter):
    """PVTv2's: a depthwise convolution over the map between ``fc1`` and the activation."""

    module_classes = (MlpWithDepthwiseConv,)

    def writers(self, module: Any) -> tuple[tuple[str, int], ...]:
        return (("fc1", 0),)

    def between(self, module: Any) -> tuple[str, ...]:
        return ("dwconv",)
