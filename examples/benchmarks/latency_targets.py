"""Whether `mhacut prune --max-latency` meets its targets, measured afresh in another process.

    python examples/benchmarks/latency_targets.py --merge latency_targets.json

cuts models of five architectures (weights random, but for those that ``--checkpoint`` names, synthetic
images) to a share of the dense model's time in each runtime and at each batch size, then times every file
beside the dense model in a process of its own, and prints a row per target. ``--merge`` keeps rows, so that a
table can be made in parts. Times of one thread are of the process, which other programs disturb less than
wall time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from process import FailedError, describe_machine, run

MODELS = {
    "deit_small_patch16_224": "50%",
    "swin_tiny_patch4_window7_224": "70%",
    "pvt_v2_b0": "80%",
    "vit_tiny_patch16_224": "60%",
    "flatten_pvt_tiny": "75%",
}
"""Names of timm's, and the share of the dense model's time to cut to."""
_WRITE = """
import sys, mhacut, timm, torch
from safetensors.torch import save_file
torch.manual_seed(0)
state = timm.create_model(sys.argv[1]).state_dict()
save_file({name: tensor.contiguous() for name, tensor in state.items()}, sys.argv[2])
"""
_FRESH = """
import json, sys
import torch
from mhacut.checkpoint.load import load_model, read_model
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.exporting.stopwatch import Stopwatch
from mhacut.options.base import PreprocessingOptions
from mhacut.options.base import TimingOptions
from mhacut.runtime.progress import SILENT
dense, slim, model, runtime, batch, threads, seconds = sys.argv[1:]
dense = read_model(dense, model=model)
size = resolve_preprocessing(dense, PreprocessingOptions()).input_size
timing = TimingOptions(runtime=runtime, latency_batch_size=int(batch), threads=int(threads))
watch = Stopwatch(timing, dense.model, size, torch.device("cpu"), SILENT)
found = watch.compare([load_model(slim)], seconds=float(seconds), precision=0.003)
print(json.dumps({"ratio": found.ratios[1], "dense_ms": found.milliseconds[0], "drift": found.drift}))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="names of timm's")
    parser.add_argument(
        "--checkpoint", action="append", default=[], metavar="MODEL=FILE", help="trained weights of a model"
    )
    parser.add_argument("--runtimes", nargs="+", default=["eager", "onnx"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--target", help="share of the dense model's time, in place of each model's own")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images", type=int, default=8, help="to calibrate on")
    parser.add_argument(
        "--seconds",
        type=float,
        default=6.0,
        help="to time each file afresh; up to five times as long on a noisy machine",
    )
    parser.add_argument("--merge", type=Path, metavar="FILE", help="keep rows there, and reuse them")
    asked = parser.parse_args(arguments)
    rows: dict[str, dict[str, Any]] = {}
    if asked.merge is not None and asked.merge.exists():
        rows = json.loads(asked.merge.read_text(encoding="utf-8"))
    wanted = []
    given = dict(text.split("=", 1) for text in asked.checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        for batch, runtime, model in product(asked.batches, asked.runtimes, asked.models):
            target = asked.target or MODELS.get(model, "70%")
            name = f"{model} {runtime} batch {batch} {target} {asked.threads}"
            wanted.append(name)
            if name in rows:
                continue
            dense = Path(given.get(model, Path(folder) / f"{model}.safetensors"))
            if not dense.exists():
                run([sys.executable, "-c", _WRITE, model, str(dense)], asked.threads)
            row = {"model": model, "runtime": runtime, "batch": batch, "target": target}
            rows[name] = row | measure(dense, row, asked, Path(folder) / "slim.safetensors")
            if asked.merge is not None:
                asked.merge.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n".join(f"{name}: {value}" for name, value in describe_machine(asked.threads).items()))
    print("\n" + as_text([rows[name] for name in wanted]))


def measure(dense: Path, row: Mapping[str, Any], asked: argparse.Namespace, slim: Path) -> dict[str, Any]:
    """Cut one model to one target, and time its file afresh."""
    where = [row["runtime"], str(row["batch"]), str(asked.threads)]
    command = [sys.executable, "-m", "mhacut", "prune", str(dense), "--model", row["model"], "--json"]
    command += ["--max-latency", row["target"], "--runtime", where[0], "--latency-batch-size", where[1]]
    command += ["--threads", where[2], "--effort", "fast", "--calibration-images", str(asked.images)]
    command += ["--eval-images", "0", "--output", str(slim), "--overwrite", "--quiet"]
    command += ["--scope", "attention+mlp"]
    try:
        process = run(command, asked.threads)
    except FailedError as error:
        if "--max-latency" not in str(error) or "exit code 1" not in str(error):
            sys.exit(f"{row['model']}: {error}")
        return {"failed": str(error)}  # the target was missed, or is out of reach
    found = json.loads(process.stdout)
    (target,) = found["targets"]
    fresh = [sys.executable, "-c", _FRESH, str(dense), str(slim), row["model"], *where, str(asked.seconds)]
    afresh = json.loads(run(fresh, asked.threads).stdout.splitlines()[-1])
    return {
        "most": target["most"] / target["dense"],
        "predicted": target["predicted"] / target["dense"],
        "reached": target["reached"] / target["dense"],
        "afresh": afresh["ratio"],
        "dense_ms": afresh["dense_ms"],
        "drift": afresh["drift"],
        "corrections": target["corrections"],
        "flops": found["slim"]["flops"] / found["dense"]["flops"],
        "table_s": found["stage_seconds"].get("timing layers", 0.0),
        "cpu_s": process.cpu_s,
    }


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a line per target, and how many were met."""
    head = ["model", "runtime", "batch", "target", "predicted", "in the command", "afresh", "met"]
    head += ["corrections", "FLOPs", "dense, ms", "table, s", "all, CPU s"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        cells = [row["model"], row["runtime"], str(row["batch"]), row["target"]]
        if "failed" in row:
            cells += ["-", "-", "-", "failed", *"-----"]
        else:
            shares = (row[name] for name in ("predicted", "reached", "afresh"))
            cells += [f"{100 * share:.1f}%" for share in shares]
            cells += ["yes" if met(row) else "no", str(row["corrections"]), f"{100 * row['flops']:.1f}%"]
            cells += [f"{row['dense_ms']:.1f}", f"{row['table_s']:.0f}", f"{row['cpu_s']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    done = [row for row in rows if "failed" not in row]
    lines += ["", f"{sum(map(met, done))} of {len(rows)} targets met afresh"]
    if done:
        errors = [abs(row["predicted"] / row["afresh"] - 1) for row in done]
        lines.append(f"prediction off by {100 * statistics.median(errors):.1f} % in the median")
    return "\n".join(lines)


def met(row: Mapping[str, Any]) -> bool:
    """Whether the file, timed afresh, is within its target."""
    return bool(row["afresh"] <= row["most"])


if __name__ == "__main__":
    main()
