"""Flags, arguments and help of a command, made from its options."""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar

import typer
from typer.core import TyperCommand

from mhacut.cli.running import Console, running
from mhacut.errors import MhacutError, PeerFailed
from mhacut.options.option import Option, Options, read_config, read_options, yaml_value
from mhacut.runtime.files import REMOTE, check_checkpoint, check_class_map, check_data_dir
from mhacut.runtime.process import local_rank

RESEARCH = "Research switches"
"""Panel of the research switches, which have no flag. YAML files, ``--set`` and Python set them."""
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
    RESEARCH,
)
"""Headings of option groups, in the order of ``--help-all`` and of the docs."""
SHORT = {"output": "-o", "batch_size": "-b", "model": "-m", "workers": "-j"}
_CHECKS: Mapping[str, Callable[[Any], None]] = {
    "checkpoint": check_checkpoint,
    "data_dir": check_data_dir,
    "class_map": check_class_map,
}
"""Function that checks an input path, by the kind of input in ``Option.reads``."""
_CONFIG = "Read options from a YAML file, such as round_to: 8. Flags win."
_SET = "Set any option by its YAML key, such as repair=false. Can be repeated."
_VERBOSE = "Show stages, warnings and library logs. -vv shows more."
_ALL = "Show all options."


def show_all(context: typer.Context, wanted: bool) -> None:
    if wanted:
        context.obj = show_all  # a sign for Command.format_options
        typer.echo(context.get_help())
        raise typer.Exit


_COMMON = {
    "config": (str | None, None, typer.Option("--config", "-c", metavar="FILE.yaml", help=_CONFIG)),
    "set": (list[str] | None, None, typer.Option("--set", metavar="KEY=VALUE", help=_SET)),
    "json": (bool, False, typer.Option("--json", help="Print one JSON object.")),
    "quiet": (bool, False, typer.Option("--quiet", "-q", help="Show the result and errors only.")),
    "verbose": (int, 0, typer.Option("--verbose", "-v", count=True, show_default=False, help=_VERBOSE)),
    "help_all": (bool, False, typer.Option("--help-all", is_eager=True, callback=show_all, help=_ALL)),
}
"""Type, default and flag of the options that every command has, by name."""


class Command(TyperCommand):
    """A command with a short ``--help``, a complete ``--help-all``, and errors for removed flags."""

    known: ClassVar[Mapping[str, Option]]
    usual: ClassVar[Sequence[str]]
    """Names of the options in the short ``--help``, in this order."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        replacements = _replacements(self.known)
        for flag in (argument.partition("=")[0] for argument in args):
            if flag in replacements:
                ctx.fail(f"{flag} {replacements[flag]}")
        return super().parse_args(ctx, args)

    def format_options(self, ctx: Any, formatter: Any) -> None:
        rows = {param.name: param.get_help_record(ctx) for param in self.get_params(ctx)}
        flags = _flags(self.known)
        arguments = [option for option in flags if option.is_argument]
        rows |= {option.name: (option.placeholder, option.help) for option in arguments}
        panels = {panel: [option.name for option in flags if option.panel == panel] for panel in PANELS}
        left = len(self.known) - len(flags)
        note = f"{left} research switches have no flag: use --set KEY=VALUE, a --config file or Python. "
        note += "The reference page of this command lists them."
        if ctx.obj is not show_all:
            panels = {"Arguments": panels["Arguments"], "Options": list(self.usual)}
            left = len(flags) - len(arguments) - len(self.usual)
            note = f"--help-all shows {left} more options."
        panels["Every command"] = [*_COMMON, "help"]
        for panel, names in panels.items():
            if names:
                with formatter.section(panel):
                    formatter.write_dl([rows[name] for name in names], col_max=28)
        if left:
            formatter.write_paragraph()
            formatter.write_text(note)


def _flags(known: Mapping[str, Option]) -> list[Option]:
    flags = (option for option in known.values() if option.panel != RESEARCH)
    return sorted(flags, key=lambda option: (PANELS.index(option.panel), option.name != "flops"))


_REMOVED = {
    "--calibration": "repeat --flops, because several budgets share the calibration",
    "--feature-weight": "distill logits with --teacher, which gave higher accuracy",
    "--quantization": "use --int8, which quantizes activations dynamically",
}
"""Advice for each removed flag: what to use instead."""


def _replacements(known: Mapping[str, Option]) -> dict[str, str]:
    """Return the advice for each flag that this command does not accept, such as a removed flag."""
    replacements = {flag: f"was removed: {way}" for flag, way in _REMOVED.items()}
    for option in known.values():
        for flag in (option.flag, option.negative):
            value = str(flag == option.flag).lower() if option.kind is bool else "VALUE"
            if option.panel == RESEARCH:
                replacements[flag] = f"is a research switch: use --set {option.key}={value}"
            elif option.kind is bool and flag != option.switch:
                replacements[flag] = "is the default: leave it out"
    return replacements


def command(
    options: type[Options],
    *,
    usual: Sequence[str] = (),
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    check_outputs: Callable[[Any], None] | None = None,
) -> Callable[[Callable[[Any, Console], None]], Callable[..., None]]:
    """Turn a function of (options, console) into a command with the flags of ``options``.

    Flags override ``--set``, which overrides the ``--config`` file. ``usual`` names the options in the short
    help. ``complete`` may change the values. ``check_outputs`` runs before torch is imported.
    """
    known = options.options()

    def decorate(body: Callable[[Any, Console], None]) -> Callable[..., None]:
        def run(context: typer.Context, **flags: Any) -> None:
            common = {name: flags.pop(name) for name in _COMMON}
            config, pairs = common["config"], common["set"] or []
            # Flags that were not given may stand in the YAML file: their defaults are for the help.
            sources = {name: context.get_parameter_source(name) for name in flags}
            from_flags = {
                n: flags[n] for n, source in sources.items() if source and source.name == "COMMANDLINE"
            }
            display = {"as_json": common["json"], "quiet": common["quiet"], "verbose": common["verbose"]}
            console = Console(body.__name__, **display)
            with running(console, flag_writer(known), known):
                made = options.of(**complete(_values(known, config, pairs, from_flags)))
                try:
                    check_paths(made)
                    if check_outputs is not None:
                        check_outputs(made)
                except MhacutError as error:
                    if local_rank() > 0:  # the first process on this machine reports the same error
                        raise PeerFailed from error
                    raise
                console.start("starting")  # bodies import torch and timm, which takes seconds
                body(made, console)

        parameters = [_parameter("context", typer.Context), *map(_flag, _flags(known))]
        for name, (kind, default, info) in _COMMON.items():
            parameters.append(_parameter(name, Annotated[kind, info], default))
        run.__name__ = body.__name__
        paragraphs = inspect.cleandoc(body.__doc__ or "").split("\n\n")
        run.__doc__ = "\n\n".join(
            # \b: lines of examples are not refilled.
            f"\b\n{text}" if text.startswith("Example") else " ".join(text.split())
            for text in paragraphs
        )
        command_class = type("Command", (Command,), {"known": known, "usual": usual})
        vars(run).update(__signature__=inspect.Signature(parameters), options=options, kind=command_class)
        return run

    return decorate


def check_paths(options: Options) -> None:
    for name, option in options.options().items():
        value = getattr(options, name)
        if value is not None and option.reads is not None:
            for path in value if option.element else (value,):
                if not os.fspath(path).startswith(REMOTE):
                    _CHECKS[option.reads](path)


def flag_writer(options: Mapping[str, Option]) -> Callable[..., str]:
    """Return a function that writes options as flags in messages: ``--round-to 8``, ``--no-labels``.

    Research switches have no flag: ``--set selection=indicator``.
    """

    def write(name: str, *value: Any) -> str:
        option, setting = options.get(name), value[0] if value else None
        if option is not None and option.is_argument:
            return option.placeholder.removesuffix("...")
        if option is not None and option.panel == RESEARCH:
            return name if setting is None else f"--set {name}={_as_text(setting)}"
        pairs = name.endswith("model_args")  # of another command, perhaps
        flag = (name.removesuffix("s") if pairs else name.rstrip("_")).replace("_", "-")
        flag = f"--no-{flag}" if setting is False else f"--{flag}"
        if setting is None or isinstance(setting, bool):
            return flag
        if isinstance(setting, Mapping):
            return " ".join(f"{flag} {key}={_as_text(part)}" for key, part in setting.items())
        return f"{flag} {shlex.quote(_as_text(setting))}"

    return write


def _values(
    options: Mapping[str, Option], config: str | None, pairs: Sequence[str], from_flags: Mapping[str, Any]
) -> dict[str, Any]:
    """Return option values: flags override ``--set``, which overrides the YAML file."""
    values = {} if config is None else read_config(config, options, f"--config {config}")
    for pair in pairs:
        key, _, text = pair.partition("=")
        values |= read_options({key: yaml_value(text)}, options, f"--set {pair}")
    for name, value in from_flags.items():
        if options[name].kind is bool:  # a switch has one spelling, which changes the default
            value = not options[name].default
        checked = options[name].check(value)
        values[name] = {**values.get(name, {}), **checked} if options[name].takes_pairs else checked
    return values


def _flag(option: Option) -> inspect.Parameter:
    # All but switches are text to Typer: Option.check reads flags, YAML and Python alike.
    kind: Any = bool if option.kind is bool else list[str] if option.repeats or option.takes_pairs else str
    info: Any
    text = option.off or option.help
    if not all(choice in text for choice in option.choices):
        text += f" One of {', '.join(option.choices)}."
    if option.is_argument:
        kind = list[str] if option.element else str
        info = typer.Argument(help=text, metavar=option.placeholder, show_default=False)
    else:
        spelled = option.switch if kind is bool else option.flag
        flags = [spelled, SHORT[option.name]] if option.name in SHORT else [spelled]
        info = typer.Option(*flags, help=text, metavar=option.placeholder or None)
    default = None if option.required or option.default in (None, (), {}) else option.default
    info.show_default = default is not None and kind is not bool
    default = False if kind is bool else None if default is None else _as_text(default)
    return _parameter(option.name, Annotated[kind | None, info], default)


def _as_text(value: Any) -> str:
    if isinstance(value, tuple | list):
        return ",".join(map(_as_text, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
