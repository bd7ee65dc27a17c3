"""Devices, torch's global defaults, and torch.compile."""

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

_MAX_COMPILED = 1000
"""Number of programs that torch.compile keeps per class. Beyond this number, models would run eagerly."""


def resolve_device(name: str) -> torch.device:
    """Return the device of this name. ``auto`` is CUDA if there is a GPU, and the CPU otherwise."""
    option = option_name("device", name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise UsageError(f"{option} is not a device; use auto, cpu, cuda or cuda:N")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise MhacutError(f"{option}: this machine has {count or 'no usable'} CUDA GPUs; use auto or cpu")
    return device


def ordered_attention(device: torch.device) -> AbstractContextManager[None]:
    """Return a context with an attention kernel whose backward pass is deterministic."""
    if device.type != "cuda":  # all kernels on CPUs are deterministic
        return nullcontext()
    return sdpa_kernel(SDPBackend.MATH)


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU has native bfloat16. GPUs before Ampere emulate bfloat16 slowly."""
    with torch.cuda.device(device):
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def warn_of_slow_amp(device: torch.device, note: Callable[[str], None]) -> None:
    """Warn about ``--amp`` on a processor or GPU without native bfloat16."""
    # With emulated bfloat16, a training step of a small ViT took 13 times as long as in float32. torch only
    # reports the vector width of CPUs: CPUs with no more than AVX2 have no bfloat16.
    narrow = device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX2"
    if narrow or (device.type == "cuda" and not has_bfloat16(device)):
        unit = "processor" if narrow else "GPU"
        option = option_name("amp", True)
        note(f"{option}: this {unit} has no native bfloat16 and emulates it slowly; leave {option} out")


# -- torch's defaults --


@contextmanager
def default_torch() -> Iterator[None]:
    """Set torch's defaults inside the block: float32, CPU, gradients recorded, no autocast."""
    with ExitStack() as stack:
        dtype = torch.get_default_dtype()
        if dtype != torch.float32:
            stack.callback(torch.set_default_dtype, dtype)
            torch.set_default_dtype(torch.float32)
        # A tensor made in inference mode could never get gradients later.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in ("cpu", "cuda"):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.empty(0).device.type != "cpu":  # torch.get_default_device misses some contexts
            stack.enter_context(torch.device("cpu"))
        yield


def software_versions() -> dict[str, str]:
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
    """Let torch.compile keep a program for each of many models or layers of one class."""
    import torch._dynamo as dynamo

    # By default, torch silently runs a class eagerly after 8 programs, and times would be wrong.
    config: Any = dynamo.config
    with config.patch(recompile_limit=_MAX_COMPILED, accumulated_recompile_limit=_MAX_COMPILED):
        yield


@contextmanager
def refusing_compile(option: str) -> Iterator[None]:
    """Raise a :class:`MhacutError` that names ``option`` if torch.compile fails inside the block."""
    try:
        yield
    except Exception as error:
        # Not imported here: importing dynamo takes seconds. If nobody did, nothing was compiled.
        known: Any = sys.modules.get("torch._dynamo.exc")
        if known is None or not isinstance(error, known.TorchDynamoException):
            raise
        reason = " ".join(str(error).split())
        raise MhacutError(
            f"{option}: torch.compile fails ({reason:.200}). On CPUs it needs a C++ compiler. Without the "
            "option, PyTorch runs the model eagerly"
        ) from error
