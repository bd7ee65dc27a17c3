"""Which ingredients of mhacut pay: each taken from the full method, and each alone, over several seeds.

    python examples/benchmarks/ablation.py --merge rows --subject wide430 --root downloads --keep 75 50

takes the flags of ``compare.py`` and ``--seeds``, and prints per row mean ± half the range over seeds. A seed
draws other calibration images, other batches and other random projections. ``--merge STEM`` keeps the rows of
seed S in STEM-S.json; a run that was stopped goes on from there. Rows that calibrate alike do it once, and
its seconds count for each.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import compare
from methods import METHODS, chosen
from scores import HALVES, of_half


def main(arguments: Sequence[str] | None = None) -> int:
    rows = [name for name in METHODS if name.startswith("ablation-")]
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0],
        epilog=f"All other flags are those of compare.py. Rows: {', '.join(rows)}.",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 1, 2])
    parser.add_argument("--merge", required=True, metavar="STEM")
    parser.add_argument("--methods", nargs="+", default=["ablation-*"], metavar="GLOB")
    parser.add_argument("--half", choices=("all", *HALVES), default="all")
    asked, others = parser.parse_known_args(arguments)
    failed = 0
    tables: list[dict[str, Any]] = []
    for seed in asked.seeds:
        file = f"{asked.merge}-{seed}.json"
        flags = [
            *others,
            "--methods",
            *asked.methods,
            "--seed",
            str(seed),
            "--merge",
            file,
            "--share-calibration",
        ]
        with contextlib.redirect_stdout(io.StringIO()):  # one table for all seeds is printed below
            failed |= compare.main(flags)
        if not Path(file).exists():
            return failed  # nothing was begun; compare.py has said why
        table = json.loads(Path(file).read_text(encoding="utf-8"))
        tables.append({**table, "rows": [of_half(row, asked.half) for row in table["rows"]]})
    about = {**tables[0]["machine"], "seeds": asked.seeds, "checkpoint": tables[0]["setup"]["checkpoint"]}
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    print(f"\n{tables[0]['validation_images']} validation images ({asked.half} of them in the table)\n")
    print(as_text(tables, [method.name for method in chosen(asked.methods)]))
    return failed


def as_text(tables: Sequence[dict[str, Any]], names: Sequence[str]) -> str:
    """Markdown, a line per method and budget."""
    lines = ["| keep | row | top-1 | agree | KL | CPU s |", "|---|---|---|---|---|---|"]
    keeps = sorted({row["keep"] for row in tables[0]["rows"] if row["keep"]}, reverse=True)
    for keep in keeps:
        for name in names:
            found = [row for table in tables for row in table["rows"] if _is(row, name, keep)]
            if not found:
                continue
            cells = [f"{keep:g} %", found[0]["title"]]
            cells += [
                _spread([row[key] for row in found], digits)
                for key, digits in (("top1", 2), ("agreement", 2), ("kl", 4), ("cpu_s", 0))
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _is(row: dict[str, Any], name: str, keep: float) -> bool:
    return row["method"] == name and row["keep"] == keep and "out_of_reach" not in row


def _spread(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.{digits}f}"


if __name__ == "__main__":
    sys.exit(main())
