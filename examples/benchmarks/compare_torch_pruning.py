"""Compares ``mhacut prune`` with Torch-Pruning on one plain timm ViT at equal FLOPs.

    pip install 'mhacut[bench]'
    python examples/benchmarks/compare_torch_pruning.py \
        --checkpoint examples/digits/model --data-dir examples/digits/images

prints one table: a row per method and budget, none of them fine-tuned. Rules of the comparison:

- Equal FLOPs: mhacut never exceeds the budget, Torch-Pruning comes as near to it as its channels allow, from
  either side. All are counted by ``mhacut.cost.measure_flops`` on the model read back from its file.
- Equal freedom: both cut q/k/v channels and hidden channels of the MLP; the residual width stays.
- Equal data: the same calibration images, batch size and preprocessing. Taylor needs their labels.
- Every cell prunes in a process of its own. Its seconds and peak memory are those of that whole process, from
  the start of Python to the written file; the row "dense" is a process that only reads model and images,
  which any of them does before it prunes. Accuracy is measured afterwards, in yet another process.

Torch-Pruning's own scripts for timm do not run on timm 1.0.31: they replace ``forward`` by an older one.
Without them timm's attention keeps the attributes of the dense model, so they are set by hand here. That
leaves the softmax temperature open: with the attribute ``scale`` as it was, timm takes 1/sqrt(dense width)
without fused attention and 1/sqrt(kept width) with it. Both are scored, and the better one is in the table.

This process imports the standard library only: on Linux a child starts with its parent's peak memory.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from mhacut.checkpoint.load import LoadedModel
    from mhacut.data import CalibrationImages, Preprocessing

MHACUT = {
    "mhacut, no data": None,
    "mhacut, unlabelled": ("--no-labels",),
    "mhacut, labelled": (),
}
"""Method to the flags of ``mhacut prune`` that make it; None leaves the data out."""
TORCH_PRUNING = ("Torch-Pruning L1", "Torch-Pruning Taylor")
BATCH = 16
"""Images at a time in Taylor's backward passes, as in mhacut's search."""
EVALUATION_BATCH = 64
RATIOS = 10_000
"""Steps in which pruning ratios are searched."""
NEAR = 0.005
"""Share of the budget that a model may miss it by, where its widths allow."""


# --- What is compared ---


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
        """Flags of ``mhacut prune`` that say the same."""
        flags = ["--seed", str(self.seed), "--calibration-images", str(self.calibration_images)]
        if self.model is not None:
            flags += ["--model", self.model]
        for argument in self.model_args:
            flags += ["--model-arg", argument]
        for name, value in (("--mean", self.mean), ("--std", self.std)):
            flags += [] if value is None else [name, value]
        return flags


@dataclass(frozen=True)
class Process:
    """What a finished process took."""

    wall_s: float
    cpu_s: float
    """User and system time."""
    peak_mib: float
    """Largest resident set."""
    stdout: str


@dataclass(frozen=True)
class Score:
    """How a model does on the validation split."""

    top1: float
    """Percent."""
    agreement: float
    """Percent of images where the first answer is the dense model's."""
    kl: float
    """KL(dense || slim) in nats, mean over images."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    keep: int | None
    """Budget, percent of the dense FLOPs; None for the dense model."""
    flops: int
    ratio: float
    """Of the dense FLOPs, in 0..1."""
    score: Score
    other_score: Score | None
    """At the temperature that did worse; None for methods that choose theirs."""
    temperature: str
    """In words."""
    wall_s: float
    cpu_s: float
    peak_mib: float
    checks: dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Compare mhacut with Torch-Pruning on a timm ViT at equal FLOPs."
    )
    parser.add_argument("--checkpoint", required=True, help="whatever `mhacut prune` reads")
    parser.add_argument("--model", help="timm architecture, for a file that does not say")
    parser.add_argument(
        "--model-arg", action="append", default=[], metavar="KEY=VALUE", help="may be given again"
    )
    parser.add_argument(
        "--data-dir", required=True, help="folder with train/ and val/, a folder per class in each"
    )
    parser.add_argument("--mean", metavar="A,B,C", help="per channel; by default the model's own")
    parser.add_argument("--std", metavar="A,B,C", help="per channel; by default the model's own")
    parser.add_argument(
        "--keep", type=int, nargs="+", default=[75, 50, 25], metavar="PERCENT", help="of the FLOPs"
    )
    parser.add_argument("--calibration-images", type=int, default=256, metavar="N")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1, help="of every process (default: 1)")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there too")
    asked = parser.parse_args(arguments)
    setup = Setup(
        checkpoint=os.path.abspath(asked.checkpoint)
        if os.path.exists(asked.checkpoint)
        else asked.checkpoint,
        model=asked.model,
        model_args=tuple(asked.model_arg),
        data_dir=os.path.abspath(asked.data_dir),
        mean=asked.mean,
        std=asked.std,
        calibration_images=asked.calibration_images,
        seed=asked.seed,
    )
    machine = describe_machine(asked.threads)
    print(
        "\n".join(f"{name}: {value}" for name, value in {**machine, "seed": setup.seed}.items()), flush=True
    )
    with tempfile.TemporaryDirectory(prefix="compare-") as folder:
        rows, images, failures = compare(setup, asked.keep, Path(folder), asked.threads)
    print(f"\n{images} validation images, {setup.calibration_images} calibration images asked for\n")
    print(as_text(rows))
    for failure in failures:
        print(f"failed: {failure}", file=sys.stderr)
    if asked.json:
        document = {
            "machine": machine,
            "setup": asdict(setup)
            | {"checkpoint": Path(setup.checkpoint).name, "data_dir": Path(setup.data_dir).name},
            "validation_images": images,
            "rows": [asdict(row) for row in rows],
            "failures": failures,
        }
        Path(asked.json).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 1 if failures else 0


def describe_machine(threads: int) -> dict[str, str]:
    versions = {
        name: importlib.metadata.version(name) for name in ("torch", "timm", "torch-pruning", "mhacut")
    }
    return {
        "cpu": f"{_cpu_model()}, {os.cpu_count()} cores, {threads} thread(s) used",
        "python": platform.python_version(),
        **versions,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()


def compare(
    setup: Setup, keeps: Sequence[int], folder: Path, threads: int
) -> tuple[list[Row], int, list[str]]:
    """All rows, the number of validation images, and what went wrong."""
    job = {"setup": asdict(setup)}
    failures: list[str] = []
    reading = run_part("read", job, folder, threads)
    cells: list[dict[str, Any]] = []
    for method, keep in ((method, keep) for method in (*MHACUT, *TORCH_PRUNING) for keep in keeps):
        print(f"{method}, {keep} %", file=sys.stderr, flush=True)
        output = folder / f"{len(cells)}.safetensors"
        cell = {"method": method, "keep": keep, "file": str(output)}
        try:
            if method in MHACUT:
                process = run(mhacut_command(setup, MHACUT[method], keep, output), folder, threads)
            else:
                process = run_part("torch-pruning", {**job, **cell}, folder, threads)
        except RuntimeError as error:
            failures.append(f"{method}, {keep} %: {error}")
            continue
        cells.append({**cell, "process": asdict(process), "document": json.loads(process.stdout)})
    print("measuring accuracy", file=sys.stderr, flush=True)
    scored = json.loads(run_part("score", {**job, "cells": cells}, folder, threads).stdout)

    dense_flops = scored["dense"]["flops"]
    rows = [_row("dense", None, scored["dense"], dense_flops, asdict(reading))]
    for cell, found in zip(cells, scored["cells"], strict=True):
        row = _row(cell["method"], cell["keep"], found, dense_flops, cell["process"])
        rows.append(row)
        if cell["method"] in TORCH_PRUNING:
            row.checks["differs from masked dense model by"] = cell["document"]["exactness"]
            row.checks["ratios"] = cell["document"]["ratios"]
    return rows, scored["images"], failures


def _row(
    method: str, keep: int | None, found: Mapping[str, Any], dense_flops: int, process: Mapping[str, Any]
) -> Row:
    scores = {name: Score(**score) for name, score in found["scores"].items()}
    best = max(scores, key=lambda name: (scores[name].top1, -scores[name].kl))
    return Row(
        method=method,
        keep=keep,
        flops=found["flops"],
        ratio=found["flops"] / dense_flops,
        score=scores[best],
        other_score=next((score for name, score in scores.items() if name != best), None),
        temperature=best,
        wall_s=process["wall_s"],
        cpu_s=process["cpu_s"],
        peak_mib=process["peak_mib"],
        checks=dict(found["checks"]),
    )


def mhacut_command(setup: Setup, data: tuple[str, ...] | None, keep: int, output: Path) -> list[str]:
    """The command as a user types it."""
    command = [sys.executable, "-m", "mhacut", "prune", setup.checkpoint, "--flops", f"{keep}%"]
    command += ["--output", str(output), "--no-latency", "--eval-images", "0", "--json", "--device", "cpu"]
    command += setup.flags()
    if data is not None:
        command += ["--data-dir", setup.data_dir, *data]
    return command


def run_part(part: str, job: Mapping[str, Any], folder: Path, threads: int) -> Process:
    """One of :data:`PARTS` of this script in a process of its own."""
    file = folder / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    return run([sys.executable, os.path.abspath(__file__), f"--part={part}", str(file)], folder, threads)


def run(command: Sequence[str], folder: Path, threads: int) -> Process:
    """Run ``command`` to its end.

    Raises:
        RuntimeError: it failed; with the last lines it wrote to stderr.
    """
    # GOMP_SPINCOUNT: idle OpenMP threads of two programs on one machine would take each other's cores.
    environment = {**os.environ, "GOMP_SPINCOUNT": "0"}
    environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    began = time.perf_counter()
    with (
        open(folder / "stdout", "w+", encoding="utf-8") as out,
        open(folder / "stderr", "w+", encoding="utf-8") as err,
    ):
        process = subprocess.Popen(command, stdout=out, stderr=err, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        wall = time.perf_counter() - began
        out.seek(0)
        err.seek(0)
        if process.returncode != 0:
            last = "\n".join(err.read().strip().splitlines()[-5:])
            raise RuntimeError(f"exit code {process.returncode}: {last or 'no message'}")
        unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KiB
        return Process(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / unit, out.read())


def as_text(rows: Sequence[Row]) -> str:
    """The table, then what does not fit into it."""
    head = ["method", "keep", "top-1", "agree", "KL", "GMAC", "ratio", "gap", "wall s", "CPU s", "peak MiB"]
    lines = [head]
    notes = []
    for row in rows:
        # Torch-Pruning may end on either side of the budget, mhacut below it.
        gap = "" if row.keep is None else f"{100 * (100 * row.ratio / row.keep - 1):+.2f}%"
        lines.append(
            [
                row.method,
                "" if row.keep is None else f"{row.keep}%",
                f"{row.score.top1:.2f}",
                f"{row.score.agreement:.2f}",
                f"{row.score.kl:.4f}",
                f"{row.flops / 1e9:.4f}",
                f"{100 * row.ratio:.2f}%",
                gap,
                f"{row.wall_s:.1f}",
                f"{row.cpu_s:.1f}",
                f"{row.peak_mib:.0f}",
            ]
        )
        where = row.method if row.keep is None else f"{row.method}, {row.keep}%"
        told = [f"{name} {value}" for name, value in row.checks.items()]
        if row.other_score is not None:
            told.insert(0, f"scored at {row.temperature} (the other temperature: {row.other_score.top1:.2f})")
        notes.append(f"{where}: {'; '.join(told)}")
    widths = [max(len(line[column]) for line in lines) for column in range(len(head))]
    text = []
    for line in lines:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(cells).rstrip())
    text.insert(1, "-" * max(map(len, text)))
    return "\n".join([*text, "", *(note for note in notes if not note.endswith(": "))])


# --- Parts that run in a process of their own ---


def read_all(setup: Setup) -> tuple[LoadedModel, Preprocessing, CalibrationImages]:
    """Model, preprocessing and labelled calibration images, as ``mhacut prune`` reads them."""
    from mhacut.data import calibration_images

    loaded, preprocessing = read(setup)
    seen = calibration_images(
        preprocessing,
        count=setup.calibration_images,
        seed=setup.seed,
        data_dir=Path(setup.data_dir),
        num_classes=loaded.model.num_classes,
    )
    return loaded, preprocessing, seen


def read(setup: Setup) -> tuple[LoadedModel, Preprocessing]:
    import yaml

    from mhacut.checkpoint.load import read_model
    from mhacut.inspection import resolve_preprocessing
    from mhacut.options import PreprocessingOptions

    pairs = (argument.partition("=") for argument in setup.model_args)
    model_args = {name: yaml.safe_load(value) for name, _, value in pairs}
    loaded = read_model(setup.checkpoint, model=setup.model, model_args=model_args or None)
    mean, std = (
        None if text is None else tuple(float(part) for part in text.split(","))
        for text in (setup.mean, setup.std)
    )
    return loaded, resolve_preprocessing(loaded, PreprocessingOptions(mean=mean, std=std))


def part_read(job: Mapping[str, Any]) -> None:
    """What every method does before it prunes."""
    read_all(Setup(**job["setup"]))


def part_torch_pruning(job: Mapping[str, Any]) -> None:
    """Prune with Torch-Pruning; write the state dict, print what was checked."""
    import torch
    from safetensors.torch import save_file

    loaded, preprocessing, seen = read_all(Setup(**job["setup"]))
    dense = loaded.model
    ratios = find_ratios(dense, preprocessing.input_size, job["keep"] / 100)
    slim, removed = prune_by_torch_pruning(dense, seen, ratios, taylor=job["method"].endswith("Taylor"))
    slim.requires_grad_(False)
    dense.requires_grad_(False)
    probe = seen.images[:4]
    with torch.no_grad():
        for model in (dense, slim):
            set_attention(model, fused=False)
        logits = slim(probe)
        masked = masked_copy(dense, removed)(probe)
        difference = float((logits - masked).abs().max() / masked.abs().max())
    save_file({**slim.state_dict(), "probe.images": probe, "probe.logits": logits}, job["file"])
    print(json.dumps({"ratios": ratios, "exactness": f"{difference:.0e}"}))


def attentions(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Name and module of every timm attention.

    Raises:
        SystemExit: none, or a kind that this recipe does not know how to repair.
    """
    from timm.layers import Attention

    found = [(name, module) for name, module in model.named_modules() if isinstance(module, Attention)]
    if not found or any(
        module.gate is not None or module.q_norm.__class__.__name__ != "Identity" for _, module in found
    ):
        raise SystemExit(
            "the comparison needs a plain timm ViT: timm.layers.Attention without gate and q/k norm"
        )
    return iter(found)


def set_attention(model: nn.Module, *, fused: bool, scale: float | None = None) -> None:
    """Choose the path of every attention, and its scale where one is given."""
    for _, attention in attentions(model):
        attention.fused_attn = fused
        if scale is not None:
            attention.scale = scale


def kept(width: int, ratio: float) -> int:
    """How many channels Torch-Pruning 1.6.1 leaves of ``width``."""
    return int(width * (1 - ratio))


def find_ratios(dense: nn.Module, input_size: tuple[int, int, int], share: float) -> tuple[float, float]:
    """The pruning ratios of attention and MLP that bring FLOPs to ``share`` of the dense model's.

    They are one ratio for both if that comes within :data:`NEAR` of it. If it does not, because a channel of
    attention is too large a step, the MLP makes up for it, with a ratio as near to attention's as there is.
    Widths depend on nothing but the ratios, so FLOPs are known without pruning.
    """
    from mhacut.cost import build_cost_table
    from mhacut.surgery import dissect

    anatomy = dissect(dense)
    table = build_cost_table(dense, anatomy, input_size)
    units = anatomy.units(("qk", "v", "hidden"))
    target = share * table.dense

    def flops(attention: float, mlp: float) -> float:
        ratios = {"qk": attention, "v": attention, "hidden": mlp}
        return float(table.flops({unit.key: max(kept(unit.width, ratios[unit.kind]), 1) for unit in units}))

    def gap(attention: float, mlp: float) -> float:
        return abs(flops(attention, mlp) / target - 1)

    around = _bisect(lambda ratio: flops(ratio, ratio) > target)
    uniform = min(around, key=lambda ratio: gap(ratio, ratio))
    pairs = [(uniform, uniform)]
    if gap(uniform, uniform) > NEAR:
        for attention in around:
            mlps = _bisect(lambda mlp, attention=attention: flops(attention, mlp) > target)
            pairs.append((attention, min(mlps, key=lambda mlp, attention=attention: gap(attention, mlp))))
    return min(pairs, key=lambda pair: (max(gap(*pair) - NEAR, 0.0), abs(pair[0] - pair[1])))


def _bisect(too_much: Callable[[float], bool]) -> tuple[float, float]:
    """The largest ratio that leaves too much and the smallest that does not, in steps of 1/:data:`RATIOS`."""
    low, high = 0, RATIOS - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if too_much(middle / RATIOS) else (low, middle)
    return low / RATIOS, high / RATIOS


def prune_by_torch_pruning(
    dense: nn.Module, seen: CalibrationImages, ratios: tuple[float, float], *, taylor: bool
) -> tuple[nn.Module, list[tuple[str, bool, list[int]]]]:
    """A pruned copy, and what was removed: (name of a linear layer, whether outputs, channels).

    Args:
        dense: left as it is.
        seen: to take gradients on, if ``taylor``.
        ratios: of attention and of the MLP.
        taylor: by first-order Taylor expansion of the loss; otherwise by L1 norm.
    """
    import copy

    import torch
    import torch_pruning
    from torch.nn.functional import cross_entropy

    model = copy.deepcopy(dense).eval().requires_grad_(True)
    set_attention(model, fused=False)
    names = {module: name for name, module in model.named_modules()}
    heads = {attention.qkv: attention.num_heads for _, attention in attentions(model)}
    hidden = [module for module, name in names.items() if name.endswith(".fc1")]
    roots = {*heads, *hidden}
    others = [
        m for m in model.modules() if isinstance(m, (torch.nn.Linear, torch.nn.Conv2d)) and m not in roots
    ]
    if taylor:
        if seen.labels is None:
            raise SystemExit("Torch-Pruning's Taylor criterion needs labelled images: train/<class>/")
        for images, labels in zip(seen.images.split(BATCH), seen.labels.split(BATCH), strict=True):
            cross_entropy(model(images), labels).backward()
        importance = torch_pruning.importance.GroupTaylorImportance()
    else:
        importance = torch_pruning.importance.GroupMagnitudeImportance(p=1)
    pruner = torch_pruning.pruner.BasePruner(
        model,
        seen.images[:1],
        importance=importance,
        pruning_ratio=ratios[0],
        pruning_ratio_dict=dict.fromkeys(hidden, ratios[1]),
        num_heads=dict(heads),
        ignored_layers=others,
        # The defaults of these two are shared by all pruners of a process.
        in_channel_groups={},
        out_channel_groups={},
    )
    removed = []
    for group in pruner.step(interactive=True):
        for dependency, channels in group:
            module = dependency.target.module
            if isinstance(module, torch.nn.Linear):
                outputs = pruner.DG.is_out_channel_pruning_fn(dependency.handler)
                removed.append((names[module], outputs, list(channels)))
        group.prune()
    for name, attention in attentions(model):
        width = attention.qkv.out_features // (3 * attention.num_heads)
        expected = kept(attention.head_dim, ratios[0])
        if width != expected:
            raise SystemExit(f"{name}: Torch-Pruning left {width} channels per head, expected {expected}")
        # timm reshapes by these, and Torch-Pruning does not know them. The scale stays as it was.
        attention.head_dim = width
        attention.attn_dim = width * attention.num_heads
    return model, removed


def masked_copy(dense: nn.Module, removed: Sequence[tuple[str, bool, Sequence[int]]]) -> nn.Module:
    """The dense model with the removed channels at zero."""
    import copy

    model = copy.deepcopy(dense)
    for name, outputs, channels in removed:
        layer: Any = model.get_submodule(name)
        if outputs:
            layer.weight[list(channels)] = 0
            if layer.bias is not None:
                layer.bias[list(channels)] = 0
        else:
            layer.weight[:, list(channels)] = 0
    return model


def read_torch_pruning(dense: nn.Module, file: str) -> tuple[nn.Module, dict[str, Any]]:
    """The pruned model out of its state dict, and what was checked on the way.

    timm cannot load it: its layers have the dense shapes. So they are given the file's shapes by hand.
    """
    import copy

    import torch
    from safetensors.torch import load_file

    state = load_file(file)
    images, logits = state.pop("probe.images"), state.pop("probe.logits")
    model = copy.deepcopy(dense)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    misfits = sum(state[name].shape != shape for name, shape in shapes.items())
    for name, tensor in state.items():
        owner, _, attribute = name.rpartition(".")
        module: Any = model.get_submodule(owner)
        if isinstance(module, torch.nn.Linear):
            setattr(module, attribute, torch.nn.Parameter(tensor, requires_grad=False))
            module.out_features, module.in_features = module.weight.shape
    for _, attention in attentions(model):
        attention.head_dim = attention.qkv.out_features // (3 * attention.num_heads)
        attention.attn_dim = attention.head_dim * attention.num_heads
    model.load_state_dict(state, strict=True)
    set_attention(model, fused=False)
    with torch.no_grad():
        same = bool(torch.allclose(model(images), logits, atol=1e-4))
    checks = {
        "loads into timm": "yes" if misfits == 0 else f"no ({misfits} tensors of other shapes)",
        "same logits after repair": "yes" if same else "no",
    }
    return model, checks


def part_score(job: Mapping[str, Any]) -> None:
    """Score every model on the whole validation split, all of them in one pass over the images."""
    import torch

    import mhacut
    from mhacut.cost import measure_flops
    from mhacut.data import evaluation_loader

    setup = Setup(**job["setup"])
    loaded, preprocessing = read(setup)
    dense = loaded.model.requires_grad_(False)
    loader = evaluation_loader(
        preprocessing,
        data_dir=Path(setup.data_dir),
        batch_size=EVALUATION_BATCH,
        workers=0,
        num_classes=dense.num_classes,
    )
    # A whole batch: a small input takes the plain path through slim attention even where fusing is allowed.
    probe, _ = next(iter(loader))
    cells, models = [], []
    for cell in job["cells"]:
        if cell["method"] in MHACUT:
            model = mhacut.load_model(cell["file"])
            variants, checks = {"its own temperature": None}, {"loads with mhacut.load_model": "yes"}
        else:
            model, checks = read_torch_pruning(dense, cell["file"])
            _, first = next(attentions(model))
            variants = {"1/sqrt(dense)": first.scale, "1/sqrt(kept)": first.head_dim**-0.5}
        checks["fused and plain differ by"] = f"{path_difference(model, probe):.0e}"
        cells.append(
            {"flops": measure_flops(model, preprocessing.input_size), "checks": checks, "variants": variants}
        )
        models.append(model.requires_grad_(False))
    totals = [{name: Totals() for name in cell["variants"]} for cell in cells]
    own = Totals()
    with torch.inference_mode():
        for images, labels in loader:
            reference = dense(images)
            own.add(reference, reference, labels)
            for model, cell, total in zip(models, cells, totals, strict=True):
                for name, scale in cell["variants"].items():
                    if scale is not None:
                        set_attention(model, fused=False, scale=scale)
                    total[name].add(reference, model(images), labels)
    for cell, total in zip(cells, totals, strict=True):
        cell["scores"] = {name: asdict(sums.score()) for name, sums in total.items()}
    flops = measure_flops(dense, preprocessing.input_size)
    dense_row = {"flops": flops, "scores": {"its own": asdict(own.score())}, "checks": {}}
    print(json.dumps({"dense": dense_row, "cells": cells, "images": own.images}))


def path_difference(model: nn.Module, images: Tensor) -> float:
    """Largest difference of the logits with and without fused attention, relative to the largest logit."""
    import torch

    with torch.no_grad():
        set_attention(model, fused=True)
        fused = model(images)
        set_attention(model, fused=False)
        plain = model(images)
        set_attention(model, fused=True)
    return float((fused - plain).abs().max() / plain.abs().max())


class Totals:
    """Sums over batches from which a :class:`Score` follows."""

    def __init__(self) -> None:
        self.images = self.right = self.agreeing = 0
        self.kl = 0.0

    def add(self, reference: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Take in one batch; logits [B, classes], labels [B]."""
        p, q = reference.double().log_softmax(1), logits.double().log_softmax(1)
        answers = logits.argmax(1)
        self.images += len(labels)
        self.right += int((answers == labels).sum())
        self.agreeing += int((answers == reference.argmax(1)).sum())
        self.kl += float((p.exp() * (p - q)).sum())

    def score(self) -> Score:
        return Score(100 * self.right / self.images, 100 * self.agreeing / self.images, self.kl / self.images)


PARTS = {"read": part_read, "torch-pruning": part_torch_pruning, "score": part_score}


if __name__ == "__main__":
    if len(sys.argv) == 3 and sys.argv[1].startswith("--part="):
        PARTS[sys.argv[1].removeprefix("--part=")](json.loads(Path(sys.argv[2]).read_text(encoding="utf-8")))
    else:
        sys.exit(main())
