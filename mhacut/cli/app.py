"""The program ``mhacut``."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated

import typer

from mhacut._version import __version__
from mhacut.cli.export import export
from mhacut.cli.finetune import finetune
from mhacut.cli.flags import show_all
from mhacut.cli.inspect import inspect
from mhacut.cli.measure import bench, evaluate, models
from mhacut.cli.prune import prune
from mhacut.options.option import Options

_COMMANDS = (prune, finetune, evaluate, inspect, bench, export, models)
COMMANDS: Mapping[str, type[Options]] = {each.__name__: getattr(each, "options") for each in _COMMANDS}  # noqa: B009
"""Options class of each command, by command name."""
app = typer.Typer(
    name="mhacut",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text fits 80 columns, pipes and screen readers
    pretty_exceptions_enable=False,  # mhacut.cli.running prints tracebacks
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in _COMMANDS:
    app.command(command.__name__, cls=getattr(command, "kind"))(command)  # noqa: B009


def _show_version(wanted: bool) -> None:
    if wanted:
        libraries = [f"{name} {version(name)}" for name in ("torch", "timm", "safetensors")]
        python = f"python {platform.python_version()} on {platform.system()} {platform.machine()}"
        typer.echo(f"mhacut {__version__} ({', '.join([python, *libraries])})")
        raise typer.Exit


@app.callback()
def root(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            is_eager=True,
            callback=_show_version,
            help="Print versions of mhacut, torch and timm.",
        ),
    ] = False,
    help_all: Annotated[
        bool, typer.Option("--help-all", is_eager=True, callback=show_all, hidden=True)
    ] = False,
) -> None:
    """Make trained vision transformers smaller and faster: prune channels, merge tokens.

    FLOPs are multiply-accumulates, attention included. Results go to stdout, messages to stderr.
    Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted. "mhacut COMMAND --help-all" shows all
    options of a command.
    """
