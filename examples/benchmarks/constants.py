r"""What a constant of mhacut is worth: models pruned with other values of it, over several seeds.

    python examples/benchmarks/constants.py --subject wide430 --root downloads \
        --constant mhacut.pruning.fisher.SHRINKAGE mhacut.pruning.recover.SHRINKAGE --values 0.25 0.5 0.75

Constants have no flags. The script sets those that ``--constant`` names, prunes by unlabelled images, and
prints top-1, KL divergence from the dense model and CPU seconds on one half of the validation images, to
choose by, or on the other, to report. A constant that another module imports by name is named there too.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from finetune import Images, outputs, read_images
from process import describe_machine
from scores import HALVES, of_half, scores_of
from setups import Setup, read
from subjects import add_flags, complete

import mhacut


def main(arguments: Sequence[str] | None = None) -> None:
    """Run what is missing, print a row per value and budget."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    add_flags(parser)
    parser.add_argument("--constant", nargs="+", required=True, metavar="MODULE.NAME", help="set to the same")
    parser.add_argument("--values", nargs="+", required=True, help="numbers, as YAML reads them")
    parser.add_argument("--flops", nargs="+", default=["50%"])
    parser.add_argument("--effort", default="balanced")
    parser.add_argument("--scope", help="what is cut; by default channels alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[42, 1, 2])
    parser.add_argument(
        "--half", choices=("all", *HALVES), default="all", help="of the images, for the table"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--merge", type=Path, metavar="FILE", help="keep rows there, and reuse them")
    asked = parser.parse_args(arguments)
    complete(parser, asked)
    torch.set_num_threads(asked.threads)
    rows: dict[str, dict[str, Any]] = {}
    if asked.merge is not None and asked.merge.exists():
        rows = json.loads(asked.merge.read_text(encoding="utf-8"))
    names = {}
    for seed in asked.seeds:
        for value in asked.values:
            for flops in asked.flops:
                name = f"{' '.join(asked.constant)} {value} {flops} {asked.effort} {seed}"
                name += f" {asked.scope}" * bool(asked.scope)
                names.setdefault((value, flops), []).append(name)
                if name in rows:
                    continue
                rows[name] = measure(asked, value, flops, seed)
                if asked.merge is not None:
                    asked.merge.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("\n".join(f"{name}: {value}" for name, value in describe_machine(asked.threads).items()))
    print("\n| value | FLOPs | top-1 | KL | CPU s |\n|---|---|---|---|---|")
    for (value, flops), kept in names.items():
        halves = [of_half(rows[name], asked.half) for name in kept]
        cells = (told([row[key] for row in halves], digits) for key, digits in SHOWN.items())
        print(f"| {value} | {flops} | {' | '.join(cells)} |")


SHOWN = {"top1": 1, "kl": 3, "cpu_s": 0}
"""Columns, and their digits."""


def told(values: Sequence[float], digits: int) -> str:
    """Mean of the seeds, and half the range."""
    return f"{statistics.mean(values):.{digits}f} ± {(max(values) - min(values)) / 2:.{digits}f}"


def measure(asked: argparse.Namespace, value: str, flops: str, seed: int) -> dict[str, Any]:
    """Prune with the constants set to ``value``, and compare with the dense model."""
    setup = Setup.of(asked, calibration_images=0, seed=seed)
    loaded, preprocessing = read(setup)
    held = read_images(Path(asked.data_dir, "val"), preprocessing)
    images = Images(*held, *held, preprocessing.mean, preprocessing.std)
    places = [constant.rpartition(".")[::2] for constant in asked.constant]
    modules = [(importlib.import_module(module), name) for module, name in places]
    before = [getattr(module, name) for module, name in modules]
    for module, name in modules:
        setattr(module, name, yaml.safe_load(value))
    began = time.process_time()
    try:
        with tempfile.TemporaryDirectory() as folder:
            result = mhacut.prune(
                setup.checkpoint,
                model=setup.model,
                model_args=setup.arguments(),
                flops=flops,
                data_dir=setup.data_dir,
                mean=preprocessing.mean,
                std=preprocessing.std,
                labels=False,
                effort=asked.effort,
                scope=asked.scope or "attention+mlp",
                seed=seed,
                eval_images=0,
                latency=False,
                output=Path(folder, "slim.safetensors"),
            )
            slim = mhacut.load_model(result.output)
    finally:
        for (module, name), own in zip(modules, before, strict=True):
            setattr(module, name, own)
    cpu_s = time.process_time() - began
    return {**scores_of(outputs(loaded.model, images), outputs(slim, images), held[1]), "cpu_s": cpu_s}


if __name__ == "__main__":
    sys.exit(main())
