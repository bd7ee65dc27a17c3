"""Calibration kept in a file: its tensors, a digest of them, and the conditions that it was made under."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mhacut._version import __version__
from mhacut.checkpoint.files import read_safetensors, safetensors_header
from mhacut.checkpoint.untrusted_json import parse_json
from mhacut.errors import CheckpointError, DataError, option_name
from mhacut.linalg.moments import Moments
from mhacut.options.base import PathLike
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.fisher import FisherInformation, Grid
from mhacut.pruning.job import Job
from mhacut.pruning.paper.statistics import UnitStatistics
from mhacut.pruning.preserve import Preserved
from mhacut.pruning.unit_moments import UnitMoments
from mhacut.runtime.distributed import Processes
from mhacut.runtime.files import reason_alone, write_file
from mhacut.runtime.tensor_files import save_tensors
from mhacut.surgery.tokens import tokens_of
from mhacut.text import safe

METADATA_KEY = "mhacut-calibration"
"""Key of the conditions in the ``__metadata__`` of the file."""
_TENSORS = "sha256 of tensors"


def calibrated(job: Job, file: PathLike | None, processes: Processes) -> Calibration:
    """Return the job's calibration: read from a file if it exists, otherwise computed and saved in that file.

    Args:
        job: job to calibrate.
        file: file to read or write; None to keep nothing.
        processes: processes that share the images.

    Raises:
        DataError: the file was made under other conditions, or is not a calibration.
    """
    if file is None:
        return job.calibrate(processes)
    path = Path(file)
    # All look before the first writes; where disks are not shared, it may not be there for all.
    everywhere = all(processes.gather(os.path.exists(path)))
    with processes.together():
        stored = read_calibration(path, job) if everywhere else None
    if stored is not None:
        preserved = job.preserved or Preserved.outputs_of(job.model)  # fitted anew: the file does not hold it
        fitted = preserved.fitted(job.model, job.images[stored.held :], job.options.batch_size, processes)
        thinned = fitted.thinned(job.model, job.images[:1].to(job.device), len(job.images))
        job.reporter.log(f"calibration read from {path}")
        return replace(stored, preserved=thinned)
    calibration = job.calibrate(processes)
    with processes.together():
        if processes.first and not os.path.exists(path):
            write_calibration(path, calibration, job)
            job.reporter.log(f"calibration saved in {path}")
    return calibration


def write_calibration(path: Path, calibration: Calibration, job: Job) -> None:
    """Write the calibration of ``job``, whole or not at all.

    Raises:
        OutputError: the file is there already, or cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in _named(calibration).items()}
    text = json.dumps({**conditions(job), _TENSORS: _digest(tensors)})
    write_file(
        path, lambda temporary: save_tensors(tensors, temporary, {METADATA_KEY: text}), overwrite=False
    )


def read_calibration(path: Path, job: Job) -> Calibration:
    """Read the calibration of ``job`` back, to the bit.

    Raises:
        DataError: it was made under other conditions (the message names what differs), or is not a
            calibration.
    """
    other = f"Name another file by {option_name('calibration')} to calibrate again, or remove this one"
    # Equal conditions give equal tensors, so a digest of them proves more than checks of each shape would.
    try:
        announced, metadata = safetensors_header(path)
        stated = parse_json(metadata[METADATA_KEY], METADATA_KEY)
        wanted = conditions(job)
        if differs := [name for name in wanted if stated.get(name) != wanted[name]]:
            raise DataError(f"{path}: was made under other conditions ({', '.join(differs)}). {other}")
        tensors = read_safetensors(path, announced)
        if stated[_TENSORS] != _digest(tensors):
            raise ValueError("its tensors are not those that were written")
        return _restored(tensors, job)
    except (CheckpointError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        why = f"no {error}" if isinstance(error, KeyError) else reason_alone(error, path)
        raise DataError(
            f"{path}: is not a calibration file written by mhacut: {safe(why):.200}. {other}"
        ) from error


def conditions(job: Job) -> dict[str, str]:
    """Return all that a calibration of ``job`` depends on, in words or as a digest, by name."""
    fisher = job.fisher_options
    preserved = job.preserved or Preserved.outputs_of(job.model)
    units = [(unit.layer, unit.kind, unit.heads, unit.width, unit.mixing) for unit in job.prunable.units()]
    text = f"{units} {tokens_of(job.model).to_json()} {job.model}"
    return {
        "version of mhacut": __version__,
        "model": _digest(job.model.state_dict(), text),
        "number of images": str(len(job.images)),
        "images": _digest({"": job.images}),
        "batch_size": str(job.options.batch_size),
        "Fisher information": f"{fisher.images} images, seed {fisher.seed}" if fisher.images else "none",
        "token_weights": "on" if fisher.images and fisher.token_importance else "off",
        "preserved outputs": json.dumps(preserved.to_json()),
    }


def _digest(tensors: Mapping[str, Tensor], text: str = "") -> str:
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _named(calibration: Calibration) -> dict[str, Tensor]:
    """Return all tensors and numbers, as tensors by name."""
    tensors = {"held": torch.tensor(calibration.held), "teacher": calibration.teacher}
    for key, moments in calibration.moments.items():
        unit, statistics = ".".join(key), calibration.statistics[key]
        for part, sides in (("fit", moments.fit), ("held", moments.held)):
            for number, side in enumerate(sides):
                tensors[f"{unit} {part} {number} rows"] = torch.tensor(side.rows)
                tensors[f"{unit} {part} {number} total"] = side.total
                tensors[f"{unit} {part} {number} second"] = side.second
        tensors[f"{unit} redundancy"], tensors[f"{unit} difference"] = (
            statistics.redundancy,
            statistics.difference,
        )
    for layer, matrix in calibration.fisher.matrices.items():
        tensors[f"{layer} Fisher"] = matrix
    for layer, grids in calibration.fisher.importance.items():
        for grid, values in grids.items():
            tensors[f"{layer} importance {'x'.join(map(str, grid))}"] = values
    return tensors


def _restored(tensors: Mapping[str, Tensor], job: Job) -> Calibration:
    def sides(unit: str, part: str) -> tuple[Moments, ...]:
        names = [f"{unit} {part} {number}" for number in (0, 1) if f"{unit} {part} {number} rows" in tensors]
        return tuple(
            Moments(
                int(tensors[f"{name} rows"]),
                tensors[f"{name} total"].to(job.device),
                tensors[f"{name} second"].to(job.device),
            )
            for name in names
        )

    keys = {unit.key: ".".join(unit.key) for unit in job.prunable.units()}
    moments = {key: UnitMoments(sides(unit, "fit"), sides(unit, "held")) for key, unit in keys.items()}
    statistics = {
        key: UnitStatistics(tensors[f"{unit} redundancy"], tensors[f"{unit} difference"])
        for key, unit in keys.items()
    }
    matrices: dict[str, Tensor] = {}
    importance: dict[str, dict[Grid, Tensor]] = {}
    for layer in (layer.name for layer in job.prunable.layers):
        if f"{layer} Fisher" in tensors:
            matrices[layer] = tensors[f"{layer} Fisher"].to(job.device)
    for name, tensor in tensors.items():
        layer, separator, grid = name.rpartition(" importance ")
        if separator:
            sizes = tuple(map(int, grid.split("x")))
            importance.setdefault(layer, {})[sizes] = tensor.to(job.device)
    fisher = FisherInformation(matrices, importance)
    return Calibration(int(tensors["held"]), moments, statistics, fisher, tensors["teacher"])
