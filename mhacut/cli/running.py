"""Surroundings of a command: the only printer, quiet libraries, signals and errors as exit codes."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import typer

from mhacut._version import __version__
from mhacut.errors import (
    Interrupted,
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
"""Version of the JSON that every command prints under ``--json``."""
FAILED, USAGE, INTERRUPTED = 1, 2, 130
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
"""Words of a RuntimeError of torch on the CPU, and of the system."""
_SECONDS_TO_SAY_WHY = 10
"""Delay before a process that fails because of another exits: torchrun ends all processes at the first
failure, and the process that reports the reason must be first."""


class Console:
    """Shows one command to one user; a :class:`mhacut.runtime.progress.Reporter`.

    Of several processes, all but the first print errors only.
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

    def result(self, text: str, document: Mapping[str, Any]) -> None:
        """Print ``text``, or ``document`` under ``--json``; a reader that went away is no error.

        What every command states is added to ``document``; the seconds of each stage are shown with ``-v``.

        Raises:
            OutputError: stdout cannot be written.
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
            document = {**about, **document, "stage_seconds": seconds}
            text = json.dumps(document, allow_nan=False, indent=2, default=os.fspath)
        encoding = sys.stdout.encoding or "ascii"  # which may lack characters of a file's name
        text = text.encode(encoding, "backslashreplace").decode(encoding)
        try:
            if self.as_json or not sys.stdout.isatty():
                print(text, flush=True)
            else:
                _print_in_colour(text)
        except OSError as error:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, sys.stdout.fileno())  # else Python tries to write the rest again at its end
            if not isinstance(error, BrokenPipeError):  # of `| head`
                raise OutputError(f"the output cannot be written: {error.strerror or error}") from error

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
        """End the last stage, and take the bar off the terminal."""
        self._timer.stop()
        if self._display is not None:
            self._display.close()
            self._display, self._has_bar = None, False

    def error(self, text: str) -> None:
        """Print ``text`` whatever the verbosity."""
        self.finish()
        self.say(text if self.rank == 0 else f"process {self.rank}: {text}")

    def say(self, text: str) -> None:
        """Print lines on stderr, made safe, above the bar if there is one."""
        lines = "\n".join(map(safe, text.split("\n")))
        if self._display is not None and self._has_bar:
            from rich.text import Text

            self._display.console.print(Text(lines), soft_wrap=True)
        else:
            with suppress(OSError):  # nobody reads on, or the disk is full: there is nowhere to say so
                print(lines, file=sys.stderr, flush=True)


def _print_in_colour(text: str) -> None:
    """Print ``text`` on a terminal, lines that begin with "warning: " in colour."""
    from rich.console import Console as Terminal
    from rich.text import Text

    coloured = Text(text)
    coloured.highlight_regex(r"(?m)^warning: .*", "bold yellow")
    Terminal().print(coloured, soft_wrap=True)


@contextmanager
def running(console: Console, writer: OptionWriter, known: Collection[str]) -> Iterator[None]:
    """Turn the errors of a command's body into messages and exit codes.

    Messages name options as ``writer`` writes them, and of those that save memory only ``known`` ones.
    mhacut's own errors are shown as one message; any other error is a bug and shows its traceback.
    ``MHACUT_DEBUG=1`` shows every traceback.
    """
    debug = os.environ.get("MHACUT_DEBUG", "") not in ("", "0")
    code = 0
    with options_written_by(writer), _library_logs(console), _sigterm_as_interrupt():
        try:
            yield
        except (KeyboardInterrupt, Interrupted) as error:
            code = INTERRUPTED
            if console.rank == 0:  # all processes stop for the same reason
                console.error(str(error) or "interrupted; nothing was left half written")
        except PeerFailed:
            code = FAILED  # the process that knows why says so
            time.sleep(_SECONDS_TO_SAY_WHY)
        except Exception as error:
            code = USAGE if isinstance(error, UsageError) else FAILED
            message = str(error) if isinstance(error, MhacutError) else _out_of_memory(error, known)
            if debug or not message:
                console.error(traceback.format_exc().rstrip())
            kind = type(error).__name__
            unforeseen = f"mhacut did not foresee this {kind}; please report it with the lines above"
            console.error(f"error: {message or unforeseen}")
        finally:
            console.finish()
    if code:
        raise typer.Exit(code)


def _out_of_memory(error: Exception, known: Collection[str]) -> str:
    """Return that memory was short, and what to do; empty for an error of another kind."""
    # By name: this module must not import torch, nor wait for it.
    by_type = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    if not by_type and not any(words in str(error) for words in _NO_MEMORY):
        return ""
    ways = [f"a smaller {option_name('batch_size')}"] if "batch_size" in known else []
    ways += [f"smaller {option_name('batch_sizes')}"] if "batch_sizes" in known else []
    ways += [option_name("device", "cpu")] if "device" in known else []
    return "out of memory" + (f"; use {', or '.join(ways)}" if ways else "")


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """Let SIGTERM end the block as Ctrl-C does, unless somebody handles it.

    Of several processes it ends each at once: one that waits for the others would see no exception.
    """
    ours = threading.current_thread() is threading.main_thread() and world_size() == 1
    if not ours or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # raises KeyboardInterrupt
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _ToConsole(logging.Handler):
    """Handler that shows log records above the progress display."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.say(self.format(record))


@contextmanager
def _library_logs(console: Console) -> Iterator[None]:
    """Show warnings and logs of torch, timm and others on stderr with ``-v`` only."""
    before = logging.root.manager.disable
    handler = _ToConsole(console)
    with warnings.catch_warnings():
        if console.verbose:
            handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
            logging.root.addHandler(handler)
            logging.root.setLevel(logging.DEBUG if console.verbose > 1 else logging.INFO)
        else:
            warnings.simplefilter("ignore")
            logging.disable(logging.WARNING)  # errors of libraries are shown in any case
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        try:
            yield
        finally:
            logging.root.removeHandler(handler)
            logging.disable(before)
