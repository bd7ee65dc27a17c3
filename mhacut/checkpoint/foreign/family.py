"""One family of another library's models: how to recognise it, rename its tensors and build it in timm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from mhacut.checkpoint.foreign.config import Config
from mhacut.checkpoint.foreign.rename import Renaming
from mhacut.errors import CheckpointError

Shapes = Mapping[str, tuple[int, ...]]

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
"""Largest difference of a norm's epsilon that is not refused; at 1e-12 for 1e-6 logits agree within 1e-5."""


@dataclass(frozen=True)
class Built:
    """Which timm model it becomes."""

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
    """Models of one layout."""

    title: str
    """Name for readers: ``ViT of transformers``."""
    signs: tuple[tuple[str, ...], ...]
    """Ends of tensor names; every file of it has all of one row. A bare file is recognised by them."""
    renaming: Callable[[Shapes], Renaming]
    """Function from the file's shapes to the table of names."""
    build: Callable[[Config, Shapes], Built] | None = None
    """Function from the configuration and the renamed shapes to timm's model."""
    guess: Callable[[Shapes, Shapes], Built | None] | None = None
    """The same by shapes alone, renamed and as in the file; None where they do not show it."""
    model_types: tuple[str, ...] = ()
    """Values of ``model_type`` in ``config.json``."""
    unlike: tuple[str, ...] = field(default=())
    """Ends of tensor names that no file of it has."""
    cfg: Mapping[str, Any] = field(default_factory=dict)
    """Preprocessing of all of its files, as timm's pretrained_cfg has it, where none is stated."""
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
    """Return timm's name of the activation that the configuration states."""
    stated = config.text(name, default)
    if stated not in ACTIVATIONS:
        raise config.fault(name, f"one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[stated]


def check_eps(config: Config, expected: float, default: float, name: str = "layer_norm_eps") -> None:
    """Refuse an epsilon of norms that is not about timm's."""
    stated = config.number(name, default)
    if abs(stated - expected) > _EPS_TOLERANCE:
        raise CheckpointError(
            f"{config.where}: {name} {stated:g} cannot be converted: the norms of timm's model add "
            f"{expected:g}"
        )


def depth_of(shapes: Shapes, prefix: str = "blocks.") -> int:
    """Return the number of different numbers that follow ``prefix`` in the names."""
    return len({name[len(prefix) :].partition(".")[0] for name in shapes if name.startswith(prefix)})
