"""Directory of a run, whose files are replaced whole: no reader finds one half written.

``args.yaml`` holds the options, ``last.safetensors`` and ``best.safetensors`` are slim files, a run is
resumed from ``state.pt``, and ``summary.csv`` has a line per epoch. ``state.pt`` is written last. If the run
is killed before that, the steps since the previous ``state.pt`` are repeated, with the same result.

In a directory that holds a run, a new one writes to a hidden directory until its first save is complete.
Only then do its files take the place of the earlier run's, which is whole until then.

Imports torch only to read and write ``state.pt``, so that a directory is checked without waiting for it.
"""

from __future__ import annotations

import csv
import io
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import yaml

from mhacut.errors import CheckpointError, OutputError, UsageError, option_name
from mhacut.finetuning.logs import remove_logs
from mhacut.limits import is_int
from mhacut.options.base import PathLike
from mhacut.options.finetune import FinetuneOptions
from mhacut.options.option import read_config
from mhacut.runtime.files import (
    check_output,
    is_no_file,
    left_on_error,
    lock_directory,
    reason_alone,
    remove_temporaries,
    stem_of,
    sync_directory,
    temporary_folder,
    unlock,
    write_whole,
)

ARGUMENTS, STATE, SUMMARY = "args.yaml", "state.pt", "summary.csv"
LAST, BEST = "last.safetensors", "best.safetensors"
_FILES = (SUMMARY, BEST, LAST, STATE, ARGUMENTS)
_NEW = "new-run"
"""Beginning of the name of the hidden directory of a run that is not saved yet."""
_OLD = "old"
"""Directory within it of the earlier run's files, while the new ones take their place."""
_STATE_VERSION = 1


@dataclass(frozen=True)
class RunFolder:
    """Files of a run."""

    path: Path
    hidden: Path | None = None
    """Directory within it of a new run's files, until these take the place of an earlier run's."""

    def claim(self, *, shared: bool = False) -> int | None:
        """Lock the directory, so that no other process writes a run there.

        Args:
            shared: only as long as none does; several processes may hold such a lock.

        Returns:
            The lock, for :func:`mhacut.runtime.files.unlock`; None where there are no locks, and of a
            directory that may not be listed: nothing guards these.

        Raises:
            OutputError: another process does, or there is no such directory.
        """
        try:
            return lock_directory(self.path, shared=shared)
        except BlockingIOError:
            raise OutputError(
                f"{self.path}: another process is writing a run there; wait until it has ended, or choose "
                f"another directory ({option_name('output')})"
            ) from None
        except OSError as error:
            raise self._cannot_be_written(error) from error

    def _cannot_be_written(self, error: OSError) -> OutputError:
        return OutputError(f"{self.path}: cannot be written: {error.strerror or error}")

    def file(self, name: str) -> Path:
        """Return the path of the file of this name."""
        return (self.hidden or self.path) / name

    def check_new(self, read: Iterable[PathLike], *, overwrite: bool) -> None:
        """Raise an :class:`OutputError` if no new run can be written there. Leaves nothing behind.

        Args:
            read: files that the run reads, which are never replaced.
            overwrite: whether the files of a run that it holds may be replaced.
        """
        if os.path.exists(self.path) and not os.path.isdir(self.path):
            raise OutputError(
                f"{self.path}: is a file; expected a directory for the run ({option_name('output')})"
            )
        for name in (LAST, BEST):
            for path in read:
                check_output(self.file(name), overwrite=True, input_path=path)
        try:
            self._check_held(overwrite)
        except OutputError:
            # Where another process is still writing the run, that is what to say; all of torchrun look here.
            unlock(self.claim(shared=True))
            raise

    def open_new(self, *, overwrite: bool) -> int | None:
        """Make the directory of a new run, :meth:`claim` it, and return the lock.

        Args:
            overwrite: whether it may hold a run, which is left as it is.

        Raises:
            OutputError: it holds a run, another process is writing one, or it cannot be made.
        """
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = self.claim()
            try:
                self._check_held(overwrite)
            except BaseException:
                unlock(lock)
                raise
        except OSError as error:
            raise self._cannot_be_written(error) from error
        self.sweep()
        return lock

    def held(self) -> list[str]:
        """Names of the files of a run that it holds."""
        return [name for name in reversed(_FILES) if self.file(name).exists()]

    def _check_held(self, overwrite: bool) -> None:
        held = self.held()
        if held and not overwrite:
            raise OutputError(
                f"{self.path}: already holds a run ({', '.join(held)}); continue it with "
                f"{option_name('resume', self.path)}, choose another directory, or replace it with "
                f"{option_name('overwrite', True)}"
            )
        self.check_files()

    def check_files(self) -> None:
        """Raise an :class:`OutputError` if one of a run's files is none, which no save could replace."""
        for name in _FILES:
            if is_no_file(self.file(name)):
                raise OutputError(
                    f"{self.file(name)}: is not a regular file, and is not replaced; move it away"
                )

    def beside_held(self, until: ExitStack) -> RunFolder:
        """Return the directory of a new run, which leaves the one held there until :meth:`replace_held`.

        Args:
            until: removes the hidden directory of the new files when it is closed, but for files of an
                earlier run that could not be put back.

        Raises:
            OutputError: it cannot be written.
        """
        try:
            hidden = until.enter_context(temporary_folder(self.path / _NEW))
        except OSError as error:
            raise self._cannot_be_written(error) from error
        return replace(self, hidden=hidden)

    @contextmanager
    def saying_what_stays(self) -> Iterator[None]:
        """Context that adds to an :class:`OutputError`, where it is so, that the earlier run is kept."""
        try:
            yield
        except OutputError as error:
            if self.hidden is None or not replace(self, hidden=None).held():
                raise
            raise OutputError(f"{error}; {self.path} keeps its earlier run") from error

    def replace_held(self) -> RunFolder:
        """Put the hidden files, if they are hidden, in the place of the earlier run's; return the directory.

        If that fails, or on Ctrl-C, the files that were moved go back: the earlier run is whole.

        Raises:
            OutputError: they cannot be moved, or something in their place is not a file; or the earlier run
                cannot be put back, and the hidden directory, which has the rest of it, is left.
        """
        if self.hidden is None:
            return self
        place, moved = replace(self, hidden=None), list[tuple[Path, Path]]()
        failed: BaseException | None = None
        with self.saying_what_stays():
            place._check_held(overwrite=True)
        with left_on_error(self.hidden):
            try:
                self._exchange(self.hidden / _OLD, moved)
            except BaseException as error:  # also torch's, of a worker that died
                self._put_back(moved)
                failed = error
        if isinstance(failed, OSError):
            with self.saying_what_stays():
                raise self._cannot_be_written(failed) from failed
        if failed is not None:
            raise failed
        shutil.rmtree(self.hidden / _OLD, ignore_errors=True)
        remove_logs(self.path)
        return place

    def _exchange(self, old: Path, moved: list[tuple[Path, Path]]) -> None:
        """Move each file of the earlier run to the directory ``old``, and the new one to its place.

        Nothing is resumed without ``args.yaml``, which goes first and comes back last: files of two runs are
        never taken for those of one, whenever this is killed.

        Args:
            old: is made.
            moved: receives where each file was and where it goes, before it is moved.

        Raises:
            OSError: one cannot be moved.
        """

        def move(source: Path, target: Path) -> None:
            if os.path.lexists(source):
                moved.append((source, target))
                os.replace(source, target)

        os.stat(self.file(ARGUMENTS))  # fails before anything is moved, if somebody removed the files
        old.mkdir()
        move(self.path / ARGUMENTS, old / ARGUMENTS)
        sync_directory(self.path)
        for name in _FILES:
            if name == ARGUMENTS:
                sync_directory(self.path)
            else:
                move(self.path / name, old / name)
            move(self.file(name), self.path / name)
        sync_directory(self.path)

    def _put_back(self, moved: Sequence[tuple[Path, Path]]) -> None:
        """Undo the moves of :meth:`_exchange`, the old ``args.yaml`` last.

        Raises:
            OutputError: one cannot be undone.
        """
        try:
            for source, target in reversed(moved):
                if source.name == ARGUMENTS:
                    sync_directory(self.path)
                if os.path.lexists(target) and not os.path.lexists(source):  # the last may not have moved
                    os.replace(target, source)
            sync_directory(self.path)
        except BaseException as error:  # a second Ctrl-C, too: the files must be named
            reason = error.strerror if isinstance(error, OSError) else None
            raise OutputError(
                f"{self.path}: its earlier run cannot be put back: {reason or type(error).__name__}; move "
                f"the files in {self.file(_OLD)} to {self.path} before the next run there removes them"
            ) from error

    def sweep(self) -> None:
        """Remove temporary files of a process that was killed while it wrote."""
        for name in (*_FILES, _NEW):
            remove_temporaries(self.path / name)

    def write_arguments(self, values: Mapping[str, Any]) -> None:
        """Write the options of the run as YAML that ``--config`` reads."""
        plain = {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}
        write_whole(self.file(ARGUMENTS), yaml.safe_dump(plain, sort_keys=False).encode(), overwrite=True)

    def write_summary(self, rows: Sequence[Mapping[str, float | None]]) -> None:
        """Write a line per epoch, in timm's columns."""
        if not rows:
            return
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({key: "" if value is None else value for key, value in row.items()} for row in rows)
        write_whole(self.file(SUMMARY), text.getvalue().encode(), overwrite=True)

    def _epochs(self) -> int:
        """Return how many epochs the summary has; 0 if there is none."""
        try:
            return max(self.file(SUMMARY).read_bytes().count(b"\n") - 1, 0)
        except OSError:
            return 0

    def still_there(self, lock: int | None) -> bool:
        """Whether the directory was not removed since :meth:`claim` gave ``lock``.

        Raises:
            OutputError: another directory is in its place.
        """
        try:
            found = os.stat(self.path)
        except OSError:
            return False
        if lock is not None and not self._is_locked(lock, found):
            raise OutputError(f"{self.path}: was replaced meanwhile; what is there now is left as it is")
        return True

    def _is_locked(self, lock: int, found: os.stat_result) -> bool:
        """Whether the directory ``found`` is the locked one, whose inode some network file systems change."""
        try:
            if os.path.samestat(os.fstat(lock), found):
                return True
            ours, there = os.stat(ARGUMENTS, dir_fd=lock), os.stat(self.path / ARGUMENTS)
        except OSError:  # no such file in one of them; NFS: the locked one is gone
            return False
        return (ours.st_size, ours.st_mtime_ns) == (there.st_size, there.st_mtime_ns)

    def write_state(self, state: Mapping[str, Any]) -> None:
        """Write the state that the run can be resumed from."""
        import torch

        buffer = io.BytesIO()
        torch.save({"version": _STATE_VERSION, **state}, buffer)
        with buffer.getbuffer() as content:  # released also where writing fails: else Python complains later
            write_whole(self.file(STATE), content, overwrite=True)

    def not_resumable(self, why: str) -> CheckpointError:
        """Return the error of a run whose state ``why`` it cannot be resumed from, with what to do."""
        again = f"{option_name('overwrite', True)} instead of {option_name('resume')}"
        return CheckpointError(
            f"{self.file(STATE)}: {why}, and the run cannot be resumed without it; {LAST} holds its weights, "
            f"and {again} starts again"
        )

    def read_state(self) -> dict[str, Any] | None:
        """Return the state that :meth:`write_state` wrote; None before the first. No code in the file is run.

        Raises:
            CheckpointError: the file is damaged, removed, not a run's, or of another version.
        """
        from mhacut.checkpoint.torch_file import read_torch

        path = self.file(STATE)
        if not path.exists():
            if self._epochs() > 1:  # one that was killed before its first state has no more
                raise self.not_resumable("is gone")
            return None
        try:
            state = read_torch(path)
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
        except CheckpointError as error:
            why = f"cannot be read ({reason_alone(error, path)})"
            raise self.not_resumable(why) from None
        version = dict.get(state, "version") if isinstance(state, dict) else None
        if not is_int(version):
            raise self.not_resumable("is not the state of a run, which states its version")
        if version != _STATE_VERSION:
            raise CheckpointError(
                f"{path}: this mhacut can resume from version {_STATE_VERSION}, found {shown(version):.50}"
            )
        return dict(dict.items(state))


def folder_of(options: FinetuneOptions, stem: str) -> RunFolder:
    """Return the directory of the run; ``stem`` is the beginning of its default name."""
    return RunFolder(Path(options.resume or options.output or f"{stem}-finetuned"))


def check_folder_before_reading(options: FinetuneOptions) -> None:
    """Raise an :class:`OutputError` if no new run can be written, as far as its directory is known by now."""
    if options.resume is not None or (options.output is None and not os.path.isfile(options.checkpoint)):
        return
    folder = folder_of(options, stem_of(Path(options.checkpoint)))
    folder.check_new(options.files_read(), overwrite=options.overwrite)


def read_arguments(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Read the options that the run in ``folder`` was started with.

    Raises:
        UsageError: there is no run, or its options cannot be read.
    """
    path = Path(folder) / ARGUMENTS
    try:
        if is_no_file(path):
            raise OSError("is not a regular file")
        found = read_config(path, FinetuneOptions.options(), str(path))
        if "checkpoint" not in found:  # which every run states
            raise OSError("names no checkpoint")
        return found
    except OSError as error:
        raise UsageError(
            f"{option_name('resume', folder)}: no run to continue, {ARGUMENTS}: {error.strerror or error}"
        ) from None
