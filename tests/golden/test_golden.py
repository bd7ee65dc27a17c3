"""Plans and logits of runs of every kind, as they were before the package was rebuilt.

The expectations lie in ``runs.json``: the FLOPs, the digest of the plan, exact, and the logits on fixed
images, to 1e-5. A change that alters them on purpose says so in its commit and writes them anew::

    python tests/golden/test_golden.py --write    # all, for this CPU
    python tests/golden/test_golden.py            # SHA-256 of each file, of its tensors, of its header

Channels nearly tie now and then, so a CPU with other kernels may choose others: the file has a part per CPU.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import mhacut
from mhacut.exporting.stopwatch import machine

CPU = machine(torch.device("cpu"))
EXPECTED = Path(__file__).with_name("runs.json")
DIGITS = Path(__file__).parents[2] / "examples" / "digits"
VIT = ("vit_tiny_patch16_224", {"depth": 3, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 4})
SWIN = (
    "swin_tiny_patch4_window7_224",
    {"img_size": 64, "depths": [1, 2, 1, 1], "embed_dim": 24, "window_size": 2},
)
FLATTEN = (
    "flatten_swin_tiny_224",
    {"img_size": 64, "depths": [1, 2, 1, 1], "embed_dim": 24, "window_size": 4},
)
ROTARY = (
    "eva02_tiny_patch14_224",
    {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8},
)
HYBRID = (
    "levit_128s",
    {"img_size": 64, "embed_dim": [32, 48, 64], "depth": [1, 1, 1], "num_heads": [2, 3, 4]},
)
PAPER = {
    "allocation": "indicator",
    "selection": "indicator",
    "basis": "channel",
    "repair": False,
    "heal_steps": 0,
    "steps": 6,
    "gain_steps": 4,
}
HEADS = {"eva02_tiny_patch14_224": 1000, "levit_128s": 1000}
"""Factors on weights of classifiers that begin near 0."""
SIDES = {architecture: args["img_size"] for architecture, args in (SWIN, FLATTEN, HYBRID)}
QUICK = {
    "scope": "attention+mlp",
    "effort": "balanced",
    "calibration_images": 24,
    "batch_size": 8,
    "heal_steps": 3,
    "tuning_steps": 0,
    "latency": False,
}


@dataclass(frozen=True)
class Run:
    options: Mapping[str, Any]
    model: tuple[str, Mapping[str, Any]] | None = None
    """Architecture and arguments of a model of random weights; None is the model of the digits."""
    images: bool = True
    timed: bool = False
    """Whether the tests' clock counts: 10 ns per parameter."""
    classes: int = 5
    budgets: tuple[str, ...] = field(default=())
    """Budgets of FLOPs of several files."""


TOKENS = {"scope": "attention+mlp+tokens"}
RUNS = {
    "vit-flops": Run({"flops": "50%"}),
    "vit-flops-fast": Run({"flops": "60%", "effort": "fast", "heal_steps": None}, VIT),
    "vit-flops-best": Run({"flops": "40%", "effort": "best"}),
    "vit-many": Run({}, budgets=("70%", "45%")),
    "vit-params": Run({"params": "60%"}),
    "vit-size": Run({"size": "60%"}, VIT),
    "vit-flops-params": Run({"flops": "70%", "params": "55%"}, VIT),
    "vit-kl": Run({"max_kl": 0.0001}),
    "vit-drop": Run({"max_drop": 1, "repair": False, "heal_steps": 0}),
    "vit-latency": Run({"max_latency": "70%"}, timed=True),
    "tokens-flops": Run({"flops": "45%", **TOKENS}, VIT),
    "tokens-latency-size": Run({"max_latency": "80%", "size": "70%", **TOKENS}, VIT, timed=True),
    "tokens-digits": Run({"flops": "35%", **TOKENS}),
    "vit-paper": Run({"flops": "60%", **PAPER}),
    "vit-no-images": Run({"flops": "60%"}, VIT, images=False),
    "vit-preserve-tokens": Run({"flops": "60%", "preserve": "tokens"}, VIT, classes=0),
    "vit-equal": Run({"flops": "55%", "equal_qkv": True, "min_width": ["blocks.1.*=4"], "round_to": 4}, VIT),
    "swin": Run({"flops": "60%"}, SWIN),
    "swin-pyramid": Run({"flops": "70%", "preserve": "pyramid"}, SWIN, classes=0),
    "flatten": Run({"flops": "65%"}, FLATTEN),
    "rotary": Run({"flops": "60%"}, ROTARY),
    "hybrid": Run({"flops": "65%"}, HYBRID),
}

IN_CI = {
    "vit-flops", "vit-flops-fast", "vit-size", "vit-latency", "tokens-flops", "vit-no-images",
    "vit-preserve-tokens", "vit-equal", "swin", "rotary",
}  # fmt: skip
"""One run of each kind that takes a few seconds; before a release all run."""


def prune(name: str, folder: Path) -> list[mhacut.PruneResult]:
    torch.set_num_threads(1)  # sums depend on how many share them
    run, given = RUNS[name], {**QUICK, **RUNS[name].options}
    if run.model is None:
        checkpoint = DIGITS / "model"
        given["data_dir"] = DIGITS / "images"
    else:
        architecture, args = run.model
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = timm.create_model(architecture, num_classes=run.classes, **args)
            for name, parameter in model.named_parameters():  # logits that are not all nearly 0
                parameter.data.mul_(1.5 if parameter.dim() > 1 else 1)
                if name in ("head.weight", "head.linear.weight"):
                    parameter.data.mul_(HEADS.get(architecture, 1))
            images = torch.randn(48, 3, args["img_size"], args["img_size"])
        checkpoint = folder / "dense.safetensors"
        save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, checkpoint)
        given |= {"model": architecture, "model_args": {**args, "num_classes": run.classes}}
        if run.images:
            given["images"] = images
    output = folder / ("slim-{}.safetensors" if run.budgets else "slim.safetensors")
    if run.budgets:
        return list(mhacut.prune_many(checkpoint, flops=run.budgets, output=output, **given))
    return [mhacut.prune(checkpoint, output=output, **given)]


def digest(text: str | bytes) -> str:
    return hashlib.sha256(text.encode() if isinstance(text, str) else text).hexdigest()[:16]


def summary(result: mhacut.PruneResult) -> dict[str, Any]:
    model = mhacut.load_model(result.output)
    side = SIDES.get(result.architecture, 32)
    images = (torch.arange(2 * 3 * side * side) * 0.7).sin().view(2, 3, side, side)
    with torch.no_grad():
        logits = model(images)
    return {
        "flops": result.slim.flops,
        "params": result.slim.parameters,
        "plan": digest(json.dumps(result.plan.to_json(), sort_keys=True)),
        "logits": [round(value, 7) for value in logits.flatten()[:24].tolist()],
    }


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in IN_CI else pytest.mark.exhaustive)
        for name in RUNS
    ],
)
def test_a_run_gives_the_plan_and_the_logits_it_gave(name, tmp_path, request):
    expected = json.loads(EXPECTED.read_text()).get(CPU)
    if expected is None:
        pytest.skip(f"no run of {CPU} is recorded")
    if RUNS[name].timed:
        request.getfixturevalue("clock")
    found = [summary(result) for result in prune(name, tmp_path)]
    for one, other in zip(found, expected[name], strict=True):
        assert {**one, "logits": None} == {**other, "logits": None}
        torch.testing.assert_close(
            torch.tensor(one["logits"]), torch.tensor(other["logits"]), rtol=0, atol=1e-5
        )


def sha(path: Path) -> tuple[str, str, str]:
    """SHA-256 of a slim file; of its tensors; and of its header, without options and versions."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    record = json.loads(header["__metadata__"]["mhacut"])
    for entry in record["history"]:
        entry.pop("options", None)
        entry.pop("versions", None)
    header["__metadata__"]["mhacut"] = record
    return digest(content), digest(content[8 + length :]), digest(json.dumps(header, sort_keys=True))


def in_all(use: Callable[[str, list[mhacut.PruneResult]], None]) -> None:
    from helpers.clocks import Counting

    for name, run in RUNS.items():
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            if run.timed:
                Counting(patch, Path(folder))
            use(name, prune(name, Path(folder)))


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    if "--write" in sys.argv:
        written: dict[str, Any] = {}
        in_all(lambda name, results: written.update({name: [summary(result) for result in results]}))
        recorded = json.loads(EXPECTED.read_text()) | {CPU: written}
        parts = []
        for cpu, runs in recorded.items():
            lines = (f"{json.dumps(name)}: {json.dumps(found)}" for name, found in runs.items())
            parts.append(f"{json.dumps(cpu)}: {{\n" + ",\n".join(lines) + "\n}")
        EXPECTED.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    else:
        in_all(
            lambda name, results: [print(name, *sha(Path(result.output)), flush=True) for result in results]
        )
