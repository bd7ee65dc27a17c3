"""``mhacut --version``."""

from __future__ import annotations

import platform
from importlib.metadata import version

from mhacut._version import __version__


def versions(*, everything: bool) -> list[str]:
    """Return the lines to print.

    Args:
        everything: also Python, the libraries that results depend on, and what ``--device auto`` would take;
            torch is imported for that.
    """
    lines = [f"mhacut {__version__}"]
    if not everything:
        return lines
    import torch

    from mhacut.runtime.device import resolve_device

    lines.append(f"python {platform.python_version()} on {platform.system()} {platform.machine()}")
    lines += [f"{package} {version(package)}" for package in ("torch", "timm", "safetensors")]
    device = resolve_device("auto")
    if device.type == "cuda":
        lines.append(f"device cuda, {torch.cuda.get_device_name()}, CUDA {torch.version.cuda}")
    else:
        lines.append(f"device cpu, {torch.get_num_threads()} thread(s)")
    return lines
