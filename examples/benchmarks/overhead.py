"""What `mhacut prune` costs beside the model it cuts: time per stage and memory, by model size and images.

    python examples/benchmarks/overhead.py --threads 2

prunes timm's DeiT-T, -S and -B at 224 pixels, or any other models (``--models flatten_swin_tiny_224 --flops
3.2G``), weights random, each run in a process of its own, and prints a row per run: channels alone on
synthetic images, or as the plain command does on those of ``--data-dir``. The weights do not matter for the
time, but random ones lose too little to be healed or tuned. CPU seconds are of the whole process; "of
that, start" is one that reads the model and asks only for ``inspect``.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

from process import FailedError, Process, describe_machine, run

MODELS = [f"deit_{size}_patch16_224" for size in ("tiny", "small", "base")]
STAGES = (
    "loading images",
    "calibrating",
    "ranking channels",
    "measuring sensitivity curves",
    "choosing merges",
    "repairing",
    "healing",
)
_WRITE = """
import sys, mhacut, timm, torch
from safetensors.torch import save_file
torch.manual_seed(0)
blocks = {"depth": int(depth) for depth in sys.argv[3:]}
save_file(timm.create_model(sys.argv[1], **blocks).state_dict(), sys.argv[2])
"""


# In a process of its own: a child starts with its parent's peak of memory, which is measured here.
_NAME = "import sys, torch; print(torch.cuda.get_device_name(sys.argv[1]))"


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="names of timm's")
    parser.add_argument("--depths", nargs="+", type=int, default=[None], help="blocks, not the model's own")
    parser.add_argument("--images", nargs="*", type=int, default=[64, 256], help="to calibrate on")
    parser.add_argument("--data-dir", help="folder of images; labels are not read")
    parser.add_argument("--effort", default="balanced", help="of the rows by --images")
    parser.add_argument("--efforts", nargs="+", default=[], help="rows with the images of an effort")
    parser.add_argument("--flops", default="50%")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu", help="that prunes, such as cuda; memory is the host's")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--merge", type=Path, metavar="FILE", help="keep rows there, and reuse them")
    asked = parser.parse_args(arguments)
    if not (asked.images or asked.efforts):
        parser.error("expected --images or --efforts")
    device = asked.device
    if device.startswith("cuda"):
        device = told(device, [sys.executable, "-c", _NAME, device], 1).stdout.strip()
    candidates = [(asked.effort, images) for images in asked.images]
    candidates += [(effort, None) for effort in asked.efforts]
    rows: dict[str, dict[str, Any]] = {}
    if asked.merge is not None and asked.merge.exists():
        rows = json.loads(asked.merge.read_text(encoding="utf-8"))
    wanted = []
    with tempfile.TemporaryDirectory() as folder:
        for model, depth in product(asked.models, asked.depths):
            blocks = [] if depth is None else [str(depth)]
            for effort, images in candidates:
                name = f"{model} {effort} {images or ''} {asked.flops} {asked.threads} {asked.seed}"
                name += "" if depth is None else f" {depth} blocks"
                name += f" {asked.data_dir}" if asked.data_dir else ""
                name += "" if asked.device == "cpu" else f" {device}"
                wanted.append(name)
                if name in rows:
                    continue
                weights = Path(folder) / f"{model}{depth or ''}.safetensors"
                if not weights.exists():
                    told(model, [sys.executable, "-c", _WRITE, model, str(weights), *blocks], asked.threads)
                rows[name] = measure(weights, model, depth, effort, images, asked)
                if asked.merge is not None:
                    asked.merge.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    about = {**describe_machine(asked.threads), "seed": asked.seed, "budget": asked.flops}
    about["device"] = device
    print("\n".join(f"{name}: {value}" for name, value in about.items()))
    print("\n" + as_text([rows[name] for name in wanted]))


def measure(
    weights: Path, model: str, depth: int | None, effort: str, images: int | None, asked: argparse.Namespace
) -> dict[str, Any]:
    """One row."""
    opened = [str(weights), "--model", model]
    opened += [] if depth is None else ["--model-arg", f"depth={depth}"]
    mhacut = [sys.executable, "-m", "mhacut"]
    start = told(model, [*mhacut, "inspect", *opened], asked.threads)
    command = [
        *mhacut,
        "prune",
        *opened,
        "--flops",
        asked.flops,
        "--effort",
        effort,
        "--seed",
        str(asked.seed),
    ]
    synthetic = ["--scope", "attention+mlp"]
    command += ["--data-dir", asked.data_dir, "--no-labels"] if asked.data_dir else synthetic
    command += [] if images is None else ["--calibration-images", str(images)]
    command += ["--output", str(weights.parent / "slim.safetensors"), "--overwrite"]
    process = told(model, [*command, "--no-latency", "--device", asked.device, "--json"], asked.threads)
    found = json.loads(process.stdout)
    return {
        "model": model if depth is None else f"{model}, {depth} blocks",
        "effort": effort,
        "data": found["data"],
        "seconds": found["seconds"],
        "start": _cost(start),
        "all": _cost(process),
    }


def told(about: str, command: Sequence[str], threads: int) -> Process:
    """What a process said and cost; the script ends with its message if it fails."""
    try:
        return run(command, threads)
    except FailedError as error:
        sys.exit(f"{about}: {error}")


def _cost(process: Process) -> dict[str, float]:
    return {name: value for name, value in asdict(process).items() if name != "stdout"}


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown, a line per run."""
    head = ["model", "effort", "images", *(f"{stage}, s" for stage in STAGES)]
    head += ["all, s", "CPU s", "of that, start", "peak MiB", "of that, start"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for row in rows:
        seconds, start, whole = row["seconds"], row["start"], row["all"]
        cells = [row["model"], row["effort"], row["data"].split()[0]]
        cells += [f"{seconds[stage]:.1f}" if stage in seconds else "-" for stage in STAGES]
        cells += [f"{whole['wall_s']:.0f}", f"{whole['cpu_s']:.0f}", f"{start['cpu_s']:.0f}"]
        cells += [f"{whole['peak_mib']:.0f}", f"{start['peak_mib']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
