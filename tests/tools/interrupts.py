"""Interrupt ``mhacut --help`` soon after its start, and see how it ends.

    python tests/tools/interrupts.py --runs 20

Both as the script that pip makes and as ``python -m mhacut``. Prints a line of JSON for each delay: how many
runs ended quietly (exit code 130, or the signal itself, or finished), how many with a traceback in which
mhacut's own code stands, and how many with one of Python's start alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import mhacut

OURS = str(Path(mhacut.__file__).parent)


def main() -> None:
    """Try each delay with both commands."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--runs", type=int, default=20, help="runs of each delay")
    parser.add_argument("--ms", type=int, nargs="+", default=[5, 10, 20, 30, 50, 100, 200])
    arguments = parser.parse_args()
    script = shutil.which("mhacut", path=str(Path(sys.executable).parent))
    commands = {"python -m mhacut": [sys.executable, "-m", "mhacut"]}
    if script is not None:
        commands["mhacut"] = [script]
    for name, command in commands.items():
        for ms in arguments.ms:
            seen = Counter(ended(command, ms / 1000) for _ in range(arguments.runs))
            print(json.dumps({"command": name, "ms": ms, **dict(sorted(seen.items()))}), flush=True)


def ended(command: Sequence[str], seconds: float) -> str:
    """Interrupt the command after so many seconds; return how it ended."""
    process = subprocess.Popen(
        [*command, "prune", "--help"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate()
    if said:
        return "traceback of mhacut" if OURS in said else "traceback of Python's start"
    return "quiet" if process.returncode in (0, 130, -signal.SIGINT) else f"exit code {process.returncode}"


if __name__ == "__main__":
    main()
