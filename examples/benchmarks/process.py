"""Processes that are measured, and the machine that they run on.

The standard library only: on Linux a child starts with its parent's peak memory.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

OUT_OF_REACH = 3
"""Exit code of a part whose method cannot cut that far; the reason is on stdout."""


@dataclass(frozen=True)
class Process:
    """What a finished process took."""

    wall_s: float
    cpu_s: float
    """User and system time."""
    peak_mib: float
    """Largest resident set."""
    stdout: str


class FailedError(Exception):
    """A process that failed."""


class TooFarError(Exception):
    """A budget out of the method's reach."""


class TooLongError(FailedError):
    """A process that was ended because its time was up."""


def run(command: Sequence[str], threads: int, limit_s: float | None = None) -> Process:
    """Run ``command`` to its end, on so many threads; or end it after ``limit_s``.

    Raises:
        FailedError: it failed; with the last lines it wrote to stderr.
        TooLongError: its time was up.
        TooFarError: it said that the budget is out of reach.
    """
    # GOMP_SPINCOUNT: idle OpenMP threads of two programs on one machine would take each other's cores.
    environment = {**os.environ, "GOMP_SPINCOUNT": "0"}
    environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        watch = threading.Timer(limit_s, process.kill) if limit_s is not None else None
        if watch is not None:
            watch.start()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - began
        if watch is not None:
            watch.cancel()
        if limit_s is not None and wall >= limit_s and process.returncode == -signal.SIGKILL:
            raise TooLongError(f"more than {limit_s:g} s")
        out.seek(0)
        err.seek(0)
        if process.returncode == OUT_OF_REACH:
            raise TooFarError(out.read().strip())
        if process.returncode != 0:
            last = "\n".join(err.read().strip().splitlines()[-5:])
            raise FailedError(f"exit code {process.returncode}: {last or 'no message'}")
        unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
        return Process(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit, out.read())


def commit() -> str:
    """Return the commit of this clone, with a plus if code that makes rows was changed since."""

    def git(*words: str) -> str:
        found = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True)
        return found.stdout.strip()

    changed = git("status", "--porcelain", "--", "../../mhacut", "methods")
    return git("rev-parse", "--short=8", "HEAD") + ("+" if changed else "")


def describe_machine(threads: int) -> dict[str, str]:
    versions = {}
    for name in ("torch", "timm", "torch-pruning", "mhacut"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores, {threads} thread(s) used",
        "python": platform.python_version(),
        **versions,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
