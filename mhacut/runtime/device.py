"""Where and how torch computes: devices, defaults that callers may have changed, and torch.compile."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhacut._version import __version__
from mhacut.errors import MhacutError, UsageError, option_name

_MOST_COMPILED = 1000
"""Largest number of programs that torch.compile keeps of one class. Beyond it, models run eagerly."""


def resolve_device(name: str) -> torch.device:
    """Return the device of this name; ``auto`` is CUDA if there is a GPU, otherwise the CPU."""
    asked = option_name("device", name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"{asked} is not a device; use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise MhacutError(f"{asked}: this machine has {count or 'no usable'} CUDA GPUs; use auto or cpu")
    return device


def ordered_attention(device: torch.device) -> AbstractContextManager[None]:
    """Choose, on CUDA, the attention kernel whose backward pass sums in a fixed order; on a CPU all do."""
    if device.type != "cuda":
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes bfloat16 itself; those before Ampere emulate it, slowly."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def warn_of_slow_amp(device: torch.device, note: Callable[[str], None]) -> None:
    """Warn those who asked for ``--amp`` on a processor or GPU without bfloat16, which then emulates it."""
    # A training step of a small ViT took 13 times as long there as in float32. Of processors, torch says
    # only how wide their vectors are; none that stops at AVX2 has bfloat16.
    narrow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if narrow or (device.type == "cuda" and not has_bfloat16(device)):
        this = "processor" if narrow else "GPU"
        note(
            f"{option_name('amp', True)}: this {this} has no native bfloat16 and would be many times slower "
            "with it; leave it out"
        )


# -- torch's defaults --


@contextmanager
def default_torch() -> Iterator[None]:
    """Make tensors in float32 on the CPU by default, with gradients and without autocast.

    A block, or with ``@default_torch()`` a function, after which the caller's defaults are back.
    """
    with ExitStack() as stack:
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        # A tensor made in inference mode could never get gradients, wherever it is used later.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.empty(0).device.type != "cpu":  # torch.get_default_device has not always seen all contexts
            stack.enter_context(torch.device("cpu"))
        yield


def software_versions() -> dict[str, str]:
    """Return the versions that a file's history states: mhacut, Python, torch and timm."""
    import timm

    return {
        "mhacut": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }


# -- torch.compile --


@contextmanager
def many_compiled() -> Iterator[None]:
    """A block in which torch.compile keeps a program for each of many models or layers of one class."""
    import torch._dynamo as dynamo

    # After eight programs of one class it gives up without a word, and would time models uncompiled.
    config: Any = dynamo.config
    with config.patch(recompile_limit=_MOST_COMPILED, accumulated_recompile_limit=_MOST_COMPILED):
        yield


@contextmanager
def refusing_compile(option: str) -> Iterator[None]:
    """Context for compiled models. A failed compilation raises a :class:`MhacutError`."""
    try:
        yield
    except Exception as error:
        # Importing dynamo takes seconds, and without it nothing was compiled.
        known: Any = sys.modules.get("torch._dynamo.exc")
        if known is None or not isinstance(error, known.TorchDynamoException):
            raise
        reason = " ".join(str(error).split())
        raise MhacutError(
            f"{option}: torch.compile fails ({reason:.200}); on CPUs it needs a C++ compiler. Without the "
            "option, PyTorch runs the model eagerly"
        ) from error
