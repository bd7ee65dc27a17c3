"""Layer times kept in a file per machine and conditions, so that they are measured once."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mhacut.errors import OutputError
from mhacut.measuring.layer_times import TimeTable
from mhacut.runtime.files import show, write_file

_FORMAT = 3


def kept_table(
    key: Mapping[str, Any],
    measure: Callable[[], TimeTable],
    log: Callable[[str], None],
    today: Callable[[TimeTable], TimeTable | None],
) -> TimeTable:
    """Return the table saved on this machine under ``key``; if there is none, measure it.

    A steady table is saved.

    Args:
        key: everything that times depend on.
        measure: measures the table.
        log: receives whether the file is used, and problems with it.
        today: returns a saved table with the current time of the dense model, or None to measure again
            because the target cannot be reached with the saved times.
    """
    digest = hashlib.sha256(json.dumps([_FORMAT, key], sort_keys=True).encode()).hexdigest()
    path = _folder() / f"{digest[:32]}.json"
    kept: TimeTable | None = None
    if os.path.exists(path):  # Path.exists raises where it may not look
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] == _FORMAT and document["key"] == json.loads(json.dumps(key)):
                kept = TimeTable.from_json(document["table"])
            else:
                log(f"{show(path)}: its content does not match its name; layer times are measured again")
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            log(f"{show(path)}: cannot be read ({error!s:.80}); layer times are measured again")
    found = None if kept is None else today(kept)
    if found is not None:
        log(f"{show(path)}: layer times of an earlier run are reused")
        return found
    if kept is not None:
        log(f"{show(path)}: with these times the target cannot be reached; layer times are measured again")
    table = measure()
    if not table.steady:
        log("layer times are not saved: this machine was busy while they were measured")
        return table
    text = json.dumps({"format": _FORMAT, "key": key, "table": table.to_json()}, indent=1, sort_keys=True)
    try:
        write_file(path, text.encode(), overwrite=True)
    except OutputError as error:
        log(f"layer times are not saved: {error}")
    return table


def _folder() -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(cache) / "mhacut" / "layer-times"
