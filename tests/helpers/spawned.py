"""What a spawned process runs: it imports this module alone, not the program."""

from __future__ import annotations

import signal


def print_held_signals(worker: int) -> None:
    held = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    print(*sorted(number.name for number in held), flush=True)
