"""Flags, arguments and help of a command, made from its options."""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from mhacut.cli.running import Console, running
from mhacut.errors import MhacutError, PeerFailed, UsageError
from mhacut.options.option import Option, Options, read_config, read_options, yaml_value
from mhacut.runtime.files import REMOTE, check_checkpoint, check_class_map, check_data_dir
from mhacut.runtime.process import local_rank

PANELS = (
    "Arguments",
    "Result",
    "Quantization",
    "What is shown",
    "Models",
    "Teacher",
    "Data",
    "Model",
    "Training",
    "Augmentation",
    "Preprocessing",
    "Measuring",
    "Computing",
    "Rarer options",
)
"""Headings of ``--help``, in this order."""
RESEARCH = "Research switches"
"""Heading of the options that have no flag: YAML, ``--set`` and Python set them."""
SHORT = {"output": "-o", "batch_size": "-b", "model": "-m", "workers": "-j"}
_CHECKS: Mapping[str, Callable[[Any], None]] = {
    "checkpoint": check_checkpoint,
    "data_dir": check_data_dir,
    "class_map": check_class_map,
}
_NO_VALUE = " "
"""Metavar of a switch: typer shows a type where there is none."""
_CONFIG = "Read options from a YAML file. Keys are flag names; flags take precedence."
_SET = "Set any option by its YAML key, research switches included: repair=false. Can be repeated."
_VERBOSE = "Show stages, and the warnings and logs of libraries; -vv shows more."
_COMMON = {
    "config": (str | None, None, typer.Option("--config", "-c", metavar="FILE.yaml", help=_CONFIG)),
    "set": (list[str] | None, None, typer.Option("--set", metavar="KEY=VALUE", help=_SET)),
    "json": (bool, False, typer.Option("--json", metavar=_NO_VALUE, help="Print one JSON object.")),
    "quiet": (
        bool,
        False,
        typer.Option("--quiet", "-q", metavar=_NO_VALUE, help="Show the result and errors only."),
    ),
    "verbose": (
        int,
        0,
        typer.Option("--verbose", "-v", metavar=_NO_VALUE, count=True, show_default=False, help=_VERBOSE),
    ),
}
"""Type, default and flag of what every command takes."""


def command(
    options: type[Options],
    *,
    usual: Sequence[str] = (),
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    check_outputs: Callable[[Any], None] | None = None,
) -> Callable[[Callable[[Any, Console], None]], Callable[..., None]]:
    """Make a command from a function of (options, console). Its flags are the fields of ``options``.

    ``--help`` shows the ``usual`` flags (default: all), ``--help-all`` all flags. ``complete`` maps the given
    values to the used values. ``check_outputs`` raises for unusable output paths, before torch is imported.
    """
    known = options.options()

    def decorate(body: Callable[[Any, Console], None]) -> Callable[..., None]:
        def run(context: typer.Context, **flags: Any) -> None:
            config, pairs, as_json = flags.pop("config"), flags.pop("set"), flags.pop("json")
            quiet, verbose = flags.pop("quiet"), flags.pop("verbose")
            del flags["help_all"]
            # Defaults exist for --help only: a value that is not on the command line may be in the YAML file.
            sources = {name: context.get_parameter_source(name) for name in flags}
            given = {n: flags[n] for n, source in sources.items() if source and source.name == "COMMANDLINE"}
            console = Console(body.__name__, quiet=quiet, verbose=verbose, as_json=as_json)
            with running(console, flag_writer(known), known):
                made = options.of(**complete(_values(known, config, pairs or [], given)))
                try:
                    check_paths(made)
                    if check_outputs is not None:
                        check_outputs(made)
                except MhacutError as error:
                    if local_rank() > 0:  # the first process on this machine says the same
                        raise PeerFailed from error
                    raise
                console.start("starting")  # bodies import torch and timm, which takes seconds
                body(made, console)

        # Fields have the order of inheritance; most users look for the budget.
        shown = sorted(known.values(), key=lambda stated: stated.name != "flops")
        shown = sorted(
            (stated for stated in shown if stated.panel != RESEARCH), key=lambda s: PANELS.index(s.panel)
        )
        hidden = [s.name for s in shown if usual and s.name not in usual and not s.is_argument]
        parameters = [_parameter("context", typer.Context)]
        parameters += [_flag(known[name], None, hidden=False) for name in usual]
        rest = [stated for stated in shown if stated.name not in usual]
        parameters += [_flag(s, s.panel, hidden=s.name in hidden) for s in rest]
        for name, (kind, default, info) in _COMMON.items():
            parameters.append(_parameter(name, Annotated[kind, info], default))
        text = f"Show {len(hidden)} more options and exit." if hidden else "Show this message and exit."
        show_all = typer.Option("--help-all", is_eager=True, metavar=_NO_VALUE, callback=_help_all, help=text)
        parameters.append(_parameter("help_all", Annotated[bool, show_all], False))
        run.__name__ = body.__name__
        paragraphs = inspect.cleandoc(body.__doc__ or "").split("\n\n")
        run.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        vars(run).update(__signature__=inspect.Signature(parameters), options=options)
        return run

    return decorate


class Command(TyperCommand):
    """A command that names the replacement of a flag that does not exist."""

    options: Mapping[str, Option]

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the flags. An unknown flag of a known option is answered with the right spelling."""
        try:
            return super().parse_args(ctx, args)
        except Exception as error:
            # By attribute: click's NoSuchOption, or typer's copy of the class, by typer's version.
            replacement = self._replacement(getattr(error, "option_name", None) or "")
            if replacement and hasattr(error, "possibilities"):
                error.possibilities = None
                vars(error)["message"] = f"No such option: {error.option_name}. {replacement}"  # type: ignore[attr-defined]
            raise

    def _replacement(self, flag: str) -> str:
        key = flag.removeprefix("--").replace("-", "_")
        name = key if key in self.options else key.removeprefix("no_")
        stated = self.options.get(name)
        if stated is None:
            return ""
        if stated.panel == RESEARCH:
            value = "VALUE" if stated.kind is not bool else "false" if key != name else "true"
            return f"Use --set {name}={value}, or {name}: {value} in a --config file."
        return f"This is the default. To change it, use {_spelling(stated)}." if stated.kind is bool else ""


def _help_all(ctx: typer.Context, value: bool) -> None:
    """Print the help with all flags."""
    if not value:
        return
    hidden = [parameter for parameter in ctx.command.params if getattr(parameter, "hidden", False)]
    for parameter in hidden:
        vars(parameter)["hidden"] = False
    typer.echo(ctx.get_help())
    for parameter in hidden:
        vars(parameter)["hidden"] = True
    raise typer.Exit


def check_paths(options: Options) -> None:
    """Raise the error that the command itself would give, seconds later, if a path cannot be read."""
    for name, one in options.options().items():
        value = getattr(options, name)
        if value is not None and one.reads is not None:
            for path in value if one.element else (value,):
                if not os.fspath(path).startswith(REMOTE):
                    _CHECKS[one.reads](path)


def flag_writer(options: Mapping[str, Option]) -> Callable[..., str]:
    """Return the writer of options in messages that makes them flags: ``--round-to 8``, ``--no-labels``."""

    def write(name: str, *value: Any) -> str:
        pairs = name.endswith("model_args")  # of another command, perhaps
        flag = "--" + (name.removesuffix("s") if pairs else name.rstrip("_")).replace("_", "-")
        if name in options and options[name].is_argument:
            return options[name].placeholder.removesuffix("...")
        if not value or value[0] is True or value[0] is None:
            return flag
        (given,) = value
        if given is False:
            return "--no-" + flag.removeprefix("--")
        if isinstance(given, Mapping):
            return " ".join(f"{flag} {key}={_as_text(part)}" for key, part in given.items())
        return f"{flag} {shlex.quote(_as_text(given))}"

    return write


def _values(
    options: Mapping[str, Option], config: str | None, pairs: Sequence[str], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the values of a YAML file, overridden by ``--set``, overridden by flags."""
    values: dict[str, Any] = {}
    if config is not None:
        try:
            values = read_config(config, options, f"--config {config}")
        except OSError as error:
            raise UsageError(f"--config {config}: {error.strerror or error}") from None
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UsageError(f"--set {pair}: expected KEY=VALUE")
        values |= read_options({key: yaml_value(text)}, options, f"--set {pair}")
    for flag, value in given.items():
        off = flag not in options  # --no-labels sets labels to false
        name, value = (flag.removeprefix("no_"), False) if off else (flag, value)
        checked = options[name].check(value)
        values[name] = {**values.get(name, {}), **checked} if options[name].takes_pairs else checked
    return values


def _spelling(switch: Option) -> str:
    """Return the flag that changes the default of a switch."""
    return f"--no-{switch.flag.removeprefix('--')}" if switch.default is True else switch.flag


def _flag(one: Option, panel: str | None, *, hidden: bool) -> inspect.Parameter:
    """Make a flag or an argument."""
    # Typer reads values as text: Option.check converts flags, YAML and Python with the same code.
    switch = one.kind is bool
    kind: Any = bool if switch else list[str] if one.repeats or one.takes_pairs else str
    info: Any
    text = (one.off if switch and one.default is True else one.help).replace("[", r"\[")  # no rich markup
    if not all(choice in text for choice in one.choices):
        text += f" One of {', '.join(one.choices)}."
    if one.is_argument:
        kind = list[str] if one.element else str
        info = typer.Argument(help=text, metavar=one.placeholder, show_default=False)
    else:
        flags = [_spelling(one) if switch else one.flag, *([SHORT[one.name]] if one.name in SHORT else [])]
        info = typer.Option(
            *flags,
            help=text,
            metavar=one.placeholder or _NO_VALUE,
            hidden=hidden,
            rich_help_panel=panel,
        )
    default = None if one.required or one.default in (None, (), {}) else one.default
    info.show_default = default is not None and not switch
    if switch:
        return _parameter(f"no_{one.name}" if default else one.name, Annotated[bool, info], False)
    return _parameter(one.name, Annotated[kind | None, info], None if default is None else _as_text(default))


def _as_text(value: Any) -> str:
    return ",".join(map(_as_text, value)) if isinstance(value, tuple | list) else f"{value}"


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
