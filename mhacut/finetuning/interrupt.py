"""Being asked to stop, by Ctrl-C or by a scheduler, without losing a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from mhacut.data.workers import STOP_SIGNALS


class StopRequest:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.asked = False
        self.answered = False
        """Whether it was told that this takes a while."""


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """In the block, the first SIGINT or SIGTERM only leaves a note; a second one acts as it would have.

    Outside the main thread, where Python delivers no signals, nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        request.asked = True
        restore()

    for number in STOP_SIGNALS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
