"""Sets ``mhacut prune`` beside other methods on one plain timm ViT at equal FLOPs, without fine-tuning.

    pip install 'mhacut[bench]'
    python examples/benchmarks/compare.py --checkpoint examples/digits/model --data-dir examples/digits/images
    python examples/benchmarks/compare.py --subject wide430 --root downloads
    python examples/benchmarks/compare.py --subject imagenet --root DIR --checkpoint timm:NAME

prints one table: a row per method and budget. Rules of the comparison:

- Equal FLOPs: within 0.5 % of the budget where the method's steps allow (the column "gap" shows it), mhacut
  never above it. All are counted by mhacut.surgery.flops on the model read back from its file.
- Equal freedom: q/k/v channels and hidden channels of the MLP, and tokens where the row says so; the
  residual width stays. What a method does not cut (attention in VBP, v in CORP) it leaves whole, and a
  budget below that is out of its reach.
- Equal data: the same calibration images and preprocessing. Some methods need their labels.
- Every cell prunes in a process of its own. Its seconds and peak memory are those of that whole process, from
  the start of Python to the written file; the row "dense" is a process that only reads model and images,
  which any of them does before it prunes. Accuracy is measured afterwards, in another process.
- Where a method leaves the softmax temperature open, the better of two is in the table: that of less KL on
  the validation images.

``--merge FILE`` keeps the rows in a file as they come and reuses those it finds there, so that a table can be
made in parts and a stopped run goes on. ``--subject imagenet`` does so by itself, and takes the budgets at
which others published results without training (``published.py``), which it prints beside its own.

This process imports the standard library only: on Linux a child starts with its parent's peak memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from compare_table import Table, as_markdown, as_text, empty_row, filled_row
from methods import METHODS, Method, chosen
from process import FailedError, Process, TooFarError, describe_machine, run
from published import as_markdown as published_markdown
from published import as_rows, budgets, published
from scores import HALVES, of_half
from setups import Setup
from subjects import IMAGENET, add_flags, complete


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    asked = parser.parse_args(arguments)
    complete(parser, asked)
    others = published(asked.checkpoint, asked.model) if asked.subject == IMAGENET else []
    if asked.subject == IMAGENET:
        name = os.path.basename(asked.checkpoint).removeprefix("timm:")
        asked.merge = asked.merge or f"imagenet_{name}.json"
        asked.keep = asked.keep or budgets(others)
        asked.methods = asked.methods or ["mhacut-plain-balanced", "tome"]
    asked.keep = asked.keep or [75.0, 50.0, 25.0]
    try:
        methods = chosen(asked.methods)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if any(method.name.startswith("tp-") for method in methods) and not importlib.util.find_spec(
        "torch_pruning"
    ):
        print(
            "Torch-Pruning is missing: pip install 'mhacut[bench]', or choose other --methods",
            file=sys.stderr,
        )
        return 2
    setup = Setup.of(asked, calibration_images=asked.calibration_images, seed=asked.seed)
    machine = describe_machine(asked.threads)
    table = Table.open(asked.merge, machine, setup)
    if others:
        table.document["published"] = as_rows(others)
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        comparison = Comparison(
            setup,
            table,
            Path(folder),
            asked.threads,
            asked.keep_models,
            asked.share_calibration,
            asked.device,
        )
        failures = comparison.fill(methods, asked.keep, again=asked.again)
    print("\n".join(f"{name}: {value}" for name, value in {**machine, "seed": setup.seed}.items()))
    print(
        f"\n{table.validation_images} validation images ({asked.half} of them in the table), "
        f"{setup.calibration_images} calibration images asked for\n"
    )
    rows = [of_half(row, asked.half) for row in table.rows]
    print(as_markdown(rows) if asked.markdown else as_text(rows))
    if others:
        print(f"\nof others, on 50,000 images, not measured here:\n\n{published_markdown(others)}")
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    if asked.json:
        table.write(asked.json)
    return 1 if failures else 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Compare mhacut with other methods on a timm ViT at equal FLOPs.",
        epilog=f"Methods: {', '.join(METHODS)}.",
    )
    add_flags(parser)
    parser.add_argument(
        "--keep",
        type=float,
        nargs="+",
        metavar="PERCENT",
        help="of the FLOPs (default: 75 50 25; for imagenet those of published rows)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="names below; by default all but mhacut's other bases and efforts",
    )
    parser.add_argument("--calibration-images", type=int, default=256, metavar="N", help="(default: 256)")
    parser.add_argument("--seed", type=int, default=42, help="of all random numbers (default: 42)")
    parser.add_argument("--threads", type=int, default=1, help="of every process (default: 1)")
    parser.add_argument(
        "--device", default="cpu", help="of mhacut and of scoring, such as cuda (default: cpu)"
    )
    parser.add_argument("--merge", metavar="FILE", help="reuse the rows of this file, and add those made now")
    parser.add_argument("--again", action="store_true", help="make rows anew that --merge has")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there too")
    parser.add_argument(
        "--half", choices=("all", *HALVES), default="all", help="of the validation images, for the table"
    )
    parser.add_argument(
        "--share-calibration",
        action="store_true",
        help="calibrate once for all rows of mhacut that calibrate alike; its seconds count for each",
    )
    parser.add_argument("--markdown", action="store_true", help="print the table as Markdown")
    parser.add_argument("--keep-models", metavar="DIR", help="keep METHOD-PERCENT.safetensors there")
    return parser


@dataclass(frozen=True)
class Comparison:
    """What fills a table."""

    setup: Setup
    table: Table
    folder: Path
    """For files that nobody needs afterwards."""
    threads: int
    models: str | None
    """Folder that keeps the slim models."""
    share_calibration: bool
    """Whether runs of mhacut that calibrate alike do it once."""
    device: str = "cpu"
    """Device of mhacut, and of scoring; the references prune on the CPU."""

    def fill(self, methods: Sequence[Method], keeps: Sequence[float], *, again: bool) -> list[str]:
        """Make the rows that are not there, method by method; what went wrong."""
        missing = {
            method.name: [keep for keep in keeps if again or not self.table.has(method.name, keep)]
            for method in methods
        }
        if not any(missing.values()):
            return []
        if self.models is not None:
            os.makedirs(self.models, exist_ok=True)
        job = {"setup": asdict(self.setup), "device": self.device}
        reference = str(self.folder / "reference.safetensors")
        dense = json.loads(self.part("reference", {**job, "file": reference}).stdout)
        self.table.document["validation_images"] = dense["images"]
        if again or not self.table.has("dense", None):
            reading = self.part("read", job)
            self.table.put(filled_row(None, None, dense, dense["flops"], reading, {}))
        failures: list[str] = []
        for method in methods:
            cells = []
            for keep in missing[method.name]:
                told = f"{method.name} {keep:g} %"
                print(told, file=sys.stderr, flush=True)
                try:
                    cells.append(self.prune(method, keep))
                except TooFarError as error:
                    self.table.put(empty_row(method, keep, str(error)))
                except FailedError as error:
                    failures.append(f"{told}: {error}")
            if not cells:
                continue
            try:
                scoring = self.part("score", {**job, "reference": reference, "cells": cells})
                scored = json.loads(scoring.stdout)
            except FailedError as error:
                failures.append(f"{method.name}, scoring: {error}")
                continue
            for cell, found in zip(cells, scored, strict=True):
                process = Process(**cell["process"], stdout="")
                row = filled_row(method, cell["keep"], found, dense["flops"], process, cell["checks"])
                self.table.put(row)
                if self.models is None:
                    os.unlink(cell["file"])
        return failures

    def prune(self, method: Method, keep: float) -> dict[str, Any]:
        """Prune one cell."""
        where = self.folder if self.models is None else Path(self.models)
        file = where / f"{method.name}-{keep:g}.safetensors"
        cell = {"method": method.name, "keep": keep, "file": str(file)}
        if method.module:
            process = self.part("prune", {"setup": asdict(self.setup), **cell})
            checks = json.loads(process.stdout)
        else:
            process = self.mhacut(mhacut_command(self.setup, method, keep, file, self.device))
            checks = {}
        took = {"wall_s": process.wall_s, "cpu_s": process.cpu_s, "peak_mib": process.peak_mib}
        return {**cell, "process": took, "checks": checks}

    def mhacut(self, command: Sequence[str]) -> Process:
        """Run a command of mhacut; seconds that a shared calibration saved count as its own."""
        if not self.share_calibration:
            return run(command, self.threads)
        saved = self.folder / "saved.json"
        job = {"arguments": command[3:], "folder": str(self.folder), "saved": str(saved)}
        process = self.part("shared", job)
        seconds = json.loads(saved.read_text(encoding="utf-8"))
        return replace(process, wall_s=process.wall_s + seconds, cpu_s=process.cpu_s + seconds)

    def part(self, part: str, job: Mapping[str, Any]) -> Process:
        """One of the parts of ``compare_parts.py`` in a process of its own."""
        file = self.folder / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        script = str(Path(__file__).with_name("compare_parts.py").resolve())
        return run([sys.executable, script, part, str(file)], self.threads)


def mhacut_command(setup: Setup, method: Method, keep: float, output: Path, device: str = "cpu") -> list[str]:
    """The command as a user types it."""
    command = [sys.executable, "-m", "mhacut", "prune", setup.checkpoint, "--flops", f"{keep:g}%"]
    command += ["--output", str(output), "--overwrite", "--no-latency", "--eval-images", "0", "--json"]
    command += ["--device", device, *setup.flags(), *method.options["flags"]]
    return command if method.sees == "nothing" else [*command, "--data-dir", setup.data_dir]


if __name__ == "__main__":
    sys.exit(main())
