"""Flags, arguments and help of a command, made from its options."""

from __future__ import annotations

import inspect
import os
import shlex
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Annotated, Any

import typer

from mhacut.cli.console import Console
from mhacut.cli.paths import check_paths
from mhacut.cli.running import Globals, running
from mhacut.errors import FailedElsewhere, MhacutError, UsageError, option_name
from mhacut.options.config import convert, key_value, read_config
from mhacut.options.option import REQUIRED, Option, Options
from mhacut.runtime.process import local_rank

Body = Callable[[Any, Console], None]
QUIET = "Show the result and errors only."
VERBOSE = "Show stages, and the warnings and logs of libraries; -vv shows more."
PAIR = "KEY=VALUE ..."
"""Placeholder of flags that take pairs."""
_COMMON = ("config", "json", "quiet", "verbose")
"""Flags of every command that are no options of its function."""


def command(
    options: type[Options],
    *,
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    check_outputs: Callable[[Any], None] | None = None,
) -> Callable[[Body], Callable[..., None]]:
    """Make a command of a function of (options, console); its flags are the fields of ``options``.

    A value is the flag's, else the ``--config`` file's, else the default in ``options``.

    Args:
        options: the class of what the function takes.
        complete: given the values, returns those to use.
        check_outputs: given the options, raises an error if a file must not or cannot be written,
            before torch is imported.
    """
    known = options.options()

    def decorate(body: Body) -> Callable[..., None]:
        def run(**given: Any) -> None:
            context = given.pop("context")
            shared = Globals(
                quiet=given.pop("quiet"), verbose=given.pop("verbose"), as_json=given.pop("json")
            ).joined(context.obj)
            with running(shared, flag_writer(known), known) as console:
                values = complete(_values(known, given.pop("config"), given))
                made = options.from_flat(**values)
                _check_paths(made, check_outputs)
                # Bodies import torch and timm, which takes seconds.
                console.start("starting")
                body(made, console)

        run.__name__ = body.__name__
        run.__doc__ = inspect.cleandoc(body.__doc__ or "")
        parameters = [_parameter("context", typer.Context)]
        parameters += map(_flag, known.values())
        parameters += _common()
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _check_paths(options: Options, check_outputs: Callable[[Any], None] | None) -> None:
    """Check the paths of ``options``; of several processes on one machine, only the first reports errors."""
    try:
        check_paths(options)
        if check_outputs is not None:
            check_outputs(options)
    except MhacutError as error:
        if local_rank() > 0:
            raise FailedElsewhere from error
        raise


def _values(options: Mapping[str, Option], config: str | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """Values of a file, overridden by those given as flags."""
    values = {} if config is None else _read_config(config, options)
    for name, value in given.items():
        option = options[name]
        if value is None or value == []:
            continue
        if option.once:
            if len(value) > 1:
                found = " and ".join(shlex.quote(str(one)) for one in value)
                raise UsageError(f"{option.flag}: expected one value, found {found}")
            (value,) = value
        if option.takes_pairs:
            value = {**values.get(name, {}), **dict(key_value(option.flag, pair) for pair in value)}
        if option.repeats and (option.element or len(value) == 1):
            value = ",".join(value)
        values[name] = convert(value, option.type, option_name(name))
    return values


def _read_config(path: str, options: Mapping[str, Option]) -> dict[str, Any]:
    where = f"--config {path}"
    try:
        return read_config(path, options, where, flags_only=_COMMON)
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror or error}") from None


def flag_writer(options: Mapping[str, Option]) -> Callable[..., str]:
    """Return the writer of options in messages that makes them flags: ``--round-to 8``, ``--no-labels``."""

    def write(name: str, *value: Any) -> str:
        option = options.get(name) or Option(name=name, help="", panel="Result", type=_type_of(*value))
        if option.is_argument:
            return (option.metavar or name.upper()).removesuffix("...")
        flag = option.flag
        if not value or value[0] is True or value[0] is None:
            return flag
        (given,) = value
        if given is False:
            return "--no-" + flag.removeprefix("--")
        if isinstance(given, Mapping):
            return " ".join(f"{flag} {key}={part}" for key, part in given.items())
        text = ",".join(map(str, given)) if isinstance(given, tuple | list) else str(given)
        return f"{flag} {shlex.quote(text)}"

    return write


def _type_of(*value: Any) -> Any:
    """Guess the type of an option that only another command has."""
    return Mapping[str, Any] if value and isinstance(value[0], Mapping) else str


def with_flags_repeated(arguments: Sequence[str], flags: Collection[str]) -> list[str]:
    """Return ``arguments`` with the flag before each of several pairs that follow it.

    So that ``--model-arg a=1 b=2`` means what timm's ``--model-kwargs a=1 b=2`` does. A file that exists is
    no pair, whatever its name.

    >>> with_flags_repeated(["--model-arg", "a=1", "b=2", "vit.pth", "c=3"], ["--model-arg"])
    ['--model-arg', 'a=1', '--model-arg', 'b=2', 'vit.pth', 'c=3']

    Args:
        arguments: of a command.
        flags: those whose values are pairs.
    """
    found: list[str] = []
    flag = None
    values = 0
    for number, argument in enumerate(arguments):
        if argument == "--":
            return [*found, *arguments[number:]]
        name, equals, _ = argument.partition("=")
        if name in flags:
            flag, values = name, int(bool(equals))
        elif flag is not None and values and name.isidentifier() and equals and not os.path.exists(argument):
            found.append(flag)
        elif flag is not None and not values:
            values = 1  # the flag's own value, whatever it is
        else:
            flag = None
        found.append(argument)
    return found


def _flag(option: Option) -> inspect.Parameter:
    """Make one flag. Its own default is None: that marks a flag that was not given."""
    if option.is_argument:
        argument = typer.Argument(help=option.help, metavar=option.metavar, show_default=False)
        given: Any = list[str] if option.element else str
        return _parameter(option.name, Annotated[given | None, argument], None)
    switch = option.kind is bool
    flags = [f"{option.flag}/--no-{option.flag.removeprefix('--')}" if switch else option.flag]
    flags += [option.short] if option.short else []
    info = typer.Option(
        *flags,
        help=option.help + _shown_default(option.default),
        metavar=PAIR if option.takes_pairs else "|".join(option.choices) or option.metavar,
        show_default=False,
        rich_help_panel=option.panel,
    )
    python: Any = option.kind if option.kind in (bool, int, float) else str
    if option.takes_pairs or option.repeats:
        python = list[str]
    elif option.once:
        python = list[python]
    return _parameter(option.name, Annotated[python | None, info], None)


def _common() -> list[inspect.Parameter]:
    config = typer.Option(
        "--config",
        "-c",
        metavar="FILE.yaml",
        help="Read options from a YAML file whose keys are flag names; flags take precedence.",
    )
    as_json = typer.Option("--json", help="Print one JSON object.")
    quiet = typer.Option("--quiet", "-q", help=QUIET)
    verbose = typer.Option("--verbose", "-v", count=True, help=VERBOSE, show_default=False)
    return [
        _parameter("config", Annotated[str | None, config], None),
        _parameter("json", Annotated[bool, as_json], False),
        _parameter("quiet", Annotated[bool, quiet], False),
        _parameter("verbose", Annotated[int, verbose], 0),
    ]


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _shown_default(default: Any) -> str:
    """Return the default as a user types it; typer would show the flag's own, which is None."""
    if default is None or default is REQUIRED or default in ({}, ()):
        return ""
    if isinstance(default, bool):
        shown = "on" if default else "off"
    elif isinstance(default, tuple):
        shown = ",".join(f"{part:.4g}" for part in default)
    else:
        shown = str(default)
    return f" (default: {shown})"
