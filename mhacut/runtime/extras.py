"""Check that optional packages are installed, before the work that needs them."""

from __future__ import annotations

import importlib.util

from mhacut.errors import MhacutError


def need(flag: str, module: str, extra: str) -> None:
    """Raise a :class:`MhacutError` that says what to install unless ``module`` is there.

    Args:
        flag: what needs it, as on the command line.
        module: its name in Python; nothing of it is imported.
        extra: extra of mhacut that installs it.
    """
    if importlib.util.find_spec(module) is None:
        raise MhacutError(f"{flag}: needs the package {module}; pip install 'mhacut[{extra}]'")
