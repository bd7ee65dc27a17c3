"""MLPs beside the attention, linear layers or 1x1 convolutions: a row of :data:`MLPS` for each class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm.layers import ConvMlp, GluMlp, Mlp, SwiGLU
from timm.models import (
    efficientformer,
    efficientformer_v2,
    efficientvit_msra,
    fastvit,
    gemma4_vit,
    iformer,
    levit,
    pvt_v2,
    shvit,
    swiftformer,
    tiny_vit,
    visformer,
    vitamin,
)
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mhacut.adapters.base import NORM_TENSORS, Adapter, ChannelAxis, Layer
from mhacut.adapters.projection import Projection


@dataclass(frozen=True)
class MlpNames:
    """What an MLP class calls its parts. Linear layers may be convolutions, with or without a batch norm."""

    cls: type[nn.Module]
    writers: tuple[str, ...] = ("fc1",)
    """Linear layers that make the hidden channels; of several, channels of equal number meet in a product."""
    reader: str = "fc2"
    """The linear layer that reads them."""
    between: tuple[str, ...] = ()
    """Depthwise convolutions and norms that the hidden channels pass, where the module has them."""
    behind: str = ""
    """A norm behind the reader, where it is not part of that."""
    within: str = ""
    """Submodule that holds them, where the module adds its input to what they give."""
    halves: bool = False
    """Both factors of a product come from one writer: channel i is rows i and i + hidden."""


MLPS = (
    MlpNames(Mlp, between=("norm",)),
    MlpNames(GluMlp, between=("norm",), halves=True),
    MlpNames(SwiGLU, ("fc1_g", "fc1_x"), between=("norm",)),
    MlpNames(ConvMlp, between=("norm",)),
    MlpNames(pvt_v2.MlpWithDepthwiseConv, between=("dwconv",)),
    MlpNames(levit.LevitMlp, ("ln1",), "ln2"),
    MlpNames(vitamin.GeGluMlp, ("w0", "w1"), "w2"),
    MlpNames(fastvit.ConvMlp),
    MlpNames(tiny_vit.NormMlp),
    MlpNames(swiftformer.Mlp),
    MlpNames(efficientformer.ConvMlpWithNorm, between=("norm1",), behind="norm2"),
    MlpNames(efficientformer_v2.ConvMlpWithNorm, between=("mid",)),
    MlpNames(efficientvit_msra.ConvMlp, ("pw1",), "pw2"),
    MlpNames(shvit.FFN, ("pw1",), "pw2"),
    MlpNames(iformer.FFN, ("0",), "2", within="mixer.module"),
    MlpNames(visformer.SpatialMlp, ("conv1",), "conv3", between=("conv2",)),
    MlpNames(gemma4_vit.Gemma4GatedMlp, ("gate_proj", "up_proj"), "down_proj"),
)


class MlpAdapter(Adapter):
    """Any MLP of :data:`MLPS`."""

    family = "mlp"

    def __init__(self, names: MlpNames) -> None:
        """Serve the class of ``names``."""
        self.names = names
        self.module_classes = (names.cls,)

    def describe(self, name: str, module: Any) -> Layer:
        if self.names.within:
            name, module = f"{name}.{self.names.within}", module.get_submodule(self.names.within)
        reason = _left_whole(self._between(module))
        if reason is not None:
            channel_dim = Projection.of(module, self.names.reader).channel_dim
            return Layer(name, self, (), {"hidden": reason}, channel_dim)
        reader = Projection.of(module, self.names.reader)
        written: list[ChannelAxis] = []
        for writer in self.names.writers:
            for half in range(1 + self.names.halves):
                written += Projection.of(module, writer).rows(half * reader.reads)
        for passed, part in self._between(module).items():
            if isinstance(part, _BatchNorm):
                written += [ChannelAxis(f"{passed}.{tensor}", 0) for tensor in NORM_TENSORS]
            else:
                written += Projection.of(module, passed).rows()
        norm = self._norm_behind(module, reader)
        hidden = reader.unit(name, "hidden", (1, reader.reads), tuple(written), {}, output_norm=norm)
        return Layer(name, self, (hidden,), channel_dim=reader.channel_dim)

    def _norm_behind(self, module: Any, reader: Projection) -> str | None:
        own = self.names.behind
        return own if own and isinstance(getattr(module, own), _BatchNorm) else reader.norm

    def _between(self, module: Any) -> dict[str, nn.Module]:
        parts = {name: part for name, part in module.named_children() if name in self.names.between}
        return {name: part for name, part in parts.items() if type(part) is not nn.Identity}


def _left_whole(between: Mapping[str, nn.Module]) -> str | None:
    """Why the hidden channels must stay."""
    for part in between.values():
        if isinstance(part, _BatchNorm):
            continue
        convs = [conv for conv in part.modules() if isinstance(conv, nn.Conv2d)]
        if not convs:
            return "a norm runs over all hidden channels"
        if any(conv.groups != conv.out_channels for conv in convs):
            return "a convolution mixes hidden channels"
    return None
