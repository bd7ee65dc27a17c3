"""The table of all heads, with a search over it."""

from __future__ import annotations

from mhacut.inspection.layers import LayerReport, UnitReport
from mhacut.report.contents import Contents
from mhacut.report.markup import Markup, join, tag
from mhacut.report.sections import scrolling, section
from mhacut.text import ranges

_HEADS = (
    ("layer", "Module name"),
    ("head", "Number of the head; MLPs have none"),
    ("kind", "q/k, v, or hidden channels"),
    ("width", "Channels now"),
    ("dense", "Channels before any cut"),
    ("similarity", "Mean similarity of a channel to the others of its head"),
    ("rank 90 %", "Principal channels that hold 90 % of the energy"),
    ("rank 99 %", "Principal channels that hold 99 % of the energy"),
    ("FLOPs %", "Share of the model's FLOPs, of the whole layer or head"),
    ("parameters %", "Share of the model's parameters, of the whole layer or head"),
    ("channels", "Kept and removed, and what a cut would keep"),
)


def heads_table(contents: Contents) -> Markup:
    """One row per head and kind, one per MLP; the page's script searches and sorts it."""
    rows: list[Markup] = []
    for layer in contents.layers:
        for unit in layer.units.values():
            for head in range(unit.head_count):
                rows.append(_row(layer, unit, head))
    search = tag(
        "p",
        tag("label", "Search ", for_="search"),
        tag("input", type="search", id="search", autocomplete="off", aria_controls="every-head"),
        " ",
        tag("output", f"{len(rows)} of {len(rows)} rows", id="found", for_="search", aria_live="polite"),
    )
    headings = [
        tag("th", tag("button", name, type="button", title=told), scope="col", aria_sort="none")
        for name, told in _HEADS
    ]
    table = tag(
        "table",
        tag("caption", "All heads; headings sort."),
        tag("thead", tag("tr", *headings)),
        tag("tbody", *rows),
        id="every-head",
    )
    return section("All heads", search, scrolling(table))


def _row(layer: LayerReport, unit: UnitReport, head: int) -> Markup:
    found = unit.heads[head] if head < len(unit.heads) else None
    share = 1 / unit.head_count
    cells = [
        "" if layer.heads is None else str(head),
        unit.kind,
        str(unit.now),
        str(unit.dense),
        "" if found is None else f"{found.similarity:.3f}",
        "" if found is None else str(found.rank90),
        "" if found is None else str(found.rank99),
        f"{100 * layer.share * share:.2f}",
        f"{100 * layer.parameter_share * share:.2f}",
    ]
    return tag(
        "tr",
        tag("th", layer.name, scope="row"),
        *(tag("td", cell) for cell in cells),
        tag("td", _channels(unit, head)),
    )


def _channels(unit: UnitReport, head: int) -> Markup:
    told: list[Markup] = []
    if unit.kept is not None:
        kept = unit.kept[head]
        removed = sorted(set(range(unit.dense)) - set(kept))
        told += [
            tag("dt", f"kept ({unit.basis})"),
            tag("dd", ranges(kept)),
            tag("dt", "removed"),
            tag("dd", ranges(removed)),
        ]
    if unit.heads:
        for share, channels in unit.heads[head].keeps.items():
            told += [tag("dt", f"at {share} % would keep"), tag("dd", ranges(channels))]
    return tag("details", tag("summary", "show"), tag("dl", *told)) if told else join()
