"""Environment of a command: output, library logs, signals, and errors as exit codes."""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import fields, is_dataclass
from types import FrameType
from typing import Any

import typer

from mhacut._version import __version__
from mhacut.errors import (
    MhacutError,
    OptionWriter,
    OutputError,
    PeerFailed,
    UsageError,
    option_name,
    options_written_by,
)
from mhacut.runtime.process import rank, world_size
from mhacut.runtime.progress import SILENT, StageDisplay, StageTimer
from mhacut.text import safe, table

SCHEMA_VERSION = 1
"""Version of the format of ``--json`` output."""
FAILED, USAGE, INTERRUPTED = 1, 2, 130
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
"""Texts in errors of torch (CPU) and the operating system that mean: out of memory."""
_SECONDS_TO_SAY_WHY = 10
"""Delay in seconds before a process exits because another process failed. torchrun ends all processes at the
first exit, so the failed process must print its error and exit first."""


class Console:
    """Output of a command, as a :class:`mhacut.runtime.progress.Reporter`.

    In a run with several processes, only the first process prints results and messages. The other processes
    print errors.
    """

    def __init__(
        self, command: str = "", *, quiet: bool = False, verbose: int = 0, as_json: bool = False
    ) -> None:
        self.command = command
        self.rank = rank()
        self.quiet = quiet or self.rank > 0
        self.verbose = verbose
        self.as_json = as_json
        self._timer = StageTimer(SILENT)
        self._display: StageDisplay | None = None
        self._has_bar = False

    def result(self, text: str, document: object) -> None:
        """Print ``text``.

        With ``--json``, print the mapping or dataclass ``document`` as JSON. With ``-v``, first print the
        wall time of each stage.
        """
        self.finish()
        if self.rank > 0:
            return
        seconds = self._timer.seconds
        if self.verbose and not self.quiet:
            rows = [[stage, f"{spent:.1f} s"] for stage, spent in seconds.items()]
            self.say(table([*rows, ["all stages", f"{sum(seconds.values()):.1f} s"]]))
        if self.as_json:
            about = {"schema_version": SCHEMA_VERSION, "command": self.command, "mhacut": __version__}
            text = json.dumps({**about, **_as_json(document), "stage_seconds": seconds}, indent=2)
        encoding = sys.stdout.encoding or "ascii"  # may lack characters of a file name
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        try:
            if self.as_json or not sys.stdout.isatty():
                print(text, flush=True)
            else:
                _print_in_colour(text)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())  # else Python tries to write the rest at exit
            if not isinstance(error, BrokenPipeError):  # the reader, such as `| head`, has closed the pipe
                raise OutputError(f"cannot write to stdout: {error.strerror or error}") from error

    def log(self, message: str) -> None:
        if not self.quiet:
            self.say(message)

    def start(self, stage: str) -> None:
        self._timer.start(stage)
        if self.quiet:
            return
        if self._display is None:
            self._has_bar = not self.as_json and sys.stderr.isatty()
            self._display = StageDisplay(None if self._has_bar else self.say)
        if self.verbose and not self._has_bar:
            self.say(stage)
        self._display.start(stage)

    def advance(self, done: int, total: int, detail: str = "") -> None:
        if self._display is not None:
            self._display.advance(done, total, detail)

    def finish(self) -> None:
        self._timer.stop()
        if self._display is not None:
            self._display.close()
            self._display, self._has_bar = None, False

    def error(self, text: str) -> None:
        self.finish()
        self.say(text if self.rank == 0 else f"process {self.rank}: {text}")

    def failure(self, message: str) -> None:
        """Print the message of a failed command; with ``--json`` also as JSON on stdout."""
        self.error(f"error: {message}")
        if self.as_json and self.rank == 0:
            with suppress(OSError):  # the reader has closed the pipe
                print(json.dumps({"schema_version": SCHEMA_VERSION, "error": message}, indent=2), flush=True)

    def say(self, text: str) -> None:
        """Print lines on stderr above the progress bar, with control characters escaped."""
        lines = "\n".join(map(safe, text.split("\n")))
        if self._display is not None and self._has_bar:
            from rich.text import Text

            self._display.console.print(Text(lines), soft_wrap=True)
        else:
            with suppress(OSError):  # stderr is closed or the disk is full
                print(lines, file=sys.stderr, flush=True)


def _as_json(value: Any) -> Any:
    if hasattr(value, "to_json"):
        return _as_json(value.to_json())
    if hasattr(value, "_asdict"):  # a named tuple
        return _as_json(value._asdict())
    if is_dataclass(value):
        return {spec.name: _as_json(getattr(value, spec.name)) for spec in fields(value)}
    if isinstance(value, Mapping):
        return {name: _as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(part) for part in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _print_in_colour(text: str) -> None:
    from rich.console import Console as Terminal
    from rich.text import Text

    coloured = Text(text)
    coloured.highlight_regex(r"(?m)^warning: .*", "bold yellow")
    Terminal().print(coloured, soft_wrap=True)


@contextmanager
def running(console: Console, writer: OptionWriter, known: Collection[str]) -> Iterator[None]:
    """Convert the errors of a command's body into messages and exit codes.

    An error that is not a :class:`MhacutError` is a bug and is printed with its traceback. ``MHACUT_DEBUG=1``
    prints all tracebacks. ``known`` has the names of the command's options, for advice about memory.
    """
    debug = os.environ.get("MHACUT_DEBUG", "") not in ("", "0")
    code = 0
    with options_written_by(writer), _library_logs(console), _quiet_interrupts():
        try:
            yield
        except KeyboardInterrupt:
            code = INTERRUPTED
            if console.rank == 0:  # all processes stop for the same reason
                console.error("interrupted; no incomplete file was left")
        except PeerFailed:
            code = FAILED  # the failed process reports the error
            time.sleep(_SECONDS_TO_SAY_WHY)
        except Exception as error:
            code = USAGE if isinstance(error, UsageError) else FAILED
            message = str(error) if isinstance(error, MhacutError) else _out_of_memory(error, known)
            if debug or not message:
                console.error(traceback.format_exc().rstrip())
            bug = f"unexpected {type(error).__name__}: this is a bug in mhacut. "
            bug += "Please report it with the traceback above."
            console.failure(message or bug)
        finally:
            console.finish()
    if code:
        raise typer.Exit(code)


def _out_of_memory(error: Exception, known: Collection[str]) -> str:
    """Return a message and advice for out-of-memory errors; empty for other errors."""
    # Compared by name, because this module must not import torch.
    by_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not by_type and not any(words in str(error) for words in _NO_MEMORY):
        return ""
    sizes = [name for name in ("batch_size", "batch_sizes") if name in known]
    ways = [f"a smaller {option_name(name)}" for name in sizes]
    ways += [option_name("device", "cpu")] if "device" in known else []
    return "out of memory" + (f"; use {', or '.join(ways)}" if ways else "")


@contextmanager
def _quiet_interrupts() -> Iterator[None]:
    """In a run with 1 process, handle SIGTERM like Ctrl-C, and end data loader workers without a message."""
    # A process that waits for other processes in a collective operation would not see the exception.
    if threading.current_thread() is not threading.main_thread() or world_size() > 1:
        yield
        return
    command = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Terminals and schedulers send the signal also to the workers of a DataLoader, which are forks.
        if os.getpid() != command:
            os._exit(INTERRUPTED)
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises when a worker ends
        raise KeyboardInterrupt

    usual = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}
    replaced = {number: handler for number, handler in usual.items() if signal.getsignal(number) is handler}
    for number in replaced:
        signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)


class _ToConsole(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.say(self.format(record))


@contextmanager
def _library_logs(console: Console) -> Iterator[None]:
    """Hide warnings and logs of libraries unless ``-v`` is given."""
    before = logging.root.manager.disable
    handler = _ToConsole(console)
    with warnings.catch_warnings():
        if console.verbose:
            handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
            logging.root.addHandler(handler)
            logging.root.setLevel(logging.DEBUG if console.verbose > 1 else logging.INFO)
        else:
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)  # errors are always shown
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        try:
            yield
        finally:
            logging.root.removeHandler(handler)
            logging.disable(before)
