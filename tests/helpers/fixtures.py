"""Fixtures that tests of the examples use too."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.programs import Programs
from helpers.threads import on_a_short_stack, unless_in_a_mode


@pytest.fixture(scope="session", autouse=True)
def short_stacks() -> None:
    """Let fvcore trace models in threads."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from fvcore.nn import jit_analysis
    trace = jit_analysis._get_scoped_trace_graph
    jit_analysis._get_scoped_trace_graph = unless_in_a_mode(on_a_short_stack(trace), trace)


@pytest.fixture(scope="session", autouse=True)
def brief_times() -> Iterator[None]:
    """Let ``prune`` and the quantizer time models for a moment: no test here depends on how steady it is."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mhacut.commands.prune.TIMING_SECONDS", 0.1)
        patch.setattr("mhacut.exporting.quantize._SECONDS", 0.1)
        yield


@pytest.fixture(scope="session")
def few_digits(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("digits")
    for folder in sorted((Path(__file__).parents[2] / "examples" / "digits" / "images").glob("*/*")):
        (root / folder.parent.name / folder.name).mkdir(parents=True)
        for image in sorted(folder.glob("*.png"))[:3]:
            shutil.copy(image, root / folder.parent.name / folder.name)
    return root


@pytest.fixture(scope="session")
def programs() -> Iterator[Programs]:
    """Processes of their own for scripts, none of which imports torch anew."""
    server = Programs()
    yield server
    server.close()
