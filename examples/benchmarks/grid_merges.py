"""Sets grid merges beside channel pruning on a DINOv2-S with attention in windows.

    python examples/benchmarks/grid_merges.py downloads
    python examples/benchmarks/grid_merges.py downloads --sides 2:7,5:6 --channels 70 --steps 40

The model is the one of ``in_place.py --subject saliency``. The 16 x 16 tokens are split into 2 x 2 windows of
8 x 8, each with its own copy of the class token. Blocks 2, 5, 8 and 11 attend to all windows, as in RF-DETR.
The weights were not trained with windows. The reference is therefore the unpruned model with windows.

A grid merge leaves a smaller rectangle of tokens: each row of a window, then each column, loses the same
number of tokens, each merged into a neighbour in its line. Costs, averages and norms are those of
``mhacut/surgery/token_merging.py``. Merged tokens are copied back before the head.

With ``--steps``, all weights of the backbone are tuned on the error of the features that the head reads.
Both methods are tuned with the same images, steps and learning rate. Images to judge on are not tuned on.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

GLOBAL_BLOCKS = (2, 5, 8, 11)
WINDOWS, SIDE = 2, 8
IMAGE = (3, 224, 224)


def merge_lines(x: Tensor, sizes: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge ``count`` tokens in every line of ``x`` [L, N, C] into a neighbour in the line.

    Returns:
        Tokens [L, N - count, C], sizes [L, N - count, 1], and the new index of every old token [L, N].
    """
    lines, length, _ = x.shape
    norms = x.norm(dim=-1, keepdim=True)
    directions = x / norms
    # Ward's cost of a merge with the token on the right, [L, N - 1].
    cosine = (directions[:, 1:] * directions[:, :-1]).sum(-1)
    cost = (1 - cosine) / (1 / sizes[:, 1:] + 1 / sizes[:, :-1])[..., 0]
    edge = cost.new_full((lines, 1), torch.inf)
    left, right = torch.cat([edge, cost], 1)[:, 1::2], torch.cat([cost, edge], 1)[:, 1::2]
    cost, on_right = torch.stack([left, right], -1).min(-1)
    cheapest = cost.topk(count, largest=False).indices  # odd tokens to merge
    source = 2 * cheapest + 1
    target = source - 1 + 2 * on_right.gather(1, cheapest)
    stays = torch.ones(lines, length, device=x.device, dtype=torch.long).scatter(1, source, 0)
    place = stays.cumsum(1) - 1  # keeps the order of the line
    place = place.scatter(1, source, place.gather(1, target))
    index = torch.arange(length - count, device=x.device)[:, None]
    members = (place[:, None] == index).to(x.dtype)  # [L, N - count, N]
    new_sizes = members @ sizes
    mean_norms = members @ (sizes * norms) / new_sizes
    return F.normalize(members @ (sizes * x), dim=-1) * mean_norms, new_sizes, place


def merge_grid(x: Tensor, sizes: Tensor, owner: Tensor, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Merge windows ``x`` [W, S * S, C] to ``side`` x ``side`` tokens.

    ``owner`` [W, 64] has the index of the token that stands for each of the first 64 tokens.
    """
    windows, tokens, _ = x.shape
    old = int(tokens**0.5)
    rows, row_sizes, place = merge_lines(
        x.reshape(windows * old, old, -1), sizes.reshape(windows * old, old, 1), old - side
    )
    along = place.view(windows, tokens).gather(1, owner)
    down = owner // old
    columns = rows.view(windows, old, side, -1).transpose(1, 2).reshape(windows * side, old, -1)
    column_sizes = row_sizes.view(windows, old, side, 1).transpose(1, 2).reshape(windows * side, old, 1)
    columns, column_sizes, place = merge_lines(columns, column_sizes, old - side)
    down = place.view(windows, side * old).gather(1, along * old + down)
    x, sizes = (
        part.view(windows, side, side, -1).transpose(1, 2).reshape(windows, side * side, -1)
        for part in (columns, column_sizes)
    )
    return x, sizes, down * side + along


class Windowed(nn.Module):
    """A timm DINOv2 with windows; ``sides`` gives the side of a window's grid after some blocks."""

    def __init__(self, vit: Any, sides: dict[int, int] | None = None) -> None:
        super().__init__()
        self.vit, self.sides = vit, sides or {}

    def forward(self, images: Tensor) -> Tensor:
        vit: Any = self.vit
        x = vit._pos_embed(vit.patch_embed(images))
        batch, windows = len(x), WINDOWS**2
        patches = x[:, 1:].unflatten(1, (WINDOWS, SIDE, WINDOWS, SIDE)).transpose(2, 3)
        patches = patches.reshape(batch * windows, SIDE**2, -1)
        x = torch.cat([x[:, :1].repeat_interleave(windows, 0), patches], 1)
        sizes = x.new_ones(len(x), x.shape[1], 1)
        owner = torch.arange(SIDE**2, device=x.device).expand(len(x), -1)
        for number, block in enumerate(vit.blocks):
            width, length = x.shape[-1], x.shape[1]
            joined = number in GLOBAL_BLOCKS
            seen = x.reshape(batch, windows * length, width) if joined else x
            if not self.sides:
                x = block(seen).reshape(-1, length, width)
                continue
            bias = sizes.reshape(len(seen), 1, 1, -1).log()
            x = (seen + block.ls1(attend(block.attn, block.norm1(seen), bias))).reshape(-1, length, width)
            if number in self.sides:
                patches, new, owner = merge_grid(x[:, 1:], sizes[:, 1:], owner, self.sides[number])
                x, sizes = torch.cat([x[:, :1], patches], 1), torch.cat([sizes[:, :1], new], 1)
            x = x + block.ls2(block.mlp(block.norm2(x)))
        x = vit.norm(x)
        patches = x[:, 1:].gather(1, owner[..., None].expand(-1, -1, x.shape[-1]))
        patches = patches.view(batch, WINDOWS, WINDOWS, SIDE, SIDE, -1).transpose(2, 3).flatten(1, 4)
        return torch.cat([x[::windows, :1], patches], 1)


def attend(attention: Any, x: Tensor, bias: Tensor) -> Tensor:
    q, k, v = attention.qkv(x).unflatten(2, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    found = F.scaled_dot_product_attention(q, k, v, attn_mask=bias.expand(-1, -1, x.shape[1], -1))
    return attention.proj(found.transpose(1, 2).flatten(2))


def tune(model: Any, images: Tensor, wanted: Tensor, steps: int, rate: float) -> None:
    """Tune the backbone on the squared error of its patch tokens."""
    parameters = list(model.backbone.requires_grad_(True).parameters())
    optimiser = torch.optim.Adam(parameters, lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, rate, total_steps=steps, pct_start=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        drawn = torch.randperm(len(images), generator=generator)[:8]
        loss = F.mse_loss(model.tokens(images[drawn]), wanted[drawn])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    model.requires_grad_(False)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", help="folder of dinov2_small_focus.safetensors and imagenet_wide430")
    sides, shares = ["2:7,5:6", "2:7,3:6,4:5"], [70.0, 56.0]
    parser.add_argument("--sides", nargs="*", default=sides, help="sides of the grid after blocks")
    parser.add_argument(
        "--channels", nargs="*", type=float, default=shares, metavar="PERCENT", help="of FLOPs"
    )
    parser.add_argument("--steps", type=int, default=0, help="of tuning, 8 images each")
    parser.add_argument("--rate", type=float, default=2e-6)
    parser.add_argument("--images", type=int, default=64, help="to prune and tune on")
    parser.add_argument("--compared", type=int, default=48, help="images to judge on")
    parser.add_argument("--effort", default="fast", choices=["fast", "balanced", "best"])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    from dense_tasks import outputs, relative_error, saliency

    import mhacut
    from mhacut.surgery.flops import measure_flops

    root, count = Path(options.root), options.images + options.compared
    task = saliency(
        str(root / "dinov2_small_focus.safetensors"),
        str(root / "imagenet_wide430"),
        "timm",
        count,
        1,
        options.seed,
    )
    images, judged = task.images.split([options.images, options.compared])
    dense: Any = task.model
    dense.backbone = Windowed(dense.backbone)
    wanted = outputs(dense.tokens, judged)
    maps = outputs(dense.decoded, wanted).sigmoid()
    whole = measure_flops(dense.backbone, IMAGE)

    def report(name: str, model: Any) -> None:
        tokens = outputs(model.tokens, judged)
        found = outputs(model.decoded, tokens).sigmoid()
        correlation = torch.corrcoef(torch.stack([found.flatten(), maps.flatten()]))[0, 1]
        share = 100 * measure_flops(model.backbone, IMAGE) / whole
        error = relative_error(tokens, wanted)
        print(f"| {name} | {share:.1f} % | {error:.4f} | {correlation:.4f} |", flush=True)

    def tuned(name: str, model: Any) -> None:
        report(name, model)
        if options.steps:
            tune(model, images, outputs(dense.tokens, images), options.steps, options.rate)
            report(f"{name}, tuned", model)

    print(
        "| method | FLOPs | error of features | correlation of maps |\n|---|---|---|---|",
        flush=True,
    )
    for sides in options.sides:
        model = copy.deepcopy(dense)
        pairs = (pair.split(":") for pair in sides.split(","))
        model.backbone.sides = {int(block): int(side) for block, side in pairs}
        tuned(f"grid {sides}", model)
    for keep in options.channels:
        model = copy.deepcopy(dense)
        search = {"effort": options.effort, "seed": options.seed, "heal_steps": 0, "tuning_steps": 0}
        batches = images.split(16)
        mhacut.prune_(model, "backbone", images=batches, flops=f"{keep:g}%", scope="attention+mlp", **search)
        tuned(f"channels {keep:g} %", model)


if __name__ == "__main__":
    main()
