"""Models and images that the scripts are run on, and the flags that name them.

The standard library only: on Linux a child starts with its parent's peak memory.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass


@dataclass(frozen=True)
class Subject:
    """A dense model and its images, by their names in one folder; README.md says how to get them."""

    checkpoint: str
    data_dir: str
    """Has ``train/`` and ``val/``."""
    mean: str
    std: str
    model: str = "vit_tiny_patch16_224"
    model_args: tuple[str, ...] = ()
    class_map: str | None = None
    """File with the classes of the head, if images of some classes are missing."""


HALF = "0.5,0.5,0.5"
SUBJECTS = {
    "cifar": Subject(
        "vit_tiny_d6_cifar10.safetensors",
        "cifar10",
        "0.4914,0.4822,0.4465",
        "0.2470,0.2435,0.2616",
        model_args=("img_size=32", "patch_size=4", "depth=6"),
    ),
    "wide430": Subject("vit_tiny_imagenet_wide430.safetensors", "imagenet_wide430", HALF, HALF),
    "narrow10": Subject("vit_tiny_imagenet_narrow10.safetensors", "imagenet_narrow10", HALF, HALF),
    "tiny200": Subject("vit_tiny_tiny200.safetensors", "tiny200", HALF, HALF),
    "deit": Subject(
        "deit_tiny_imagenet.safetensors",
        "imagenet_wide430",
        "0.485,0.456,0.406",
        "0.229,0.224,0.225",
        model="deit_tiny_patch16_224",
        class_map="imagenet_synsets.txt",
    ),
}
IMAGENET = "imagenet"
"""ImageNet itself, in ``--root``, for any ``--checkpoint`` such as ``timm:deit_small_patch16_224``."""


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that name a model and its images; :func:`complete` reads them."""
    parser.add_argument(
        "--subject",
        choices=(*SUBJECTS, IMAGENET),
        help=f"model and images, in place of the flags below; {IMAGENET} needs a --checkpoint",
    )
    parser.add_argument("--root", default=".", metavar="DIR", help="folder that has those of --subject")
    parser.add_argument("--checkpoint", help="the dense model: whatever `mhacut prune` reads")
    parser.add_argument("--model", help="timm architecture, for a file that does not say")
    parser.add_argument(
        "--model-arg", action="append", default=[], metavar="KEY=VALUE", help="may be given again"
    )
    parser.add_argument("--data-dir", help="folder with train/ and val/, a folder per class in each")
    parser.add_argument("--class-map", metavar="FILE", help="folder names in the order of the head")
    parser.add_argument("--mean", metavar="A,B,C", help="per channel; by default the model's own")
    parser.add_argument("--std", metavar="A,B,C", help="per channel; by default the model's own")


def complete(parser: argparse.ArgumentParser, asked: argparse.Namespace) -> None:
    """Fill in what ``--subject`` stands for; flags that were given win."""
    if asked.subject == IMAGENET:
        asked.data_dir = asked.data_dir or asked.root
    elif asked.subject is not None:
        subject = SUBJECTS[asked.subject]
        asked.checkpoint = asked.checkpoint or os.path.join(asked.root, subject.checkpoint)
        asked.data_dir = asked.data_dir or os.path.join(asked.root, subject.data_dir)
        asked.model = asked.model or subject.model
        asked.model_arg = asked.model_arg or list(subject.model_args)
        if subject.class_map is not None:
            asked.class_map = asked.class_map or os.path.join(asked.root, subject.class_map)
        asked.mean, asked.std = asked.mean or subject.mean, asked.std or subject.std
    if asked.checkpoint is None or asked.data_dir is None:
        parser.error("name a --subject, or a --checkpoint and a --data-dir")
