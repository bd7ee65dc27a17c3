"""Description of a prunable layer: where its channels are, and what an adapter does when some are cut.

Slicing, masking, merging channel scales and reading activations are done once, in :mod:`mhacut.surgery` and
:mod:`mhacut.pruning.calibrate`, by walking what is described here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mhacut.plan import LayerFamily, UnitKey, UnitKind, UnitPlan

NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
"""Tensors of a batch norm, with an entry for each channel."""

Mixing = Literal["rotate", "refit", "select"]
"""Degree to which the channels of a head can be mixed.

- ``rotate``: the layer computes the same when scale axes are multiplied by any invertible matrix [d, d] and
  the other axes by its inverse transpose.
- ``refit``: something acts on single channels, so that the basis stays; but the output projection, or W_q,
  can be refitted so that kept channels stand in for removed ones.
- ``select``: something acts on single channels behind W_q and W_k: a kept q/k channel cannot stand in for a
  removed one, and what is constant over the keys matters.
"""

Sharing = Literal["own", "copied", "tied"]
"""Degree to which heads share tensors of a unit.

- ``own``: every head has its own.
- ``copied``: heads share a tensor, of which each can get a copy (:attr:`mhacut.plan.UnitPlan.unshared`).
- ``tied``: heads share a tensor without room for copies: all keep the same channels, in the same basis.
"""


@dataclass(frozen=True)
class ChannelAxis:
    """Indices of a unit's channels in one tensor: head h, channel i at ``offset + h * width + i``.

    One tensor may hold several units side by side: rows of a fused ``qkv.weight`` are q, then k, then v, of
    all heads or in every head. In general, head h, channel i, copy c has the index
    ``offset + h * head_step + i * channel_step + copies[c]``.

    >>> ChannelAxis("qkv.weight", 0, offset=4).rows(heads=2, width=3)[..., 0].tolist()
    [[4, 5, 6], [7, 8, 9]]
    >>> ChannelAxis("qkv.weight", 0, copies=(0, 3)).rows(heads=2, width=3).tolist()
    [[[0, 3], [1, 4], [2, 5]], [[6, 9], [7, 10], [8, 11]]]
    """

    tensor: str
    """Name relative to the layer, ``qkv.weight``."""
    dim: int
    """Dimension of that tensor along which the channels lie."""
    offset: int = 0
    """Index of channel 0 of head 0, or of the first of ``heads``."""
    heads: tuple[int, int] | None = None
    """First head, and the one past the last, if the tensor has the channels of some heads only."""
    shared: bool = False
    """One row serves all heads: channel i of every head has the index ``offset + i``; see :data:`Sharing`."""
    head_step: int | None = None
    """Step from a head to the next; None if channels of a head lie side by side."""
    channel_step: int = 1
    """Step from a channel of a head to the next."""
    copies: tuple[int, ...] = (0,)
    """Offset of each row of a channel from its first, for channels that are several rows."""
    norm: str | None = None
    """The batch norm behind the linear layer whose rows these are. Its entries are sliced with the rows, and
    scaled in their place."""

    def rows(self, heads: int, width: int) -> Tensor:
        """Return the indices along ``dim``, [heads, width, copies]."""
        if self.shared:
            heads = 1
        elif self.heads is not None:
            heads = self.heads[1] - self.heads[0]
        step = width * len(self.copies) if self.head_step is None else self.head_step
        head, channel = torch.arange(heads)[:, None, None], torch.arange(width)[:, None]
        return self.offset + head * step + channel * self.channel_step + torch.tensor(self.copies)


@dataclass(frozen=True)
class ActivationHook:
    """Place where an activation of a unit passes while the model runs, [..., offset + heads * width, ...]."""

    module: str
    """Submodule whose input or output is read, relative to the layer. ``*`` stands for the number of the
    head, where every head has a submodule of its own, which run one after the other."""
    side: Literal["input", "output"]
    offset: int = 0
    channel_dim: int = -1
    """Dimension of the activation that holds the channels."""
    width: int | None = None
    """Channels per head, where it is not the unit's."""
    stride: int | None = None
    """Step from one head to the next, where that is not the width."""
    argument: int = 0
    """Position of the argument that is read, of an input."""
    then: Callable[[Any, Tensor], Tensor] | None = None
    """(submodule, activation) -> [..., channels], where no module gives the channels head by head."""


@dataclass(frozen=True)
class Unit:
    """A group of channels that is sized together: all heads of (layer, kind)."""

    layer: str
    kind: UnitKind
    heads: int
    width: int
    """Channels per head."""
    axes: tuple[ChannelAxis, ...]
    """All axes that are sliced when channels are cut."""
    scale_axes: tuple[ChannelAxis, ...]
    """Axes along which a factor per channel scales that channel's contribution exactly: 0 removes it (mask),
    any other number is a channel scale. A subset of ``axes``, with biases; empty if there is a ``gate``."""
    hooks: Mapping[str, ActivationHook]
    """``query`` and ``key`` for qk (of ``linear`` attention their features, and ``value`` too); ``value`` and
    ``output`` (weighted by attention, before the projection) for v; ``hidden`` for the MLP."""
    output_projection: ChannelAxis | None = None
    """Columns that read the channels (v, hidden); None for qk."""
    output_bias: str | None = None
    """Bias of the output projection whose input columns are the unit's channels."""
    output_norm: str | None = None
    """Batch norm behind those columns and their bias."""
    output_scale: str | None = None
    """LayerScale behind those columns, a factor for each output channel."""
    mixing: Mixing = "refit"
    sharing: Sharing = "own"
    """Shared tensors are marked by :attr:`ChannelAxis.shared`."""
    softmax_scaled: bool = False
    """The layer multiplies its logits by 1/sqrt(width), so that a cut changes the temperature."""
    linear: bool = False
    """Attention without a softmax: its weights are products of features of q and of k, over their sum."""
    feeds: bool = False
    """The channels feed others of the layer before the output projection reads them, so that the loss shows
    only when the layer runs without them; least-squares reconstruction makes up for the projection only."""
    white_inputs: bool = True
    """Without images, inputs may be taken as white (:mod:`mhacut.pruning.unit_moments`)."""
    gate: str | None = None
    """Buffer for a scale per channel, [heads * width], at least 0; None except in a masked model. It is for
    channels that no factor on a parameter removes exactly; :meth:`Adapter.merge_gate` merges its scales."""
    constants: tuple[ChannelAxis, ...] = ()
    """Biases, one per channel, that reach the output projection as they are: the value of a channel whose
    input is zero. When the channel is cut, its effect is added to the output bias."""

    def __post_init__(self) -> None:
        assert any(axis.shared for axis in self.axes) == (self.sharing != "own"), self.key

    @property
    def key(self) -> UnitKey:
        return self.layer, self.kind

    def keep_first(self, width: int, *, unshared: bool = False) -> UnitPlan:
        """Return the cut to the first ``width`` channels of each head."""
        kept = (tuple(range(width)),) * self.heads
        return UnitPlan(*self.key, self.width, kept, unshared=unshared)

    def read_at(self, columns: ChannelAxis, hook: ActivationHook) -> Unit:
        """Return the unit with other columns of the output projection, and the hook on what they read."""
        old, name = self.output_projection, "hidden" if self.kind == "hidden" else "output"
        return replace(
            self,
            axes=tuple(columns if axis == old else axis for axis in self.axes),
            scale_axes=tuple(columns if axis == old else axis for axis in self.scale_axes),
            output_projection=columns,
            hooks={**self.hooks, name: hook},
        )

    @property
    def constants_pass(self) -> bool:
        """Whether a bias or norm after the output projection can absorb the mean of removed channels."""
        return self.output_bias is not None or self.output_norm is not None


@dataclass(frozen=True)
class Layer:
    """One attention or MLP of a model, as its adapter describes it."""

    name: str
    """Module name in the model, ``blocks.0.attn``."""
    adapter: Adapter
    units: tuple[Unit, ...]
    not_prunable: Mapping[UnitKind, str] = field(default_factory=dict)
    """Kinds that cannot be cut exactly, and why."""
    channel_dim: int = -1
    """Dimension of the layer's output that holds its channels."""
    result: str = ""
    """Submodule that ends with the output projection, if more follows; errors are those of its output."""
    coupled_with: Mapping[UnitKind, UnitKind] = field(default_factory=dict)
    """Kinds without a unit of their own, whose channels are tied to those of another."""


class Adapter(ABC):
    """Describes one attention or MLP class. Stateless; one instance serves all layers of the class."""

    family: LayerFamily
    module_classes: tuple[type[nn.Module], ...]
    """Exactly these classes; a subclass may compute something else and needs an adapter of its own."""
    one_width: bool = False
    """Whether the classes know one width of q, k and v."""
    equal_widths_only: bool = False
    """Whether a layer with different widths of q, k and v cannot run."""

    def serves(self, module: Any) -> bool:
        """Whether ``module``, of one of the classes, is built so that it can be described."""
        return True

    @abstractmethod
    def describe(self, name: str, module: Any) -> Layer:
        """Return the units of ``module``, and the kinds that are not prunable."""

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        """Set attributes and class of ``module`` to the widths that its sliced tensors have.

        Tensors keep their names. ``widths`` names every unit of the layer, also those that keep all channels.
        Nothing is done where the class reads its widths from its tensors.
        """
        return

    def heads(self, module: Any) -> int:
        """Number of heads of ``module``, of the family ``attention``."""
        return module.num_heads

    def record_kept(self, module: Any, unit: Unit, kept: Tensor) -> None:
        """Record the kept channels of ``unit``, [heads, kept], if the layer needs them, before slicing."""
        return

    def prepare(self, module: Any) -> None:
        """Make a layer of the dense model call the submodules that its hooks name."""
        return

    def fix_shared_modules(self, model: nn.Module) -> None:
        """Repair references of ``model`` to modules that its cut layers no longer share."""
        return

    def merge_gate(self, module: Any, unit: Unit, channel_scale: Tensor) -> None:
        """Put channel scales into parameters, before they are sliced, so that the layer needs no gate.

        Args:
            module: the layer, not yet cut.
            unit: unit of that layer, with a gate.
            channel_scale: [heads, width], float64; 0 only for channels that are cut next.
        """
        raise NotImplementedError


def mixed(prefix: str, *classes: type, **attributes: Any) -> Any:
    """Make a class of ``classes``, the last of them timm's, named after it: ``ReadBeitAttention``.

    It is kept under its name in this module, where pickle looks for it.
    """
    module = classes[-1].__module__.rpartition(".")[2].title().replace("_", "")
    name = f"{prefix}{module}{classes[-1].__name__}"
    globals()[name] = type(name, classes, {**attributes, "__module__": __name__})
    return globals()[name]


def table_device(weight: Tensor) -> torch.device:
    """Return the device for an index table beside ``weight``: the CPU if that is on the meta device.

    Weights on the meta device are read from a file later; a table is in no file and must keep its values.
    """
    return torch.device("cpu") if weight.is_meta else weight.device


_LINEAR = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Projection:
    """A linear layer or convolution, alone or in a module that holds a batch norm behind it.

    A transposed convolution can read channels, not write them.
    """

    name: str
    """Name of the whole module, relative to the layer."""
    linear_name: str
    linear: Any
    norm: str | None
    """Name of the batch norm."""

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Projection:
        """Return the projection of the layer ``module`` that is called ``name``."""
        projection = module.get_submodule(name)
        if isinstance(projection, (*_LINEAR, nn.ConvTranspose2d)):
            return cls(name, name, projection, None)
        (inner,) = (key for key, part in projection.named_children() if isinstance(part, _LINEAR))
        norms = [f"{name}.{key}" for key, part in projection.named_children() if isinstance(part, _BatchNorm)]
        assert len(norms) <= 1, name
        return cls(name, f"{name}.{inner}", projection.get_submodule(inner), norms[0] if norms else None)

    @property
    def channel_dim(self) -> int:
        """Dimension of input and output that holds channels."""
        return -1 if isinstance(self.linear, nn.Linear) else 1

    @property
    def reads(self) -> int:
        """Number of input channels."""
        return int(self.linear.in_features if isinstance(self.linear, nn.Linear) else self.linear.in_channels)

    @property
    def writes(self) -> int:
        """Number of output channels."""
        return int(self.linear.weight.shape[0])

    @property
    def bias(self) -> str | None:
        """Name of the bias."""
        return None if self.linear.bias is None else f"{self.linear_name}.bias"

    @property
    def transposed(self) -> bool:
        """Whether input channels lie along dimension 0 of the weight, and their effect varies by position."""
        return isinstance(self.linear, nn.ConvTranspose2d)

    def rows(self, offset: int = 0, stride: int | None = None) -> tuple[ChannelAxis, ...]:
        """Return the axes of channels written from row ``offset`` on: of the weight, and of the bias."""
        weight = ChannelAxis(f"{self.linear_name}.weight", 0, offset, head_step=stride, norm=self.norm)
        if self.bias is None:
            return (weight,)
        return weight, ChannelAxis(self.bias, 0, offset, head_step=stride)

    def scaled_rows(self, offset: int = 0, stride: int | None = None) -> tuple[ChannelAxis, ...]:
        """Return those of :meth:`rows` that a factor scales; a batch norm scales a bias before it."""
        axes = self.rows(offset, stride)
        return axes if self.norm is None else axes[:1]

    def columns(self) -> ChannelAxis:
        """Return the axis of channels that are read."""
        return ChannelAxis(f"{self.linear_name}.weight", 0 if self.transposed else 1)

    def hook(
        self,
        side: Literal["input", "output"],
        offset: int = 0,
        stride: int | None = None,
        width: int | None = None,
    ) -> ActivationHook:
        """Return the hook on what is read or, behind the batch norm, written."""
        name = self.linear_name if side == "input" else self.name
        return ActivationHook(name, side, offset, self.channel_dim, width, stride)

    def unit(
        self,
        layer: str,
        kind: UnitKind,
        size: tuple[int, int],
        written: tuple[ChannelAxis, ...],
        hooks: Mapping[str, ActivationHook],
        **further: Any,
    ) -> Unit:
        """Return the unit of channels that this projection reads."""
        columns, read = self.columns(), "hidden" if kind == "hidden" else "output"
        fields = {
            "axes": (*written, columns),
            # Columns, not rows: what is written may feed other channels before it is read.
            "scale_axes": (columns,),
            "hooks": {**hooks, read: self.hook("input")},
            "output_projection": columns,
            # A transposed convolution makes no constant of a constant: its bias cannot take one up.
            "output_bias": None if self.transposed else self.bias,
            "output_norm": self.norm,
        }
        return Unit(layer, kind, *size, **{**fields, **further})
