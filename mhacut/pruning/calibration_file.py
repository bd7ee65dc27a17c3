"""Calibration kept in a file: tensors as safetensors, the rest as JSON beside them, with a fingerprint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mhacut._version import __version__
from mhacut.errors import DataError, option_name
from mhacut.linalg.moments import Moments
from mhacut.plan import UnitKey
from mhacut.pruning.calibrate import Calibration
from mhacut.pruning.fisher import FisherInformation
from mhacut.pruning.job import Job
from mhacut.pruning.preserve import Preserved
from mhacut.pruning.unit_sums import UnitMoments, UnitStatistics
from mhacut.runtime.distributed import Processes
from mhacut.runtime.files import write_whole
from mhacut.runtime.tensor_file import save_tensors
from mhacut.surgery.tokens import tokens_of

METADATA_KEY = "mhacut-calibration"
"""Key of the document in the ``__metadata__`` of the file."""

Fingerprint = Mapping[str, str]
"""Conditions that a calibration depends on, in words or as a digest, by name."""


def calibrated(job: Job, path: Path | None, processes: Processes) -> Calibration:
    """Return the job's calibration: read from a file if it exists, otherwise computed and saved in that file.

    Args:
        job: what is pruned.
        path: the file; None to gather.
        processes: those that share the images.

    Raises:
        DataError: the file was made with another model, other images or other options, or is not a
        calibration.
    """
    if path is None:
        return job.calibrate(processes)
    fingerprint = fingerprint_of(job)
    # All look before the first writes; where disks are not shared, it may not be there for all.
    everywhere = processes.union([str(os.path.exists(path))]) == ["True"]
    with processes.together():
        found = read_calibration(path, fingerprint, job.device) if everywhere else None
    if found is not None:
        job.reporter.log(f"calibration read from {path}")
        return replace(found, preserved=_preserved(job, found.held, processes))
    calibration = job.calibrate(processes)
    with processes.together():
        if processes.first and not os.path.exists(path):
            write_calibration(path, calibration, fingerprint)
            job.reporter.log(f"calibration saved in {path}")
    return calibration


def _preserved(job: Job, held: int, processes: Processes) -> Preserved:
    """Return the preserved outputs as the calibration fitted them; the file does not hold them."""
    preserved = job.preserved or Preserved.outputs_of(job.model)
    fitted = preserved.fitted(job.model, job.images[held:], job.options.batch_size, processes)
    return fitted.thinned(job.model, job.images[:1].to(job.device), len(job.images))


def fingerprint_of(job: Job) -> Fingerprint:
    """Return the fingerprint of all that a calibration of ``job`` depends on."""
    fisher = job.fisher_options
    differentiated = f"{fisher.images} images, seed {fisher.seed}" if fisher.images else "none"
    weights = "on" if fisher.images and fisher.token_importance else "off"
    preserved = job.preserved or Preserved.outputs_of(job.model)
    units = [(unit.layer, unit.kind, unit.heads, unit.width, unit.mixing) for unit in job.prunable.units()]
    text = f"{units} {tokens_of(job.model).to_json()} {job.model}"
    return {
        "version of mhacut": __version__,
        "model": _digest(
            {"": torch.tensor(list(text.encode()), dtype=torch.uint8), **job.model.state_dict()}
        ),
        "number of images": str(len(job.images)),
        "images": _digest({"": job.images}),
        "batch_size": str(job.options.batch_size),
        "Fisher information": differentiated,
        "token_weights": weights,
        "preserved outputs": json.dumps(preserved.to_json()),
    }


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def write_calibration(path: Path, calibration: Calibration, fingerprint: Fingerprint) -> None:
    """Write a calibration, whole or not at all.

    Raises:
        OutputError: the file is there already, or cannot be written.
    """
    tensors, document = _flat(calibration)
    text = json.dumps({"fingerprint": dict(fingerprint), **document})
    metadata = {METADATA_KEY: text}
    write_whole(path, lambda temporary: save_tensors(tensors, temporary, metadata), overwrite=False)


def read_calibration(path: Path, fingerprint: Fingerprint, device: torch.device) -> Calibration:
    """Read a calibration back, to the bit.

    Args:
        path: what :func:`write_calibration` wrote.
        fingerprint: that the file must have.
        device: to put the moments on.

    Raises:
        DataError: it is stale (the message names what differs), or not a calibration.
    """
    try:
        with safe_open(path, "pt") as file:
            document = json.loads((file.metadata() or {})[METADATA_KEY])
            stored = document["fingerprint"]
            differs = [name for name in fingerprint if stored.get(name) != fingerprint[name]]
            if differs:
                raise DataError(_stale(path, stored, fingerprint, differs))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return _restored(tensors, document, device)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path}: is not a calibration file written by mhacut: {error!r:.100}") from error


def _stale(path: Path, stored: Mapping[str, str], wanted: Fingerprint, differs: list[str]) -> str:
    lines = [
        f"another {name}"
        if len(wanted[name]) == 64  # digests say nothing to readers
        else f"{name}: {stored.get(name, 'not stated')!s:.60}, now {wanted[name]}"
        for name in differs
    ]
    return (
        f"{path}: was made under other conditions: {'; '.join(lines)}. Name another file by "
        f"{option_name('calibration')} to calibrate again, or remove this one"
    )


def _flat(calibration: Calibration) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return all tensors by name, and what puts them together again."""
    tensors: dict[str, Tensor] = {"teacher": calibration.teacher}
    units: list[dict[str, Any]] = []
    for number, (key, moments) in enumerate(calibration.moments.items()):
        entry: dict[str, Any] = {"layer": key[0], "kind": key[1]}
        for part, sides in (("fit", moments.fit), ("held", moments.held)):
            entry[part] = [side.rows for side in sides]
            for place, side in enumerate(sides):
                tensors[f"unit{number}.{part}{place}.total"] = side.total
                tensors[f"unit{number}.{part}{place}.second"] = side.second
        statistics = calibration.statistics[key]
        tensors[f"unit{number}.redundancy"] = statistics.redundancy
        tensors[f"unit{number}.difference"] = statistics.difference
        units.append(entry)
    layers = list(calibration.fisher.matrices)
    tensors |= {f"fisher{number}": calibration.fisher.matrices[layer] for number, layer in enumerate(layers)}
    grids: list[dict[str, Any]] = []
    for layer, importance in calibration.fisher.importance.items():
        for grid, values in importance.items():
            tensors[f"importance{len(grids)}"] = values
            grids.append({"layer": layer, "grid": list(grid)})
    bare = [layer for layer, importance in calibration.fisher.importance.items() if not importance]
    own, seen = dict[str, Tensor](), set[int]()
    for name, tensor in tensors.items():
        alone = tensor.detach().cpu().contiguous()
        place = alone.untyped_storage().data_ptr()
        # The file may share no memory, as moments of few images do; moments of large models are not copied.
        own[name] = alone.clone() if place in seen else alone
        seen.add(place)
    return own, {"held": calibration.held, "units": units, "fisher": layers, "grids": grids, "bare": bare}


def _restored(
    tensors: Mapping[str, Tensor], document: Mapping[str, Any], device: torch.device
) -> Calibration:
    moments: dict[UnitKey, UnitMoments] = {}
    statistics: dict[UnitKey, UnitStatistics] = {}
    for number, entry in enumerate(document["units"]):
        key: UnitKey = (str(entry["layer"]), entry["kind"])

        def part(name: str, rows: list[int], number: int = number) -> tuple[Moments, ...]:
            return tuple(
                Moments(
                    int(count),
                    tensors[f"unit{number}.{name}{place}.total"].to(device),
                    tensors[f"unit{number}.{name}{place}.second"].to(device),
                )
                for place, count in enumerate(rows)
            )

        moments[key] = UnitMoments(part("fit", entry["fit"]), part("held", entry["held"]))
        statistics[key] = UnitStatistics(
            tensors[f"unit{number}.redundancy"], tensors[f"unit{number}.difference"]
        )
    matrices = {
        layer: tensors[f"fisher{number}"].to(device) for number, layer in enumerate(document["fisher"])
    }
    importance: dict[str, dict[tuple[int, ...], Tensor]] = {layer: {} for layer in document["bare"]}
    for number, entry in enumerate(document["grids"]):
        grid = tuple(map(int, entry["grid"]))
        importance.setdefault(entry["layer"], {})[grid] = tensors[f"importance{number}"].to(device)
    fisher = FisherInformation(matrices, importance)
    return Calibration(int(document["held"]), moments, statistics, fisher, tensors["teacher"])
