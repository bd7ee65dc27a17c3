"""Sets ``mhacut prune`` beside other methods on one plain timm ViT at equal FLOPs, without fine-tuning.

    pip install 'mhacut[bench]'
    python examples/benchmarks/compare.py --checkpoint examples/digits/model --data-dir examples/digits/images
    python examples/benchmarks/compare.py --subject wide430 --root downloads

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
made in parts and a stopped run goes on.

This process imports the standard library only: on Linux a child starts with its parent's peak memory.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import importlib
import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from methods import METHODS, Method, chosen
from process import OUT_OF_REACH, FailedError, Process, TooFarError, describe_machine, run
from subjects import add_flags, complete

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from mhacut.checkpoint.checkpoint import Checkpoint
    from mhacut.data import CalibrationImages, Preprocessing

EVALUATION_BATCH = 64
LATENCY_BATCH = 8
LATENCY_SECONDS = 4.0
HALVES = {"even": 0, "odd": 1}
"""Halves of the validation images, by their first index: choose on one, report the other."""


@dataclass(frozen=True)
class Setup:
    """What all cells have in common."""

    checkpoint: str
    model: str | None
    model_args: tuple[str, ...]
    """``key=value``, as the command line of mhacut takes them."""
    data_dir: str
    mean: str | None
    """``A,B,C``"""
    std: str | None
    """``A,B,C``"""
    calibration_images: int
    seed: int

    def flags(self) -> list[str]:
        """Flags of ``mhacut prune`` that say the same, all but the checkpoint and the data."""
        flags = ["--seed", str(self.seed), "--calibration-images", str(self.calibration_images)]
        if self.model is not None:
            flags += ["--model", self.model]
        for argument in self.model_args:
            flags += ["--model-arg", argument]
        for name, value in (("--mean", self.mean), ("--std", self.std)):
            flags += [] if value is None else [name, value]
        return flags

    def told(self) -> dict[str, Any]:
        """For the table's file: names instead of paths, and a digest that tells checkpoints apart."""
        told = asdict(self) | {"model_args": list(self.model_args)}
        told |= {"checkpoint": Path(self.checkpoint).name, "data_dir": Path(self.data_dir).name}
        return told | {"checkpoint_sha256": digest(self.checkpoint)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = build_parser()
    asked = parser.parse_args(arguments)
    complete(parser, asked)
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
    exists = os.path.exists(asked.checkpoint)
    setup = Setup(
        checkpoint=os.path.abspath(asked.checkpoint) if exists else asked.checkpoint,
        model=asked.model,
        model_args=tuple(asked.model_arg),
        data_dir=os.path.abspath(asked.data_dir),
        mean=asked.mean,
        std=asked.std,
        calibration_images=asked.calibration_images,
        seed=asked.seed,
    )
    machine = describe_machine(asked.threads)
    table = Table.open(asked.merge, machine, setup)
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        comparison = Comparison(
            setup, table, Path(folder), asked.threads, asked.keep_models, asked.share_calibration
        )
        failures = comparison.fill(methods, asked.keep, again=asked.again)
    print("\n".join(f"{name}: {value}" for name, value in {**machine, "seed": setup.seed}.items()))
    print(
        f"\n{table.validation_images} validation images ({asked.half} of them in the table), "
        f"{setup.calibration_images} calibration images asked for\n"
    )
    rows = [of_half(row, asked.half) for row in table.rows]
    print(as_markdown(rows) if asked.markdown else as_text(rows))
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
        "--keep", type=float, nargs="+", default=[75.0, 50.0, 25.0], metavar="PERCENT", help="of the FLOPs"
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


def digest(checkpoint: str) -> str:
    """sha256 of a file, or of a folder's files; empty for what is neither."""
    path = Path(checkpoint)
    files = sorted(path.iterdir()) if path.is_dir() else [path] if path.is_file() else []
    found = hashlib.sha256()
    for file in files:
        found.update(file.read_bytes())
    return found.hexdigest() if files else ""


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


# --- The table ---


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
        setup = asdict(self.setup)
        reference = str(self.folder / "reference.safetensors")
        dense = json.loads(self.part("reference", {"setup": setup, "file": reference}).stdout)
        self.table.document["validation_images"] = dense["images"]
        if again or not self.table.has("dense", None):
            reading = self.part("read", {"setup": setup})
            self.table.put(_row(None, None, dense, dense["flops"], reading, {}))
        failures: list[str] = []
        for method in methods:
            cells = []
            for keep in missing[method.name]:
                told = f"{method.name} {keep:g} %"
                print(told, file=sys.stderr, flush=True)
                try:
                    cells.append(self.prune(method, keep))
                except TooFarError as error:
                    self.table.put(_empty_row(method, keep, str(error)))
                except FailedError as error:
                    failures.append(f"{told}: {error}")
            if not cells:
                continue
            job = {"setup": setup, "reference": reference, "cells": cells}
            try:
                scored = json.loads(self.part("score", job).stdout)
            except FailedError as error:
                failures.append(f"{method.name}, scoring: {error}")
                continue
            for cell, found in zip(cells, scored, strict=True):
                process = Process(**cell["process"], stdout="")
                row = _row(method, cell["keep"], found, dense["flops"], process, cell["checks"])
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
            process = self.mhacut(mhacut_command(self.setup, method, keep, file))
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
        """One of :data:`PARTS` of this script in a process of its own."""
        file = self.folder / "job.json"
        file.write_text(json.dumps(job), encoding="utf-8")
        return run([sys.executable, os.path.abspath(__file__), f"--part={part}", str(file)], self.threads)


def mhacut_command(setup: Setup, method: Method, keep: float, output: Path) -> list[str]:
    """The command as a user types it."""
    command = [sys.executable, "-m", "mhacut", "prune", setup.checkpoint, "--flops", f"{keep:g}%"]
    command += ["--output", str(output), "--overwrite", "--no-latency", "--eval-images", "0", "--json"]
    command += ["--device", "cpu", *setup.flags(), *method.options["flags"]]
    return command if method.sees == "nothing" else [*command, "--data-dir", setup.data_dir]


def _row(
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
    }


def _empty_row(method: Method, keep: float, reason: str) -> dict[str, Any]:
    about = {"method": method.name, "title": method.title, "sees": method.sees, "keep": keep}
    return {**about, "out_of_reach": reason}


def best_of(scores: Mapping[str, Mapping[str, float]]) -> str:
    """The temperature at which KL is least: it tells more than top-1 of as many images."""
    return min(scores, key=lambda name: scores[name]["kl"])


def of_half(row: Mapping[str, Any], half: str) -> dict[str, Any]:
    """A row with the scores of one half of the validation images, or of all."""
    return dict(row) if half == "all" or "out_of_reach" in row else {**row, **row["halves"][half]}


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


# --- Parts that run in a process of their own ---


def read(setup: Setup) -> tuple[Checkpoint, Preprocessing]:
    """Model and preprocessing, as ``mhacut prune`` reads them."""
    import yaml

    from mhacut.checkpoint.load import read_model
    from mhacut.checkpoint.preprocessing import resolve_preprocessing
    from mhacut.options.base import PreprocessingOptions

    pairs = (argument.partition("=") for argument in setup.model_args)
    model_args = {name: yaml.safe_load(value) for name, _, value in pairs}
    loaded = read_model(setup.checkpoint, model=setup.model, model_args=model_args or None)
    mean, std = (
        None if text is None else tuple(float(part) for part in text.split(","))
        for text in (setup.mean, setup.std)
    )
    return loaded, resolve_preprocessing(loaded, PreprocessingOptions(mean=mean, std=std))


def read_all(setup: Setup) -> tuple[Checkpoint, Preprocessing, CalibrationImages]:
    """The same and the labelled calibration images."""
    from mhacut.data import calibration_images
    from mhacut.options.base import DataOptions

    loaded, preprocessing = read(setup)
    seen = calibration_images(
        preprocessing,
        DataOptions(data_dir=setup.data_dir),
        count=setup.calibration_images,
        seed=setup.seed,
        num_classes=loaded.model.num_classes,
    )
    return loaded, preprocessing, seen


def part_read(job: Mapping[str, Any]) -> int:
    """What every method does before it prunes."""
    read_all(setup_of(job))
    return 0


def part_prune(job: Mapping[str, Any]) -> int:
    """Prune with one of the modules in ``methods/``; write the slim model, print what was checked."""
    import torch
    from methods.common import OutOfReachError, Task, read_slim, write_slim

    method = METHODS[job["method"]]
    setup = setup_of(job)
    loaded, preprocessing, seen = read_all(setup)
    dense = loaded.model.eval().requires_grad_(False)
    labels = seen.labels if method.sees == "labelled images" else None
    task = Task.of(
        dense, preprocessing.input_size, seen.images, labels, job["keep"] / 100, dict(method.options)
    )
    try:
        slim = importlib.import_module(f"methods.{method.module}").prune(task)
    except OutOfReachError as error:
        print(error)
        return OUT_OF_REACH
    write_slim(job["file"], slim.model, slim.temperatures)
    probe = seen.images[:4]
    with torch.no_grad():
        # Plain attention reads the attribute scale: as the method left it.
        again = read_slim(dense, job["file"], slim.temperatures[0])
        same = torch.allclose(again(probe), slim.model(probe), atol=1e-4)
    print(json.dumps({**slim.checks, "same logits after reading back": "yes" if same else "no"}))
    return 0


def part_shared(job: Mapping[str, Any]) -> int:
    """Run mhacut with calibrations shared in a folder; write how many seconds that saved."""
    from methods.shared_calibration import SharedCalibration

    import mhacut.pruning.job
    from mhacut.cli.app import app

    shared = SharedCalibration(Path(job["folder"]))
    mhacut.pruning.job.calibrate = shared
    try:
        app(list(job["arguments"]))
    finally:
        Path(job["saved"]).write_text(json.dumps(shared.saved_s), encoding="utf-8")
    return 0


def part_reference(job: Mapping[str, Any]) -> int:
    """The dense model's logits on the whole validation split, to a file; its own score to stdout."""
    import torch
    from safetensors.torch import save_file

    from mhacut.surgery.flops import measure_flops

    loaded, preprocessing = read(setup_of(job))
    dense = loaded.model.eval().requires_grad_(False)
    logits, truths = [], []
    with torch.inference_mode():
        for images, labels in evaluation_images(setup_of(job), preprocessing, dense.num_classes):
            logits.append(dense(images))
            truths.append(labels)
    reference, truth = torch.cat(logits), torch.cat(truths)
    save_file({"logits": reference, "labels": truth}, job["file"])
    found = {
        "flops": measure_flops(dense, preprocessing.input_size),
        "images": len(truth),
        "best": "own",
        "scores": {"own": scores_of(reference, reference, truth)},
        "checks": {},
    }
    print(json.dumps(found))
    return 0


def part_score(job: Mapping[str, Any]) -> int:
    """Score slim models on the whole validation split, at every softmax temperature that is left open.

    The files of methods that leave it open are written anew with the better one folded in.
    """
    import torch
    from methods.common import read_slim, temperatures_of, write_slim
    from safetensors.torch import load_file

    from mhacut.measuring.latency import compare_latency
    from mhacut.surgery.flops import measure_flops

    loaded, preprocessing = read(setup_of(job))
    dense = loaded.model.eval().requires_grad_(False)
    reference = load_file(job["reference"])
    cells = [
        {
            name: read_slim(dense, cell["file"], name).requires_grad_(False)
            for name in temperatures_of(cell["file"]) or ("own",)
        }
        for cell in job["cells"]
    ]
    logits: list[dict[str, list[Tensor]]] = [{name: [] for name in cell} for cell in cells]

    with torch.inference_mode():
        for images, _ in evaluation_images(setup_of(job), preprocessing, dense.num_classes):
            for models, collected in zip(cells, logits, strict=True):
                for name, model in models.items():
                    collected[name].append(model(images))
    found = []
    for cell, models, collected in zip(job["cells"], cells, logits, strict=True):
        scores = {
            name: scores_of(reference["logits"], torch.cat(parts), reference["labels"])
            for name, parts in collected.items()
        }
        best = best_of(scores)
        if len(scores) > 1:
            write_slim(cell["file"], models[best], ("own",))
        size = preprocessing.input_size
        dense_ms, slim_ms = compare_latency(
            [dense, models[best]],
            size,
            batch_size=LATENCY_BATCH,
            seconds=LATENCY_SECONDS,
            device=torch.device("cpu"),
        )
        flops = measure_flops(models[best], size)
        about = {"flops": flops, "latency_ratio": slim_ms / dense_ms}
        found.append({**about, "best": best, "scores": scores, "checks": {}})
    print(json.dumps(found))
    return 0


def setup_of(job: Mapping[str, Any]) -> Setup:
    return Setup(**{**job["setup"], "model_args": tuple(job["setup"]["model_args"])})


def evaluation_images(setup: Setup, preprocessing: Preprocessing, num_classes: int) -> Any:
    """Batches of images and labels of val/."""
    from mhacut.data import evaluation_loader
    from mhacut.options.base import LabelledImages

    return evaluation_loader(
        preprocessing,
        LabelledImages(data_dir=setup.data_dir, workers=0),
        num_classes=num_classes,
        batch_size=EVALUATION_BATCH,
    )


def scores_of(reference: Tensor, logits: Tensor, labels: Tensor) -> dict[str, Any]:
    """:func:`score` on all images, and under ``halves`` on those of even and of odd index."""
    halves = {
        name: score(reference[start::2], logits[start::2], labels[start::2]) for name, start in HALVES.items()
    }
    return {**score(reference, logits, labels), "halves": halves}


def score(reference: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """How a model does on n images.

    Args:
        reference: the dense model's logits, [n, classes].
        logits: the model's.
        labels: [n].

    Returns:
        ``top1`` in percent; ``agreement``, percent of the images where the first answer is the dense model's;
        ``kl``, KL(dense || slim) in nats, mean over the images; ``images``, n.
    """
    p, q = reference.double().log_softmax(1), logits.double().log_softmax(1)
    answers = logits.argmax(1)
    return {
        "top1": 100 * float((answers == labels).double().mean()),
        "agreement": 100 * float((answers == reference.argmax(1)).double().mean()),
        "kl": float((p.exp() * (p - q)).sum(1).mean()),
        "images": len(labels),
    }


PARTS = {
    "read": part_read,
    "prune": part_prune,
    "shared": part_shared,
    "reference": part_reference,
    "score": part_score,
}


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].startswith("--part="):
        document = json.loads(Path(sys.argv[2]).read_text(encoding="utf-8"))
        sys.exit(PARTS[sys.argv[1].removeprefix("--part=")](document))
    sys.exit(main())
