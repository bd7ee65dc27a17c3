"""Each case of the table in turn."""

from __future__ import annotations

import pytest

from helpers.models import LayerCase, ModelCase
from properties.cases import BY_CLASS, CASES

REPEATED = {
    case
    for cases in BY_CLASS.values()
    if any(isinstance(case, LayerCase) for case in cases.values())
    for case in cases.values()
    if isinstance(case, ModelCase)
}
"""Whole models of classes that have a case of one layer."""


def marks(case):
    if case.fast:
        return ()
    return pytest.mark.exhaustive if case in REPEATED else pytest.mark.slow


@pytest.fixture(
    scope="session",
    params=[pytest.param(case, id=name, marks=marks(case)) for name, case in CASES.items()],
)
def case(request):
    return request.param
