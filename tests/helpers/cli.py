"""The command line without a process of its own, and what a refusal is."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from click.testing import Result
from typer.testing import CliRunner

from mhacut.cli.app import app

FAST = ["--gain-steps", "2", "--calibration-images", "8", "--batch-size", "4", "--no-latency"]
"""Flags of ``prune`` with which it takes a second."""


def run(*arguments: object, env: Mapping[str, str] | None = None) -> Result:
    """Run ``mhacut`` with ``arguments``; what it did not foresee is raised."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def tree(folder: Path) -> dict[str, bytes | str]:
    """Everything under ``folder``, with the bytes of each file."""
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        kind = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "other"
        found[str(path.relative_to(folder))] = kind
    return found


def refusal(folder: Path, *arguments: object, code: int = 1) -> str:
    """The message of a command that is refused, and that leaves all under ``folder``, and here, as it is."""
    before, here = tree(folder), tree(Path.cwd())
    result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert "Traceback" not in result.stderr
    assert all(char == "\n" or char.isprintable() for char in result.stderr)
    assert (tree(folder), tree(Path.cwd())) == (before, here)
    return result.stderr
