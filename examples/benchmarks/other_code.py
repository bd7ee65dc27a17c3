"""Prunes one ImageNet ViT-Ti as a class of timm, transformers, torchvision and open_clip.

    python examples/benchmarks/other_code.py --root downloads

prints one table: a row per class, with the accuracy on the images of ``val/`` and the divergence from the
dense logits. Weights, images, budget and seed are equal in all rows: differences come from the class's code.

- KL: from the dense model, in nats; agree: images with the dense model's top-1 class, in %.
- merged: tokens that the blocks merge.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from process import commit, describe_machine
from subjects import SUBJECTS
from torch import Tensor, nn
from torch.nn import functional as F

import mhacut

SIZES = {"hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3, "intermediate_size": 768}
Weights = dict[str, Tensor]


class Classifier(nn.Module):
    """A backbone that returns its class token or all tokens, with a linear head."""

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone, self.head, self.num_classes = backbone, head, 430

    def forward(self, images: Tensor) -> Tensor:
        output = self.backbone(images)
        tokens = output if isinstance(output, Tensor) else output.last_hidden_state
        return self.head(tokens if tokens.ndim == 2 else tokens[:, 0])


def renamed(vit: nn.Module, names: dict[str, str | tuple[str, ...]]) -> Weights:
    """Return the ViT's tensors under other names. A tuple splits qkv into three equal parts."""
    weights = {}
    for name, tensor in vit.state_dict().items():
        if name.startswith("head."):
            continue
        _, _, rest = name.partition("blocks.")
        block, _, part = rest.partition(".")
        stem, kind = (part or name).rsplit(".", 1) if "." in (part or name) else (name, "")
        target = names[stem]
        parts = (target,) if isinstance(target, str) else target
        for new, values in zip(parts, tensor.chunk(len(parts)), strict=True):
            weights[new.format(block=block, kind=kind)] = values
    return weights


def with_head(backbone: nn.Module, vit: Any, weights: Weights) -> nn.Module:
    backbone.load_state_dict(weights)
    return Classifier(backbone, copy.deepcopy(vit.head))


def transformers_vit(vit: Any) -> nn.Module:
    from transformers import ViTConfig, ViTModel

    layer, attention = "layers.{block}.", "layers.{block}.attention."
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection.{kind}",
        "norm1": layer + "layernorm_before.{kind}",
        "attn.qkv": tuple(attention + f"{part}_proj.{{kind}}" for part in "qkv"),
        "attn.proj": attention + "o_proj.{kind}",
        "norm2": layer + "layernorm_after.{kind}",
        "mlp.fc1": layer + "mlp.fc1.{kind}",
        "mlp.fc2": layer + "mlp.fc2.{kind}",
        "norm": "layernorm.{kind}",
    }
    model = ViTModel(ViTConfig(**SIZES, layer_norm_eps=1e-6), add_pooling_layer=False)
    return with_head(model, vit, renamed(vit, names))


def transformers_dpt(vit: Any) -> nn.Module:
    from transformers import DPTConfig, DPTModel

    layer, attention = "encoder.layer.{block}.", "encoder.layer.{block}.attention."
    names = {
        "cls_token": "embeddings.cls_token",
        "pos_embed": "embeddings.position_embeddings",
        "patch_embed.proj": "embeddings.patch_embeddings.projection.{kind}",
        "norm1": layer + "layernorm_before.{kind}",
        "attn.qkv": tuple(attention + f"attention.{part}.{{kind}}" for part in ("query", "key", "value")),
        "attn.proj": attention + "output.dense.{kind}",
        "norm2": layer + "layernorm_after.{kind}",
        "mlp.fc1": layer + "intermediate.dense.{kind}",
        "mlp.fc2": layer + "output.dense.{kind}",
        "norm": "layernorm.{kind}",
    }
    config = DPTConfig(**SIZES, layer_norm_eps=1e-6, image_size=224, patch_size=16)
    return with_head(DPTModel(config, add_pooling_layer=False), vit, renamed(vit, names))


def torchvision_vit(vit: Any) -> nn.Module:
    from torchvision.models import VisionTransformer

    layer = "encoder.layers.encoder_layer_{block}."
    names: dict[str, str | tuple[str, ...]] = {
        "cls_token": "class_token",
        "pos_embed": "encoder.pos_embedding",
        "patch_embed.proj": "conv_proj.{kind}",
        "norm1": layer + "ln_1.{kind}",
        "attn.qkv": layer + "self_attention.in_proj_{kind}",
        "attn.proj": layer + "self_attention.out_proj.{kind}",
        "norm2": layer + "ln_2.{kind}",
        "mlp.fc1": layer + "mlp.0.{kind}",
        "mlp.fc2": layer + "mlp.3.{kind}",
        "norm": "encoder.ln.{kind}",
    }
    model = VisionTransformer(224, 16, 12, 3, 192, 768)
    model.heads = nn.Identity()
    return with_head(model, vit, renamed(vit, names))


def open_clip_vit(vit: Any) -> nn.Module:
    from open_clip.transformer import VisionTransformer

    layer = "transformer.resblocks.{block}."
    names: dict[str, str | tuple[str, ...]] = {
        "cls_token": "class_embedding",
        "pos_embed": "positional_embedding",
        "patch_embed.proj": "conv1.{kind}",
        "norm1": layer + "ln_1.{kind}",
        "attn.qkv": layer + "attn.in_proj_{kind}",
        "attn.proj": layer + "attn.out_proj.{kind}",
        "norm2": layer + "ln_2.{kind}",
        "mlp.fc1": layer + "mlp.c_fc.{kind}",
        "mlp.fc2": layer + "mlp.c_proj.{kind}",
        "norm": "ln_post.{kind}",
    }
    norm: Any = partial(nn.LayerNorm, eps=1e-6)
    model = VisionTransformer(224, 16, 192, 12, 3, 4.0, output_dim=192, norm_layer=norm, no_ln_pre=True)
    model.proj = None
    # open_clip's convolution has no bias, and its tables have no batch dimension.
    model.conv1 = nn.Conv2d(3, 192, 16, 16)
    weights = renamed(vit, names)
    for name in ("class_embedding", "positional_embedding"):
        weights[name] = weights[name].squeeze(0).squeeze(0)
    return with_head(model, vit, weights)


CLASSES: dict[str, Callable[[Any], nn.Module]] = {
    "timm": lambda vit: vit,
    "transformers ViT": transformers_vit,
    "transformers DPT": transformers_dpt,
    "torchvision": torchvision_vit,
    "open_clip": open_clip_vit,
}


class Log:
    """Reporter that prints to stderr."""

    def __init__(self) -> None:
        self.merged = ""

    def log(self, message: str) -> None:
        if message.startswith("tokens merged per block"):
            self.merged = message.partition("total ")[2].partition(")")[0]
        print("   ", message, file=sys.stderr, flush=True)

    def start(self, stage: str) -> None:
        pass

    def advance(self, done: int, total: int, detail: str = "") -> None:
        pass


@torch.no_grad()
def logits_of(model: nn.Module, batches: list[Tensor]) -> Tensor:
    return torch.cat([model(batch) for batch in batches]).double()


def row_of(
    name: str, vit: Any, images: Tensor, val: tuple[list[Tensor], Tensor], args: Any
) -> dict[str, Any]:
    batches, labels = val
    dense = logits_of(vit, batches)
    model = CLASSES[name](copy.deepcopy(vit)).eval()
    difference = float((logits_of(model, batches[:1]) - dense[: len(batches[0])]).abs().max())
    assert difference < 1e-3, f"{name}: logits differ from timm's by {difference}"
    log, start = Log(), time.process_time()
    result = mhacut.prune_(
        model, "", images=images.split(32), flops=args.flops, effort=args.effort, seed=args.seed, reporter=log
    )
    cpu_s = time.process_time() - start
    slim = logits_of(model, batches)
    kl = F.kl_div(slim.log_softmax(-1), dense.log_softmax(-1), reduction="batchmean", log_target=True)
    return {
        "class": name,
        "flops": 100 * result.flops_after / result.flops_before,
        "merged": log.merged or "0",
        "dense": 100 * float((dense.argmax(-1) == labels).double().mean()),
        "top1": 100 * float((slim.argmax(-1) == labels).double().mean()),
        "agree": 100 * float((slim.argmax(-1) == dense.argmax(-1)).double().mean()),
        "kl": float(kl),
        "cpu_s": cpu_s,
        "effort": args.effort,
        "seed": args.seed,
        "commit": commit(),
        **describe_machine(args.threads),
    }


HEADINGS: dict[str, Callable[[dict[str, Any]], str]] = {
    "class": lambda row: row["class"],
    "FLOPs": lambda row: f"{row['flops']:.1f} %",
    "merged": lambda row: row["merged"],
    "top-1": lambda row: f"{row['top1']:.1f} of {row['dense']:.1f}",
    "KL": lambda row: f"{row['kl']:.4f}",
    "agree": lambda row: f"{row['agree']:.1f}",
    "CPU s": lambda row: f"{row['cpu_s']:.0f}",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--root", default=".", metavar="DIR", help="folder with the model and its images")
    parser.add_argument("--classes", nargs="+", default=list(CLASSES), choices=CLASSES)
    parser.add_argument("--flops", default="50%")
    parser.add_argument("--calibration-images", type=int, default=430, metavar="N")
    parser.add_argument("--effort", default="balanced", choices=["fast", "balanced", "best"])
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--merge", metavar="FILE", help="JSON file that collects the rows")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    vit, images, val = subject(args)
    rows: list[dict[str, Any]] = []
    if args.merge and Path(args.merge).exists():
        rows = json.loads(Path(args.merge).read_text("utf-8"))
    for name in args.classes:
        if any((row["class"], row["seed"], row["effort"]) == (name, args.seed, args.effort) for row in rows):
            continue
        print(name, file=sys.stderr, flush=True)
        rows.append(row_of(name, vit, images, val, args))
        if args.merge:
            Path(args.merge).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print("| " + " | ".join(HEADINGS) + " |")
    print("|" + "---|" * len(HEADINGS))
    for row in rows:
        print("| " + " | ".join(write(row) for write in HEADINGS.values()) + " |")


def subject(args: Any) -> tuple[Any, Tensor, tuple[list[Tensor], Tensor]]:
    """Return timm's ViT-Ti, normalised calibration images, and validation batches with labels."""
    from timm.data.transforms_factory import create_transform
    from torchvision.datasets import ImageFolder

    model = SUBJECTS["wide430"]
    vit = mhacut.load_model(Path(args.root) / model.checkpoint, model=model.model)
    mean = std = (0.5, 0.5, 0.5)
    transform = create_transform(224, interpolation="bicubic", crop_pct=0.9, mean=mean, std=std)

    def split(name: str) -> Any:
        return ImageFolder(str(Path(args.root) / model.data_dir / name), transform)

    train, val = split("train"), split("val")
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(args.seed)).tolist()
    images = torch.stack([train[index][0] for index in order[: args.calibration_images]])
    pictures, labels = zip(*val, strict=True)
    return vit, images, (list(torch.stack(pictures).split(32)), torch.tensor(labels))


if __name__ == "__main__":
    main()
