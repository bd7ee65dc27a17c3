"""Prunes the model that train.py made, each ingredient that concerns linear attention on and off.

    python examples/flatten_cifar/table.py --checkpoint run/model --data-dir cifar10 --seeds 0 1 2

prints a row per method and budget, none of them fine-tuned: top-1 and KL(dense || slim) in nats on images
of ``val/``, mean and spread (half the range) over the seeds, and the latency beside the dense model's,
interleaved. A seed decides which 256 images of ``train/`` are looked at and everything random. ``--json
FILE`` keeps every cell and goes on from there.

Methods: ``mhacut`` is the default without labels, its v channels at positions of each head's own or at equal
ones, as chosen by held-out error; ``own`` and ``equal`` ask for one of them. ``indicators`` is the paper's
way alone (trained indicators decide widths and channels, channel scales, no repair), then without one of its
ingredients each. ``magnitude`` (L1 norm of all weights of a channel) and ``Taylor`` (squared gradient of the
labelled loss by a channel scale of the channel) keep the same share of every unit, without repair.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mhacut
from mhacut.adapters.base import Unit
from mhacut.checkpoint.load import read_model
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.data import Preprocessing, calibration_images, evaluation_loader
from mhacut.measuring.latency import fixed_images, run_of, take_turns
from mhacut.options.base import DataOptions, LabelledImages, PreprocessingOptions
from mhacut.plan import Plan, UnitKey, UnitPlan
from mhacut.pruning.allocate import uniform_widths
from mhacut.pruning.limits import Limit, width_choices
from mhacut.pruning.paper.indicators import top_channels
from mhacut.surgery.channels import channels_of
from mhacut.surgery.costs import build_cost_table
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.flops import measure_flops
from mhacut.surgery.mask import masked_tensors, run_with
from mhacut.surgery.slice import cut

CALIBRATION_IMAGES = 256
ROUND_TO = 4  # by eights, 28 % of the FLOPs would be the least: heads have 16 channels
BATCH = 16
LATENCY_SECONDS = 3.0

_PAPER = {
    "allocation": "indicator",
    "selection": "indicator",
    "repair": False,
    "heal_steps": 0,
    "gain_steps": 40,
}
METHODS: Mapping[str, Mapping[str, Any]] = {
    "mhacut": {},
    "mhacut, own": {"positions": "own"},
    "mhacut, equal": {"positions": "equal"},
    "indicators": _PAPER,
    "indicators, equal": {**_PAPER, "positions": "equal"},
    "indicators, uniform init": {**_PAPER, "init": "uniform"},
    "indicators, no similarity": {**_PAPER, "similarity": False},
    "indicators, no reweight": {**_PAPER, "reweight": False},
}
"""Name to the options of ``mhacut.prune``."""


@dataclass(frozen=True)
class Setup:
    """What all cells have in common."""

    checkpoint: Path
    data_dir: Path
    dense: nn.Module
    preprocessing: Preprocessing
    images: Tensor
    """Of ``val/``, normalised."""
    labels: Tensor
    answers: Tensor
    """The dense model's, logits."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path, required=True, help="ImageFolder with train/ and val/")
    parser.add_argument("--keep", type=float, nargs="+", default=[75, 50, 25], help="percent of the FLOPs")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, *SCORES], default=[*METHODS, *SCORES])
    parser.add_argument("--eval-images", type=int, default=2500)
    parser.add_argument("--json", type=Path, help="file of cells, read and added to")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    setup = prepare(arguments.checkpoint, arguments.data_dir, arguments.eval_images)
    cells = json.loads(arguments.json.read_text()) if arguments.json and arguments.json.exists() else {}
    for seed in arguments.seeds:
        for keep in arguments.keep:
            for method in arguments.methods:
                name = f"{method} | {keep:g} | {seed}"
                if name in cells:
                    continue
                cells[name] = run_cell(setup, method, keep, seed)
                if arguments.json:
                    arguments.json.write_text(json.dumps(cells, indent=1) + "\n")
    show(setup, cells, arguments)


def prepare(checkpoint: Path, data_dir: Path, count: int) -> Setup:
    loaded = read_model(checkpoint)
    dense: Any = loaded.model.requires_grad_(False)
    preprocessing = resolve_preprocessing(loaded, PreprocessingOptions())
    loader = evaluation_loader(
        preprocessing,
        LabelledImages(data_dir=data_dir, workers=0),
        num_classes=dense.num_classes,
        batch_size=100,
        limit=count,
    )
    images, labels = (torch.cat(parts) for parts in zip(*loader, strict=True))
    return Setup(checkpoint, data_dir, dense, preprocessing, images, labels, answers_of(dense, images))


@torch.inference_mode()
def answers_of(model: nn.Module, images: Tensor) -> Tensor:
    return torch.cat([model(batch) for batch in images.split(100)])


def run_cell(setup: Setup, method: str, keep: float, seed: int) -> dict[str, float]:
    """One slim model, and how good it is."""
    began = time.process_time()
    if method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            result = mhacut.prune(
                setup.checkpoint,
                flops=f"{keep:g}%",
                data_dir=setup.data_dir,
                output=Path(folder) / "slim.safetensors",
                labels=False,
                latency=False,
                eval_images=0,
                calibration_images=CALIBRATION_IMAGES,
                batch_size=BATCH,
                round_to=ROUND_TO,
                seed=seed,
                **METHODS[method],
            )
            assert result.output is not None
            slim = mhacut.load_model(result.output)
    else:
        slim = cut_by_scores(setup, SCORES[method], keep, seed)
    seconds = time.process_time() - began
    slim = slim.requires_grad_(False)
    answers = answers_of(slim, setup.images)
    right = (answers.argmax(1) == setup.labels).double().mean()
    divergence = F.kl_div(
        answers.log_softmax(1), setup.answers.log_softmax(1), log_target=True, reduction="batchmean"
    )
    size = setup.preprocessing.input_size
    images = fixed_images(8, size)
    runs = [run_of(model, images) for model in (setup.dense, slim)]
    times = [
        1000 * statistics.median(own)
        for own in take_turns(runs, seconds=LATENCY_SECONDS, device=torch.device("cpu"))
    ]
    return {
        "top1": 100 * float(right),
        "kl": float(divergence),
        "flops": measure_flops(slim, size) / measure_flops(setup.dense, size),
        "latency": times[1] / times[0],
        "cpu_seconds": seconds,
    }


def cut_by_scores(setup: Setup, scores_of: Callable[..., Tensor], keep: float, seed: int) -> nn.Module:
    """The same share of every unit, its channels of the highest score."""
    model = copy.deepcopy(setup.dense)
    prunable = find_prunable_layers(model)
    table = build_cost_table(model, prunable, setup.preprocessing.input_size)
    choices = {unit.key: width_choices(unit.width, ROUND_TO) for unit in prunable.units()}
    widths = uniform_widths(choices, [Limit(table.flops, int(keep / 100 * table.dense))])
    gradients = taylor_gradients(setup, seed) if scores_of is taylor else {}
    units = []
    for unit in prunable.units():
        score = scores_of(model.get_submodule(unit.layer), unit, gradients)
        kept = top_channels(score, widths[unit.key])
        unshared = unit.sharing != "own" and widths[unit.key] < unit.width
        units.append(UnitPlan(unit.layer, unit.kind, unit.width, kept, unshared=unshared))
    cut(model, Plan(tuple(units)))
    return model


def magnitude(module: nn.Module, unit: Unit, gradients: Mapping[UnitKey, Tensor]) -> Tensor:
    """L1 norm of what belongs to each channel alone, [H, d]; encodings of positions and scales left out."""
    score = torch.zeros(unit.heads, unit.width)
    for axis in unit.axes:
        own = not axis.shared and axis.heads is None and axis.tensor.endswith("weight")
        if own:
            score += channels_of(module, unit, axis).flatten(2).abs().sum(-1)
    return score


def taylor(module: nn.Module, unit: Unit, gradients: Mapping[UnitKey, Tensor]) -> Tensor:
    """Sum over batches of the squared gradient by a channel scale of 1 on the channel, [H, d]."""
    return gradients[unit.key]


def taylor_gradients(setup: Setup, seed: int) -> dict[UnitKey, Tensor]:
    seen = calibration_images(
        setup.preprocessing,
        DataOptions(data_dir=setup.data_dir),
        count=CALIBRATION_IMAGES,
        seed=seed,
        num_classes=int(setup.answers.shape[1]),
        use_labels=True,
    )
    assert seen.labels is not None
    prunable = find_prunable_layers(setup.dense)
    sums = {unit.key: torch.zeros(unit.heads, unit.width) for unit in prunable.units()}
    for images, labels in zip(seen.images.split(BATCH), seen.labels.split(BATCH), strict=True):
        channel_scales = {key: torch.ones_like(total).requires_grad_() for key, total in sums.items()}
        tensors = masked_tensors(setup.dense, prunable, channel_scales)
        outputs = run_with(setup.dense, tensors, images)
        F.cross_entropy(outputs, labels).backward()
        for key, channel_scale in channel_scales.items():
            assert channel_scale.grad is not None
            sums[key] += channel_scale.grad.square()
    return sums


SCORES: Mapping[str, Callable[..., Tensor]] = {"magnitude": magnitude, "Taylor": taylor}


def show(setup: Setup, cells: Mapping[str, Mapping[str, float]], arguments: argparse.Namespace) -> None:
    right = (setup.answers.argmax(1) == setup.labels).double().mean()
    flops = measure_flops(setup.dense, setup.preprocessing.input_size)
    print(
        f"dense: {100 * float(right):.2f} % of {len(setup.labels)} images, {flops / 1e6:.1f} MFLOPs; "
        f"{platform.machine()}, torch {torch.__version__}, timm {timm.__version__}, one thread, "
        f"seeds {' '.join(map(str, arguments.seeds))}\n"
    )
    columns = ("FLOPs kept", "method", "top-1, %", "KL, nats", "FLOPs", "latency", "CPU s")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|")
    for keep in arguments.keep:
        for method in arguments.methods:
            found = [cells[f"{method} | {keep:g} | {seed}"] for seed in arguments.seeds]
            print(
                f"| {keep:g} % | {method} | {spread(found, 'top1', '.2f')} | {spread(found, 'kl', '.4f')} | "
                f"{statistics.mean(cell['flops'] for cell in found):.1%} | "
                f"{statistics.mean(cell['latency'] for cell in found):.0%} | "
                f"{statistics.mean(cell['cpu_seconds'] for cell in found):.0f} |"
            )


def spread(cells: list[Mapping[str, float]], key: str, form: str) -> str:
    """Mean, and half the range over seeds."""
    values = [cell[key] for cell in cells]
    return f"{statistics.mean(values):{form}} ± {(max(values) - min(values)) / 2:{form}}"


if __name__ == "__main__":
    main()
