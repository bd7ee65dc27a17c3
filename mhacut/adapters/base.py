"""Description of a prunable attention layer or MLP: the places of its channels in tensors and activations.

Slicing, masking and calibration read these descriptions in :mod:`mhacut.surgery` and
:mod:`mhacut.pruning.calibrate`, so that each is written once for all classes.
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
"""Parameters and buffers of a batch norm that have 1 entry per channel."""

Mixing = Literal["rotate", "refit", "select"]
"""Ability of the kept channels of a head to replace removed channels.

- ``rotate``: any invertible matrix [d, d] can change the basis without changing the output.
- ``refit``: the basis must stay, but a refit of the output projection or of W_q replaces removed channels.
- ``select``: the basis must stay, and kept q/k channels cannot replace removed q/k channels.
"""

Sharing = Literal["own", "copied", "tied"]
"""Whether heads share tensors of a unit.

- ``own``: every head has its own tensors.
- ``copied``: heads share a tensor, and pruning can give each head a copy.
- ``tied``: heads share a tensor that cannot be copied, so all heads keep the same channels.
"""


@dataclass(frozen=True)
class ChannelAxis:
    """Indices of prunable channels in one tensor: head h, channel i at ``offset + h * width + i``.

    A tensor may hold several kinds of channels: rows of a fused ``qkv.weight`` are q, then k, then v, of all
    heads or in every head. If a channel has several rows, row c of channel i of head h has the index
    ``offset + h * head_step + i * channel_step + copies[c]``.

    >>> ChannelAxis("qkv.weight", 0, offset=4).rows(heads=2, width=3)[..., 0].tolist()
    [[4, 5, 6], [7, 8, 9]]
    >>> ChannelAxis("qkv.weight", 0, copies=(0, 3)).rows(heads=2, width=3).tolist()
    [[[0, 3], [1, 4], [2, 5]], [[6, 9], [7, 10], [8, 11]]]
    """

    tensor: str
    """Tensor name relative to the layer: ``qkv.weight``."""
    dim: int
    """Tensor dimension along which the channels are indexed."""
    offset: int = 0
    """Index of channel 0 of head 0 in the tensor dimension ``dim``."""
    heads: tuple[int, int] | None = None
    """Heads whose channels are in the tensor, as (first, last + 1). None: all heads."""
    shared: bool = False
    """Whether all heads share these tensor rows: channel i of every head has index ``offset + i``."""
    head_step: int | None = None
    """Index step from one head to the next. None: the number of rows of a head."""
    channel_step: int = 1
    """Index step from one channel of a head to the next."""
    copies: tuple[int, ...] = (0,)
    """Index offsets of the rows of a channel from its first row. ``(0,)``: 1 row per channel."""
    norm: str | None = None
    """Name of the batch norm after these rows. Pruning slices the batch norm with the rows, and channel
    scales multiply the batch norm instead of the rows."""

    def rows(self, heads: int, width: int) -> Tensor:
        """Return the channel indices in tensor dimension ``dim``, [heads, width, rows per channel]."""
        if self.shared:
            heads = 1
        elif self.heads is not None:
            heads = self.heads[1] - self.heads[0]
        step = width * len(self.copies) if self.head_step is None else self.head_step
        head, channel = torch.arange(heads)[:, None, None], torch.arange(width)[:, None]
        return self.offset + head * step + channel * self.channel_step + torch.tensor(self.copies)


@dataclass(frozen=True)
class ActivationHook:
    """Place in the forward pass where channel activations can be read: input or output of a submodule."""

    module: str
    """Submodule name relative to the layer. If every head has its own submodule, ``*`` replaces the head
    number."""
    side: Literal["input", "output"]
    offset: int = 0
    channel_dim: int = -1
    """Dimension of the activation along which the channels are indexed."""
    width: int | None = None
    """Channels per head in the activation. None: the number of prunable channels per head."""
    stride: int | None = None
    """Index step from one head to the next in the activation. None: the channels per head."""
    argument: int = 0
    """Position of the activation in the submodule's arguments, if ``side`` is ``input``."""
    then: Callable[[Any, Tensor], Tensor] | None = None
    """Function of the submodule and its activation that sorts the channels by head. None: the channels are
    already sorted by head."""


@dataclass(frozen=True)
class Unit:
    """Prunable channels of one kind (qk, v or hidden) in one attention layer or MLP.

    All heads keep the same number of channels.
    """

    layer: str
    kind: UnitKind
    heads: int
    width: int
    axes: tuple[ChannelAxis, ...]
    """Places of these channels in all tensors that a cut slices."""
    scale_axes: tuple[ChannelAxis, ...]
    """Subset of ``axes``: a factor on these tensor rows scales the channel's contribution exactly, and factor
    0 removes the channel. Empty if there is a ``gate``."""
    hooks: Mapping[str, ActivationHook]
    """Places where activations of the channels can be read, by name: ``query`` and ``key`` (qk), ``value``
    and ``output`` before the projection (v), ``hidden`` (MLP). Linear attention has ``value`` for qk too."""
    output_projection: ChannelAxis | None = None
    """Columns of the output projection that read the v or hidden channels. None for qk."""
    output_bias: str | None = None
    """Name of the bias of the output projection. None without a bias."""
    output_norm: str | None = None
    """Name of the batch norm after the output projection. None without a batch norm."""
    output_scale: str | None = None
    """Name of the LayerScale parameter after the output projection. None without LayerScale."""
    mixing: Mixing = "refit"
    sharing: Sharing = "own"
    """Whether each head has its own tensors, or heads share tensors. See :data:`Sharing`."""
    softmax_scaled: bool = False
    """Whether the layer divides attention logits by sqrt(channels per head), so that a cut changes the
    softmax temperature."""
    linear: bool = False
    """Whether the layer is linear attention, which replaces the softmax by products of non-negative q and k
    features."""
    feeds: bool = False
    """Whether other channels of the layer also read these channels. A refit of the output projection then
    corrects only a part of the error."""
    white_inputs: bool = True
    """Whether white noise may stand for the layer's input when there are no calibration images."""
    gate: str | None = None
    """Name of a buffer in the masked model with a scale per channel, [heads * width], at least 0. Used if no
    factor on a parameter removes a channel exactly."""
    constants: tuple[ChannelAxis, ...] = ()
    """Biases added to the channels shortly before the output projection. When a cut removes such a channel,
    the constant effect of its bias is added to the output bias."""

    def __post_init__(self) -> None:
        assert any(axis.shared for axis in self.axes) == (self.sharing != "own"), self.key

    @property
    def key(self) -> UnitKey:
        return self.layer, self.kind

    def keep_first(self, width: int, *, unshared: bool = False) -> UnitPlan:
        kept = (tuple(range(width)),) * self.heads
        return UnitPlan(*self.key, self.width, kept, unshared=unshared)

    def read_at(self, columns: ChannelAxis, hook: ActivationHook) -> Unit:
        """Return a copy of the unit in which the output projection ``columns`` reads the channels."""
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
    """One attention layer or MLP of a model, with its prunable units."""

    name: str
    adapter: Adapter
    units: tuple[Unit, ...]
    not_prunable: Mapping[UnitKind, str] = field(default_factory=dict)
    """Reason why the channels cannot be cut, by kind (qk, v or hidden)."""
    channel_dim: int = -1
    """Index of the channel dimension in the layer's output tensor."""
    result: str = ""
    """Name of the submodule whose output replaces the layer's output in comparisons of dense and slim layers.
    Empty: the layer."""
    coupled_with: Mapping[UnitKind, UnitKind] = field(default_factory=dict)
    """Maps a kind of channels (such as qk) to the kind (such as v) with which it is cut."""


class Adapter(ABC):
    """Description of an attention or MLP class for pruning.

    It has no state, so 1 instance serves all layers of the class.
    """

    family: LayerFamily
    module_classes: tuple[type[nn.Module], ...]
    """Supported module classes. Subclasses are not supported, because they may compute something else."""
    one_width: bool = False
    """Whether the original module class has a single head width for q, k and v."""
    equal_widths_only: bool = False
    """Whether the class of a cut layer supports only equal numbers of q, k and v channels per head."""

    def __deepcopy__(self, memo: object) -> Adapter:
        return self

    def serves(self, module: Any) -> bool:
        return True

    @abstractmethod
    def describe(self, name: str, module: Any) -> Layer:
        """Return the prunable channels of ``module``, and the reasons why other kinds are not prunable."""

    def resize(self, module: Any, widths: Mapping[UnitKind, int]) -> None:
        """Set size attributes and class of a layer whose tensors were sliced.

        ``widths`` maps each kind of channels (qk, v, hidden) to the channels per head.
        """
        return

    def heads(self, module: Any) -> int:
        return module.num_heads

    def record_kept(self, module: Any, unit: Unit, kept: Tensor) -> None:
        """Store the indices of the kept channels, [heads, kept], in a layer whose forward pass needs them."""
        return

    def prepare(self, module: Any) -> None:
        """Change a dense layer so that its forward pass calls the submodules that have activation hooks."""
        return

    def fix_shared_modules(self, model: nn.Module) -> None:
        """After a cut, update references in ``model`` to modules that several layers share."""
        return

    def merge_gate(self, module: Any, unit: Unit, channel_scale: Tensor) -> None:
        """Multiply channel scales into the layer's parameters, so that the layer needs no gate buffer."""
        raise NotImplementedError


def mixed(prefix: str, *classes: type, **attributes: Any) -> Any:
    """Return a new subclass of ``classes``. Pickle finds the subclass in this module."""
    module = classes[-1].__module__.rpartition(".")[2].title().replace("_", "")
    name = f"{prefix}{module}{classes[-1].__name__}"
    globals()[name] = type(name, classes, {**attributes, "__module__": __name__})
    return globals()[name]


def library_class(module: nn.Module) -> type[nn.Module]:
    cls = type(module)
    return cls.__bases__[-1] if cls.__module__ == __name__ else cls


def table_device(weight: Tensor) -> torch.device:
    """Return the device of ``weight`` for an index buffer, or the CPU if ``weight`` is on the meta device.

    Indices on the meta device would be lost, because weight files do not contain them.
    """
    return torch.device("cpu") if weight.is_meta else weight.device


_LINEAR = (nn.Linear, nn.Conv2d)


@dataclass(frozen=True)
class Projection:
    """A linear layer or convolution, optionally followed by a batch norm."""

    name: str
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
        return -1 if isinstance(self.linear, nn.Linear) else 1

    @property
    def reads(self) -> int:
        return int(self.linear.in_features if isinstance(self.linear, nn.Linear) else self.linear.in_channels)

    @property
    def writes(self) -> int:
        return int(self.linear.weight.shape[0])

    @property
    def bias(self) -> str | None:
        return None if self.linear.bias is None else f"{self.linear_name}.bias"

    @property
    def transposed(self) -> bool:
        """Whether the projection is a transposed convolution, with input channels in dimension 0."""
        return isinstance(self.linear, nn.ConvTranspose2d)

    def rows(self, offset: int = 0, stride: int | None = None) -> tuple[ChannelAxis, ...]:
        """Return the rows of weight and bias, from row ``offset`` on, that compute the channels."""
        weight = ChannelAxis(f"{self.linear_name}.weight", 0, offset, head_step=stride, norm=self.norm)
        if self.bias is None:
            return (weight,)
        return weight, ChannelAxis(self.bias, 0, offset, head_step=stride)

    def scaled_rows(self, offset: int = 0, stride: int | None = None) -> tuple[ChannelAxis, ...]:
        """Return the rows that channel scales multiply. The bias is left out if a batch norm follows."""
        axes = self.rows(offset, stride)
        return axes if self.norm is None else axes[:1]

    def columns(self) -> ChannelAxis:
        return ChannelAxis(f"{self.linear_name}.weight", 0 if self.transposed else 1)

    def hook(
        self,
        side: Literal["input", "output"],
        offset: int = 0,
        stride: int | None = None,
        width: int | None = None,
    ) -> ActivationHook:
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
