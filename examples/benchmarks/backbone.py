"""Sets what ``mhacut prune --preserve`` keeps of a backbone's features beside Torch-Pruning, at equal FLOPs.

    pip install 'mhacut[bench]'
    python examples/benchmarks/backbone.py --subject narrow10 --root downloads

takes a plain timm ViT without its classifier and prints one table: a row per method and budget. Features are
the patch tokens of the last two blocks, normalised as timm's ``get_intermediate_layers(norm=True)`` does:

- error: squared error over the squared deviation of the dense features from their mean; nats: the same
  whitened, half the squared Mahalanobis distance of each token, the mean; cosine: between the features of
  each patch; all on ``--compared`` validation images.
- 5-NN (cosine) and linear probe (ridge regression on one-hot classes, its strength chosen on a fifth of the
  training images): top-1 on all validation images, of the mean of each block's patch tokens. The neighbours
  and the probe come from the same model's features of the training images. Images of both splits are
  resized and cropped alike, so nothing is random but the choice of that fifth (``--seed``).

Torch-Pruning (Taylor) sees labelled images and the classifier, which is then taken away. Nothing is trained
afterwards. ``--merge FILE`` keeps the rows in a file as they come and reuses those it finds there.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from subjects import add_flags, complete

PRESERVED = {"tokens": "tokens", "pooled": "pooled", "last-two": None}
"""Values of ``--preserve`` by method; None for the names of the last two blocks."""
METHODS = (*PRESERVED, "tp-taylor-uniform", "tp-taylor-global")
BLOCKS, NEIGHBOURS, BATCH = 2, 5, 25
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
"""Relative to the mean energy of the features."""


@dataclass(frozen=True)
class Row:
    """Scores of one pruned backbone; of the dense one, those of itself."""

    method: str
    keep: float
    """FLOPs kept, in %: asked for."""
    flops: float
    """FLOPs kept, in %: counted."""
    error: float
    nats: float
    cosine: float
    neighbours: float
    """Top-1 in %."""
    probe: float
    """Top-1 in %."""
    cpu_s: float
    """Of pruning alone."""


class Scorer:
    """Scores backbones beside the dense one."""

    def __init__(
        self, dense: Any, splits: dict[str, list[tuple[Any, Any]]], asked: argparse.Namespace
    ) -> None:
        """Run the dense backbone; ``splits`` are batches of images and labels, of train and val."""
        self.splits, self.seed, self.compared = splits, asked.seed, asked.compared
        self.dense_tokens = self._tokens(dense)

    def _tokens(self, model: Any) -> Any:
        """Patch tokens of both blocks of the compared images, [images, blocks, tokens, C]."""
        import torch

        batches, left = [], self.compared
        # Every so many images of a split that is sorted by class.
        images = torch.cat([images for images, _ in self.splits["val"]])
        for batch in images[:: max(len(images) // left, 1)][:left].split(BATCH):
            batches.append(features(model, batch))
        return torch.cat(batches)

    def _nats(self, tokens: Any) -> float:
        """Mean over tokens and blocks of the divergence that ``--preserve`` keeps small."""
        from mhacut.linalg.moments import Moments
        from mhacut.pruning.preserve import Whitening

        found = 0.0
        for block, dense in enumerate(self.dense_tokens.unbind(1)):
            whitening = Whitening.of(Moments.of(dense.flatten(0, 1)))
            error = whitening(tokens[:, block]) - whitening(dense)
            found += float(error.square().sum(-1).mean()) / 2 / BLOCKS
        return found

    def __call__(self, model: Any) -> dict[str, float]:
        import torch

        tokens, dense = self._tokens(model), self.dense_tokens
        mean = dense.mean((0, 2), keepdim=True)
        pooled, labels = {}, {}
        for split, batches in self.splits.items():
            pooled[split] = torch.cat([features(model, images).mean(2).flatten(1) for images, _ in batches])
            labels[split] = torch.cat([truth for _, truth in batches])
        both = (pooled["train"], labels["train"], pooled["val"], labels["val"])
        return {
            "error": float((tokens - dense).square().sum() / (dense - mean).square().sum()),
            "nats": self._nats(tokens),
            "cosine": float(torch.nn.functional.cosine_similarity(tokens, dense, dim=-1).mean()),
            "neighbours": nearest(*both),
            "probe": probed(*both, self.seed),
        }


def features(model: Any, images: Any) -> Any:
    """Normalised patch tokens of the last blocks, [B, blocks, tokens, C]."""
    import torch

    with torch.inference_mode():
        found = model.forward_intermediates(
            images, indices=BLOCKS, norm=True, output_fmt="NLC", intermediates_only=True
        )
        return torch.stack(list(found), 1)


def nearest(train: Any, classes: Any, val: Any, truth: Any) -> float:
    """Top-1 in % of a vote of the nearest training images, by cosine, weighted by it."""
    import torch
    from torch.nn.functional import normalize, one_hot

    similar, indices = (normalize(val, dim=1) @ normalize(train, dim=1).mT).topk(NEIGHBOURS)
    votes = (similar[..., None] * one_hot(classes[indices])).sum(1)
    return 100 * float((votes.argmax(1) == truth).to(torch.float64).mean())


def probed(train: Any, classes: Any, val: Any, truth: Any, seed: int) -> float:
    """Top-1 in % of ridge regression on one-hot classes, the ridge chosen on a fifth of ``train``."""
    import torch

    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    train, classes, val = train[order].double(), classes[order], val.double()
    part = len(train) // 5

    def right(fit: slice, x: Any, y: Any, ridge: float) -> float:
        mean = train[fit].mean(0)
        inputs, aims = train[fit] - mean, torch.nn.functional.one_hot(classes[fit]).double()
        gram = inputs.mT @ inputs
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        weights = torch.linalg.solve(gram, inputs.mT @ (aims - aims.mean(0)))
        return 100 * float((((x - mean) @ weights + aims.mean(0)).argmax(1) == y).double().mean())

    def held(ridge: float) -> float:
        return right(slice(part, None), train[:part], classes[:part], ridge)

    return right(slice(None), val, truth, max(RIDGES, key=held))


def pruned(method: str, keep: float, model: Any, calibration: Any, asked: argparse.Namespace) -> Any:
    """Return ``model``, a classifier, pruned by one method to ``keep`` % of its FLOPs."""
    if method.startswith("tp-"):
        from methods.common import Task
        from methods.torch_pruning_timm import prune as prune_by_torch_pruning

        _, criterion, spread = method.split("-")
        options = {"criterion": criterion, "spread": spread}
        images, labels = calibration.images, calibration.labels
        task = Task.of(model, tuple(images.shape[1:]), images, labels, keep / 100, options)
        return prune_by_torch_pruning(task).model
    import mhacut

    last = range(len(model.blocks) - BLOCKS, len(model.blocks))
    with tempfile.TemporaryDirectory() as folder:
        result = mhacut.prune(
            without_classifier(model),
            flops=f"{keep:g}%",
            images=calibration.images,
            preserve=PRESERVED[method] or ",".join(f"blocks.{index}" for index in last),
            output=Path(folder) / "slim.safetensors",
            calibration_images=len(calibration.images),
            effort=asked.effort,
            model_args={name: value for name, value in model_args(asked).items() if name != "img_size"},
            seed=asked.seed,
            latency=False,
            progress=False,
        )
        return result.model().requires_grad_(False)


def without_classifier(model: Any) -> Any:
    import copy

    model = copy.deepcopy(model)
    model.reset_classifier(0)
    return model


def rows(asked: argparse.Namespace) -> list[Row]:
    """Make the rows that are not in the file of ``--merge``."""
    import torch

    from mhacut.surgery.flops import measure_flops

    torch.set_num_threads(asked.threads)
    known = read(asked)
    cells = [("dense", 100.0), *((method, keep) for keep in asked.keep for method in asked.methods)]
    if all(cell in known for cell in cells):
        return [known[cell] for cell in cells]
    model, calibration, splits = subject(asked)
    score = Scorer(model, splits, asked)
    size = tuple(calibration.images.shape[1:])
    whole = measure_flops(without_classifier(model), size)
    for method, keep in cells:
        if (method, keep) in known:
            continue
        began = time.process_time()
        slim = model if method == "dense" else pruned(method, keep, model, calibration, asked)
        seconds = time.process_time() - began
        flops = 100 * measure_flops(without_classifier(slim), size) / whole
        row = Row(method, keep, round(flops, 2), **score(slim.eval()), cpu_s=round(seconds, 1))
        known[method, keep] = row
        print(shown(row), flush=True)
        write(asked, known)
    return [known[cell] for cell in cells]


def subject(asked: argparse.Namespace) -> tuple[Any, Any, dict[str, list[tuple[Any, Any]]]]:
    """The classifier, its calibration images, and the batches of both splits."""
    from mhacut.checkpoint.load import read_model
    from mhacut.checkpoint.preprocessing import resolve_preprocessing
    from mhacut.data import calibration_images, evaluation_loader
    from mhacut.options.base import DataOptions, PreprocessingOptions

    def three(text: str | None) -> Any:
        return None if text is None else tuple(map(float, text.split(",")))

    loaded = read_model(asked.checkpoint, model=asked.model, model_args=model_args(asked))
    stated = PreprocessingOptions(mean=three(asked.mean), std=three(asked.std))
    preprocessing = resolve_preprocessing(loaded, stated)
    calibration = calibration_images(
        preprocessing,
        DataOptions(data_dir=asked.data_dir),
        count=asked.calibration_images,
        seed=asked.seed,
        num_classes=loaded.model.num_classes,
    )
    splits = {}
    for split in ("train", "val"):
        data = DataOptions(data_dir=asked.data_dir, val_split=split)
        batches = evaluation_loader(
            preprocessing, data, num_classes=loaded.model.num_classes, batch_size=BATCH, limit=asked.limit
        )
        splits[split] = list(batches)
    return loaded.model.eval().requires_grad_(False), calibration, splits


def model_args(asked: argparse.Namespace) -> dict[str, int | str]:
    pairs = dict(pair.split("=", 1) for pair in asked.model_arg)
    return {name: int(value) if value.isdecimal() else value for name, value in pairs.items()}


def read(asked: argparse.Namespace) -> dict[tuple[str, float], Row]:
    if asked.merge is None or not os.path.exists(asked.merge):
        return {}
    found = [Row(**entry) for entry in json.loads(Path(asked.merge).read_text(encoding="utf-8"))]
    return {(row.method, row.keep): row for row in found}


def write(asked: argparse.Namespace, known: dict[tuple[str, float], Row]) -> None:
    if asked.merge is not None:
        text = json.dumps([asdict(row) for row in known.values()], indent=1)
        Path(asked.merge).write_text(text + "\n", encoding="utf-8")


HEADINGS: dict[str, Callable[[Row], str]] = {
    "FLOPs": lambda row: f"{row.flops:.1f} %",
    "method": lambda row: row.method,
    "error": lambda row: f"{row.error:.4f}",
    "nats": lambda row: f"{row.nats:.3f}",
    "cosine": lambda row: f"{row.cosine:.4f}",
    "5-NN": lambda row: f"{row.neighbours:.1f}",
    "linear probe": lambda row: f"{row.probe:.1f}",
    "CPU s": lambda row: f"{row.cpu_s:.0f}",
}


def shown(row: Row) -> str:
    return "| " + " | ".join(write(row) for write in HEADINGS.values()) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_flags(parser)
    parser.add_argument("--keep", type=float, nargs="+", default=[75, 50], metavar="PERCENT")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--calibration-images", type=int, default=256, metavar="N")
    parser.add_argument("--effort", default="balanced", choices=["fast", "balanced", "best"])
    parser.add_argument("--compared", type=int, default=250, metavar="N")
    parser.add_argument("--limit", type=int, metavar="N", help="images of each split; by default all")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--merge", metavar="FILE")
    asked = parser.parse_args()
    complete(parser, asked)
    table = rows(asked)
    print("\n| " + " | ".join(HEADINGS) + " |")
    print("|" + "---|" * len(HEADINGS))
    for row in table:
        print(shown(row))


if __name__ == "__main__":
    main()
