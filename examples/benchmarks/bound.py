"""What a bound on the loss finds beside a sweep by hand, and what three budgets cost beside one.

    python examples/benchmarks/bound.py --subject wide430 --root downloads --merge bound.json

cuts a model by ``--max-drop``, then to FLOPs budgets in small steps around what that found, and names the
smallest of them within the bound. Per effort it then cuts to one budget and to three at once, and compares
CPU seconds. ``--merge FILE`` keeps both, and reuses them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from process import Process, describe_machine, run
from setups import Setup
from subjects import add_flags, complete

_SETTINGS = ("max_drop", "effort", "step", "steps", "efforts", "budgets", "calibration_images", "seed")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print both tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_flags(parser)
    parser.add_argument("--max-drop", type=float, default=1.0, help="points of top-1")
    parser.add_argument("--effort", default="fast", help="of the bound and the sweep")
    parser.add_argument("--step", type=float, default=0.25, help="between budgets, percent of all FLOPs")
    parser.add_argument("--steps", type=int, default=4, help="on either side")
    parser.add_argument("--efforts", nargs="*", default=["fast", "balanced"], help="of the costs")
    parser.add_argument("--budgets", nargs="+", default=["75%", "60%", "50%"], help="the last one alone, too")
    parser.add_argument("--calibration-images", type=int, default=256)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--merge", type=Path, metavar="FILE", help="keep results there, and reuse them")
    asked = parser.parse_args(arguments)
    complete(parser, asked)
    settings = {name: getattr(asked, name) for name in _SETTINGS}
    settings["checkpoint"] = Path(asked.checkpoint).name
    found: dict[str, Any] = {}
    if asked.merge is not None and asked.merge.exists():
        found = json.loads(asked.merge.read_text(encoding="utf-8"))
    if found.get("settings") != settings:
        found = {"settings": settings}
    with tempfile.TemporaryDirectory() as folder:
        for name, measure in (("bound", _bound), ("costs", _costs)):
            if name not in found:
                found[name] = measure(asked, Path(folder))
            if asked.merge is not None:
                asked.merge.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print("\n".join(f"{name}: {value}" for name, value in describe_machine(asked.threads).items()))
    print("\n" + bound_as_text(found["bound"], asked.max_drop) + "\n\n" + costs_as_text(found["costs"]))


def _prune(asked: argparse.Namespace, effort: str, output: Path, *flags: str) -> Process:
    setup = Setup.of(asked, calibration_images=asked.calibration_images, seed=asked.seed)
    command = [sys.executable, "-m", "mhacut", "prune", setup.checkpoint, "--data-dir", setup.data_dir]
    command += [*setup.flags(), "--effort", effort, "--no-latency", "--json", "--quiet", "--overwrite"]
    command += ["--scope", "attention+mlp"]
    return run([*command, "--output", str(output), *flags], asked.threads)


def _bound(asked: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """FLOPs and drops of the model that the bound finds, and of those around it."""
    process = _prune(asked, asked.effort, folder / "bound.safetensors", "--max-drop", f"{asked.max_drop:g}")
    found = json.loads(process.stdout)
    dense = found["dense"]["flops"]
    share = math.ceil(1e5 * found["slim"]["flops"] / dense) / 1e3
    shares = [share + asked.step * place for place in range(-asked.steps, asked.steps + 1)]
    budgets = [part for each in shares if each < 100 for part in ("--flops", f"{each:.3f}%")]
    swept = json.loads(_prune(asked, asked.effort, folder / "sweep-{}.safetensors", *budgets).stdout)
    return {
        "dense_flops": dense,
        "found": [found["slim"]["flops"], found["targets"][0]["reached"]],
        "standard_error": found["targets"][0]["standard_error"],
        "cpu_s": process.cpu_s,
        "sweep": [
            [one["slim"]["flops"], one["dense"]["top1"] - one["slim"]["top1"]] for one in swept["results"]
        ],
    }


def _costs(asked: argparse.Namespace, folder: Path) -> dict[str, list[float]]:
    """CPU seconds of one budget and of all at once, by effort."""
    output, least = folder / "cost-{}.safetensors", ("--eval-images", "0", "--no-labels")
    every = [part for budget in asked.budgets for part in ("--flops", budget)]
    return {
        effort: [_prune(asked, effort, output, *flags, *least).cpu_s for flags in (every[-2:], every)]
        for effort in asked.efforts
    }


def bound_as_text(bound: dict[str, Any], most: float) -> str:
    """Markdown, a line per model of the sweep, the smallest within the bound and the found one marked."""
    within = [flops for flops, drop in bound["sweep"] if round(drop, 6) <= most]
    lines = ["| FLOPs, M | percent | points lost | |", "|---" * 4 + "|"]
    for flops, drop in sorted(map(tuple, bound["sweep"])):
        marks = ["smallest of the sweep within the bound"] * bool(within and flops == min(within))
        marks += [f"found by --max-drop {most:g}"] * (flops == bound["found"][0])
        share = 100 * flops / bound["dense_flops"]
        lines.append(f"| {flops / 1e6:.1f} | {share:.2f} | {drop:.1f} | {', '.join(marks)} |")
    return "\n".join(lines)


def costs_as_text(costs: dict[str, list[float]]) -> str:
    """Markdown, a line per effort."""
    lines = ["| effort | one budget, CPU s | all budgets, CPU s | times |", "|---" * 4 + "|"]
    for effort, (one, every) in costs.items():
        lines.append(f"| {effort} | {one:.0f} | {every:.0f} | {every / one:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
