"""Generate pages of docs/reference/ from the code, and tables of results from measured rows.

    python docs/generate.py               # commands and options, Python names, tables of results
    python docs/generate.py --check       # only compare
    mhacut models --json > models.json    # takes minutes
    python docs/generate.py models.json   # also the architectures

A table of results is between ``<!-- table NAME -->`` and ``<!-- end -->`` in a page. Its rows are in
``examples/benchmarks/results/NAME.json``.
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
from mhacut.cli.flags import PANELS, RESEARCH, SHORT
from mhacut.options.option import Option

DOCS = Path(__file__).parent
REFERENCE = DOCS / "reference"
EXAMPLES = DOCS.parent / "examples" / "benchmarks"
RESULTS = EXAMPLES / "results"
_CODE = re.compile(r"""(torchrun .+? \.\.\.|pip install '[^']+'|(?<![\w`'-])--[a-z][a-z0-9-]*)""")
"""Commands and flags, which are set in code."""
_ANY_NUMBER = re.compile(r"(, )?(at least -\d{19}|at most (\d{20}|1e\+36))")
"""Bounds of integer and float types, which the pages omit."""
_WRITTEN = "<!-- Written by docs/generate.py -->\n\n"
NAMES: Mapping[str, Sequence[str]] = {
    "Functions": ("prune", "prune_many", "prune_", "finetune", "evaluate", "inspect", "bench", "export"),
    "Models": ("load_model", "save_model", "save_pruned", "apply_pruned", "load_pruned"),
    "Results": (
        *("PruneResult", "PruneResults", "InPlaceResult", "FinetuneResult"),
        *("EvaluateResult", "InspectResult", "BenchResult", "ExportResult"),
    ),
    "Plan": ("Plan",),
    "Errors": (
        *("MhacutError", "UsageError", "CheckpointError", "UnsupportedModelError", "PlanError"),
        *("BudgetError", "DataError", "OutputError"),
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
"""One list of errors without headings."""
_COMMON = (
    "`--config`, `--set`, `--json`, `--quiet`, `--verbose` and `--help-all` belong to every command: "
    "[Commands](index.md)."
)
_RESEARCH = (
    "These options have no flag. Use `--set repair=false`, a YAML file (`repair: false`, `--config FILE`) "
    "or Python (`repair=False`)."
)


def pages() -> dict[str, str]:
    """Pages of the commands and of the Python API, by path under docs/reference/."""
    return {f"commands/{name}.md": command_page(name) for name in COMMANDS} | {"python.md": python_page()}


def python_page() -> str:
    """Python reference: a table of names, and directives for mkdocstrings."""
    head = f"""{_WRITTEN}# Python API

Import the names in this table from `mhacut`.
The keyword arguments of a function such as `mhacut.prune` are the flags of the [command](commands/index.md).
For example, `--round-to 16` is `round_to=16`, and `--no-labels` is `labels=False`.
The flags `--model-arg` and `--teacher-model-arg` are mappings in Python (`model_args`, `teacher_model_args`).
The flags `--config`, `--set`, `--json`, `--quiet`, `--verbose` and the command `mhacut models` have no
counterpart in Python.

When the site is built, the sections below the table show the docstrings of mhacut's functions and classes.
In Python, `help(mhacut.prune)` shows the docstring of `mhacut.prune`.

| name | meaning |
|---|---|
"""
    rows = [f"| `{name}` | {_first_sentence(name)} |\n" for names in NAMES.values() for name in names]
    sections = []
    for title, names in NAMES.items():
        sections += [f"## {title}", *([_ERRORS] if title == "Errors" else [f"::: mhacut.{n}" for n in names])]
    return head + "".join(rows) + "\n" + "\n\n".join(sections) + "\n"


def _first_sentence(name: str) -> str:
    """First paragraph of a public docstring, in Markdown."""
    paragraph, *_ = (inspect.getdoc(getattr(mhacut, name)) or "").split("\n\n")
    return re.sub(r":\w+:(?=`)", "", " ".join(paragraph.split())).replace("``", "`").replace("|", "\\|")


def command_page(name: str) -> str:
    """Reference of one command: its help, then its options by panel."""
    known = COMMANDS[name].options()
    arguments = " ".join(stated.placeholder for stated in known.values() if stated.is_argument)
    summary, *paragraphs = _documentation(name)
    body = [f"# mhacut {name}", summary, *paragraphs, f"```text\nmhacut {name} {arguments} [OPTIONS]\n```"]
    for panel in PANELS:
        own = [stated for stated in known.values() if stated.panel == panel]
        if own:
            own.sort(key=lambda option: option.name != "flops")  # most users look for it
            body.append(f"## {panel}")
            if panel == RESEARCH:
                body.append(_RESEARCH)
            body.append("\n".join(_table(own)))
    body.append(_COMMON)
    return _WRITTEN + "\n\n".join(body) + "\n"


def _documentation(name: str) -> list[str]:
    """Return the paragraphs of the command's help, in Markdown."""
    (found,) = (one for one in app.registered_commands if one.name == name)
    paragraphs = []
    for text in (found.callback.__doc__ or "").split("\n\n"):
        if text.startswith("\b\nExample"):
            title, _, first = text.removeprefix("\b\n").partition(":")
            lines = inspect.cleandoc(first.lstrip("\n") if "\n" in first else first.strip())
            paragraphs.append(f"{title}:\n\n```text\n{lines}\n```")
        else:
            paragraphs.append(_with_code(text))
    return paragraphs


def _table(options: Sequence[Option]) -> Iterator[str]:
    if options[0].is_argument:
        yield from ("| argument | meaning |", "|---|---|")
        yield from (f"| `{one.placeholder}` | {_with_code(one.help)} |" for one in options)
        return
    research = options[0].panel == RESEARCH
    yield from (f"| {'YAML key' if research else 'flag'} | meaning |", "|---|---|")
    for one in options:
        name = f"`{one.key}`" if research else _flags(one)
        text = one.help if research else one.off or one.help
        yield f"| {name} | {' '.join([_with_code(text), *_facts(one)])} |"


def _flags(option: Option) -> str:
    """Return the flags, the main one with its value."""
    value = "" if option.choices else option.placeholder
    flag = option.switch if option.kind is bool else option.flag
    flags = [f"`{flag} {value}`" if value else f"`{flag}`"]
    return ", ".join([*flags, *([f"`{SHORT[option.name]}`"] if option.name in SHORT else [])])


def _facts(option: Option) -> Iterator[str]:
    """Yield sentences about choices, bounds and the default."""
    if option.choices:
        yield "One of " + ", ".join(f"`{choice}`" for choice in option.choices) + "."
    if limits := _ANY_NUMBER.sub("", option.limits):
        yield limits.capitalize() + "."
    default = option.default
    if default is True:
        if option.panel == RESEARCH:
            yield "Default: `true`."
    elif default is not None and default is not False and default not in ((), {}):
        text = ",".join(f"{part:.4g}" for part in default) if isinstance(default, tuple) else default
        yield f"Default: `{text}`."


def _with_code(text: str) -> str:
    """Set commands and flags in code, and escape Markdown characters."""
    return _CODE.sub(r"`\1`", text.replace("|", "\\|").replace("*", "\\*"))


def architectures_page(document: Mapping[str, Any], timm: str) -> str:
    """Return the table of what can be cut in which architecture.

    Args:
        document: output of ``mhacut models --json``.
        timm: version that it is about.
    """
    entries = [entry for entry in document["models"] if entry["transformer"]]
    cut = [entry for entry in entries if entry["refusal"] is None]
    merging = [entry for entry in cut if not entry["tokens_stay"]]
    head = f"""{_WRITTEN}# Architectures

`mhacut models` builds every architecture of timm without weights and lists what can be cut. Of timm
{timm} and the FLatten Transformers, {len(entries)} architectures have attention; something can be cut in
{len(cut)}, and tokens merge in {len(merging)}. `mhacut models PATTERN --json` also names the parts that
stay, each with its reason; `mhacut models --refused` says why an architecture is refused.

A star marks architectures of which some layers or kinds of channels stay. Tags name the pretrained weights
in timm: `timm:NAME.TAG` opens them.

| architecture | attention | channels that can be cut, and tokens | tags |
|---|---|---|---|
"""
    return head + "".join(_architecture_row(entry) + "\n" for entry in entries)


def _architecture_row(entry: Mapping[str, Any]) -> str:
    attention = ", ".join(f"`{name}`" for name in entry["attention"]) or "-"
    kinds = {"qk": "q/k", "v": "v", "hidden": "MLP"}
    cut = ", ".join(kinds[kind] for kind in entry["kinds"]) or "refused"
    star = "\\*" if entry["not_prunable"] else ""
    tokens = "" if entry["tokens_stay"] else ", tokens"
    tags = ", ".join(f"`{tag}`" for tag in entry["tags"]) or "-"
    return f"| `{entry['architecture']}` | {attention} | {cut}{star}{tokens} | {tags} |"


# --- Tables of results ---

METHODS: Mapping[str, str] = {
    "dense": "dense",
    "mhacut-tokens-balanced": "mhacut",
    "mhacut-tokens-best": "mhacut, `best`",
    "tome": "ToMe, untrained",
    "mhacut-unlabelled-auto-balanced": "mhacut, channels alone",
    "mhacut-unlabelled-auto-best": "mhacut, channels alone, `best`",
    "corp": "CORP",
    "tp-taylor-uniform": "Torch-Pruning, Taylor",
    "mhacut-pooled": "mhacut, `--preserve pooled`",
    "tome-tp": "Torch-Pruning to 90 %, then ToMe",
    "mhacut-tokens-balanced, random": "random weights, mhacut's shape",
    "tp-taylor-uniform, random": "random weights, Torch-Pruning's",
}
"""Names and order of the methods in tables; rows of other methods keep their title."""
IN_README = ("mhacut-tokens-balanced", "tome", "mhacut-unlabelled-auto-balanced", "corp", "tp-taylor-uniform")
_FILES = {"readme": "wide430", "in_place_saliency": "in_place"}
"""Files of the tables that show a selection of rows."""
_TABLE = re.compile(r"(<!-- table ([\w-]+) -->\n\n).*?(\n\n<!-- end -->)", re.DOTALL)
Row = Mapping[str, Any]


def with_tables(text: str) -> str:
    """Write the tables of results in a page again."""
    return _TABLE.sub(lambda found: found[1] + results_table(found[2]) + found[3], text)


def results_table(name: str) -> str:
    """Return a table of results, and below it the machine, versions and commit of its rows.

    Args:
        name: a file of results, ``readme`` for the top-1 of wide430 by budget and method, or
            ``in_place_saliency`` for four rows of in_place.
    """
    file = _FILES.get(name, name)
    document = json.loads((RESULTS / f"{file}.json").read_text())
    if name == "readme":
        return _by_budget(document["rows"])
    if name == "in_place_saliency":
        document = [row for row in document if _in_guide(row)]
    if isinstance(document, list):  # each row states its machine and seed
        rows, columns = _in_place(document)
        machine, seed = rows[0], rows[0]["seed"]
    else:
        rows, columns = _one_shot(document["rows"])
        machine, seed = document["machine"], document["setup"]["seed"]
    origins = [_origin(row) for row in rows]
    common = [origins[0]] if len(set(origins)) == 1 else []
    if not common:  # then each row says it
        columns["commit"] = lambda row: _origin(row).removeprefix("commit ")
    lines = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    lines += [f"| {' | '.join(cell(row) for cell in columns.values())} |" for row in rows]
    versions = [f"{part} {machine[part]}" for part in ("torch", "timm")]
    made = "; ".join([machine["cpu"], *versions, f"seed {seed}", *common])
    if tuned := next((row["finetuned"] for row in rows if "finetuned" in row), None):
        made += f"; fine-tuned for {tuned['steps']} steps, up to {len(tuned['seeds'])} seeds"
    return "\n".join([*lines, "", f"The table was measured on {made}. Rows: `results/{file}.json`."])


def _one_shot(rows: Sequence[Row]) -> tuple[list[Row], dict[str, Any]]:
    order = [*METHODS]
    known = [row for row in rows if "out_of_reach" not in row]
    known.sort(
        key=lambda row: (-(row["keep"] or 101), order.index(row["method"]) if row["method"] in order else 99)
    )
    columns = {
        "FLOPs, %": lambda row: f"{100 * row['ratio']:.1f}",
        "method": lambda row: METHODS.get(row["method"], row["title"]),
        "top-1, %": lambda row: f"{row['top1']:.1f}" if "top1" in row else "-",
        "same as dense, %": lambda row: f"{row['agreement']:.1f}" if "agreement" in row else "-",
        "KL": lambda row: f"{row['kl']:.3f}" if "kl" in row else "-",
        "time": lambda row: f"{row['latency_ratio']:.2f}" if "latency_ratio" in row else "-",
        "ONNX, ms": lambda row: f"{row['onnx_ms']:.1f}" if "onnx_ms" in row else "-",
        "fine-tuned, %": _finetuned,
        "CPU s": lambda row: f"{row['cpu_s']:.0f}" if "cpu_s" in row else "-",
    }
    return known, {name: cell for name, cell in columns.items() if any(cell(row) != "-" for row in known)}


def _finetuned(row: Row) -> str:
    found = row.get("finetuned")
    if found is None:
        return "-"
    spread = f" ± {found['spread']:.1f}" if len(found["seeds"]) > 1 else ""
    return f"{found['top1']:.1f}{spread}"


def _in_guide(row: Row) -> bool:
    """Whether a row of in_place is one of the four that the guide shows."""
    budgets = {"mhacut": (75, 60, 50), "tp-taylor-uniform": (60,)}
    return row["subject"] == "saliency, timm" and round(row["flops"], 1) in budgets[row["method"]]


def _in_place(rows: Sequence[Row]) -> tuple[list[Row], dict[str, Any]]:
    columns = {
        "FLOPs, %": lambda row: f"{row['flops']:.1f}",
        "model": lambda row: row["subject"],
        "method": lambda row: METHODS.get(row["method"], row["method"]),
        "correlation": lambda row: f"{row['correlation']:.3f}" if "correlation" in row else "-",
        "map, MAE": lambda row: f"{row['mae']:.3f}" if "mae" in row else "-",
        "patches, %": lambda row: f"{row['accuracy']:.1f}" if "accuracy" in row else "-",
        "same as dense, %": lambda row: f"{row['agreement']:.1f}" if "agreement" in row else "-",
        "error of features": lambda row: f"{row['error']:.3f}" if "error" in row else "-",
        "time": lambda row: f"{row['time']:.2f}" if "time" in row else "-",
        "CPU s": lambda row: f"{row['cpu_s']:.0f}" if row["method"] != "dense" else "-",
    }
    return list(rows), {name: cell for name, cell in columns.items() if any(cell(row) != "-" for row in rows)}


def _origin(row: Row) -> str:
    """Commit that made a row; older rows have a digest of the code."""
    return f"commit {row['commit']}" if "commit" in row else f"code {row['code'][:8]}"


def _by_budget(rows: Sequence[Row]) -> str:
    found = {(row["keep"], row["method"]): f"{row['top1']:.1f}" for row in rows if "top1" in row}
    keeps = sorted({keep for keep, method in found if method in IN_README}, reverse=True)
    lines = [
        f"| FLOPs | {' | '.join(_readme_title(name) for name in IN_README)} |",
        f"|{'---|' * (len(IN_README) + 1)}",
    ]
    for keep in keeps:
        cells = [found.get((keep, name), "") for name in IN_README]
        lines.append(f"| {keep:g} % | {' | '.join(cells)} |")
    return "\n".join(lines)


def _readme_title(method: str) -> str:
    # The README's table stands alone, so its header says that this method is incomplete without fine-tuning.
    return "Torch-Pruning, before fine-tuning" if method == "tp-taylor-uniform" else METHODS[method]


def written() -> dict[Path, str]:
    """All pages that this script writes without the list of models, by path."""
    found = {REFERENCE / path: text for path, text in pages().items()}
    for page in (DOCS.parent / "README.md", EXAMPLES / "README.md", *DOCS.rglob("*.md")):
        text = page.read_text()
        if _TABLE.search(text):
            found[page] = with_tables(text)
    return found


def unknown_tables(page: Path) -> list[str]:
    """Header lines of tables that are not made from rows."""
    return re.findall(r"^(\|.*)\n\|---", _TABLE.sub("", page.read_text()), re.MULTILINE)


def main(arguments: Sequence[str]) -> None:
    """Write the pages, or with ``--check`` list outdated pages."""
    if arguments == ["--check"]:
        stale = [
            str(path.relative_to(DOCS.parent)) for path, text in written().items() if path.read_text() != text
        ]
        if stale:
            sys.exit(f"not current: {', '.join(stale)}; run python docs/generate.py")
        if alone := unknown_tables(DOCS / "explanation" / "benchmarks.md"):
            sys.exit(f"docs/explanation/benchmarks.md: no rows make the table {alone[0]}")
        return
    for path, text in written().items():
        path.write_text(text)
    for models in arguments:
        from importlib.metadata import version

        page = architectures_page(json.loads(Path(models).read_text()), version("timm"))
        (REFERENCE / "architectures.md").write_text(page)


if __name__ == "__main__":
    main(sys.argv[1:])
