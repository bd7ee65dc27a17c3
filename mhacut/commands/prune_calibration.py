"""Calibration kept in a file, with the conditions that it was made under."""

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
from mhacut.checkpoint.torch_file import read_whole
from mhacut.errors import CheckpointError, DataError, option_name
from mhacut.linalg.moments import Moments
from mhacut.options.base import PathLike
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.fisher import FisherInformation
from mhacut.pruning.job import Job
from mhacut.pruning.paper.statistics import UnitStatistics
from mhacut.pruning.preserve import Preserved
from mhacut.pruning.unit_moments import UnitMoments
from mhacut.runtime.distributed import Processes
from mhacut.runtime.files import reason_alone, write_file
from mhacut.surgery.tokens import tokens_of
from mhacut.text import safe


def calibrated(job: Job, file: PathLike | None, processes: Processes) -> Calibration:
    """Return the job's calibration, read from its file or computed and saved there."""
    if file is None:
        return job.calibrate(processes)
    path = Path(file)
    # All look before the first writes; where disks are not shared, it may not be there for all.
    everywhere = all(processes.gather(os.path.exists(path)))
    with processes.fail_together():
        stored = read_calibration(path, job) if everywhere else None
    if stored is not None:
        preserved = job.preserved or Preserved.outputs_of(job.model)  # fitted anew: the file does not hold it
        fitted = preserved.fitted(job.model, job.images[stored.held :], job.options.batch_size, processes)
        thinned = fitted.thinned(job.model, job.images[:1].to(job.device), len(job.images))
        job.reporter.log(f"calibration read from {path}")
        return replace(stored, preserved=thinned)
    calibration = job.calibrate(processes)
    with processes.fail_together():
        if processes.first and not os.path.exists(path):
            write_calibration(path, calibration, job)
            job.reporter.log(f"calibration saved in {path}")
    return calibration


def write_calibration(path: Path, calibration: Calibration, job: Job) -> None:
    """Write the calibration of ``job``, whole or not at all."""
    content = {
        "conditions": conditions(job),
        "held": calibration.held,
        "moments": {
            key: [[tuple(vars(side).values()) for side in part] for part in (moments.fit, moments.held)]
            for key, moments in calibration.moments.items()
        },
        "statistics": {key: tuple(vars(each).values()) for key, each in calibration.statistics.items()},
        "fisher": dict(vars(calibration.fisher)),
        "teacher": calibration.teacher,
    }

    def write(temporary: Path) -> None:
        try:
            torch.save(content, temporary)
        except RuntimeError as error:  # the disk is full, for one
            raise OSError(str(error)) from error

    write_file(path, write, overwrite=False)


def read_calibration(path: Path, job: Job) -> Calibration:
    """Read the calibration of ``job`` back, to the bit."""
    other = f"Name another file by {option_name('calibration')} to calibrate again, or remove this one"
    try:
        stored, wanted = read_whole(path, str(job.device)), conditions(job)
        if differs := [name for name in wanted if stored["conditions"].get(name) != wanted[name]]:
            raise DataError(f"{path}: was made under other conditions ({', '.join(differs)}). {other}")
        # Equal conditions give tensors of the same shapes.
        moments = {
            key: UnitMoments(*(tuple(Moments(*side) for side in part) for part in both))
            for key, both in stored["moments"].items()
        }
        statistics = {
            key: UnitStatistics(*(part.cpu() for part in each)) for key, each in stored["statistics"].items()
        }
        fisher, teacher = FisherInformation(**stored["fisher"]), stored["teacher"].cpu()
        return Calibration(stored["held"], moments, statistics, fisher, teacher)
    except (CheckpointError, ValueError, KeyError, AttributeError, TypeError) as error:
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
