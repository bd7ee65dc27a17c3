"""Folder of a run. All files are replaced atomically, so that a killed run can be resumed.

``args.yaml`` holds the options, ``last.safetensors`` and ``best.safetensors`` are slim files, ``state.pt`` is
the state to resume from, and ``summary.csv`` has a line per epoch. torch is imported only for ``state.pt``,
so that checks of a folder are fast.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhacut.checkpoint.folder import PRUNED
from mhacut.errors import CheckpointError, OutputError, UsageError, option_name
from mhacut.options.finetune import FinetuneOptions
from mhacut.options.option import read_config
from mhacut.runtime.files import REMOTE, check_output, reason_alone, stem_of, write_file

ARGUMENTS, STATE, SUMMARY = "args.yaml", "state.pt", "summary.csv"
LAST, BEST = "last.safetensors", "best.safetensors"
TENSORBOARD = "tensorboard"
LAST_FOLDER, BEST_FOLDER = Path(LAST).stem, Path(BEST).stem
"""Names of the model folders that a run writes for transformers models, in place of slim files."""
_FILES = (ARGUMENTS, STATE, LAST, BEST, LAST_FOLDER, BEST_FOLDER, SUMMARY, TENSORBOARD)
"""Names of the files of a run. ``args.yaml`` is deleted first: a run without it cannot be resumed."""

_PATHS = ("checkpoint", "teacher", "data_dir", "class_map", "output")
"""Names of options whose values are paths, or addresses such as ``timm:NAME``."""
_FREE = frozenset(
    {
        *_PATHS,  # the content of the files is compared
        # only their product is compared: images per step
        "batch_size",
        "grad_accum_steps",
        "workers",
        "device",
        # no influence on the weights
        "save_every",
        "log",
        "overwrite",
        "resume",
    }
)
"""Names of options that may change when a run is resumed."""


@dataclass(frozen=True)
class RunFolder:
    path: Path

    def file(self, name: str) -> Path:
        return self.path / name

    def check_new(self, options: FinetuneOptions) -> None:
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise OutputError(
                f"{self.path}: is a file; expected a folder for the run ({option_name('output')})"
            )
        for name in (LAST, BEST, f"{LAST_FOLDER}/{PRUNED}", f"{BEST_FOLDER}/{PRUNED}"):
            for path in options.files_read():
                check_output(self.file(name), overwrite=True, input_path=path)
        files = self._files()
        # A run that failed before its first measurement leaves only its options and can be repeated.
        if files not in ([], [ARGUMENTS]) and not options.overwrite:
            raise OutputError(
                f"{self.path}: already holds a run ({', '.join(files)}). Continue it with "
                f"{option_name('resume', self.path)}, choose another folder, or replace it with "
                f"{option_name('overwrite', True)}"
            )

    def clear(self) -> None:
        """Create the folder, or delete only the files that an earlier run wrote to it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            for name in self._files():
                path = self.file(name)
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        except OSError as error:
            raise OutputError(f"{self.path}: cannot be written: {error.strerror or error}") from error

    def write_arguments(self, options: FinetuneOptions) -> None:
        values = {**options.values(), "overwrite": False, "resume": None}
        for name in _PATHS:
            if values[name] is not None and not values[name].startswith(REMOTE):
                values[name] = os.path.abspath(values[name])
        import yaml

        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        write_file(self.file(ARGUMENTS), yaml.safe_dump(plain, sort_keys=False).encode(), overwrite=True)

    def write_summary(self, rows: Sequence[Mapping[str, float | None]]) -> None:
        if not rows:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_file(self.file(SUMMARY), text.getvalue().encode(), overwrite=True)

    def write_state(self, state: Mapping[str, Any]) -> None:
        import torch

        buffer = io.BytesIO()
        torch.save(dict(state), buffer)
        with buffer.getbuffer() as content:  # no copy: with an optimiser's moments it is three models large
            write_file(self.file(STATE), content, overwrite=True)

    def read_state(self) -> dict[str, Any] | None:
        """Return the saved training state; None if there is none. Code in the file is not executed."""
        from mhacut.checkpoint.torch_file import read_whole

        path = self.file(STATE)
        if not path.exists():
            if self.file(SUMMARY).exists():  # which is written after it
                raise self.not_resumable("is gone")
            return None
        try:
            state: dict[str, Any] = read_whole(path)
        except CheckpointError as error:
            raise self.not_resumable(f"cannot be read ({reason_alone(error, path)})") from None
        return state

    def not_resumable(self, why: str) -> CheckpointError:
        again = f"{option_name('overwrite', True)} instead of {option_name('resume')}"
        return CheckpointError(
            f"{self.file(STATE)}: {why}, so the run cannot be resumed. {LAST} holds its weights; {again} "
            "starts again"
        )

    def _files(self) -> list[str]:
        models = {name: f"{name}/{PRUNED}" for name in (LAST_FOLDER, BEST_FOLDER)}  # of a run, not the user's
        return [name for name in _FILES if self.file(models.get(name, name)).exists()]


def folder_of(options: FinetuneOptions, stem: str) -> RunFolder:
    return RunFolder(Path(options.resume or options.output or f"{stem}-finetuned"))


def check_folder_before_reading(options: FinetuneOptions) -> None:
    if options.resume is None and (options.output is not None or os.path.isfile(options.checkpoint)):
        folder_of(options, stem_of(Path(options.checkpoint))).check_new(options)


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values``, plus the saved options of the run that ``values['resume']`` names."""
    options = dict(values)
    folder = options.get("resume")
    if folder is None:
        return options
    if options.get("overwrite"):
        raise UsageError(
            f"{option_name('overwrite', True)}: not allowed with {option_name('resume', folder)}, which "
            "continues the run; give one of them"
        )
    output = options.pop("output", None)
    if output is not None and os.path.realpath(output) != os.path.realpath(folder):
        raise UsageError(
            f"{option_name('output', output)}: a resumed run writes to {folder}; leave the option out"
        )
    if not Path(folder, ARGUMENTS).is_file():
        raise UsageError(f"{option_name('resume', folder)}: no run to resume, found no {ARGUMENTS}")
    saved = read_config(Path(folder, ARGUMENTS), FinetuneOptions.options(), f"{folder}/{ARGUMENTS}")
    before = fixed_options(FinetuneOptions.of(**saved))
    for name, value in fixed_options(FinetuneOptions.of(**{**saved, **options})).items():
        if value != before[name]:
            raise UsageError(
                f"{option_name(name, value)}: the run in {folder} uses {before[name]}; leave the option "
                "out, or start a new run"
            )
    return {**saved, **options, "output": folder}


def fixed_options(options: FinetuneOptions) -> dict[str, Any]:
    """Return the options that must stay the same when a run is resumed."""
    return {name: value for name, value in options.values().items() if name not in _FREE}
