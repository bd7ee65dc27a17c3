"""Being asked to stop, by Ctrl-C or by a scheduler, without losing a step."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def outlive_first_signal(worker: int) -> None:
    """Make a process that reads images outlive the signals that its group is sent.

    A terminal's Ctrl-C, and many a scheduler, reach it as well as the process it reads for, which still needs
    the step's images. torch ends it when it is needed no longer, with a second SIGTERM if need be.

    Args:
        worker: its number, as a ``DataLoader`` says.
    """

    def outlived(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for number in _SIGNALS:
        signal.signal(number, outlived)


class StopRequest:
    """Whether somebody asked to stop."""

    def __init__(self) -> None:
        self.asked = False


@contextmanager
def stop_request() -> Iterator[StopRequest]:
    """In the block, the first SIGINT or SIGTERM only leaves a note; a second one acts as it would have.

    Outside the main thread, where Python delivers no signals, nothing changes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in _SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        request.asked = True
        restore()

    for number in _SIGNALS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        restore()
