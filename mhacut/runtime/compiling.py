"""torch.compile: its limits and its failures."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from mhacut.errors import MhacutError

_MOST_COMPILED = 1000
"""Largest number of programs that torch.compile keeps of one class. Beyond it, models run eagerly."""


@contextmanager
def many_compiled() -> Iterator[None]:
    """A block in which torch.compile keeps a program for each of many models or layers of one class."""
    import torch._dynamo as dynamo

    config: Any = dynamo.config
    limits = {
        name: _MOST_COMPILED
        for name in ("recompile_limit", "cache_size_limit", "accumulated_recompile_limit")
        if hasattr(config, name)
    }
    with config.patch(**limits):
        yield


@contextmanager
def refusing_compile(option: str) -> Iterator[None]:
    """A block in which compiled models run: where they cannot be compiled, a :class:`MhacutError` is raised.

    Args:
        option: option that asked for torch.compile, for the message.
    """
    try:
        yield
    except Exception as error:
        # Importing dynamo takes seconds, and without it nothing was compiled.
        known: Any = sys.modules.get("torch._dynamo.exc")
        if known is None or not isinstance(error, known.TorchDynamoException):
            raise
        cause: BaseException = error
        while (inner := getattr(cause, "inner_exception", None) or cause.__cause__) is not None:
            cause = inner
        if isinstance(cause, (MhacutError, MemoryError, torch.OutOfMemoryError)):
            raise cause from None
        reason = " ".join(f"{type(cause).__name__}: {cause}".split())
        raise MhacutError(
            f"{option}: torch.compile fails ({reason:.200}); on CPUs it needs a C++ compiler. Without the "
            "option, PyTorch runs the model eagerly"
        ) from error
