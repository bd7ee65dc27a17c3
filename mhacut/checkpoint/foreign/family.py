"""One family of another library's models: how to recognise it, rename its tensors and build it in timm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mhacut.checkpoint.foreign.config import Config
from mhacut.checkpoint.foreign.rename import Renaming
from mhacut.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]
"""Shape of each tensor, by its name."""

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""Activations of transformers by their names in timm."""
_EPS_TOLERANCE = 1.5e-6
"""Largest difference from timm's epsilon that is accepted. With 1e-6 for 1e-12, logits agree within 1e-5."""


@dataclass(frozen=True)
class Built:
    """The timm model that a file is converted to."""

    architecture: str
    """Name in timm."""
    args: dict[str, Any]
    """Further arguments of ``timm.create_model``; ``num_classes`` follows from the classifier's shape."""
    cfg: dict[str, Any] = field(default_factory=dict)
    """Preprocessing that goes with these weights, as timm's pretrained_cfg has it."""
    side: int | None = None
    """Side of the images in pixels, where timm's model has no argument ``img_size``."""


@dataclass(frozen=True)
class Family:
    """Models whose files name their tensors alike."""

    title: str
    """Name for readers: ``ViT of transformers``."""
    signs: tuple[tuple[str, ...], ...]
    """Rows of ends of tensor names. A file of the family has tensors with all the ends of one row; a file
    without a configuration is recognised by them."""
    renaming: Callable[[Shapes], Renaming]
    """Function from the file's shapes to the table of names."""
    build: Callable[[Config, Shapes], Built] | None = None
    """Function from the configuration and the renamed shapes to timm's model."""
    guess: Callable[[Shapes, Shapes], Built | None] | None = None
    """Function from the shapes alone, renamed and as in the file, to timm's model; it returns None where they
    do not show it."""
    model_types: tuple[str, ...] = ()
    """Values of ``model_type`` in ``config.json``."""
    unlike: tuple[str, ...] = field(default=())
    """Ends of tensor names that no file of the family has."""
    named: str = ""
    """Beginning of the names in timm of its models, if other models of timm have the same names and
    shapes: the file is of the family only where the user names one."""
    cfg: Mapping[str, Any] = field(default_factory=dict)
    """Preprocessing of files that state none, as timm's pretrained_cfg has it."""
    stem: str = "patch_embed.proj.weight"
    """Name in timm of the weight whose second dimension counts the channels of images."""


def mlp_ratio(hidden: int, width: int) -> float:
    """Return the ratio from which timm, rounding down, gets exactly ``hidden`` channels.

    >>> mlp_ratio(3072, 768)
    4.0
    >>> int(1152 * mlp_ratio(4304, 1152))
    4304
    """
    ratio = hidden / width
    return ratio if int(width * ratio) == hidden else (hidden + 0.5) / width


def activation(config: Config, name: str = "hidden_act", default: str = "gelu") -> str:
    """Return timm's name of the activation that the configuration states.

    Raises:
        CheckpointError: it is none of :data:`ACTIVATIONS`.
    """
    stated = config.text(name, default)
    if stated not in ACTIVATIONS:
        raise config.fault(name, f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[stated]


def check_eps(config: Config, expected: float, default: float, name: str = "layer_norm_eps") -> None:
    """Raise a :class:`CheckpointError` unless the epsilon of norms is close to timm's.

    Args:
        config: the other library's configuration.
        expected: epsilon of timm's model.
        default: epsilon of the other library, if the configuration states none.
        name: key of the epsilon.
    """
    stated = config.number(name, default)
    if abs(stated - expected) > _EPS_TOLERANCE:
        raise CheckpointError(
            f"{config.where}: {name} {stated:g} cannot be converted: the norms of timm's model add "
            f"{expected:g}"
        )


def depth_of(shapes: Shapes, prefix: str = "blocks.") -> int:
    """Return the number of different indices behind ``prefix`` in the names.

    >>> depth_of({"blocks.0.norm.weight": (8,), "blocks.0.norm.bias": (8,), "blocks.1.norm.bias": (8,)})
    2
    """
    return len({name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)})
