"""Each case of the table in turn."""

from __future__ import annotations

import pytest

from properties.cases import CASES


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(case, id=name, marks=() if case.fast else pytest.mark.slow)
        for name, case in CASES.items()
    ],
)
def case(request):
    return request.param
