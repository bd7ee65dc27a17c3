"""Calibration kept in a file: tensors as safetensors, the rest as JSON beside them, with a fingerprint."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mhacut._version import __version__
from mhacut.adapters.base import Layer, Unit
from mhacut.checkpoint.files import read_safetensors, safetensors_header
from mhacut.checkpoint.untrusted_json import kind_of, parse_json
from mhacut.errors import CheckpointError, DataError, option_name
from mhacut.linalg.moments import Moments
from mhacut.plan import UnitKey
from mhacut.pruning.calibrate import Calibration, held_out_count
from mhacut.pruning.fisher import FisherInformation
from mhacut.pruning.job import Job
from mhacut.pruning.paper.statistics import UnitStatistics
from mhacut.pruning.preserve import Preserved
from mhacut.pruning.unit_moments import UnitMoments
from mhacut.runtime.distributed import Processes
from mhacut.runtime.files import reason_alone, regular_size, write_file
from mhacut.runtime.tensor_files import save_tensors
from mhacut.surgery.hooks import registered
from mhacut.surgery.tokens import tokens_of
from mhacut.text import dtype_name, safe

METADATA_KEY = "mhacut-calibration"
"""Key of the document in the ``__metadata__`` of the file."""

Fingerprint = Mapping[str, str]
"""Conditions that a calibration depends on, in words or as a digest, by name."""

_COUNT, _FISHER = "number of images", "Fisher information"
"""Conditions that depend on how many images there are."""


class _Unfit(Exception):
    """A value that calibrating this job would not have given."""


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
        found = read_calibration(path, fingerprint, job) if everywhere else None
    if found is not None:
        found = replace(found, preserved=_preserved(job, found.held, processes))
        with processes.together():
            check_run(path, found, job)
        job.reporter.log(f"calibration read from {path}")
        return found
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
        _COUNT: str(len(job.images)),
        "images": _digest({"": job.images}),
        "batch_size": str(job.options.batch_size),
        _FISHER: differentiated,
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
    write_file(path, lambda temporary: save_tensors(tensors, temporary, metadata), overwrite=False)


def read_calibration(path: Path, fingerprint: Fingerprint, job: Job) -> Calibration:
    """Read a calibration back, to the bit.

    Args:
        path: what :func:`write_calibration` wrote.
        fingerprint: that the file must have.
        job: what is pruned; the moments are put on its device.

    Raises:
        DataError: it is stale (the message names what differs), or not a calibration.
    """
    try:
        announced, metadata = safetensors_header(path, regular_size(path))
        document = _document(metadata.get(METADATA_KEY))
        stored = document["fingerprint"]
        differs = [name for name in fingerprint if stored.get(name) != fingerprint[name]]
        if differs:
            raise DataError(_stale(path, stored, fingerprint, differs))
        found = _restored(read_safetensors(path, announced), document, job.device)
        _check(found, job)
        return found
    except (_Unfit, CheckpointError, OSError) as error:
        raise _refused(path, reason_alone(error, path)) from error
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise _refused(path, f"{error!r:.100}") from error


def _refused(path: Path, why: str) -> DataError:
    return DataError(
        f"{path}: is not a calibration file written by mhacut: {safe(why)}. Name another file by "
        f"{option_name('calibration')} to calibrate again, or remove this one"
    )


def _document(text: str | None) -> dict[str, Any]:
    """Return the document in the metadata of a file, with its fingerprint checked."""
    if text is None:
        raise _Unfit(f"no {METADATA_KEY} in its metadata")
    document = parse_json(text, METADATA_KEY)
    stored = document.get("fingerprint") if isinstance(document, dict) else None
    if not isinstance(stored, dict) or not all(isinstance(value, str) for value in stored.values()):
        raise _Unfit(f"fingerprint: expected texts by name, found {kind_of(stored)}")
    return dict(document)


def _check(found: Calibration, job: Job) -> None:
    """Raise :class:`_Unfit` where a number or tensor is none that calibrating ``job`` gives."""
    held, units = held_out_count(len(job.images)), job.prunable.units()
    if found.held != held:
        raise _Unfit(f"held: expected {held}, found {found.held}")
    if list(found.moments) != [unit.key for unit in units]:
        raise _Unfit(f"units: expected {len(units)} of this model, found {len(found.moments)}, or others")
    for unit in units:
        for name, tensor, shape in _of_unit(found, unit):
            _check_tensor(f"{'.'.join(unit.key)}: {name}", tensor, torch.float64, shape)
    for layer, grids in found.fisher.importance.items():
        for grid, values in grids.items():
            if min(grid, default=0) < 1:
                raise _Unfit(f"{layer}: importance: expected a grid of positive numbers, found {grid}")
            _check_tensor(f"{layer}: importance", values, torch.float64, (math.prod(grid),))


def _of_unit(found: Calibration, unit: Unit) -> Iterator[tuple[str, Tensor, tuple[int, ...]]]:
    """Tensors of one unit, with their names and the shapes that they must have."""
    each = (unit.heads, unit.width)
    summed = each if unit.kind == "qk" else (unit.heads * unit.width,)
    moments, statistics = found.moments[unit.key], found.statistics[unit.key]
    for part, sides in (("fit", moments.fit), ("held", moments.held)):
        expected = 2 if unit.kind == "qk" and not unit.linear else 1
        if len(sides) != expected or not all(side.rows > 0 for side in sides):
            rows = [side.rows for side in sides]
            raise _Unfit(f"{'.'.join(unit.key)}: {part}: expected {expected} counts of rows, found {rows}")
        for side in sides:
            yield f"{part} total", side.total, summed
            yield f"{part} second", side.second, (*summed, summed[-1])
    yield "redundancy", statistics.redundancy, each
    yield "difference", statistics.difference, each


def _check_tensor(name: str, tensor: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if (tensor.dtype, tuple(tensor.shape)) != (dtype, shape):
        found = f"{dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
        raise _Unfit(f"{name}: expected {dtype_name(dtype)} {shape}, found {found}")
    # In parts, since isfinite copies what it is given.
    if not all(bool(part.isfinite().all()) for part in tensor.split(64)):
        raise _Unfit(f"{name}: values that are not finite")


@torch.no_grad()
def check_run(path: Path, found: Calibration, job: Job) -> None:
    """Check what depends on the model's outputs: Fisher information, and what is preserved. Runs one image.

    Args:
        path: the file that it was read from.
        found: the calibration, with what it preserves.
        job: what is pruned.

    Raises:
        DataError: a tensor is none that calibrating ``job`` gives.
    """
    widths: dict[str, int] = {}

    def watch(layer: Layer) -> Any:
        def hook(module: nn.Module, args: object, output: Tensor) -> None:
            widths[layer.name] = output.shape[layer.channel_dim]

        return hook

    with registered(
        job.model.get_submodule(f"{layer.name}.{layer.result}".rstrip(".")).register_forward_hook(
            watch(layer)
        )
        for layer in job.prunable.layers
        if layer.units
    ):
        outputs = found.preserved.outputs(job.model, job.images[:1].to(job.device))
    expected, matrices = widths if job.fisher_options.images else {}, found.fisher.matrices
    count = f"expected {len(expected)} layers, found {len(matrices)}, or others"
    try:
        if matrices.keys() != expected.keys() or not found.fisher.importance.keys() <= expected.keys():
            raise _Unfit(f"Fisher information: {count}")
        for layer, width in expected.items():
            _check_tensor(f"{layer}: Fisher information", matrices[layer], torch.float64, (width, width))
        shape = (len(job.images), *outputs.shape[1:])
        _check_tensor("outputs of the dense model", found.teacher, torch.float32, shape)
    except _Unfit as error:
        raise _refused(path, str(error)) from None


def _stale(path: Path, stored: Mapping[str, str], wanted: Fingerprint, differs: list[str]) -> str:
    lines = [
        f"{name}: not the same"
        if len(wanted[name]) == 64  # digests say nothing to readers
        else f"{name}: {safe(stored.get(name, 'not stated')):.60}, now {wanted[name]}"
        for name in differs
    ]
    count = stored.get(_COUNT, "")
    only_images = _COUNT in differs and set(differs) <= {_COUNT, "images", _FISHER}
    name = "Name"
    if only_images and count.isdecimal():  # efforts have numbers of their own
        name = f"Give {option_name('calibration_images', int(count))} to use it, or name"
    return (
        f"{path}: was made under other conditions: {'; '.join(lines)}. {name} another file by "
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
    own = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
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
