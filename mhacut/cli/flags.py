"""Flags, arguments and help of a command, made from its options."""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable, Mapping
from typing import Annotated, Any

import typer

from mhacut.cli.running import Console, running
from mhacut.errors import MhacutError, PeerFailed, UsageError
from mhacut.options.option import Option, Options, read_config
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
    "Research switches",
)
"""Headings of ``--help``, in this order, after that of the flags that every command has."""
SHORT = {"output": "-o", "batch_size": "-b", "model": "-m", "workers": "-j"}
_CHECKS: Mapping[str, Callable[[Any], None]] = {
    "checkpoint": check_checkpoint,
    "data_dir": check_data_dir,
    "class_map": check_class_map,
}
_CONFIG = "Read options from a YAML file whose keys are flag names; flags take precedence."
_VERBOSE = "Show stages, and the warnings and logs of libraries; -vv shows more."
_COMMON = {
    "config": (str | None, None, typer.Option("--config", "-c", metavar="FILE.yaml", help=_CONFIG)),
    "json": (bool, False, typer.Option("--json", help="Print one JSON object.")),
    "quiet": (bool, False, typer.Option("--quiet", "-q", help="Show the result and errors only.")),
    "verbose": (int, 0, typer.Option("--verbose", "-v", count=True, show_default=False, help=_VERBOSE)),
}
"""Type, default and flag of what every command takes."""


def command(
    options: type[Options],
    *,
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    check_outputs: Callable[[Any], None] | None = None,
) -> Callable[[Callable[[Any, Console], None]], Callable[..., None]]:
    """Make a command of a function of (options, console); its flags are the fields of ``options``.

    A value is the flag's, else the ``--config`` file's, else the default in ``options``.
    """
    known = options.options()

    def decorate(body: Callable[[Any, Console], None]) -> Callable[..., None]:
        def run(
            context: typer.Context, config: str | None, json: bool, quiet: bool, verbose: int, **flags: Any
        ) -> None:
            # Defaults are there for --help alone: what is not given may stand in the YAML file.
            sources = {name: context.get_parameter_source(name) for name in flags}
            given = {n: flags[n] for n, source in sources.items() if source and source.name == "COMMANDLINE"}
            console = Console(body.__name__, quiet=quiet, verbose=verbose, as_json=json)
            with running(console, flag_writer(known), known):
                made = options.of(**complete(_values(known, config, given)))
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

        # Fields have the order of inheritance; the budget is what most users look for.
        shown = sorted(known.values(), key=lambda one: (PANELS.index(one.panel), one.name != "flops"))
        parameters = [_parameter("context", typer.Context), *map(_flag, shown)]
        for name, (kind, default, info) in _COMMON.items():
            parameters.append(_parameter(name, Annotated[kind, info], default))
        run.__name__ = body.__name__
        paragraphs = inspect.cleandoc(body.__doc__ or "").split("\n\n")
        run.__doc__ = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
        vars(run).update(__signature__=inspect.Signature(parameters), options=options)
        return run

    return decorate


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


def _values(options: Mapping[str, Option], config: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a file, overridden by those given as flags."""
    values: dict[str, Any] = {}
    if config is not None:
        try:
            values = read_config(config, options, f"--config {config}")
        except OSError as error:
            raise UsageError(f"--config {config}: {error.strerror or error}") from None
    for name, value in given.items():
        checked = options[name].check(value)
        values[name] = {**values.get(name, {}), **checked} if options[name].takes_pairs else checked
    return values


def _flag(one: Option) -> inspect.Parameter:
    """Make one flag, or argument."""
    # All but switches are text to Typer: Option.check reads flags, YAML and Python alike.
    kind: Any = bool if one.kind is bool else list[str] if one.repeats or one.takes_pairs else str
    info: Any
    text = one.help.replace("[", r"\[")  # rich would take 'mhacut[onnx]' for markup
    if not all(choice in text for choice in one.choices):
        text += f" One of {', '.join(one.choices)}."
    if one.is_argument:
        kind = list[str] if one.element else str
        info = typer.Argument(help=text, metavar=one.placeholder, show_default=False)
    else:
        switch = f"{one.flag}/--no-{one.flag.removeprefix('--')}" if kind is bool else one.flag
        flags = [switch, SHORT[one.name]] if one.name in SHORT else [switch]
        info = typer.Option(*flags, help=text, metavar=one.placeholder or None, rich_help_panel=one.panel)
    default = None if one.required or one.default in (None, (), {}) else one.default
    info.show_default = default is not None and default is not False
    default = default if kind is bool or default is None else _as_text(default)
    return _parameter(one.name, Annotated[kind | None, info], default)


def _as_text(value: Any) -> str:
    return ",".join(map(_as_text, value)) if isinstance(value, tuple | list) else f"{value}"


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
