"""Untrusted JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mhacut.errors import CheckpointError
from mhacut.runtime.files import regular_size, show


def read_json(path: Path) -> dict[str, Any]:
    regular_size(path)  # to open a pipe would block
    try:
        text = path.read_text(encoding="utf-8-sig")  # editors on Windows write a byte order mark
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{show(path)}: cannot be read: {error}") from None
    return parse_json(text, show(path))


def parse_json(text: str, where: str) -> dict[str, Any]:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError also of integers of thousands of digits
        raise CheckpointError(f"{where}: not valid JSON ({error!s:.200})") from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{where}: expected an object, found {type(document).__name__}")
    return document


def plain_json(value: object) -> Any:
    """Return ``value`` as it looks after writing and reading JSON."""
    # There and back, so that what is compared with a file later is what the file will hold.
    try:
        return json.loads(json.dumps(value, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise CheckpointError(
            f"a value of the model's description cannot be stored: {error!s:.200}"
        ) from None
