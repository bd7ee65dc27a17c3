"""Defaults of torch that callers may have changed, set back while mhacut works."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def in_usual_torch(function: Callable[P, T]) -> Callable[P, T]:
    """Let ``function`` compute as the command line does, whatever its caller has set."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with usual_torch():
            return function(*args, **kwargs)

    return run


@contextmanager
def usual_torch() -> Iterator[None]:
    """Make tensors in float32 on the CPU by default, with gradients and without autocast."""
    with ExitStack() as stack:
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.empty(0).device.type != "cpu":  # torch.get_default_device has not always seen all contexts
            stack.enter_context(torch.device("cpu"))
        yield
