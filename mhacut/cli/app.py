"""The program ``mhacut``, with all commands."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, get_args

import typer
from typer.core import TyperCommand, TyperGroup

from mhacut.cli.bench import bench
from mhacut.cli.evaluate import evaluate
from mhacut.cli.export import export
from mhacut.cli.finetune import finetune
from mhacut.cli.flags import PAIR, QUIET, VERBOSE, with_flags_repeated
from mhacut.cli.inspect import inspect
from mhacut.cli.models import models
from mhacut.cli.prune import prune
from mhacut.cli.running import FAILED, Globals
from mhacut.cli.versions import versions
from mhacut.errors import OutputError
from mhacut.options.option import Panel


class _Program(TyperGroup):
    """A group whose refusals of flags and commands take one line, as all others do."""

    def make_context(self, *args: Any, **extra: Any) -> Any:
        with _refused_in_one_line():
            return super().make_context(*args, **extra)

    def invoke(self, ctx: Any) -> Any:
        with _refused_in_one_line(ctx):
            return super().invoke(ctx)


@contextmanager
def _refused_in_one_line(group: Any = None) -> Iterator[None]:
    try:
        yield
    except OutputError as error:  # help or the version cannot be printed
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(FAILED) from None
    except Exception as error:
        # By name: typer has brought its own copy of click since 0.26, and used click's before.
        if hasattr(error, "format_message") and type(error).__name__ != "NoArgsIsHelpError":
            message = error.format_message()
            text = f"error: {message[:1].lower()}{message[1:].removesuffix('.')}"
            context = getattr(error, "ctx", None)
            if context is not None:
                command = context.command_path
            elif group is not None and group.invoked_subcommand:  # click's parser does not say where it was
                command = f"{group.command_path} {group.invoked_subcommand}"
            else:
                command = "mhacut"
            advice = f"see {command} --help"
            text += f" ({advice})" if text.endswith("?") else f"; {advice}"
            error.show = lambda file=None: typer.echo(text, err=True)  # type: ignore[attr-defined]
        raise


# Markup would eat brackets in help; tracebacks are shown by mhacut.cli.running, without the values of locals.
app = typer.Typer(
    name="mhacut",
    cls=_Program,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    pretty_exceptions_show_locals=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


class _InPanels(TyperCommand):
    """A command whose help lists its flags under headings, and whose KEY=VALUE flags take several pairs."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        pairs = {flag for one in self.params if one.metavar == PAIR for flag in one.opts}
        parsed: list[str] = super().parse_args(ctx, with_flags_repeated(args, pairs))
        return parsed

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {panel: [] for panel in get_args(Panel)}
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None:
                default = "Arguments" if parameter.param_type_name == "argument" else "Output"
                panel = getattr(parameter, "rich_help_panel", None) or default
                panels[panel].append((record[0].removesuffix(" <str>"), record[1]))
        for heading, records in panels.items():
            if records:
                with formatter.section(heading):
                    formatter.write_dl(records)


# Called without a command too, for --version; any other call without one is refused below.
@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help=QUIET)] = False,
    verbose: Annotated[
        int, typer.Option("--verbose", "-v", count=True, help=VERBOSE, show_default=False)
    ] = 0,
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version; with -v, also those of torch, timm, ..."),
    ] = False,
) -> None:
    """Cut channels out of the attention and the MLPs of trained vision transformers.

    FLOPs are multiply-accumulates, attention included. Results go to stdout, everything else to stderr.
    Exit codes: 0 done, 1 failed, 2 usage, 130 interrupted.
    """
    if version:
        typer.echo("\n".join(versions(everything=verbose > 0)))
        raise typer.Exit()
    if context.invoked_subcommand is None:
        context.fail("Missing command")
    context.obj = Globals(quiet=quiet, verbose=verbose)


app.command("prune", cls=_InPanels)(prune)
app.command("finetune", cls=_InPanels)(finetune)
app.command("evaluate", cls=_InPanels)(evaluate)
app.command("inspect", cls=_InPanels)(inspect)
app.command("bench", cls=_InPanels)(bench)
app.command("export", cls=_InPanels)(export)
app.command("models", cls=_InPanels)(models)
