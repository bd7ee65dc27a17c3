"""Directory of a run: its files, each replaced in one step, and the options that it began with.

``args.yaml`` holds the options, ``last.safetensors`` and ``best.safetensors`` are slim files, a run is
resumed from ``state.pt``, and ``summary.csv`` has a line per epoch.

Imports torch only to read and write ``state.pt``, so that a directory is checked without waiting for it.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhacut.errors import CheckpointError, OutputError, UsageError, option_name
from mhacut.limits import is_int
from mhacut.options.finetune import FinetuneOptions
from mhacut.options.option import read_config
from mhacut.runtime.files import REMOTE, check_output, lock_directory, reason_alone, stem_of, write_file

ARGUMENTS, STATE, SUMMARY = "args.yaml", "state.pt", "summary.csv"
LAST, BEST = "last.safetensors", "best.safetensors"
TENSORBOARD = "tensorboard"
_FILES = (ARGUMENTS, STATE, LAST, BEST, SUMMARY, TENSORBOARD)
"""Names of what a run writes. ``args.yaml`` comes first: nothing is resumed without it, so that files of two
runs are not taken for those of one, wherever moving them is cut off."""
_SAVED = frozenset({STATE, LAST, SUMMARY})
"""What is written once a step is saved. To save space, people remove the state, or all but the best file."""
_OLD = "old"
"""Directory that an earlier run is moved to."""
_STATE_VERSION = 3

_PATHS = ("checkpoint", "teacher", "data_dir", "class_map", "output")
"""Options that are paths, or begin with one of :data:`REMOTE`."""
_FREE = frozenset(
    {
        *_PATHS,  # what they hold is compared
        # a finished run can be prolonged
        "epochs",
        "steps",
        # how the work is divided; the number of images of a step is compared
        "batch_size",
        "grad_accum_steps",
        "workers",
        "device",
        # what is written
        "save_every",
        "log",
        "overwrite",
        "resume",
    }
)
"""Options that may differ in a resumed run."""


@dataclass(frozen=True)
class RunFolder:
    """Files of a run."""

    path: Path

    def file(self, name: str) -> Path:
        """Return the path of the file of this name."""
        return self.path / name

    def check_new(self, options: FinetuneOptions) -> None:
        """Raise an :class:`OutputError` if no new run can be written there. Leaves nothing behind."""
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise OutputError(
                f"{self.path}: is a file; expected a directory for the run ({option_name('output')})"
            )
        for name in (LAST, BEST, f"{_OLD}/{LAST}", f"{_OLD}/{BEST}"):
            for path in options.files_read():
                check_output(self.file(name), overwrite=True, input_path=path)
        held = self._held()
        # A run whose first measurement failed leaves its options alone: the same command then begins again.
        if held not in ([], [ARGUMENTS]) and not options.overwrite:
            raise OutputError(
                f"{self.path}: already holds a run ({', '.join(held)}); continue it with "
                f"{option_name('resume', self.path)}, choose another directory, or replace it with "
                f"{option_name('overwrite', True)}"
            )

    def lock(self) -> int | None:
        """Make the directory if there is none, and lock it, so that no other process writes a run there."""
        with self._writing():
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                return lock_directory(self.path)
            except BlockingIOError:
                raise OutputError(
                    f"{self.path}: another process is writing a run there; wait until it has ended, or "
                    f"choose another directory ({option_name('output')})"
                ) from None

    def set_aside(self) -> Path | None:
        """Move the files of an earlier run to the directory ``old`` in this one, and return it.

        They take the place of a still older run's. A run that saved no step is removed instead: it holds
        nothing but its start, and the run in ``old`` is worth more. Other files stay where they are.
        """
        held, old = self._held(), RunFolder(self.path / _OLD)
        with self._writing():
            if _SAVED.isdisjoint(held):
                self._remove()
                return None
            old.path.mkdir(exist_ok=True)
            old._remove()  # a best.safetensors of the older run must not stay beside files of this one
            for name in held:
                os.replace(self.file(name), old.file(name))
        return old.path

    def write_arguments(self, options: FinetuneOptions) -> None:
        """Write the options of the run as YAML that ``--config`` reads, from any working directory."""
        values = {**options.values(), "overwrite": False, "resume": None}
        for name in _PATHS:
            if values[name] is not None and not values[name].startswith(REMOTE):
                values[name] = os.path.abspath(values[name])
        import yaml

        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        write_file(self.file(ARGUMENTS), yaml.safe_dump(plain, sort_keys=False).encode(), overwrite=True)

    def write_summary(self, rows: Sequence[Mapping[str, float | None]]) -> None:
        """Write a line per epoch, in timm's columns."""
        if not rows:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_file(self.file(SUMMARY), text.getvalue().encode(), overwrite=True)

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Write the state that the run can be resumed from."""
        import torch

        buffer = io.BytesIO()
        torch.save({"version": _STATE_VERSION, **state}, buffer)
        with buffer.getbuffer() as content:  # no copy: with an optimiser's moments it is three models large
            write_file(self.file(STATE), content, overwrite=True)

    def read_state(self) -> dict[str, Any] | None:
        """Return the state that :meth:`write_state` wrote, or None. Reading runs no code of the file."""
        from mhacut.checkpoint.torch_file import read_whole

        path = self.file(STATE)
        if not path.exists():
            if self.file(SUMMARY).exists():  # which is written after it
                raise self.not_resumable("is gone")
            return None
        try:
            state = read_whole(path)
        except CheckpointError as error:
            raise self.not_resumable(f"cannot be read ({reason_alone(error, path)})") from None
        version = state.get("version") if isinstance(state, dict) else None
        if not is_int(version) or version != _STATE_VERSION:
            raise self.not_resumable("is not a state of a run of this version of mhacut")
        checked: dict[str, Any] = state
        return checked

    def not_resumable(self, why: str) -> CheckpointError:
        """Return the error of a run whose state ``why`` it cannot be resumed from, with what to do."""
        again = f"{option_name('overwrite', True)} instead of {option_name('resume')}"
        return CheckpointError(
            f"{self.file(STATE)}: {why}, and the run cannot be resumed without it; {LAST} holds its weights, "
            f"and {again} starts again"
        )

    def _held(self) -> list[str]:
        """Names of the files of a run that the directory holds."""
        return [name for name in _FILES if self.file(name).exists()]

    def _remove(self) -> None:
        for name in self._held():
            shutil.rmtree(self.file(name)) if name == TENSORBOARD else self.file(name).unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror or error}") from error


def folder_of(options: FinetuneOptions, stem: str) -> RunFolder:
    """Return the directory of the run; ``stem`` is the beginning of its default name."""
    return RunFolder(Path(options.resume or options.output or f"{stem}-finetuned"))


def check_folder_before_reading(options: FinetuneOptions) -> None:
    """Raise an :class:`OutputError` if no new run can be written, as far as its directory is known by now."""
    if options.resume is None and (options.output is not None or os.path.isfile(options.checkpoint)):
        folder_of(options, stem_of(Path(options.checkpoint))).check_new(options)


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values``, completed by the options of the run that ``resume`` names, if it names one."""
    given = dict(values)
    folder = given.get("resume")
    if folder is None:
        return given
    if given.get("overwrite"):
        raise UsageError(
            f"{option_name('overwrite', True)}: would replace the run that {option_name('resume', folder)} "
            "continues; give one of them"
        )
    output = given.pop("output", None)
    if output is not None and os.path.realpath(output) != os.path.realpath(folder):
        raise UsageError(f"{option_name('output', output)}: a resumed run writes to {folder}, which holds it")
    try:
        began = read_config(Path(folder) / ARGUMENTS, FinetuneOptions.options(), f"{folder}/{ARGUMENTS}")
    except OSError as error:
        raise UsageError(
            f"{option_name('resume', folder)}: no run to continue, {ARGUMENTS}: {error.strerror or error}"
        ) from None
    if given.get("epochs") is not None and "steps" not in given:
        began["steps"] = None  # else the steps that it began with would win
    before = fixed_options(FinetuneOptions.of(**began))
    for name, value in fixed_options(FinetuneOptions.of(**{**began, **given})).items():
        if value != before[name]:
            raise UsageError(
                f"{option_name(name, value)}: the run in {folder} was started with {before[name]}; "
                "leave it out, or start another run"
            )
    return {**began, **given, "output": folder}


def fixed_options(options: FinetuneOptions) -> dict[str, Any]:
    """Return the options that must not differ in a resumed run."""
    return {name: value for name, value in options.values().items() if name not in _FREE}


def digest_of_options(options: FinetuneOptions) -> str:
    """Return a digest of :func:`fixed_options`, by which an edited ``args.yaml`` is noticed."""
    return hashlib.sha256(json.dumps(fixed_options(options)).encode()).hexdigest()
