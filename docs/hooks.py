"""Hooks of mkdocs."""

from __future__ import annotations

import re
from typing import Any

_ROLE = re.compile(r":(?:func|class|meth|mod|data|attr):(?=<code>)")


def on_page_content(html: str, **_: Any) -> str:
    """Leave out the roles of docstrings, :func:`name`, which mkdocstrings shows as text."""
    return _ROLE.sub("", html)
