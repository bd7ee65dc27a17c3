"""What a budget of time is worth: the divergence it leaves beside that of FLOPs budgets, at equal time.

    python examples/benchmarks/time_or_flops.py --subject wide430 --root downloads --runtimes eager onnx

cuts a model to shares of its time (``--max-latency``) and, once, to several FLOPs budgets. One process then
times all files in turns with the dense model, and compares their answers with the dense model's on
validation images. For each file that was cut to a time, the divergence of FLOPs budgets at that measured
time is read between its two neighbours, on a logarithmic scale. ``--merge FILE`` keeps rows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from process import describe_machine, run
from setups import Setup
from subjects import add_flags, complete

_SETTINGS = (
    "times",
    "flops",
    "batch",
    "threads",
    "effort",
    "scope",
    "calibration_images",
    "images",
    "seed",
    "model_arg",
)
_JUDGE = """
import json, sys
import torch
from mhacut.checkpoint.load import load_model, read_model
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.exporting.stopwatch import Stopwatch
from mhacut.data import calibration_images
from mhacut.measuring.accuracy import agreement
from mhacut.options.base import DataOptions, PreprocessingOptions
from mhacut.options.base import TimingOptions
from mhacut.runtime.progress import SILENT
asked = json.loads(sys.argv[1])
dense = read_model(asked["dense"], model=asked["model"], model_args=asked["model_args"])
means = {name: tuple(map(float, asked[name].split(","))) for name in ("mean", "std") if asked[name]}
preprocessing = resolve_preprocessing(dense, PreprocessingOptions(**means))
models = [load_model(file) for file in asked["files"]]
timing = TimingOptions(runtime=asked["runtime"], latency_batch_size=asked["batch"], threads=asked["threads"])
watch = Stopwatch(timing, dense.model, preprocessing.input_size, torch.device("cpu"), SILENT)
found = watch.compare(models, seconds=asked["seconds"] * (1 + len(models)))
data = DataOptions(data_dir=asked["data_dir"], train_split="val")
images = calibration_images(preprocessing, data, count=asked["images"], seed=0, use_labels=False).images
with torch.inference_mode():
    expected, *others = [torch.cat([m(x) for x in images.split(50)]) for m in (dense.model, *models)]
kl = [agreement(expected, outputs, classes=True).kl for outputs in others]
print(json.dumps({"time": found.ratios[1:], "kl": kl, "drift": found.drift}))
"""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_flags(parser)
    parser.add_argument("--runtimes", nargs="+", default=["eager", "onnx"])
    parser.add_argument("--times", nargs="+", default=["75%", "60%"], help="shares of the dense model's")
    parser.add_argument(
        "--flops",
        nargs="+",
        default=["80%", "72%", "64%", "57%", "50%"],
        help="whose times span --times",
    )
    parser.add_argument("--batch", type=int, default=1, help="images at once while timing")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--scope", default="attention+mlp", help="attention+mlp+tokens merges tokens too")
    parser.add_argument("--calibration-images", type=int, default=256)
    parser.add_argument("--images", type=int, default=500, help="validation images to compare on")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--seconds", type=float, default=6.0, help="to time each file")
    parser.add_argument("--merge", type=Path, metavar="FILE", help="keep rows there, and reuse them")
    asked = parser.parse_args(arguments)
    complete(parser, asked)
    rows: dict[str, dict[str, Any]] = {}
    if asked.merge is not None and asked.merge.exists():
        rows = json.loads(asked.merge.read_text(encoding="utf-8"))
    settings = {name: value for name, value in vars(asked).items() if name in _SETTINGS}
    settings["checkpoint"] = Path(asked.checkpoint).name
    for row in rows.values():
        row["settings"].setdefault("scope", "attention+mlp")  # rows of before this was a setting
    missing = [runtime for runtime in asked.runtimes if rows.get(runtime, {}).get("settings") != settings]
    with tempfile.TemporaryDirectory() as folder:
        if missing:
            by_flops = _by_flops(asked, Path(folder))
        for runtime in missing:
            by_time = [_by_time(asked, runtime, time, Path(folder)) for time in asked.times]
            rows[runtime] = {"settings": settings, **_judged(asked, runtime, by_time, by_flops)}
            if asked.merge is not None:
                asked.merge.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n".join(f"{name}: {value}" for name, value in describe_machine(asked.threads).items()))
    print("\n" + as_text({runtime: rows[runtime] for runtime in asked.runtimes}))


def _prune(asked: argparse.Namespace, *flags: str) -> None:
    setup = Setup.of(asked, calibration_images=asked.calibration_images, seed=asked.seed)
    command = [sys.executable, "-m", "mhacut", "prune", setup.checkpoint, "--data-dir", setup.data_dir]
    command += [*setup.flags(), "--no-labels", "--effort", asked.effort, "--scope", asked.scope]
    run([*command, "--eval-images", "0", "--quiet", "--overwrite", *flags], asked.threads)


def _by_flops(asked: argparse.Namespace, folder: Path) -> list[str]:
    """Files cut to every FLOPs budget, in their order."""
    budgets = [part for flops in asked.flops for part in ("--flops", flops)]
    _prune(asked, *budgets, "--no-latency", "--output", str(folder / "flops-{}.safetensors"))
    return [str(folder / f"flops-{flops.replace('%', 'pct')}.safetensors") for flops in asked.flops]


def _by_time(asked: argparse.Namespace, runtime: str, time: str, folder: Path) -> str:
    output = str(folder / f"{runtime}-{time.rstrip('%')}.safetensors")
    where = ["--runtime", runtime, "--threads", str(asked.threads), "--latency-batch-size", str(asked.batch)]
    _prune(asked, "--max-latency", time, *where, "--output", output)
    return output


def _judged(
    asked: argparse.Namespace, runtime: str, by_time: Sequence[str], by_flops: Sequence[str]
) -> dict[str, Any]:
    names = ("model", "mean", "std", "batch", "threads", "seconds", "images", "data_dir")
    order = {name: getattr(asked, name) for name in names}
    order |= {"dense": asked.checkpoint, "runtime": runtime, "files": [*by_time, *by_flops]}
    pairs = (argument.partition("=") for argument in asked.model_arg)
    order["model_args"] = {name: yaml.safe_load(value) for name, _, value in pairs}
    found = json.loads(run([sys.executable, "-c", _JUDGE, json.dumps(order)], asked.threads).stdout)
    points = list(zip(found["time"], found["kl"], strict=True))
    return {
        "asked": list(asked.times),
        "budgets": list(asked.flops),
        "by_time": points[: len(by_time)],
        "by_flops": points[len(by_time) :],
        "drift": found["drift"],
    }


def at_time(points: Sequence[tuple[float, float]], time: float) -> float | None:
    """Divergence at ``time``, between the neighbours among ``points``; None outside them.

    What rounds to no divergence, or less, counts as 1e-9.

    >>> at_time([(0.5, 4.0), (0.7, 1.0)], 0.6)
    2.0
    """
    ordered = sorted(points)
    for (low, above), (high, below) in itertools.pairwise(ordered):
        if low <= time <= high:
            share = (time - low) / (high - low) if high > low else 0.0
            low_log, high_log = (math.log(max(kl, 1e-9)) for kl in (above, below))
            return math.exp(low_log * (1 - share) + high_log * share)
    return None


def as_text(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown, a line per file that was cut to a time."""
    lines = ["| runtime | asked | time | KL | KL of FLOPs budgets at that time | ratio |", "|---" * 6 + "|"]
    for runtime, row in rows.items():
        for asked, (time, kl) in zip(row["asked"], row["by_time"], strict=True):
            other = at_time(row["by_flops"], time)
            cells = [runtime, asked, f"{100 * time:.1f}%", f"{kl:.4f}"]
            cells += ["-", "-"] if other is None else [f"{other:.4f}", f"{kl / other:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
