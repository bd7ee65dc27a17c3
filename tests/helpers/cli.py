"""The command line without a process of its own, and what a refusal is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from click.testing import Result
from typer.testing import CliRunner

from mhacut.cli.app import app

FAST = ["--calibration-images", "8", "--batch-size", "4", "--no-latency"]
"""Flags of ``prune`` with which it takes a second."""


def research(**values: object) -> list[str]:
    """Flags that set research switches: ``--set basis=channel``."""
    return [word for name, value in values.items() for word in ("--set", f"{name}={str(value).lower()}")]


def run(*arguments: object, env: Mapping[str, str] | None = None) -> Result:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env=env)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def succeed(*arguments: object, env: Mapping[str, str] | None = None) -> Result:
    result = run(*arguments, env=env)
    assert result.exit_code == 0, result.stderr
    return result


def document_of(*arguments: object) -> dict[str, Any]:
    return json.loads(succeed(*arguments, "--json").stdout)


def tree(folder: Path) -> dict[str, bytes | str]:
    found: dict[str, bytes | str] = {}
    for path in sorted(folder.rglob("*")):
        kind = os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else "other"
        found[str(path.relative_to(folder))] = kind
    return found


ROOT = Path(__file__).parents[2]


def _states(paths: Iterable[Path]) -> dict[Path, tuple[int, bytes]]:
    files = [file for path in paths for file in (path.rglob("*") if path.is_dir() else [path])]
    return {file: (file.stat().st_mtime_ns, file.read_bytes()) for file in files if file.is_file()}


@contextmanager
def unchanged(*paths: Path) -> Iterator[None]:
    """A block that leaves these files, and those under these folders, as they are; others may be missing."""
    before = _states(paths)
    yield
    assert _states(paths) == before


def refusal(folder: Path, *arguments: object, code: int = 1) -> str:
    """The message of a command that is refused, and that leaves all as it is: its inputs, ``folder``, here.

    Inputs are the files and folders that ``arguments`` name, wherever they lie.
    """
    places = {folder, Path.cwd()} - {ROOT}  # the repository, where tests beside this one may write
    before = [tree(place) for place in places]
    with unchanged(*(Path(str(argument)) for argument in arguments)):
        result = run(*arguments)
    assert (result.exit_code, result.stdout) == (code, ""), result.stderr
    assert "Traceback" not in result.stderr
    assert all(char == "\n" or char.isprintable() for char in result.stderr)
    assert [tree(place) for place in places] == before
    return result.stderr
