"""The scripts as modules."""

from __future__ import annotations

import pytest

from helpers.benchmarks import script


@pytest.fixture(scope="session")
def compare():
    return script("compare")


@pytest.fixture(scope="session")
def methods():
    import methods.common

    return methods
