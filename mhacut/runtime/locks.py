"""Locks on directories, which end with their process."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

if sys.platform != "win32":
    import fcntl

_held: set[int] = set()
"""Descriptors of :func:`lock_directory`."""
_PATIENCE, _AGAIN_AFTER = 0.3, 0.02
"""Seconds until an exclusive lock is given up, and between two attempts: others share one for a moment."""


def lock_directory(path: Path, *, shared: bool = False) -> int | None:
    """Lock a directory for this process; return the descriptor for :func:`unlock`.

    For a lock that is not shared, it waits a moment (:data:`_PATIENCE`) where another process has one.

    Processes that this one forks do not share the lock, so that it ends with this one.

    Args:
        path: of the directory.
        shared: other processes may hold a shared lock, too.

    Returns:
        None where there are no locks, and of a directory that this process may not list.

    Raises:
        BlockingIOError: another process has locked it.
        OSError: there is no such directory, or it cannot be opened.
    """
    if sys.platform == "win32":
        return None
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:
        return None  # a directory of mode 0300 may be written, but not opened
    try:
        _flock(descriptor, shared)
    except OSError as error:
        os.close(descriptor)
        if isinstance(error, BlockingIOError):
            raise
        return None
    _held.add(descriptor)
    return descriptor


def _flock(descriptor: int, shared: bool) -> None:
    assert sys.platform != "win32"
    until = time.monotonic() + (0 if shared else _PATIENCE)
    while True:
        try:
            fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(_AGAIN_AFTER)
        else:
            return


def unlock(descriptor: int | None) -> None:
    """Release what :func:`lock_directory` locked, if it did."""
    if descriptor is None:
        return
    assert sys.platform != "win32"
    _held.remove(descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_UN)  # a process that was just forked may not have closed its own yet
    os.close(descriptor)


def _forget_locks() -> None:
    while _held:
        os.close(_held.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_locks)
