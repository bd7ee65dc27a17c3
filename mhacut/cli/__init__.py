"""The command line: the only part of mhacut that prints or exits."""

from __future__ import annotations

import os
import sys
from typing import Any


def main() -> None:
    """Run the console script. Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted."""
    for name in ("stdout", "stderr"):
        stream: Any = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115  # None where it is closed
        stream.reconfigure(errors="backslashreplace")  # no name of a file fails to be printed
        setattr(sys, name, stream)
    # OpenMP reads it when torch is imported. Its idle threads would keep a core busy for 30 times as long,
    # which the thread that they wait for needs where another process runs.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from mhacut.cli.app import app

    app()
