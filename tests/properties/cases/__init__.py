"""One or more small models for each attention and MLP class that is cut, by class and what is special.

A new class is one entry here; ``test_registry.py`` fails for a registered class without one.
"""

from __future__ import annotations

import pytest
from timm.layers.attention import Attention
from timm.models import convit, levit, maxxvit, metaformer, pvt_v2, swin_transformer
from torch import nn

from helpers.models import Case, ModelCase
from properties.cases import flatten, mlps, other_attention, pyramid_attention, vit_attention

BY_CLASS: dict[type[nn.Module], dict[str, Case]] = {
    **vit_attention.CASES,
    **pyramid_attention.CASES,
    **other_attention.CASES,
    **flatten.CASES,
    **mlps.CASES,
}

CASES: dict[str, Case] = {
    f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}" + (f", {note}" if note else ""): case
    for cls, cases in BY_CLASS.items()
    for note, case in cases.items()
}
"""The same by names such as ``levit.Attention, convolutions``."""

MODELS = {name: case for name, case in CASES.items() if isinstance(case, ModelCase)}
"""Those that are whole models."""

FIRST_MODEL: dict[type[nn.Module], ModelCase] = {
    cls: models[0]
    for cls, cases in BY_CLASS.items()
    if (models := [case for case in cases.values() if isinstance(case, ModelCase)])
}
"""The first model of each class that has one."""

UNLIKE_ATTENTION = {
    swin_transformer.WindowAttention,
    pvt_v2.Attention,
    levit.Attention,
    maxxvit.Attention2d,
    metaformer.Attention,
    convit.GPSA,
}
"""Classes of softmax attention that differ most from the ViT's: CI tries what takes seconds on these."""

VITS = {note or "plain": case for note, case in BY_CLASS[Attention].items() if note != "vitamin"}
"""Plain ViTs in all their variety; ``VITS["plain"]`` is the plainest."""

UNLIKE = {"plain", "pooling head", "no biases", "norms within", "normalised"}
"""One of each kind of them."""

VIT_PARAMS = [
    pytest.param(case, id=name, marks=() if name in UNLIKE else pytest.mark.slow)
    for name, case in VITS.items()
]
"""Parameters of a test of each of them, slow but for ``UNLIKE``."""
