"""Pictures of merged tokens: the patches of a token in their mean colour, with an outline."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from xml.etree.ElementTree import SubElement

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from mhacut.data import Preprocessing
from mhacut.report.charts import figure_html, new_figure
from mhacut.surgery.grid_merging import GridMerger
from mhacut.surgery.hooks import captured_outputs
from mhacut.surgery.merging_blocks import Matcher
from mhacut.surgery.token_merging import Match, token_of_patch_after

SIZE = 150
"""Height and width of a picture in pixels."""
_STAGES = (0.5, 1.0)
"""Relative depths of the shown merging blocks, from 0 for the first to 1 for the last."""


@torch.no_grad()
def merged_groups(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    """Return {name of a token merging module: token index of each patch, int [B, patches]}."""
    matchers = {name: module for name, module in model.named_modules() if isinstance(module, Matcher)}
    mergers = [name for name, module in model.named_modules() if isinstance(module, GridMerger)]
    with captured_outputs(model, mergers or matchers) as found:
        model(images)
    if mergers:
        return {name: grid.token_of_patch.flatten(1) for name, (grid,) in found.items()}
    groups: dict[str, Tensor] = {}
    places: Tensor | None = None
    for name, (matched,) in found.items():
        assert isinstance(matched, Match)
        prefix = matchers[name].prefix
        if places is None:
            places = torch.arange(matched.weights.shape[1], device=images.device).expand(len(images), -1)
        places = token_of_patch_after(places, matched, prefix)
        groups[name] = places[:, prefix:] - prefix
    return groups


def outlines(groups: Tensor) -> str:
    """Return the borders between tokens as an SVG path, for token indices [rows, columns] of patches.

    >>> outlines(torch.tensor([[0, 0], [0, 1]]))
    'M1 1v1M1 1h1'
    """
    beside = (groups[:, 1:] != groups[:, :-1]).nonzero().tolist()
    below = (groups[1:] != groups[:-1]).nonzero().tolist()
    return "".join([f"M{x + 1} {y}v1" for y, x in beside] + [f"M{x} {y + 1}h1" for y, x in below])


def picture(title: str, image: Tensor, stages: Sequence[tuple[str, Tensor]]) -> str:
    """Draw ``image`` [3, H, W] in 0..1, and per stage a caption and token indices [rows, columns]."""
    pixels = (255 * image.clamp(0, 1)).round().byte().permute(1, 2, 0).cpu().numpy()
    Image.fromarray(pixels).save(buffer := io.BytesIO(), "JPEG", quality=85)
    link = f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    name = f"image-{hashlib.sha256(buffer.getvalue()).hexdigest()[:12]}"
    figure, svg = new_figure(title, SIZE * (1 + len(stages)) + 6 * len(stages), SIZE + 18)
    for number, (caption, groups) in enumerate([("", None), *stages]):
        x = number * (SIZE + 6)
        if groups is None:
            sides = {"width": f"{SIZE}", "height": f"{SIZE}"}
            SubElement(svg, "image", {"id": name, "href": link, **sides})
            continue
        SubElement(svg, "use", {"href": f"#{name}", "x": f"{x}"})  # so that the page has the image once
        rows, columns = groups.shape
        scale = f"translate({x} 0) scale({SIZE / columns:.4f} {SIZE / rows:.4f})"
        overlay = SubElement(svg, "g", {"transform": scale})
        means = F.adaptive_avg_pool2d(image, (rows, columns)).clamp(0, 1)
        for group in groups.unique().tolist():
            patches = (groups == group).nonzero().tolist()
            if len(patches) > 1:  # a single patch is not replaced
                mean = (255 * means[:, groups == group].mean(1)).round().int().tolist()
                path = "".join(f"M{x} {y}h1v1h-1z" for y, x in patches)
                SubElement(overlay, "path", {"d": path, "fill": "#{:02x}{:02x}{:02x}".format(*mean)})
        look = {"fill": "none", "stroke": "#000", "stroke-width": "0.06", "stroke-opacity": "0.6"}
        SubElement(overlay, "path", {"d": outlines(groups), **look})
        place = {"x": f"{x + SIZE / 2:g}", "y": f"{SIZE + 14}", "text-anchor": "middle"}
        SubElement(svg, "text", {**place, "fill": "currentColor"}).text = caption
    return figure_html(figure)


@torch.no_grad()
def gallery(
    dense: nn.Module, slim: nn.Module, images: Tensor, preprocessing: Preprocessing, names: Sequence[str] = ()
) -> list[str]:
    """Draw the merged tokens of each image [B, 3, H, W], with the predictions of both models.

    ``slim`` is a timm ViT that merges tokens. Images are normalised.
    """
    images = images.to(next(slim.parameters()).device)
    groups = merged_groups(slim, images)
    rows, columns = slim.patch_embed.grid_size  # type: ignore[union-attr, misc]
    blocks = [(name.split(".")[-2], found) for name, found in groups.items()]
    steps = sorted({round(stage * (len(blocks) - 1)) for stage in _STAGES})
    mean, std = (images.new_tensor(part)[:, None, None] for part in (preprocessing.mean, preprocessing.std))
    predictions = [
        [_prediction(row, names) for row in model(images).float().softmax(-1)] for model in (dense, slim)
    ]
    figures = []
    for index, (image, before, after) in enumerate(zip(images, *predictions, strict=True)):
        stages = []
        for block, found in (blocks[step] for step in steps):
            own = found[index].reshape(rows, columns)
            stages.append((f"block {block}: {len(own.unique())} tokens", own))
        title = f"dense: {before}, pruned: {after}" if slim.num_classes else ""
        figures.append(picture(title, image * std + mean, stages))
    return figures


def _prediction(probabilities: Tensor, names: Sequence[str]) -> str:
    best = int(probabilities.argmax())
    return f"{names[best] if names else f'class {best}'}, {100 * float(probabilities[best]):.0f} %"
