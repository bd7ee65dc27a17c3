"""A terminal in place of stderr or stdout."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest


class Terminal(io.StringIO):
    encoding = "utf-8"

    def isatty(self):
        return True


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch, name: str = "stderr") -> Iterator[Terminal]:
    """A stream as a terminal; not a fixture, since pytest puts its own one back before the test runs."""
    stream = Terminal()
    with monkeypatch.context() as patch:
        patch.setattr(sys, name, stream)
        patch.setenv("TERM", "xterm")
        patch.delenv("NO_COLOR", raising=False)
        yield stream
