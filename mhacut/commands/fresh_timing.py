"""Time a cut model beside the dense one in a new process, as its user will run it.

How a process's memory allocator serves large activations depends on what the process did before: the ratio of
a cut DeiT-S at batch size 8 was .479 in the process that pruned it and .509 to .514 in four new ones. In ONNX
Runtime, which keeps its memory, both agree.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mhacut.checkpoint.load import load_model
from mhacut.checkpoint.record import SlimRecord
from mhacut.checkpoint.write import save_slim
from mhacut.commands.stopwatch import Stopwatch
from mhacut.errors import MhacutError
from mhacut.measuring.latency import Comparison
from mhacut.options.base import TimingOptions
from mhacut.runtime.files import temporary_folder
from mhacut.runtime.process import in_new_process
from mhacut.runtime.progress import Silent


def compare_afresh(
    stopwatch: Stopwatch,
    records: Mapping[str, SlimRecord],
    slim: nn.Module,
    *,
    seconds: float,
    precision: float,
) -> Comparison | None:
    """Time ``slim`` in turns with the stopwatch's dense model, in a new process.

    Args:
        stopwatch: of the command; its device is the CPU.
        records: of the model that is ``dense``, and of the one that is ``slim``, to open them by.
        slim: the cut model.
        seconds: of measuring, for both together.
        precision: relative standard error of the ratio until which it goes on, up to five times as long.

    Returns:
        None if there is no room for the files, or no such process ends with a result: it knows no models
        that this one has registered.
    """
    try:
        with temporary_folder(Path(tempfile.gettempdir(), "mhacut-times")) as folder:
            files = {name: folder / f"{name}.safetensors" for name in records}
            for name, model in (("dense", stopwatch.dense), ("slim", slim)):
                save_slim(files[name], model, records[name], {})
            found = in_new_process(__name__, "write_comparison", _job(stopwatch, files, seconds, precision))
    except (MhacutError, OSError):
        return None
    return None if found is None else Comparison(**found)


def _job(stopwatch: Stopwatch, files: Mapping[str, Path], seconds: float, precision: float) -> dict[str, Any]:
    threads = stopwatch.timing.threads or torch.get_num_threads()
    return {
        "files": {name: str(file) for name, file in files.items()},
        "timing": {**stopwatch.timing.flat(), "threads": threads},
        "matmul_precision": torch.get_float32_matmul_precision(),
        "size": stopwatch.size,
        "seconds": seconds,
        "precision": precision,
    }


def write_comparison() -> None:
    """Time what stdin names, and write the comparison to stdout; called in a process of its own."""
    job = json.load(sys.stdin)
    torch.set_float32_matmul_precision(job["matmul_precision"])
    dense, slim = (load_model(job["files"][name]) for name in ("dense", "slim"))
    timing = TimingOptions.from_flat(**job["timing"])
    stopwatch = Stopwatch(timing, dense, tuple(job["size"]), torch.device("cpu"), Silent())
    found = stopwatch.beside([slim], seconds=job["seconds"], precision=job["precision"])
    sys.stdout.write(json.dumps(asdict(found)) + "\n")
