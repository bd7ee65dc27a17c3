"""Every class that is cut has a case, and every case is of the class under which it stands."""

from __future__ import annotations

import pytest
from timm.models.mvitv2 import MultiScaleAttentionPoolFirst

from helpers.models import build
from mhacut.adapters.registry import ADAPTERS
from properties.cases import BY_CLASS

NOT_RUNNING = {MultiScaleAttentionPoolFirst}
"""Left whole, and timm's own forward fails: it multiplies queries of a head with keys of another."""


def registered_classes() -> set[type]:
    """Classes with an adapter, without those of slim layers, which cuts of the others make."""
    found = {cls for adapter in ADAPTERS for cls in adapter.module_classes}
    return {cls for cls in found - NOT_RUNNING if not cls.__name__.startswith("Slim")}


def test_every_registered_class_has_a_case():
    assert registered_classes() == BY_CLASS.keys()


@pytest.mark.parametrize("cls", BY_CLASS, ids=lambda cls: f"{cls.__module__}.{cls.__name__}")
def test_cases_are_of_their_class(cls):
    for case in BY_CLASS[cls].values():
        assert any(type(module) is cls for module in build(case).modules())
