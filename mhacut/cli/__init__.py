"""Command line. No other package of mhacut prints or exits."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the console script. Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted."""
    # None if the shell has closed the stream (`>&-`).
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    # OpenMP reads the variable when torch is imported. With the default, idle threads spin 30 times as long,
    # and take CPU time from the thread that they wait for.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from mhacut.cli.app import app

    app()
