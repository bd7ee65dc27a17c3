"""The scripts as modules, and what they run in forks that need not import torch anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from helpers.benchmarks import BENCHMARKS, script
from helpers.programs import MAIN

PART = """
import json, sys
sys.path.insert(0, sys.argv.pop(1))
import compare_parts
compare_parts.LATENCY_SECONDS = 0.1
sys.exit(compare_parts.PARTS[sys.argv[1]](json.load(open(sys.argv[2]))))
"""
"""A part of ``compare_parts.py``, by its folder, the name of the part and its job."""


@pytest.fixture(scope="session")
def compare():
    return script("compare")


@pytest.fixture(scope="session")
def compare_table():
    import compare_table

    return compare_table


@pytest.fixture(scope="session")
def scores():
    import scores

    return scores


@pytest.fixture
def forked(programs, monkeypatch) -> Callable[[Any], None]:
    """Let a module ``compare`` run its parts, and ``mhacut``, in forks."""

    def run(command, threads, limit_s=None):
        from process import Process

        _, first, second, *rest = command
        program = (MAIN, *rest) if first == "-m" else (PART, BENCHMARKS, second, *rest)
        ended = programs.run(*program)
        assert ended.returncode == 0, ended.stderr
        return Process(wall_s=1.0, cpu_s=1.0, peak_mib=1.0, stdout=ended.stdout)

    return lambda module: monkeypatch.setattr(module, "run", run)


@pytest.fixture(scope="session")
def methods():
    import methods.common

    return methods
