"""Where the errors of a pruned ViT arise: block by block, on the residual stream.

    python examples/benchmarks/block_errors.py slim.safetensors --subject wide430 --root downloads

runs the dense and the pruned model side by side on validation images and prints, per block, the squared error
of the stream behind it over the dense stream's variance; the mean of that ratio over channels, each with its
own variance; the largest channel's share of the variance, and its variance over the median one's; and the
widths that were kept. Models that merge tokens are refused: their blocks have other rows.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from finetune import read_images
from setups import Setup, read
from subjects import add_flags, complete
from torch import Tensor, nn

import mhacut
from mhacut.surgery.find import find_prunable_layers
from mhacut.surgery.hooks import captured_outputs
from mhacut.surgery.output_tokens import output_tokens_of

BATCH = 32


@dataclass(frozen=True)
class BlockError:
    """Error of the residual stream behind one block, and variance of its channels."""

    relative: float
    """Squared error over the dense stream's variance, each summed over channels."""
    scaled: float
    """Squared error over variance of each channel, the mean over channels."""
    largest_share: float
    """Variance of the channel that has most, over the sum of all variances."""
    largest_ratio: float
    """Variance of the channel that has most, over the median variance."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Compare, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("slim", help="pruned from the dense model")
    add_flags(parser)
    parser.add_argument("--images", type=int, default=256, help="validation images to compare on")
    parser.add_argument("--threads", type=int, default=1)
    asked = parser.parse_args(arguments)
    complete(parser, asked)
    torch.set_num_threads(asked.threads)
    loaded, preprocessing = read(Setup.of(asked, calibration_images=0, seed=0))
    slim = mhacut.load_model(asked.slim)
    images, _ = read_images(Path(asked.data_dir, "val"), preprocessing)
    chosen = torch.linspace(0, len(images) - 1, min(asked.images, len(images))).long()  # of all classes
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (preprocessing.mean, preprocessing.std))
    pixels = (images[chosen].float() / 255 - mean) / std
    found = block_errors(loaded.model.eval(), slim.eval(), pixels)
    print(as_text(found, widths_of(slim)))


@torch.inference_mode()
def block_errors(dense: nn.Module, slim: nn.Module, images: Tensor) -> list[BlockError]:
    """Return one per block of a plain ViT; ``images`` are [n, C, H, W], normalised."""
    names = [f"blocks.{number}" for number in range(len(dense.blocks))]
    sums: dict[str, dict[str, Any]] = {name: {"rows": 0} for name in names}
    for batch in images.split(BATCH):
        with ExitStack() as stack:
            outputs = [stack.enter_context(captured_outputs(model, names)) for model in (dense, slim)]
            dense(batch)
            slim(batch)
        for name in names:
            rows, other = (found[name][-1].double() for found in outputs)  # (n, tokens, C)
            if name == names[-1]:
                rows = rows[:, : output_tokens_of(slim)]  # those that nothing reads are not computed
            if rows.shape != other.shape:
                sys.exit(f"{name}: expected {rows.shape[1]} tokens, found {other.shape[1]}: the model merges")
            rows, other = rows.flatten(0, 1), other.flatten(0, 1)
            own = sums[name]
            own["rows"] += len(rows)
            for key, value in (
                ("total", rows.sum(0)),
                ("squares", rows.square().sum(0)),
                ("error", (rows - other).square().sum(0)),
            ):
                own[key] = own.get(key, 0) + value
    return [_error_of(**sums[name]) for name in names]


def _error_of(rows: int, total: Tensor, squares: Tensor, error: Tensor) -> BlockError:
    variance = (squares / rows - (total / rows).square()).clamp_min(torch.finfo(torch.float64).tiny)
    error = error / rows
    return BlockError(
        relative=float(error.sum() / variance.sum()),
        scaled=float((error / variance).mean()),
        largest_share=float(variance.max() / variance.sum()),
        largest_ratio=float(variance.max() / variance.median()),
    )


def widths_of(slim: nn.Module) -> list[Mapping[str, int]]:
    """Widths per block: of q/k, of v, and of the MLP."""
    widths = {unit.key: unit.width for unit in find_prunable_layers(slim).units()}
    return [
        {
            "q/k": widths[f"blocks.{number}.attn", "qk"],
            "v": widths[f"blocks.{number}.attn", "v"],
            "MLP": widths[f"blocks.{number}.mlp", "hidden"],
        }
        for number in range(len(slim.blocks))
    ]


def as_text(errors: Sequence[BlockError], widths: Sequence[Mapping[str, int]]) -> str:
    """Markdown, a line per block."""
    head = ["block", "error", "error, scaled", "largest channel", "over the median", *widths[0]]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for number, (error, own) in enumerate(zip(errors, widths, strict=True)):
        cells = [str(number), f"{error.relative:.3f}", f"{error.scaled:.3f}"]
        cells += [f"{100 * error.largest_share:.0f} %", f"{error.largest_ratio:.0f}", *map(str, own.values())]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
