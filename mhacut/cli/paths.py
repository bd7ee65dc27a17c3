"""Check of all inputs in a command's options, before torch is imported: that takes seconds."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

from mhacut.options.option import Options, Reads
from mhacut.runtime.files import REMOTE, check_checkpoint, check_class_map, check_data_dir

_CHECKS: Mapping[Reads, Callable[[Any], None]] = {
    "checkpoint": check_checkpoint,
    "data_dir": check_data_dir,
    "class_map": check_class_map,
}


def check_paths(options: Options) -> None:
    """Raise an error, the one that the command itself would give, if a path cannot be read.

    Raises:
        CheckpointError, DataError: nothing there, or something else.
    """
    values = options.flat()
    for name, option in type(options).options().items():
        value = values[name]
        if value is not None and option.reads is not None:
            for path in value if option.element else (value,):
                if not os.fspath(path).startswith(REMOTE):
                    _CHECKS[option.reads](path)
