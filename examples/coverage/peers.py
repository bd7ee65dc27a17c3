"""Lays mhacut beside Torch-Pruning and torch-kirigami, on architectures of many families.

    pip install torch-pruning==1.6.1 torch-kirigami==0.2.1
    python examples/coverage/peers.py [PATTERN ...] --json FILE

prints a table. Each tool is asked for the same: half of the channels of q, k and v in every head and half of
the MLP's hidden channels, of a model with random weights; the embedding stays. Per tool:

- is attention cut: whether all projections to q, k and v became narrower, and in how many attention modules;
- exact: the largest difference of the logits to those of the dense model with the removed channels at zero,
  relative to the largest logit;
- reloads: whether another process gets the same logits from a file that runs no code (no pickle);
- CPU seconds and peak memory of the cut alone: no search, no calibration. Memory is that of the whole
  process, with Python, torch and the dense model.

Every cell is a process of its own, with limits of time and memory: one that crashes is a cell like others.
``--json FILE`` keeps the cells as they come; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import fnmatch
import importlib.metadata
import importlib.util
import json
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "benchmarks"))

from process import FailedError, TooLongError, describe_machine, run  # noqa: E402

TOOLS = {
    "mhacut": ("mhacut", "mhacut_tool"),
    "Torch-Pruning": ("torch_pruning", "torch_pruning_tool"),
    "torch-kirigami": ("torch_kirigami", "kirigami_tool"),
}
"""Per tool the package that must be there, and the module in ``tools/``."""

PATIENCE = 5
"""How many times its limit of CPU time a process may take of the clock, on a machine with other work."""
# fmt: off
ARCHITECTURES = [
    "vit_tiny_patch16_224", "deit_small_patch16_224", "deit3_small_patch16_224",
    "beit_base_patch16_224", "eva02_tiny_patch14_224", "cait_xxs24_224", "xcit_tiny_12_p16_224",
    "swin_tiny_patch4_window7_224", "swinv2_tiny_window8_256", "pvt_v2_b1", "twins_pcpvt_small",
    "twins_svt_small", "mvitv2_tiny", "maxvit_tiny_tf_224", "levit_128s", "hiera_tiny_224",
    "davit_tiny", "efficientvit_b0", "efficientvit_m0", "beitv2_base_patch16_224",
    "vit_small_patch14_dinov2", "vit_small_patch16_dinov3", "vit_base_patch16_siglip_224",
    "vit_base_patch16_clip_224", "vit_medium_patch16_rope_reg1_gap_256", "swinv2_cr_tiny_ns_224",
    "coatnet_0_rw_224", "crossvit_tiny_240", "tiny_vit_5m_224", "nextvit_small", "edgenext_xx_small",
    "fastvit_sa12", "convit_tiny", "pit_ti_224", "volo_d1_224", "mobilevit_s", "efficientformerv2_s0",
    "gcvit_xxtiny", "visformer_tiny",
]
# fmt: on
"""The 19 of the first comparison, then 20 more, the smallest of their families."""


def main(arguments: Sequence[str] | None = None) -> int:
    asked = build_parser().parse_args(arguments)
    names = [name for name in ARCHITECTURES if any(fnmatch.fnmatch(name, like) for like in asked.patterns)]
    tools = [tool for tool, (package, _) in TOOLS.items() if importlib.util.find_spec(package)]
    cells = json.loads(asked.json.read_text())["cells"] if asked.json and asked.json.exists() else {}
    machine = describe_machine(1)
    if "torch-kirigami" in tools:
        machine["torch-kirigami"] = importlib.metadata.version("torch-kirigami")
    for name in names:
        for tool in tools:
            key = f"{name} {tool}"
            if key not in cells:
                print(key, file=sys.stderr, flush=True)
                cells[key] = cell(name, TOOLS[tool][1], asked.limit)
                if asked.json:
                    document = {"machine": machine, "limit_s": asked.limit, "cells": cells}
                    asked.json.write_text(json.dumps(document, indent=1) + "\n")
    print("\n".join(f"{what}: {value}" for what, value in machine.items()))
    print(f"\n{as_text(names, tools, cells)}")
    return 0


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "patterns", nargs="*", default=["*"], help="which of the architectures, all by default"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the cells here, and go on from there")
    parser.add_argument(
        "--limit", type=float, default=120, metavar="SECONDS", help="of CPU time for a process"
    )
    return parser


def cell(architecture: str, tool: str, limit_s: float) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="peers-") as folder:

        def step(what: str) -> dict[str, Any]:
            command = [sys.executable, str(HERE / "cell.py"), what, architecture, tool, folder, str(limit_s)]
            told: dict[str, Any] = json.loads(run(command, 1, PATIENCE * limit_s).stdout.splitlines()[-1])
            return told

        try:
            found = step("cut")
        except FailedError as error:
            if isinstance(error, TooLongError) or f"exit code {-signal.SIGXCPU}:" in str(error):
                return {"outcome": "too long", "why": f"more than {limit_s:g} s"}
            return {"outcome": "crashes", "why": str(error)}
        if found["outcome"] == "cut":
            try:
                again = step("reload")
            except FailedError as error:
                again = {"reloads": False, "why": str(error)}
            found |= {"reloads": again["reloads"], "reload_why": again["why"]}
    return found


def as_text(names: Sequence[str], tools: Sequence[str], cells: Mapping[str, Mapping[str, Any]]) -> str:
    lines = [f"| architecture | {' | '.join(tools)} |", "|---|" + "---|" * len(tools)]
    for name in names:
        row = [as_words(cells.get(f"{name} {tool}", {"outcome": "not run"})) for tool in tools]
        lines.append(f"| {name} | {' | '.join(row)} |")
    lines += ["", "| | " + " | ".join(tools) + " |", "|---|" + "---|" * len(tools)]
    for what, holds in SCORES.items():
        counts = [sum(holds(cells.get(f"{name} {tool}", {})) for name in names) for tool in tools]
        lines.append(f"| {what} | {' | '.join(f'{count} of {len(names)}' for count in counts)} |")
    return "\n".join(lines)


def as_words(found: Mapping[str, Any]) -> str:
    """Is attention cut, how exact, does it reload, seconds, MiB; or what became of it instead."""
    if found["outcome"] != "cut":
        why = str(found.get("why", "")).replace("|", "\\|").replace("\n", " ")
        return f"{found['outcome']}: {why[:90]}" if why else str(found["outcome"])
    cut, every = found["attention_cut"], found["attention"]
    attention = "**cut**" if cut == every else f"{cut} of {every} cut" if cut else "attention whole"
    if not cut and found["silent"]:
        attention += " (silent)"
    if cut and found["mode"] == "inner and embedding":
        attention = attention.replace("cut", "cut with the embedding")
    difference = found.get("difference")
    exact = "-" if difference is None else f"{difference:.0e}"
    reloads = "reloads" if found.get("reloads") else "no reload"
    return f"{attention}, {exact}, {reloads}, {found['seconds']:.1f} s, {found['peak_mib']:.0f} MiB"


def _cut(found: Mapping[str, Any]) -> bool:
    return found.get("outcome") == "cut" and found["attention_cut"] > 0


def _inner(found: Mapping[str, Any]) -> bool:
    return _cut(found) and found["mode"] == "inner"


def _whole(found: Mapping[str, Any]) -> bool:
    return found.get("outcome") == "cut" and not found["attention_cut"]


SCORES = {
    "attention is cut": _cut,
    "and the embedding stays": _inner,
    "and exact to 1e-4": lambda found: _inner(found) and found.get("difference", 1) < 1e-4,
    "and reloads": lambda found: (
        _inner(found) and found.get("difference", 1) < 1e-4 and bool(found.get("reloads"))
    ),
    "attention is left whole, as the tool says": lambda found: _whole(found) and not found["silent"],
    "attention is left whole in silence": lambda found: _whole(found) and found["silent"],
    "refused, with a reason": lambda found: found.get("outcome") == "refused",
    "raises, or its model does": lambda found: found.get("outcome") in ("fails", "breaks", "crashes"),
    "out of time": lambda found: found.get("outcome") == "too long",
}

if __name__ == "__main__":
    sys.exit(main())
