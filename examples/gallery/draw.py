"""Draw what a pruned ViT merges in the pictures of this folder, with the answers of both models, as one SVG.

python examples/gallery/draw.py SLIM --dense DENSE --model vit_tiny_patch16_224 --output merged.svg
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import torch
from PIL import Image
from timm.data import ImageNetInfo

import mhacut
from mhacut.checkpoint.load import open_checkpoint
from mhacut.checkpoint.preprocessing import resolve_preprocessing
from mhacut.options.base import PreprocessingOptions
from mhacut.report.gallery import SIZE, gallery

PICTURES = Path(__file__).parent / "images"
GREY = "#7d8590"
"""Colour of text that can be read on light and on dark paper."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("slim")
    parser.add_argument("--dense", required=True)
    parser.add_argument("--model", help="timm architecture of --dense, where its file does not state it")
    parser.add_argument("--classes", type=Path, help="folder with a folder per class, named as in ImageNet")
    parser.add_argument("--pictures", nargs="+", default=sorted(path.stem for path in PICTURES.iterdir()))
    parser.add_argument("--output", type=Path, default=Path("merged.svg"))
    asked = parser.parse_args()
    preprocessing = resolve_preprocessing(open_checkpoint(asked.slim), PreprocessingOptions())
    transform = preprocessing.transform()
    images = [transform(Image.open(PICTURES / f"{name}.jpg").convert("RGB")) for name in asked.pictures]
    stated = {} if asked.model is None else {"model": asked.model}
    models = [mhacut.load_model(asked.dense, **stated).eval(), mhacut.load_model(asked.slim).eval()]
    figures = gallery(*models, torch.stack(images), preprocessing, class_names(asked.classes))
    asked.output.write_text(together(figures), encoding="utf-8")


def class_names(folder: Path | None) -> list[str]:
    """Return a word for each class of ImageNet that has a folder."""
    if folder is None:
        return []
    info = ImageNetInfo()
    numbers = sorted(path.name for path in folder.iterdir())
    return [info.label_name_to_description(number).partition(",")[0] for number in numbers]


def together(figures: list[str]) -> str:
    """Return figures of one width as one SVG, below each other, each under its title."""
    height = SIZE + 46
    parts = []
    for number, figure in enumerate(figures):
        found = re.search(r"<figcaption>(.*?)</figcaption>(<svg.*</svg>)", figure, re.DOTALL)
        assert found is not None
        title, svg = found[1], found[2].replace("currentColor", GREY)
        parts.append(f'<text x="0" y="{number * height + 14}" font-size="13" fill="{GREY}">{title}</text>')
        parts.append(f'<g transform="translate(0 {number * height + 20})">{svg}</g>')
    width = re.search(r'viewBox="0 0 (\d+)', figures[0])[1]  # type: ignore[index]
    head = f'viewBox="0 0 {width} {height * len(figures)}" width="{width}" height="{height * len(figures)}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {head} font-family="sans-serif">{"".join(parts)}</svg>\n'


if __name__ == "__main__":
    main()
