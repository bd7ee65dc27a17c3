"""The table of a comparison: its rows, the file that keeps them, and how they are printed."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from methods import METHODS, Method
from process import Process, commit
from setups import Setup


class Table:
    """Rows, and the file they are kept in."""

    def __init__(self, file: str | None, document: dict[str, Any]) -> None:
        self.file = file
        self.document = document

    @classmethod
    def open(cls, file: str | None, machine: Mapping[str, str], setup: Setup) -> Table:
        """The table in ``file``; an empty one if there is none.

        Raises:
            SystemExit: it was made on another machine or of other things.
        """
        fresh = {"machine": dict(machine), "setup": setup.told(), "validation_images": 0, "rows": []}
        if file is None or not os.path.exists(file):
            return cls(file, fresh)
        found = json.loads(Path(file).read_text(encoding="utf-8"))
        for part in ("machine", "setup"):
            for name, value in fresh[part].items():
                if found[part].get(name) != value:
                    raise SystemExit(
                        f"{file} was made with {name} {found[part].get(name)!r}, this is {value!r}: "
                        "such rows do not belong in one table"
                    )
        return cls(file, found)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """In the order of :data:`METHODS` and falling budgets, the dense model first."""
        order = {name: place for place, name in enumerate(("dense", *METHODS))}
        return sorted(
            self.document["rows"], key=lambda row: (order.get(row["method"], len(order)), -(row["keep"] or 0))
        )

    @property
    def validation_images(self) -> int:
        return int(self.document["validation_images"])

    def has(self, method: str, keep: float | None) -> bool:
        return any((row["method"], row["keep"]) == (method, keep) for row in self.document["rows"])

    def put(self, row: dict[str, Any]) -> None:
        """Add a row, in place of an older one, and write the file."""
        same = (row["method"], row["keep"])
        others = [old for old in self.document["rows"] if (old["method"], old["keep"]) != same]
        self.document["rows"] = [*others, row]
        if self.file is not None:
            self.write(self.file)

    def write(self, file: str) -> None:
        """Whole or not at all."""
        temporary = Path(f"{file}.part")
        document = {**self.document, "rows": self.rows}
        temporary.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, file)


def filled_row(
    method: Method | None,
    keep: float | None,
    found: Mapping[str, Any],
    dense_flops: int,
    process: Process,
    checks: Mapping[str, Any],
) -> dict[str, Any]:
    """One line of the table; of the dense model without a method."""
    scores = found["scores"]
    best = found["best"]
    return {
        "method": "dense" if method is None else method.name,
        "title": "dense" if method is None else method.title,
        "sees": "nothing" if method is None else method.sees,
        "keep": keep,
        "flops": found["flops"],
        "ratio": found["flops"] / dense_flops,
        "latency_ratio": found.get("latency_ratio", 1.0),
        **scores[best],
        "temperature": best,
        "other_temperatures": {name: score for name, score in scores.items() if name != best},
        "wall_s": process.wall_s,
        "cpu_s": process.cpu_s,
        "peak_mib": process.peak_mib,
        "checks": {**checks, **found["checks"]},
        "code": code_digest(),
        "commit": commit(),
    }


def empty_row(method: Method, keep: float, reason: str) -> dict[str, Any]:
    about = {"method": method.name, "title": method.title, "sees": method.sees, "keep": keep}
    return {**about, "out_of_reach": reason}


@functools.cache
def code_digest() -> str:
    """Of all that makes a row: the code of mhacut and of the methods beside it."""
    package = importlib.util.find_spec("mhacut")
    assert package is not None
    assert package.origin is not None
    found = hashlib.sha256()
    for folder in (Path(package.origin).parent, Path(__file__).parent / "methods"):
        for file in sorted(folder.rglob("*.py")):
            found.update(file.read_bytes())
    return found.hexdigest()[:12]


def as_markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table's main columns. "time" is that of a batch of 8 over the dense model's, timed in turns."""
    lines = ["| method | FLOPs | top-1 | agree | KL | time | CPU s |", "|---|---|---|---|---|---|---|"]
    for row in rows:
        if "out_of_reach" in row:
            cells = [f"{row['keep']:g} %", *["-"] * 5]
        else:
            time = f"{row['latency_ratio']:.2f}" if "latency_ratio" in row else "-"
            cells = [f"{100 * row['ratio']:.1f} %", f"{row['top1']:.2f}", f"{row['agreement']:.2f}"]
            cells += [f"{row['kl']:.4f}", time, f"{row['cpu_s']:.0f}"]
        lines.append(f"| {' | '.join([row['title'], *cells])} |")
    return "\n".join(lines)


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table, then what does not fit into it."""
    head = [
        "method",
        "keep",
        "top-1",
        "agree",
        "KL",
        "GMAC",
        "ratio",
        "gap",
        "time",
        "wall s",
        "CPU s",
        "peak MiB",
    ]
    lines = [head]
    notes = []
    for row in rows:
        keep = "" if row["keep"] is None else f"{row['keep']:g}%"
        where = f"{row['title']} {keep}".strip()
        if "out_of_reach" in row:
            lines.append([row["title"], keep, *["-"] * (len(head) - 2)])
            notes.append(f"{where}: out of reach, {row['out_of_reach']}")
            continue
        lines.append(
            [
                row["title"],
                keep,
                f"{row['top1']:.2f}",
                f"{row['agreement']:.2f}",
                f"{row['kl']:.4f}",
                f"{row['flops'] / 1e9:.4f}",
                f"{100 * row['ratio']:.2f}%",
                "" if row["keep"] is None else f"{100 * (100 * row['ratio'] / row['keep'] - 1):+.2f}%",
                f"{row['latency_ratio']:.2f}" if "latency_ratio" in row else "",
                f"{row['wall_s']:.1f}",
                f"{row['cpu_s']:.1f}",
                f"{row['peak_mib']:.0f}",
            ]
        )
        told = [
            f"scored at temperature {row['temperature']} ({name}: {score['top1']:.2f} / {score['kl']:.4f})"
            for name, score in row["other_temperatures"].items()
        ]
        told += [f"{name} {value}" for name, value in row["checks"].items()]
        if told:
            notes.append(f"{where}: {'; '.join(told)}")
    states = {row["code"] for row in rows if "code" in row}
    if len(states) > 1:
        notes.append(f"these rows were made by {len(states)} states of the code; --again makes them anew")
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = []
    for line in lines:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join([*text, "", *notes])
