"""Where and how torch computes: devices, defaults that callers may have changed, and torch.compile."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhacut._version import __version__
from mhacut.errors import MhacutError, UsageError, option_name

P = ParamSpec("P")
T = TypeVar("T")

_MOST_COMPILED = 1000
"""Largest number of programs that torch.compile keeps of one class. Beyond it, models run eagerly."""


def resolve_device(name: str) -> torch.device:
    """Return the device of this name; ``auto`` is CUDA if there is a GPU, otherwise the CPU.

    Raises:
        UsageError: not a device.
        MhacutError: CUDA was asked for but is not available.
    """
    asked = option_name("device", name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"{asked} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UsageError(f"{asked} is not supported; use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise MhacutError(f"{asked}: this machine has no usable CUDA GPU; use auto or cpu")
        if device.index is not None and device.index >= count:
            raise MhacutError(f"{asked}: this machine has {count} CUDA GPU(s), cuda:0 to cuda:{count - 1}")
    return device


def same_device(one: torch.device, other: torch.device) -> bool:
    """Whether both are the same device; ``cuda`` without a number is the current GPU, others are number 0."""

    def number(device: torch.device) -> int:
        current = device.type == "cuda" and device.index is None
        return torch.cuda.current_device() if current else device.index or 0

    return one.type == other.type and number(one) == number(other)


def ordered_attention(device: torch.device) -> AbstractContextManager[None]:
    """Choose, on CUDA, the attention kernel whose backward pass sums in a fixed order; on a CPU all do."""
    if device.type != "cuda":
        return nullcontext()
    kernel: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return kernel


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes bfloat16 itself; those before Ampere emulate it, slowly."""
    with torch.cuda.device(device):
        native: bool = torch.cuda.is_bf16_supported(including_emulation=False)
    return native


def warn_of_slow_amp(device: torch.device, note: Callable[[str], None]) -> None:
    """Warn those who asked for ``--amp`` on a processor or GPU without bfloat16, which then emulates it.

    A training step of a small ViT took 13 times as long there as in float32. Processors with AVX512 but
    without its bfloat16 instructions, and those other than x86, are not reported: torch does not say which
    they are.
    """
    capability = torch.backends.cpu.get_cpu_capability()
    slow = device.type == "cpu" and platform.machine() in ("x86_64", "AMD64") and "AVX512" not in capability
    if slow or (device.type == "cuda" and not has_bfloat16(device)):
        this = "GPU" if device.type == "cuda" else "processor"
        note(
            f"{option_name('amp', True)}: this {this} has no native bfloat16 and would be many times slower "
            "with it; leave it out"
        )


# -- torch's defaults --


def with_default_torch(function: Callable[P, T]) -> Callable[P, T]:
    """Run ``function`` under torch's default dtype, device and grad mode; restore the caller's."""

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        with default_torch():
            return function(*args, **kwargs)

    return run


@contextmanager
def default_torch() -> Iterator[None]:
    """Make tensors in float32 on the CPU by default, with gradients and without autocast."""
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
        # Dynamo wraps what the compiler raised, sometimes more than once.
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
