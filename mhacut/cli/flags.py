"""Flags made from options: names, types and defaults are those of :mod:`mhacut.options`, help is here."""

from __future__ import annotations

import inspect
import json
from ast import literal_eval
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

from mhacut.cli.config import convert, read_config
from mhacut.cli.console import Console
from mhacut.cli.running import Globals, running
from mhacut.errors import UsageError
from mhacut.options.base import Flat

Body = Callable[[Any, Console], None]


@dataclass(frozen=True)
class Flag:
    """How an option looks on the command line."""

    panel: str
    """Heading it stands under in the help."""
    help: str
    metavar: str | None = None
    short: str | None = None


_ARGUMENTS = ("checkpoint", "checkpoints", "pattern")
"""Options without dashes."""

FLAGS: dict[str, Flag] = {
    "checkpoint": Flag("", "A .safetensors or .pth file, a timm folder, or timm:NAME.", "CHECKPOINT"),
    "flops": Flag(
        "Result",
        "Budget: 2.0G, 600M, 2e9 or 50%. One FLOP is one multiply-accumulate, attention included.",
        "BUDGET",
    ),
    "output": Flag(
        "Result", "File to write; by default CHECKPOINT's stem and the budget, here.", "FILE", "-o"
    ),
    "overwrite": Flag("Result", "Replace FILE if it exists; CHECKPOINT is never replaced."),
    "dry_run": Flag("Result", "Find the plan and show what it gives; write no slim file."),
    "report": Flag("Result", "Write a page about the run, as inspect --html does.", "FILE"),
    "scope": Flag("Result", "What may be cut."),
    "round_to": Flag("Result", "Widths are multiples of it.", "N"),
    "eval_images": Flag(
        "Result", "Validation images to measure accuracy on, where there are any; 0 for none.", "N"
    ),
    "latency": Flag("Result", "Measure latency before and after."),
    "latency_batch_size": Flag("Result", "Images at a time when latency is measured.", "N"),
    "model": Flag("Model", "timm architecture, for a file that does not say.", "NAME", "-m"),
    "model_args": Flag(
        "Model", "Argument of that architecture, img_size=32; may be given again.", "KEY=VALUE"
    ),
    "num_classes": Flag("Model", "Refuse a model with another number of classes.", "N"),
    "data_dir": Flag("Data", "Folder with train/ and val/, or of unlabelled images.", "DIR"),
    "dataset": Flag("Data", "Dataset as timm names it: hfds/NAME, wds/NAME, torch/NAME.", "NAME"),
    "class_map": Flag("Data", "Text file: class names in the order of the model's head.", "FILE"),
    "train_split": Flag("Data", "Split to search on.", "NAME"),
    "val_split": Flag("Data", "Split to measure accuracy on.", "NAME"),
    "calibration_images": Flag("Data", "How many images to search on; by default what the effort says.", "N"),
    "labels": Flag("Data", "Use labels where there are any."),
    "workers": Flag("Data", "Processes that load images.", "N", "-j"),
    "mean": Flag("Preprocessing", "Per channel, for pixels in 0..1; by default the model's own.", "A,B,C"),
    "std": Flag("Preprocessing", "Per channel; by default the model's own.", "A,B,C"),
    "crop_pct": Flag("Preprocessing", "Share of the image that the centre crop keeps.", "SHARE"),
    "interpolation": Flag("Preprocessing", "bicubic, bilinear, ...", "NAME"),
    "img_size": Flag("Preprocessing", "Height and width in pixels.", "N"),
    "effort": Flag("Search", "How much work to put in: seconds, a minute or two, whatever it takes."),
    "allocation": Flag("Search", "How the budget is spread over layers: by error curves, by indicators, ..."),
    "basis": Flag("Search", "Cut channels as they are, or principal ones where that is exact."),
    "positions": Flag("Search", "v channels of heads that share filters: each its own, or equal ones."),
    "similarity": Flag("Search", "Weight indicators by how unlike other channels a channel is."),
    "score_adjustment": Flag("Search", "Hold the widths of all heads equal while training."),
    "init": Flag("Search", "Where indicators start."),
    "repair": Flag("Search", "Refit, in closed form, what reads a cut layer."),
    "swap_moves": Flag(
        "Search", "Swap kept v and hidden channels for better ones; by default what the effort says."
    ),
    "repair_in_order": Flag(
        "Search", "Refit once more, on what the layers cut before give; by default what the effort says."
    ),
    "token_weights": Flag("Search", "Count each token as much as it influences the answer."),
    "selection": Flag(
        "Search", "Channels that fill the widths found: best once repaired, or best indicators."
    ),
    "reweight": Flag("Search", "Train a gain per kept channel, merged into the weights."),
    "temperature": Flag("Search", "Softmax scale of a cut layer: 1/sqrt(kept width) or as it was."),
    "steps": Flag("Search", "Optimiser steps of the indicators, where they are trained.", "N"),
    "gain_steps": Flag("Search", "Optimiser steps of the gains; by default none after a repair.", "N"),
    "tuning_steps": Flag("Search", "Steps that tune all weights; by default what the effort says.", "N"),
    "lr": Flag("Search", "Learning rate of indicators.", "RATE"),
    "gain_lr": Flag("Search", "Learning rate of gains.", "RATE"),
    "tuning_lr": Flag("Search", "Learning rate of all weights.", "RATE"),
    "budget_weight": Flag("Search", "Weight of the budget's gradient against the task's.", "WEIGHT"),
    "label_weight": Flag("Search", "Weight of the cross-entropy beside the distillation loss.", "WEIGHT"),
    "seed": Flag("Search", "Of everything random.", "N"),
    "batch_size": Flag("Computing", "Images at a time.", "N", "-b"),
    "device": Flag("Computing", "auto, cpu, cuda or cuda:N.", "NAME"),
    "amp": Flag("Computing", "bfloat16 autocast."),
}


def command(
    options: type[Flat],
    *,
    flags: Mapping[str, Flag] = FLAGS,
    further: Mapping[str, str] = MappingProxyType({}),
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
) -> Callable[[Body], Callable[..., None]]:
    """Make a command of a function of (options, console); its flags are the fields of ``options``.

    A value is the flag's, else the ``--config`` file's, else the default in ``options``.

    Args:
        options: the class of what the function takes.
        flags: how its fields look on the command line.
        further: fields that are rarely wanted, and what they mean; the help lists them last.
        complete: given the values, gives those to use.
    """
    types, defaults = options.types(), options.defaults()

    def decorate(body: Body) -> Callable[..., None]:
        def run(**given: Any) -> None:
            context = given.pop("context")
            shared = Globals(
                quiet=given.pop("quiet"), verbose=given.pop("verbose"), as_json=given.pop("json")
            ).joined(context.obj)
            with running(shared) as console:
                values = _options(options, given.pop("config"), given, complete)
                # Bodies import torch and timm, which takes seconds.
                console.start("starting")
                body(values, console)

        run.__name__ = body.__name__
        run.__doc__ = inspect.cleandoc(body.__doc__ or "")
        shown = _in_panels(types, flags, further)
        parameters = [_parameter("context", typer.Context)]
        parameters += [_flag(name, flags[name], types[name], defaults.get(name)) for name in shown]
        parameters += [
            _flag(name, Flag("", meaning), types[name], defaults.get(name), hidden=True)
            for name, meaning in further.items()
        ]
        parameters += _common()
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return run

    return decorate


def _options(
    options: type[Flat],
    config: str | None,
    given: Mapping[str, Any],
    complete: Callable[[Mapping[str, Any]], Mapping[str, Any]],
) -> Flat:
    """The options object of what was given as flags over what a file holds."""
    types = options.types()
    values = {} if config is None else read_config(config, types)
    for name, value in given.items():
        if value is None or value == []:
            continue
        if _takes_arguments(name):
            value = {**values.get(name, {}), **dict(map(key_value, value))}
        values[name] = convert(value, types[name], flag_name(name))
    values = dict(complete(values))
    for name in types:
        if name not in values and name not in options.defaults():
            what = "CHECKPOINT" if name in _ARGUMENTS else f"{flag_name(name)} {FLAGS[name].metavar}"
            raise UsageError(f"{what} is missing; see --help")
    return options.from_flat(**values)


def flag_name(name: str) -> str:
    """The flag of an option.

    >>> flag_name("data_dir"), flag_name("model_args"), flag_name("teacher_model_args")
    ('--data-dir', '--model-arg', '--teacher-model-arg')
    """
    return "--" + (name.removesuffix("s") if _takes_arguments(name) else name).replace("_", "-")


def _takes_arguments(name: str) -> bool:
    """Whether the option is KEY=VALUE, given one by one."""
    return name.endswith("model_args")


def key_value(text: str) -> tuple[str, Any]:
    """A ``--model-arg``; its value is JSON, else a Python literal, else text.

    >>> key_value("img_size=32"), key_value("qk_norm=True"), key_value("global_pool=avg")
    (('img_size', 32), ('qk_norm', True), ('global_pool', 'avg'))
    """
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise UsageError(f"--model-arg {text!r}: expected KEY=VALUE, like img_size=32")
    for read in (json.loads, literal_eval):
        try:
            return key, read(value)
        except (ValueError, SyntaxError, RecursionError, MemoryError):
            continue
    return key, value


def _in_panels(names: Mapping[str, Any], flags: Mapping[str, Flag], further: Mapping[str, str]) -> list[str]:
    """In the order of ``flags``, which keeps panels together."""
    missing = set(names) - set(flags) - set(further)
    if missing:
        raise LookupError(f"options without a flag: {sorted(missing)}")
    return [name for name in flags if name in names]


def _flag(name: str, flag: Flag, kind: Any, default: Any, *, hidden: bool = False) -> inspect.Parameter:
    """One flag. Its own default is None, which tells a flag that was not given from one that was."""
    if name in _ARGUMENTS:
        info: Any = typer.Argument(help=flag.help, metavar=flag.metavar, show_default=False)
        given: Any = list[str] if get_origin(_bare(kind)) is tuple else str
        return _parameter(name, Annotated[given | None, info], None)
    declared = [flag_name(name)]
    if _bare(kind) is bool:
        declared = [f"{flag_name(name)}/--no-{name.replace('_', '-')}"]
    if flag.short:
        declared.append(flag.short)
    bare = _bare(kind)
    metavar = "|".join(get_args(bare)) if get_origin(bare) is Literal else flag.metavar
    info = typer.Option(
        *declared,
        help=flag.help + _shown_default(default),
        metavar=metavar,
        show_default=False,
        rich_help_panel=flag.panel,
        hidden=hidden,
    )
    python: Any = {bool: bool, int: int, float: float}.get(bare, str)
    if _takes_arguments(name):
        python = list[str]
    return _parameter(name, Annotated[python | None, info], None)


def _common() -> list[inspect.Parameter]:
    """Flags of every command that are no options of its function."""
    panel = "Output"
    config = typer.Option(
        "--config",
        "-c",
        metavar="FILE.yaml",
        help="Read options from a file; keys are the names of flags. Flags win.",
        rich_help_panel=panel,
    )
    as_json = typer.Option("--json", help="Print one JSON object.", rich_help_panel=panel)
    quiet = typer.Option("--quiet", "-q", help=QUIET, rich_help_panel=panel)
    verbose = typer.Option(
        "--verbose", "-v", count=True, help=VERBOSE, show_default=False, rich_help_panel=panel
    )
    return [
        _parameter("config", Annotated[str | None, config], None),
        _parameter("json", Annotated[bool, as_json], False),
        _parameter("quiet", Annotated[bool, quiet], False),
        _parameter("verbose", Annotated[int, verbose], 0),
    ]


QUIET = "Show the result and errors only."
VERBOSE = "Show stages and what libraries have to say; twice shows more."


def _parameter(name: str, annotation: Any, default: Any = inspect.Parameter.empty) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _bare(kind: Any) -> Any:
    """``int`` of ``int | None``."""
    known = [part for part in get_args(kind) if part is not type(None)]
    return known[0] if len(known) == 1 else kind


def _shown_default(default: Any) -> str:
    """Typer would show the flag's own default, which is None."""
    if default is None or default == {}:
        return ""
    if isinstance(default, bool):
        shown = "on" if default else "off"
    elif isinstance(default, tuple):
        shown = ",".join(f"{part:.4g}" for part in default)  # as it is typed
    else:
        shown = str(default)
    return f" (default: {shown})"
