"""Waiting of PyTorch's threads for each other; nothing here may import torch."""

from __future__ import annotations

import os

_SPINS = "10000"
"""Rounds for which an idle thread looks for work before it sleeps; libgomp's own number is 30 times that."""


def wait_briefly() -> None:
    """Let idle threads of OpenMP sleep soon, unless the environment says how they are to wait.

    By default they keep a core busy, which the thread that they wait for needs where another process runs.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", _SPINS)
