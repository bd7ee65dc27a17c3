"""Versions of the software that makes a file."""

from __future__ import annotations

import platform

import torch

from mhacut._version import __version__


def software_versions() -> dict[str, str]:
    """Return the versions that a file's history states: mhacut, Python, torch and timm."""
    import timm

    return {
        "mhacut": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
    }
