"""Threads for tests."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import wraps

import torch


def on_a_short_stack(test):
    """Run ``test`` in a thread of its own.

    torch notes the whole Python stack with each operator that it traces, most of it pytest's: without that,
    counting FLOPs takes a third less time.
    """

    @wraps(test)
    def run(*args, **kwargs):
        with ThreadPoolExecutor(
            1, initializer=torch.set_num_threads, initargs=(torch.get_num_threads(),)
        ) as one:
            return one.submit(test, *args, **kwargs).result()

    return run
