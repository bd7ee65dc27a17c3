"""Surroundings of every command: a console, quiet libraries, errors turned into exit codes."""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import typer

from mhacut.cli.console import Console, safe_lines
from mhacut.cli.interrupts import interruptible
from mhacut.cli.quitting import INTERRUPTED
from mhacut.errors import (
    FailedElsewhere,
    Interrupted,
    MhacutError,
    OptionWriter,
    UsageError,
    option_name,
    options_written_by,
)
from mhacut.runtime.process import rank

FAILED, USAGE = 1, 2
_NO_MEMORY = ("can't allocate memory", "not enough memory", "Cannot allocate memory")
"""Words of a RuntimeError of torch on the CPU, and of the system."""
_TOO_MANY = "Too many open files"
_SECONDS_TO_SAY_WHY = 10
"""Delay before a process that fails because of another exits: torchrun ends all processes at the first
failure, and the process that reports the reason must be first."""


@dataclass(frozen=True)
class Globals:
    """Flags that may stand before or after the command's name."""

    quiet: bool = False
    verbose: int = 0
    as_json: bool = False

    def joined(self, other: Globals | None) -> Globals:
        other = other or Globals()
        return Globals(self.quiet or other.quiet, self.verbose + other.verbose, self.as_json or other.as_json)


@contextmanager
def running(flags: Globals, writer: OptionWriter, known: Collection[str]) -> Iterator[Console]:
    """Give a command's body a console, and turn its errors into messages and exit codes.

    Messages name options as ``writer`` writes them, and of those that save memory only ``known`` ones.

    mhacut's own errors are shown as one message; any other error is a bug and shows its traceback.
    ``MHACUT_DEBUG=1`` shows every traceback.
    """
    console = Console(quiet=flags.quiet, verbose=flags.verbose, as_json=flags.as_json, rank=rank())
    debug = os.environ.get("MHACUT_DEBUG", "") not in ("", "0")
    code = 0
    with options_written_by(writer), _library_logs(console):
        try:
            with interruptible():
                _check_current_directory()
                yield console
        except KeyboardInterrupt:
            if console.rank == 0:
                console.error("interrupted; nothing was left half written")
            code = INTERRUPTED
        except Interrupted as error:
            if console.rank == 0:  # all processes stop alike
                console.error(str(error))
            code = INTERRUPTED
        except FailedElsewhere:
            time.sleep(_SECONDS_TO_SAY_WHY)
            code = FAILED
        except MhacutError as error:
            if debug:
                console.traceback()
            console.error(f"error: {error}")
            code = USAGE if isinstance(error, UsageError) else FAILED
        except Exception as error:
            if _out_of_memory(error) and not debug:
                console.error(f"error: out of memory{_advice(known)}")
                code = FAILED
            elif _TOO_MANY in str(error) and not debug:
                console.error("error: too many open files; allow more, as with `ulimit -n 4096`")
                code = FAILED
            else:
                code = _unforeseen(console, error)
        finally:
            console.finish()
    if code:
        raise typer.Exit(code)


def _check_current_directory() -> None:
    """Check that it is still there; without it torch cannot be imported, whatever the paths."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise MhacutError("the current directory no longer exists; change to another (cd)") from None


def _unforeseen(console: Console, error: Exception) -> int:
    console.traceback()
    console.error(
        f"error: mhacut did not foresee this {type(error).__name__}; please report it with the lines above"
    )
    return FAILED


def _advice(known: Collection[str]) -> str:
    """Return what to do where memory is short, with the options of the command."""
    ways = [f"a smaller {option_name('batch_size')}"] if "batch_size" in known else []
    ways += [f"smaller {option_name('batch_sizes')}"] if "batch_sizes" in known else []
    ways += [option_name("device", "cpu")] if "device" in known else []
    return f"; use {', or '.join(ways)}" if ways else ""


def _out_of_memory(error: Exception) -> bool:
    # By name: this module must not import torch, nor wait for it.
    known = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return known or any(words in str(error) for words in _NO_MEMORY)


class _ToConsole(logging.Handler):
    """Handler that shows log records above the progress display."""

    def __init__(self, console: Console) -> None:
        super().__init__()
        self.console = console

    def emit(self, record: logging.LogRecord) -> None:
        self.console.say(safe_lines(self.format(record)))


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
            logging.disable(logging.WARNING)
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        try:
            yield
        finally:
            logging.root.removeHandler(handler)
            logging.disable(before)
