"""Adapters of MLP classes: linear layers or 1x1 convolutions. :data:`MLPS` has an entry per class."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from timm import layers, models
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mhacut.adapters.base import NORM_TENSORS, Adapter, ChannelAxis, Layer, Projection


@dataclass(eq=False)
class Mlp(Adapter):
    """An MLP class, described by the names of its linear layers or convolutions."""

    family = "mlp"

    cls: type[nn.Module]
    writers: tuple[str, ...] = ("fc1",)
    """Names of the layers that write the hidden channels. The outputs of 2 layers are multiplied (gated
    MLP)."""
    reader: str = "fc2"
    between: tuple[str, ...] = ()
    """Names of depthwise convolutions and norms that an MLP may have on its hidden channels."""
    behind: str = ""
    """Name of the norm after the output layer; empty without a norm."""
    within: str = ""
    """Name of the submodule that holds the layers, if the MLP class contains a residual addition; else
    empty."""
    halves: bool = False
    """Whether ``fc1`` writes both factors of a gated MLP: hidden channel i is the product of rows i and i +
    hidden."""

    def __post_init__(self) -> None:
        self.module_classes = (self.cls,)

    def describe(self, name: str, module: Any) -> Layer:
        if self.within:
            name, module = f"{name}.{self.within}", module.get_submodule(self.within)
        reader, norm = Projection.of(module, self.reader), getattr(module, self.behind, None)
        between = {
            passed: part
            for passed, part in module.named_children()
            if passed in self.between and type(part) is not nn.Identity
        }
        reason = _why_not_prunable(between)
        if reason is not None:
            return Layer(name, self, (), {"hidden": reason}, reader.channel_dim)
        written: list[ChannelAxis] = []
        for writer in self.writers:
            for half in range(1 + self.halves):  # channel i is the product of row i of each half
                written += Projection.of(module, writer).rows(half * reader.reads)
        for passed, part in between.items():
            if isinstance(part, _BatchNorm):
                written += [ChannelAxis(f"{passed}.{tensor}", 0) for tensor in NORM_TENSORS]
            else:
                written += Projection.of(module, passed).rows()
        norm_behind = self.behind if isinstance(norm, _BatchNorm) else reader.norm
        size = 1, reader.reads
        hidden = reader.unit(name, "hidden", size, tuple(written), {}, output_norm=norm_behind)
        return Layer(name, self, (hidden,), channel_dim=reader.channel_dim)


def _why_not_prunable(between: Mapping[str, nn.Module]) -> str | None:
    for part in between.values():
        if isinstance(part, _BatchNorm):
            continue
        convs = [conv for conv in part.modules() if isinstance(conv, nn.Conv2d)]
        if not convs:
            return "a norm runs over all hidden channels"
        # A depthwise convolution keeps channels apart, so that one can go; any other mixes them.
        if any(conv.groups != conv.out_channels for conv in convs):
            return "a convolution mixes hidden channels"
    return None


MLPS = (
    Mlp(layers.Mlp, between=("norm",)),
    Mlp(layers.GluMlp, between=("norm",), halves=True),
    Mlp(layers.SwiGLU, ("fc1_g", "fc1_x"), between=("norm",)),
    Mlp(layers.ConvMlp, between=("norm",)),
    Mlp(models.pvt_v2.MlpWithDepthwiseConv, between=("dwconv",)),
    Mlp(models.levit.LevitMlp, ("ln1",), "ln2"),
    Mlp(models.vitamin.GeGluMlp, ("w0", "w1"), "w2"),
    Mlp(models.fastvit.ConvMlp),
    Mlp(models.tiny_vit.NormMlp),
    Mlp(models.swiftformer.Mlp),
    Mlp(models.efficientformer.ConvMlpWithNorm, between=("norm1",), behind="norm2"),
    Mlp(models.efficientformer_v2.ConvMlpWithNorm, between=("mid",)),
    Mlp(models.efficientvit_msra.ConvMlp, ("pw1",), "pw2"),
    Mlp(models.shvit.FFN, ("pw1",), "pw2"),
    Mlp(models.iformer.FFN, ("0",), "2", within="mixer.module"),
    Mlp(models.visformer.SpatialMlp, ("conv1",), "conv3", between=("conv2",)),
    Mlp(models.gemma4_vit.Gemma4GatedMlp, ("gate_proj", "up_proj"), "down_proj"),
)
