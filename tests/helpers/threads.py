"""Threads for tests that trace: torch notes the whole Python stack with every operator, most of it pytest's.

Without that, counting FLOPs takes a third less time.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps
from typing import Any

import torch


def on_a_short_stack(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def run(*args, **kwargs):
        def in_thread():
            torch.set_num_threads(threads)
            with torch.set_grad_enabled(grad):
                return function(*args, **kwargs)

        threads, grad = torch.get_num_threads(), torch.is_grad_enabled()
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(in_thread).result()

    return run


def unless_in_a_mode(function: Callable[..., Any], other: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, or ``other`` under modes of torch, which a thread would not inherit."""

    @wraps(function)
    def run(*args, **kwargs):
        modes = torch._C._len_torch_dispatch_stack() + torch._C._len_torch_function_stack()
        either = other if modes or torch.is_inference_mode_enabled() else function
        return either(*args, **kwargs)

    return run
