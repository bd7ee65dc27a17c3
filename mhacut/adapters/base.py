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
"""Tensors of a batch norm with 1 entry per channel."""

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
    """Name relative to the layer: ``qkv.weight``."""
    dim: int
    """Dimension of the tensor that holds the channels."""
    offset: int = 0
    """Index of channel 0 of the first head."""
    heads: tuple[int, int] | None = None
    """Range (first, last + 1) of heads, if the tensor holds only some heads."""
    shared: bool = False
    """Whether all heads share the rows: channel i of every head has index ``offset + i``."""
    head_step: int | None = None
    """Index step between heads. None: the width of a head."""
    channel_step: int = 1
    """Index step between channels of a head."""
    copies: tuple[int, ...] = (0,)
    """Offsets of all rows of a channel from its first row, if a channel has several rows."""
    norm: str | None = None
    """Name of the batch norm that follows these rows. Pruning slices the norm's entries with the rows, and
    channel scales change the norm instead of the rows."""

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
    """Activation of a unit's channels in the forward pass, [..., offset + heads * width, ...]."""

    module: str
    """Name of the submodule, relative to the layer. ``*`` stands for the head number if every head has its
    own submodule."""
    side: Literal["input", "output"]
    offset: int = 0
    channel_dim: int = -1
    """Dimension of the activation that holds the channels."""
    width: int | None = None
    """Channels per head. None: the width of the unit."""
    stride: int | None = None
    """Index step between heads. None: the width."""
    argument: int = 0
    """Position of the argument, if the hook reads an input."""
    then: Callable[[Any, Tensor], Tensor] | None = None
    """Function (submodule, activation) -> [..., channels], for activations that are not ordered by head."""


@dataclass(frozen=True)
class Unit:
    """Channels of one kind (qk, v or MLP) in one layer. All heads keep the same number."""

    layer: str
    kind: UnitKind
    heads: int
    width: int
    """Channels per head."""
    axes: tuple[ChannelAxis, ...]
    """All axes to slice when channels are cut."""
    scale_axes: tuple[ChannelAxis, ...]
    """Axes on which a factor per channel scales the channel's contribution exactly; 0 removes the channel. A
    subset of ``axes``, with biases. Empty if there is a ``gate``."""
    hooks: Mapping[str, ActivationHook]
    """``query`` and ``key`` for qk, and ``value`` in linear attention; ``value`` and ``output`` (after
    attention, before the projection) for v; ``hidden`` for the MLP."""
    output_projection: ChannelAxis | None = None
    """Columns that read the channels (v or hidden). None for qk."""
    output_bias: str | None = None
    """Bias of the output projection."""
    output_norm: str | None = None
    """Batch norm after the output projection."""
    output_scale: str | None = None
    """LayerScale after the output projection: 1 factor per output channel."""
    mixing: Mixing = "refit"
    sharing: Sharing = "own"
    """:attr:`ChannelAxis.shared` marks the shared tensors."""
    softmax_scaled: bool = False
    """Whether the layer multiplies logits by 1/sqrt(width), so that a cut changes the temperature."""
    linear: bool = False
    """Whether the attention is linear: products of features of q and k, divided by their sum."""
    feeds: bool = False
    """Whether other channels of the layer read these channels before the output projection. Least squares
    repairs only the projection, so the loss must be measured in a forward pass of the layer."""
    white_inputs: bool = True
    """Whether inputs may be treated as white noise if there are no images
    (:mod:`mhacut.pruning.unit_moments`)."""
    gate: str | None = None
    """Buffer with a scale per channel, [heads * width], at least 0. Used if no factor on a parameter removes
    a channel exactly. None outside a masked model. :meth:`Adapter.merge_gate` merges the scales."""
    constants: tuple[ChannelAxis, ...] = ()
    """Biases, 1 per channel, that reach the output projection unchanged when the input of the channel is 0. A
    cut adds their effect to the output bias."""

    def __post_init__(self) -> None:
        assert any(axis.shared for axis in self.axes) == (self.sharing != "own"), self.key

    @property
    def key(self) -> UnitKey:
        return self.layer, self.kind

    def keep_first(self, width: int, *, unshared: bool = False) -> UnitPlan:
        """Return the plan that keeps the first ``width`` channels of each head."""
        kept = (tuple(range(width)),) * self.heads
        return UnitPlan(*self.key, self.width, kept, unshared=unshared)

    def read_at(self, columns: ChannelAxis, hook: ActivationHook) -> Unit:
        """Return the unit with other output columns, and a hook on the input of these columns."""
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
    """Description of one attention or MLP of a model."""

    name: str
    """Module name in the model, ``blocks.0.attn``."""
    adapter: Adapter
    units: tuple[Unit, ...]
    not_prunable: Mapping[UnitKind, str] = field(default_factory=dict)
    """Kinds that cannot be cut exactly, with the reason."""
    channel_dim: int = -1
    """Channel dimension of the layer's output."""
    result: str = ""
    """Submodule whose output is compared, if the layer's output contains more than the output projection."""
    coupled_with: Mapping[UnitKind, UnitKind] = field(default_factory=dict)
    """Kinds whose channels are tied to channels of another kind."""


class Adapter(ABC):
    """Description of one attention or MLP class. Stateless: 1 instance serves all layers of the class."""

    family: LayerFamily
    module_classes: tuple[type[nn.Module], ...]
    """Supported classes. A subclass may compute something else, so it needs its own adapter."""
    one_width: bool = False
    """Whether the classes have a single width for q, k and v."""
    equal_widths_only: bool = False
    """Whether a cut layer needs equal widths of q, k and v."""

    def __deepcopy__(self, memo: object) -> Adapter:
        return self

    def serves(self, module: Any) -> bool:
        """Whether this adapter supports the configuration of ``module``, whose class is supported."""
        return True

    @abstractmethod
    def describe(self, name: str, module: Any) -> Layer:
        """Return the units of ``module`` and the kinds that cannot be pruned."""

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        """Set attributes and class of ``module`` to the widths of its sliced tensors.

        Tensors keep their names. ``widths`` contains all units of the layer. Classes that read their widths
        from their tensors need no change.
        """
        return

    def heads(self, module: Any) -> int:
        """Number of heads of the attention ``module``."""
        return module.num_heads

    def record_kept(self, module: Any, unit: Unit, kept: Tensor) -> None:
        """Store the kept channels of ``unit``, [heads, kept], in a layer that needs them.

        Runs before slicing.
        """
        return

    def prepare(self, module: Any) -> None:
        """Make a dense layer call the submodules that its hooks name."""
        return

    def fix_shared_modules(self, model: nn.Module) -> None:
        """Repair references of ``model`` to modules that cut layers no longer share."""
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


def library_class(module: nn.Module) -> type[nn.Module]:
    """Return the class of ``module`` before :func:`mixed` changed it."""
    cls = type(module)
    return cls.__bases__[-1] if cls.__module__ == __name__ else cls


def table_device(weight: Tensor) -> torch.device:
    """Return the device for an index table beside ``weight``: the CPU if that is on the meta device.

    Weights on the meta device are read from a file later; a table is in no file and must keep its values.
    """
    return torch.device("cpu") if weight.is_meta else weight.device


_LINEAR = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Projection:
    """A linear layer or convolution, or a module that holds one and a batch norm."""

    name: str
    """Name relative to the layer."""
    linear_name: str
    linear: Any
    norm: str | None

    @classmethod
    def of(cls, module: nn.Module, name: str) -> Projection:
        projection = module.get_submodule(name)
        if isinstance(projection, (*_LINEAR, nn.ConvTranspose2d)):
            return cls(name, name, projection, None)
        (inner,) = (key for key, part in projection.named_children() if isinstance(part, _LINEAR))
        norms = [f"{name}.{key}" for key, part in projection.named_children() if isinstance(part, _BatchNorm)]
        assert len(norms) <= 1, name
        return cls(name, f"{name}.{inner}", projection.get_submodule(inner), norms[0] if norms else None)

    @property
    def channel_dim(self) -> int:
        """Channel dimension of input and output."""
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
        return None if self.linear.bias is None else f"{self.linear_name}.bias"

    @property
    def transposed(self) -> bool:
        """Whether it is a transposed convolution: input channels are dimension 0 of the weight."""
        return isinstance(self.linear, nn.ConvTranspose2d)

    def rows(self, offset: int = 0, stride: int | None = None) -> tuple[ChannelAxis, ...]:
        """Return the axes of output channels from row ``offset`` on: weight and bias."""
        weight = ChannelAxis(f"{self.linear_name}.weight", 0, offset, head_step=stride, norm=self.norm)
        if self.bias is None:
            return (weight,)
        return weight, ChannelAxis(self.bias, 0, offset, head_step=stride)

    def scaled_rows(self, offset: int = 0, stride: int | None = None) -> tuple[ChannelAxis, ...]:
        """Return the axes of :meth:`rows` to scale. A batch norm after a bias already scales the bias."""
        axes = self.rows(offset, stride)
        return axes if self.norm is None else axes[:1]

    def columns(self) -> ChannelAxis:
        """Return the axis of the input channels."""
        return ChannelAxis(f"{self.linear_name}.weight", 0 if self.transposed else 1)

    def hook(
        self,
        side: Literal["input", "output"],
        offset: int = 0,
        stride: int | None = None,
        width: int | None = None,
    ) -> ActivationHook:
        """Return the hook on the input, or on the output after the batch norm."""
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
        """Return the unit of the input channels of this projection."""
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
