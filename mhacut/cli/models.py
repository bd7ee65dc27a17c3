"""``mhacut models``."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from mhacut.cli.flags import command
from mhacut.cli.running import Console
from mhacut.errors import UsageError
from mhacut.options.measure import ModelsOptions
from mhacut.text import table

if TYPE_CHECKING:
    from mhacut.commands.models import CatalogueEntry


@command(ModelsOptions)
def models(options: ModelsOptions, console: Console) -> None:
    """Show which channels of which timm models can be pruned; FLatten Transformers are included.

    Each model is built without weights and examined. Models without attention are counted, not listed.

    Example: mhacut models 'swin*'
    """
    from mhacut.commands.models import catalogue

    console.start("building models")
    found = catalogue(options.pattern, console.advance)
    if not found:
        hint = f"*{options.pattern.strip('*')}*"
        hint = "" if hint == options.pattern else f"; try {hint!r}"
        raise UsageError(f"{options.pattern!r}: no model in timm has a name like this{hint}")
    console.result(_text(found, options.refused), {"models": [asdict(entry) for entry in found]})


def _text(found: tuple[CatalogueEntry, ...], refused: bool) -> str:
    attending = [entry for entry in found if entry.transformer]
    cut = [entry for entry in attending if entry.refusal is None]
    if refused:
        rows = [["architecture", "tags", "why"]]
        rows += [
            [entry.architecture, str(len(entry.tags)), entry.refusal.partition(";")[0]]
            for entry in attending
            if entry.refusal
        ]
    else:
        rows = [["architecture", "tags", "cut", "attention"]]
        rows += [
            [
                entry.architecture,
                str(len(entry.tags)),
                " ".join(entry.kinds) + ("*" if entry.not_prunable else "") if entry.refusal is None else "-",
                ", ".join(entry.attention) or "-",
            ]
            for entry in attending
        ]
    tags = [sum(len(entry.tags) for entry in entries) for entries in (cut, attending)]
    lines = [table(rows), ""] if len(rows) > 1 else []
    if not attending:
        several = f"none of these {len(found)} architectures has attention"
        return several if len(found) > 1 else f"{found[0].architecture} has no attention"
    lines.append(
        f"{len(cut)} of {len(attending)} architectures with attention can be cut ({tags[0]} of {tags[1]} "
        f"pretrained tags), attention itself in {sum(bool(entry.attention) for entry in cut)}; "
        f"{len(found) - len(attending)} have no attention"
    )
    if len(cut) < len(attending) and not refused:
        lines.append("-: refused; --refused says why")
    if any(entry.not_prunable for entry in cut) and not refused:
        lines.append("*: part of it is not prunable; --json names the part and the reason")
    return "\n".join(lines)
