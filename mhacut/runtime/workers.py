"""Number of processes that load images."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

DEFAULT_WORKERS = 2
_warned: set[int] = set()
"""Numbers of processes that torch has warned of."""


def cpu_count() -> int:
    """Return the number of CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def worker_count(asked: int | None) -> int:
    """Return ``asked``; if that is None, :data:`DEFAULT_WORKERS`, or the number of CPUs if that is less."""
    return min(DEFAULT_WORKERS, cpu_count()) if asked is None else asked


@contextmanager
def warned_once(workers: int) -> Iterator[None]:
    """Let torch warn only once that ``workers`` are more than there are CPUs.

    torch does so whenever a ``DataLoader`` is made, and again whenever it is read.
    """
    if workers <= cpu_count():
        yield
        return
    with warnings.catch_warnings():
        if workers in _warned:
            warnings.filterwarnings("ignore", "This DataLoader will create")
        _warned.add(workers)
        yield
