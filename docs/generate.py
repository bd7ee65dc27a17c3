"""Write the pages of docs/reference/ that follow from the code: commands, Python names, architectures.

    python docs/generate.py               # commands and options, Python names
    mhacut models --json > models.json    # takes minutes
    python docs/generate.py models.json   # architectures too

A test compares the pages with what this script writes.
"""

from __future__ import annotations

import inspect
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import mhacut
from mhacut.cli.app import COMMANDS, app
from mhacut.cli.flags import PANELS, SHORT
from mhacut.options.option import Option

REFERENCE = Path(__file__).parent / "reference"
_CODE = re.compile(r"""(torchrun .+? \.\.\.|pip install '[^']+'|(?<![\w`'-])--[a-z][a-z0-9-]*)""")
"""What is set in code: commands, and names of flags."""
_WRITTEN = "<!-- Written by docs/generate.py -->\n\n"
NAMES: Mapping[str, Sequence[str]] = {
    "Verbs": ("prune", "prune_many", "prune_", "finetune", "evaluate", "inspect", "bench", "export"),
    "Models": ("load_model", "save_model", "save_pruned", "apply_pruned"),
    "Results": (
        *("PruneResult", "PruneResults", "InPlaceResult", "FinetuneResult"),
        *("EvaluateResult", "InspectResult", "BenchResult", "ExportResult"),
    ),
    "Plan": ("Plan",),
    "Errors": (
        *("MhacutError", "UsageError", "CheckpointError", "UnsupportedModelError", "PlanError"),
        *("BudgetError", "DataError", "OutputError", "Interrupted"),
    ),
}
"""Public names of the package, by the headings of their page."""
_ERRORS = "\n".join(
    [
        "::: mhacut.errors",
        "    options:",
        "      show_root_heading: false",
        "      show_root_toc_entry: false",
        "      members:",
        *(f"        - {name}" for name in NAMES["Errors"]),
    ]
)
"""Errors as one list without a heading each."""
_COMMON = "`--config`, `--json`, `--quiet` and `--verbose` belong to every command: [Commands](index.md)."


def pages() -> dict[str, str]:
    """Return the pages of the commands and of the Python API, by their paths under docs/reference/."""
    return {f"commands/{name}.md": command_page(name) for name in COMMANDS} | {"python.md": python_page()}


def python_page() -> str:
    """Return the reference of the Python API: a table of its names, and directives for mkdocstrings."""
    head = f"""{_WRITTEN}# Python API

Import these names from `mhacut`. Keyword arguments of the verbs are the flags of the
[commands](commands/index.md), with underscores: `--round-to 16` is `round_to=16`, `--no-labels` is
`labels=False`. `--model-arg` and `--teacher-model-arg` are the mappings `model_args` and
`teacher_model_args`. `--config`, `--json`, `--quiet` and `--verbose` are no keywords, and `mhacut models`
is no function.

The sections below the table are filled in from the docstrings when the site is built. In Python,
`help(mhacut.prune)` shows the same text.

| name | meaning |
|---|---|
"""
    rows = [f"| `{name}` | {_first_sentence(name)} |\n" for names in NAMES.values() for name in names]
    sections = []
    for title, names in NAMES.items():
        sections += [f"## {title}", *([_ERRORS] if title == "Errors" else [f"::: mhacut.{n}" for n in names])]
    return head + "".join(rows) + "\n" + "\n\n".join(sections) + "\n"


def _first_sentence(name: str) -> str:
    """Return the first paragraph of the docstring of a public name, in Markdown."""
    paragraph, *_ = (inspect.getdoc(getattr(mhacut, name)) or "").split("\n\n")
    return re.sub(r":\w+:(?=`)", "", " ".join(paragraph.split())).replace("``", "`").replace("|", "\\|")


def command_page(name: str) -> str:
    """Return the reference of one command: what it does, then its options by panel."""
    known = COMMANDS[name].options()
    arguments = " ".join(stated.placeholder for stated in known.values() if stated.is_argument)
    summary, *paragraphs = _documentation(name)
    body = [f"# mhacut {name}", summary, *paragraphs, f"```text\nmhacut {name} {arguments} [OPTIONS]\n```"]
    for panel in PANELS:
        own = [stated for stated in known.values() if stated.panel == panel]
        if own:
            body += [f"## {panel}", "\n".join(_table(own))]
    body.append(_COMMON)
    return _WRITTEN + "\n\n".join(body) + "\n"


def _documentation(name: str) -> list[str]:
    """Return the paragraphs of the command's help, in Markdown."""
    (found,) = (one for one in app.registered_commands if one.name == name)
    return [
        re.sub(r"^Example: (.*)$", r"Example: `\1`", one) if one.startswith("Example") else _with_code(one)
        for one in (found.callback.__doc__ or "").split("\n\n")
    ]


def _table(options: Sequence[Option]) -> Iterator[str]:
    if options[0].is_argument:
        yield from ("| argument | meaning |", "|---|---|")
        yield from (f"| `{one.placeholder}` | {_with_code(one.help)} |" for one in options)
        return
    yield from ("| flag | meaning |", "|---|---|")
    for one in options:
        yield f"| {_flags(one)} | {' '.join([_with_code(one.help), *_facts(one)])} |"


def _flags(option: Option) -> str:
    """Return the flags, the main one with its value."""
    value = "" if option.choices else option.placeholder
    flags = [f"`{option.flag} {value}`" if value else f"`{option.flag}`"]
    if option.kind is bool and option.default is not False:
        flags.append(f"`--no-{option.flag.removeprefix('--')}`")
    return ", ".join([*flags, *([f"`{SHORT[option.name]}`"] if option.name in SHORT else [])])


def _facts(option: Option) -> Iterator[str]:
    """Yield sentences about choices, bounds and the default."""
    if option.choices:
        yield "One of " + ", ".join(f"`{choice}`" for choice in option.choices) + "."
    if option.limits:
        yield option.limits.capitalize() + "."
    default = option.default
    if default is True:
        yield "Default: on."
    elif default is not None and default is not False and default not in ((), {}):
        text = ",".join(f"{part:.4g}" for part in default) if isinstance(default, tuple) else default
        yield f"Default: `{text}`."


def _with_code(text: str) -> str:
    """Set commands and flags in code, and escape what Markdown would take for markup."""
    return _CODE.sub(r"`\1`", text.replace("|", "\\|").replace("*", "\\*"))


def architectures_page(document: Mapping[str, Any], timm: str) -> str:
    """Return the table of what can be cut in which architecture.

    Args:
        document: output of ``mhacut models --json``.
        timm: version that it is about.
    """
    entries = [entry for entry in document["models"] if entry["transformer"]]
    cut = [entry for entry in entries if entry["refusal"] is None]
    head = f"""{_WRITTEN}# Architectures

`mhacut models` builds every architecture of timm without weights and lists what can be cut. Of timm
{timm} and the FLatten Transformers, {len(entries)} architectures have attention; something can be cut in
{len(cut)}. `mhacut models PATTERN --json` also names the parts that stay, each with its reason;
`mhacut models --refused` says why an architecture is refused.

A star marks architectures of which some layers or kinds of channels stay. Tags name the pretrained weights
in timm: `timm:NAME.TAG` opens them.

| architecture | attention | channels that can be cut | tags |
|---|---|---|---|
"""
    return head + "".join(_architecture_row(entry) + "\n" for entry in entries)


def _architecture_row(entry: Mapping[str, Any]) -> str:
    attention = ", ".join(f"`{name}`" for name in entry["attention"]) or "-"
    kinds = {"qk": "q/k", "v": "v", "hidden": "MLP"}
    cut = ", ".join(kinds[kind] for kind in entry["kinds"]) or "refused"
    star = "\\*" if entry["not_prunable"] else ""
    tags = ", ".join(f"`{tag}`" for tag in entry["tags"]) or "-"
    return f"| `{entry['architecture']}` | {attention} | {cut}{star} | {tags} |"


if __name__ == "__main__":
    for path, text in pages().items():
        (REFERENCE / path).write_text(text)
    for models in sys.argv[1:]:
        from importlib.metadata import version

        page = architectures_page(json.loads(Path(models).read_text()), version("timm"))
        (REFERENCE / "architectures.md").write_text(page)
