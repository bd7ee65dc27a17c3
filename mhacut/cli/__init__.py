"""The command line: the only part of mhacut that prints or exits."""

from __future__ import annotations


def main() -> None:
    """Run the console script. Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted."""
    from mhacut.cli.quitting import quit_when_interrupted

    quit_when_interrupted()
    from mhacut.cli.streams import guard_streams
    from mhacut.cli.threads import wait_briefly

    guard_streams()
    wait_briefly()  # OpenMP reads it when torch is imported
    from mhacut.cli.app import app  # imports for 0.2 s

    app()
