"""The command line: the only part of mhacut that prints or exits."""

from __future__ import annotations

import os
import sys


def main() -> None:
    """Run the console script. Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted."""
    # None where a shell has closed it (`>&-`); what is printed is lost then.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    # OpenMP reads it when torch is imported. Its idle threads would keep a core busy for 30 times as long,
    # which the thread that they wait for needs where another process runs.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    from mhacut.cli.app import app

    app()
