"""Options and inputs of a resumed run, which must be the same as when it was started."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from mhacut.errors import CheckpointError, UsageError, option_name
from mhacut.finetuning.folder import ARGUMENTS, read_arguments
from mhacut.options.finetune import FinetuneOptions

_FREE = frozenset(
    {
        # where things lie; what they hold is compared
        "checkpoint",
        "teacher",
        "data_dir",
        "class_map",
        # how the work is divided; the number of images of a step is compared
        "batch_size",
        "grad_accum_steps",
        "workers",
        "device",
        # what is kept
        "save_every",
        "log",
        "overwrite",
        "resume",
    }
)
"""Options that may differ in a resumed run."""
_IMAGES, _OPTIONS = "images per step", "options"


def completed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``values``, completed by the options of the run that ``resume`` names, if it names one.

    Raises:
        UsageError: there is no such run, or a value contradicts the options that it was started with.
    """
    known = FinetuneOptions.options()
    given = dict(values)
    if given.get("resume") is None:
        return given
    folder = given["resume"] = known["resume"].check(given["resume"])
    if given.get("overwrite"):
        raise UsageError(
            f"{option_name('overwrite', True)}: would remove the run that {option_name('resume', folder)} "
            "continues; give one of them"
        )
    began = {**FinetuneOptions.defaults(), **read_arguments(folder)}
    for name, value in given.items():
        if name == "output" and value is not None and os.path.realpath(value) != os.path.realpath(folder):
            raise UsageError(
                f"{option_name('output', value)}: a resumed run writes to its own directory, {folder}"
            )
        if name not in known or name in _FREE | {"output"}:
            continue
        if _plain(known[name].check(value)) != _plain(began.get(name)):
            raise UsageError(
                f"{option_name(name, value)}: the run in {folder} was started with {began.get(name)}; "
                f"leave it out, or start another run"
            )
    return {**began, **given, "output": folder}


def text_of_options(options: FinetuneOptions) -> str:
    """Return, as JSON, the options that must not differ in a resumed run."""
    free = _FREE | {"output"}
    return json.dumps({name: value for name, value in options.flat().items() if name not in free})


def _plain(value: object) -> object:
    """Return a value of an option as YAML gives it back: with lists in place of tuples."""
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    return [*map(_plain, value)] if isinstance(value, (list, tuple)) else value


def check_same(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Raise a :class:`CheckpointError` that names the inputs that changed since the run was started.

    Args:
        before: inputs when the run was started, as :meth:`mhacut.finetuning.run.Run.inputs` gives them.
        now: inputs now.
        where: directory of the run, for the message.
    """
    changed = [
        f"{name} ({_short(before.get(name))}, now {_short(now[name])})"
        for name in now
        if name != _OPTIONS and before.get(name) != now[name]
    ]
    began, goes_on = (_options(each.get(_OPTIONS)) for each in (before, now))
    changed += [
        f"{name} of {ARGUMENTS} ({began[name]!s:.80}, now {goes_on[name]!s:.80})"
        for name in goes_on
        if name in began and began[name] != goes_on[name]
    ]
    if changed:
        raise CheckpointError(
            f"{where}: the run cannot be resumed, because these differ from its start: {'; '.join(changed)}"
            + (_of_as_many_images() if before.get(_IMAGES) != now.get(_IMAGES) else "")
        )


def _options(text: object) -> dict[str, Any]:
    """Return the options in what :func:`text_of_options` gave; none of an older run, which stated none."""
    try:
        found = json.loads(str(text))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _of_as_many_images() -> str:
    options = f"{option_name('batch_size')} or {option_name('grad_accum_steps')}"
    return (
        f"; start as many processes as before (torchrun --nproc-per-node N), or change {options} so that "
        "a step has as many images"
    )


def _short(value: object) -> str:
    text = str(value)
    return text[:12] + "..." if len(text) > 24 else text
