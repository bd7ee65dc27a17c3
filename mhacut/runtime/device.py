"""Devices, and what they do slowly."""

from __future__ import annotations

import platform
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from mhacut.errors import MhacutError, UsageError, option_name


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


def repeatable(device: torch.device) -> AbstractContextManager[None]:
    """Choose, on CUDA, the attention kernel whose backward pass sums in a fixed order; on a CPU all do."""
    if device.type != "cuda":
        return nullcontext()
    kernel: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return kernel


def has_bfloat16(device: torch.device) -> bool:
    """Whether a GPU computes bfloat16 itself; those before Ampere emulate it, slowly."""
    with torch.cuda.device(device):
        found: bool = torch.cuda.is_bf16_supported(including_emulation=False)
    return found


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
