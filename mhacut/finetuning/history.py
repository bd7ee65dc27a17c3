"""Record of a fine-tuned file: that of the slim file it came from, with one more entry in its history."""

from __future__ import annotations

import dataclasses
from typing import Any

from mhacut.checkpoint.checkpoint import Checkpoint
from mhacut.checkpoint.provenance import Provenance
from mhacut.checkpoint.record import SlimRecord
from mhacut.data import Preprocessing
from mhacut.measuring.accuracy import Evaluation, accuracy_for_history
from mhacut.options.finetune import FinetuneOptions
from mhacut.runtime.device import software_versions

# A slim file is passed on: it does not reveal where files lie on the machine that made it.
_LOCAL_OPTIONS = frozenset(
    {"checkpoint", "output", "overwrite", "resume", "teacher", "data_dir", "class_map", "workers", "log"}
)


def portable(options: FinetuneOptions) -> dict[str, Any]:
    """Return ``options`` without those that depend on the machine."""
    return {key: value for key, value in options.flat().items() if key not in _LOCAL_OPTIONS}


def record_of(loaded: Checkpoint) -> SlimRecord:
    """Return the record of a slim file that was read."""
    assert loaded.record is not None
    return loaded.record


def record_after(
    loaded: Checkpoint,
    options: FinetuneOptions,
    preprocessing: Preprocessing,
    provenance: Provenance,
    accuracy: tuple[Evaluation | None, Evaluation | None],
    *,
    steps: int,
    images_per_step: int,
    teacher_sha256: str | None,
    data: str,
) -> SlimRecord:
    """Return the record of a model that was trained on.

    Args:
        loaded: the slim file it came from.
        options: options of the run.
        preprocessing: preprocessing of its images.
        provenance: origin of each value in ``preprocessing``.
        accuracy: accuracy of the slim file, and of the model now; None where it was not measured.
        steps: number of steps so far.
        images_per_step: number of images, over all processes.
        teacher_sha256: digest of the teacher's file; None without one.
        data: description of the training images.
    """
    earlier = record_of(loaded)
    entry = {
        "command": "finetune",
        "options": portable(options),
        "seed": options.training.seed,
        "steps": steps,
        "images_per_step": images_per_step,
        "source_sha256": loaded.sha256,
        "teacher_sha256": teacher_sha256,
        "data": data,
        **provenance.to_history(),
        **accuracy_for_history(*accuracy),
        "versions": software_versions(),
    }
    return dataclasses.replace(
        earlier, preprocessing=preprocessing.to_json(), history=(*earlier.history, entry)
    )
