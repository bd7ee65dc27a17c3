"""Add to the rows of a table what is measured of the files that ``compare.py --keep-models`` kept.

    python examples/benchmarks/kept.py results/wide430.json --subject wide430 --root DIR --models slim
    python examples/benchmarks/kept.py results/tiny200.json --subject tiny200 --root DIR --runs runs.jsonl

``--models`` times one image in ONNX Runtime on one thread: the dense model and all files take turns in one
process, in milliseconds of CPU time. ``--runs`` adds what ``finetune.py`` made of the files: mean and
standard deviation over seeds of the top-1 after most steps, with a teacher; random weights have rows of their
own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from setups import Setup, read
from subjects import add_flags, complete

Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    parser.add_argument("table", type=Path, help="a file of compare.py --merge, written anew")
    parser.add_argument("--models", type=Path, metavar="DIR", help="folder with METHOD-PERCENT.safetensors")
    parser.add_argument("--runs", type=Path, metavar="FILE", help="JSON lines of finetune.py")
    parser.add_argument("--seconds", type=float, default=120, help="of timing, for all together")
    asked = parser.parse_args()
    complete(parser, asked)
    document = json.loads(asked.table.read_text(encoding="utf-8"))
    if asked.models is not None:
        time_rows(document["rows"], asked)
    if asked.runs is not None:
        lines = [json.loads(line) for line in asked.runs.read_text(encoding="utf-8").splitlines()]
        document["rows"] = with_runs(document["rows"], lines)
    asked.table.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def time_rows(rows: Iterable[Row], asked: argparse.Namespace) -> None:
    """Put ``onnx_ms`` into the rows of the dense model and of all files that are there."""
    import torch
    from methods.common import read_slim

    from mhacut.exporting.runtimes import onnx_content, onnx_runner
    from mhacut.measuring.latency import fixed_images, run_of, take_turns

    torch.set_num_threads(1)
    loaded, preprocessing = read(Setup.of(asked, calibration_images=0, seed=0))
    dense, size = loaded.model.eval().requires_grad_(False), preprocessing.input_size
    timed, runs = [], []
    for row in rows:
        file = asked.models / f"{row['method']}-{row['keep'] or 100:g}.safetensors"
        if row["method"] != "dense" and not file.exists():
            continue
        model = dense if row["method"] == "dense" else read_slim(dense, str(file), "own")
        runs.append(run_of(onnx_runner(onnx_content(model, size, 1), 1), fixed_images(1, size)))
        timed.append(row)
    times = take_turns(runs, seconds=asked.seconds, device=torch.device("cpu"), clock=time.process_time)
    for row, own in zip(timed, times, strict=True):
        row["onnx_ms"] = 1000 * statistics.median(own)
        print(f"{row['title']} {row['keep'] or 100:g} %: {row['onnx_ms']:.2f} ms")


def with_runs(rows: list[Row], lines: Iterable[Row]) -> list[Row]:
    """Return ``rows`` with ``finetuned``, and rows for architectures trained from random weights."""
    found: dict[tuple[str, float, str], dict[int, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        run = line.get("run")  # the first line is about the machine
        if run is not None and run["teacher"]:
            cell = found[run["method"], run["keep"], run["start"]]
            cell[run["steps"]][run["seed"]] = line["after"]["top1"]
    added = []
    for (method, keep, start), by_steps in found.items():
        steps = max(by_steps)
        top1 = list(by_steps[steps].values())
        spread = statistics.stdev(top1) if len(top1) > 1 else 0.0
        seeds = sorted(by_steps[steps])
        finetuned = {"top1": statistics.mean(top1), "spread": spread, "seeds": seeds, "steps": steps}
        row = next(row for row in rows if (row["method"], row["keep"]) == (method, keep))
        if start == "pruned":
            row["finetuned"] = finetuned
        else:
            same = {name: row[name] for name in ("keep", "flops", "ratio", "code", "commit") if name in row}
            title = f"widths of {row['title']}, random weights"
            added.append({"method": f"{method}, random", "title": title, **same, "finetuned": finetuned})
    new = {(row["method"], row["keep"]) for row in added}
    return [row for row in rows if (row["method"], row["keep"]) not in new] + added


if __name__ == "__main__":
    main()
