"""The command line without a process of its own."""

from __future__ import annotations

from collections.abc import Mapping

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
